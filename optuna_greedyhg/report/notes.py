"""What became of a trial, in words: the note in Markdown that its page in the dashboard shows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from optuna_greedyhg.report.history import metric_of, number, score_of
from optuna_greedyhg.report.trajectory import course_of, moves
from optuna_greedyhg.trials import records

_ENDINGS = {
    "finished": "after all its outer steps",
    "patience": "as nothing better was found for long",
    "policy": "by its policy",
    "pruned": "by the pruner",
    "failed": "by an error",
    "study_stop": "with the study",
    "timeout": "by the timeout",
}


def note_of(trial: FrozenTrial, picture: str | None = None) -> str | None:
    """A note on a finished trial; ``None`` if :func:`refine` has not worked on it, or got nowhere.

    Args:
        trial: The trial.
        picture: Address of a picture of its trajectory.
    """
    if "estimator" not in trial.user_attrs or "stopped" not in trial.user_attrs:
        return None
    parts = [_headline(trial), *_table(("", "seed", "refined"), _moved(trial))]
    if tensors := trial.user_attrs.get("tensors"):
        parts += ["", f"Tensors: {', '.join(map(_text, tensors))}."]
    parts += _table(("", "validation", "test"), _scores(trial))
    parts += ["", _effort(trial)]
    if picture is not None:
        parts += ["", f"![The trajectory of α, which the dashboard shows with --artifact-dir]({picture})"]
    return "\n".join(parts) + "\n"


def _headline(trial: FrozenTrial) -> str:
    score, course = score_of(trial), course_of(trial)
    seed = None if course is None else course.scores[0]
    name = _text(f"validation {metric_of([trial]) or 'score'}")
    kind = "Refined" if records.was_refined(trial) else "Not refined"
    if trial.state != TrialState.COMPLETE:
        kind += f", {trial.state.name.lower().replace('fail', 'failed')}"
    if score is None:
        return f"**{kind}**: no finite {name}."
    if seed is None or not records.was_refined(trial):
        return f"**{kind}**: {name} **{score:.6g}**."
    return f"**{kind}**: {name} {seed:.6g} → **{score:.6g}**."


def _moved(trial: FrozenTrial) -> list[tuple[str, ...]]:
    return [(name, f"{seed:.6g}", f"{refined:.6g}") for name, (seed, refined) in moves(trial).items()]


def _scores(trial: FrozenTrial) -> list[tuple[str, ...]]:
    metrics = [key.removeprefix("val_") for key in trial.user_attrs if key.startswith("val_")]
    pairs = {name: [number(trial.user_attrs.get(f"{split}_{name}")) for split in ("val", "test")] for name in metrics}
    return [(name, *("–" if x is None else f"{x:.6g}" for x in pair)) for name, pair in pairs.items()]


def _effort(trial: FrozenTrial) -> str:
    attributes = trial.user_attrs
    ending = str(attributes["stopped"])
    sentences = [
        f"Best at outer step {attributes.get('best_outer_step')} of {attributes.get('n_outer_steps')}; "
        f"ended {_ENDINGS.get(ending, _text(ending))}.",
        f"Cost: {records.cost_of(trial).total:,.0f} gradients of one example"
        + ("." if (seconds := number(attributes.get("cost_seconds"))) is None else f", {seconds:.3g} s."),
        f"Estimator: {_text(attributes['estimator'])}; value: {_text(attributes.get('protocol'))}.",
    ]
    return "\n".join(sentences)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    # The dashboard leaves no room between columns.
    spaced = [(_text(name), *(f"&emsp;{_text(cell)}" for cell in cells)) for name, *cells in (head, *rows)]
    lines = [spaced[0], ("---", *["---:"] * (len(head) - 1)), *spaced[1:]]
    return ["", *(f"| {' | '.join(line)} |" for line in lines)]


def _text(words: object) -> str:
    """Plain text, whatever Markdown might read into it."""
    return re.sub(r"([\\`*_\[\]<>|~&!#$])", r"\\\1", " ".join(str(words).split()))
