"""What a study had found, and what it had paid, each time that a trial ended: the numbers behind the plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_greedyhg.trials.records import cost_of, was_refined


@dataclass(frozen=True)
class Finish:
    """The end of a trial, and where its study stood then.

    Attributes:
        trial: The trial: complete, pruned or failed.
        score: Its finite score, see :func:`score_of`.
        cost: The cost of all trials that had ended until then, this one among them; in gradients of one example.
        best: The best complete trial of finite value until then, this one among them; ``None`` if there was none.
    """

    trial: FrozenTrial
    score: float | None
    cost: float
    best: FrozenTrial | None


def history(study: optuna.Study, *, refined: bool | None = None) -> list[Finish]:
    """All finished trials of a study in the order in which they ended, which in parallel studies is not their number's.

    Only complete trials can be the best, as for ``study.best_trial``.

    Args:
        study: The study.
        refined: Only the trials that were refined, or only those that were not, as if there were no others.

    Raises:
        RuntimeError: If the study has several objectives.
    """
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    trials = [trial for trial in study.get_trials(deepcopy=False) if refined in (None, was_refined(trial))]
    finished = [trial for trial in trials if trial.state.is_finished()]
    finishes: list[Finish] = []
    cost, best, least = 0.0, None, math.inf
    for trial in sorted(finished, key=_when):
        cost += cost_of(trial).total
        score = score_of(trial)
        if trial.state == TrialState.COMPLETE and score is not None and sign * score < least:
            best, least = trial, sign * score
        finishes.append(Finish(trial, score, cost, best))
    return finishes


def score_of(trial: FrozenTrial) -> float | None:
    """A trial's value, or the last one that it reported if it was pruned; ``None`` if that is missing or not finite."""
    value = trial.value
    if value is None and trial.state == TrialState.PRUNED and trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return value if value is not None and math.isfinite(value) else None


def metric_of(trials: Sequence[FrozenTrial]) -> str | None:
    """The metric that the trials' values are, which no trial records: the one whose ``val_`` attribute equals them.

    ``None`` if there is no such metric. Trials without a score, or without any such attribute, have no say.
    """
    votes = [
        {
            key.removeprefix("val_")
            for key, x in trial.user_attrs.items()
            if key.startswith("val_") and _equals(x, score)
        }
        for trial in trials
        if (score := score_of(trial)) is not None and any(key.startswith("val_") for key in trial.user_attrs)
    ]
    agreed = set.intersection(*votes) if votes else set()
    return min(agreed, key=lambda name: (name != "loss", name), default=None)


def number(value: object) -> float | None:
    """An attribute as a finite number; ``None`` if it is anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]


def _equals(attribute: object, score: float) -> bool:
    x = number(attribute)
    return x is not None and math.isclose(x, score, rel_tol=1e-6)  # a database may keep fewer digits


def _when(trial: FrozenTrial) -> tuple[float, int]:
    end = trial.datetime_complete
    return (math.inf if end is None else end.timestamp(), trial.number)
