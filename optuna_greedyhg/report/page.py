"""One HTML page about some studies: what they found at what cost, and how."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from optuna_greedyhg.report import theme
from optuna_greedyhg.report.figures import (
    alpha_trajectories,
    optimization_history,
    refined_and_not,
    seed_to_refined,
)
from optuna_greedyhg.report.files import write_whole
from optuna_greedyhg.report.history import history
from optuna_greedyhg.report.html import figure_html, whole_page
from optuna_greedyhg.report.summary import MethodSummary
from optuna_greedyhg.report.table import summary_table
from optuna_greedyhg.report.trajectory import course_of
from optuna_greedyhg.trials.records import was_refined


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    intro: str,
    studies: Mapping[str, optuna.Study],
    summaries: Sequence[MethodSummary],
    footer: str = "",
) -> str:
    """Writes a page that compares studies: a table of methods, what they found at what cost, and how α moved.

    Studies may still be running. The file is replaced at once when the page is complete, so that a reader, or a disk
    that is full, never leaves half of it. All text is plain; what looks like HTML in it is shown, not obeyed.

    Args:
        path: Where to write the page; about 5 MB, most of it plotly.js.
        title: Heading, and title in the browser.
        intro: A sentence or two on what was compared and how; paragraphs are separated by empty lines.
        studies: Studies by the name of their method, of one objective, all in the same direction.
        summaries: The rows of the table, see :func:`summarize`; those named as a study share its color.
        footer: Small print, for example versions and how to reproduce the page.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If the folder of ``path`` does not exist.
        RuntimeError: If a study has several objectives.
        ValueError: If some studies minimize and others maximize.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"A report needs a folder that exists, but got {str(path)!r}; create {str(path.parent)!r}."
        )
    page = _page(title, intro, studies, summaries, footer)
    write_whole(path, page)
    return page


def _page(
    title: str,
    intro: str,
    studies: Mapping[str, optuna.Study],
    summaries: Sequence[MethodSummary],
    footer: str,
) -> str:
    colors = theme.colors(studies)
    parts = []
    if summaries:
        parts += ["<h2>Summary</h2>", summary_table(summaries, colors), _TABLE_NOTE]
    parts += [
        "<h2>What was found at what cost</h2>",
        figure_html("history", _history(studies), _HISTORY_CAPTION, with_plotly=True),
    ]
    for k, (name, study) in enumerate(studies.items()):
        parts += _refinement(k, name, study, colors[name], alone=len(studies) == 1)
    return whole_page(title, intro, parts, footer)


def _history(studies: Mapping[str, optuna.Study]) -> go.Figure:
    """The figure that compares studies, or, in a single one, what was refined with what was not."""
    if len(studies) == 1:
        return refined_and_not(*studies.values())
    return optimization_history(studies)


def _refinement(k: int, name: str, study: optuna.Study, color: str, *, alone: bool) -> list[str]:
    """How the trials of the k-th study were refined; nothing, if none was."""
    points = history(study)
    best = points[-1].best if points else None
    candidates = [best, *(point.trial for point in reversed(points))]
    trial = next((trial for trial in candidates if trial is not None and _has_moved(trial)), None)
    if trial is None:
        return []
    which = f"Trial {trial.number}, {'the best one' if trial is best else trial.state.name.lower()}"
    swatch = f'<span class="swatch" style="background: {color}"></span>'
    is_mixed = len({was_refined(point.trial) for point in points}) > 1
    split = [] if alone or not is_mixed else [figure_html(f"kinds-{k}", refined_and_not(study), _KINDS_CAPTION)]
    return [
        f"<h2>{swatch}{html.escape(name)}: from seed to refined</h2>",
        *split,
        '<div class="pair">',
        figure_html(f"trajectory-{k}", alpha_trajectories(trial, color=color), f"{which}: {_TRAJECTORY_CAPTION}"),
        figure_html(f"arrows-{k}", seed_to_refined(study, color=color), _ARROWS_CAPTION),
        "</div>",
    ]


def _has_moved(trial: FrozenTrial) -> bool:
    course = course_of(trial)
    return course is not None and len(course.steps) > 1


_TABLE_NOTE = (
    '<p class="note">Scores are those of the best trial by validation; test data chose nothing. '
    "Total cost is in gradients of one example: a product counts as one, an evaluation as a third.</p>"
)
_HISTORY_CAPTION = (
    "Solid: best validation score so far. Dashed: the held-out score of the same trial. Dots are single trials, drawn "
    "at the cost of all that ended before them and their own."
)
_KINDS_CAPTION = "As above, of this study: trials that were refined, and trials that were left at their seeds."
_TRAJECTORY_CAPTION = "ring = seed, star and dotted line = best step, band = 10–90% of a tensor’s entries."
_ARROWS_CAPTION = (
    "Each arrow is a trial: from the sampler’s seed to the refined value, at the height of its score. Rings did not "
    "move. Faint: pruned."
)
