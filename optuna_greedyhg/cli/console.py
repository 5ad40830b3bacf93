"""What a person sees in the terminal: a progress bar and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

from optuna.trial import BaseTrial
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from optuna_greedyhg.hypergrad.audit import AuditRow
from optuna_greedyhg.hypergrad.descent import OuterStep
from optuna_greedyhg.report.comparison import Statistics
from optuna_greedyhg.report.summary import MethodSummary
from optuna_greedyhg.report.wording import against_cells, anytime_cells, shown_scores, spread_lines

_MAX_GROUPS = 4
_SHORT = {"val_loss": "val loss", "test_loss": "test loss", "test_accuracy": "test acc."}


class StudyProgress:
    """A bar with trial, outer step, the trial's best value and time left, one line a study.

    Args:
        console: Where to draw; a quiet console draws nothing.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=False,
        )
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> StudyProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, name: str, share: float, trial: BaseTrial, step: OuterStep) -> None:
        """Moves the line of one study, which is added at its first step, to the share of it that is done."""
        if name not in self._lines:
            self._lines[name] = self._progress.add_task(name, total=1.0, status="")
        loss = step.best.scores["loss"]
        status = f"trial {trial.number}, outer step {step.index}: {loss:.4f}"
        self._progress.update(self._lines[name], completed=min(share, 1.0), status=status)

    def finish(self) -> None:
        """Fills all bars: a study may end before its share says so, by pruning."""
        for line in self._lines.values():
            self._progress.update(line, completed=1.0)


def summary_table(summaries: Sequence[MethodSummary], title: str) -> Table:
    """One row a method; costs in thousands of gradients of one example."""
    diagnostics = list(dict.fromkeys(key for s in summaries for key in s.diagnostics))
    table = _table(title)
    table.add_column("method", no_wrap=True, vertical="bottom")
    scores = ("val loss", "val acc.", "test loss", "test acc.")
    for column in ("trials", *scores, "cost ×1000", "time (s)", *(key.replace("_", " ") for key in diagnostics)):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for s in summaries:
        table.add_row(
            s.name,
            str(s.n_trials),
            _number(s.val_loss, ".3f"),
            _number(s.val_accuracy, ".1%"),
            _number(s.test_loss, ".3f"),
            _number(s.test_accuracy, ".1%"),
            _number(s.cost.total / 1000, ",.0f"),
            _number(s.seconds, ".1f"),
            *(_number(s.diagnostics.get(key), ".3f") for key in diagnostics),
        )
    return table


def audit_table(rows: Sequence[AuditRow]) -> Table:
    """One row an estimator; memory in MB, costs in thousands of gradients of one example.

    Of more groups than a terminal is wide for, only the lowest agreement of signs is shown.
    """
    groups = list(dict.fromkeys(group for row in rows for group in row.sign_agreement or ()))
    is_wide = len(groups) > _MAX_GROUPS
    table = _table()
    table.add_column("estimator", no_wrap=True, vertical="bottom")
    signs = ["lowest signs"] if is_wide else [f"signs {group.replace('_', ' ')}" for group in groups]
    for column in ("cosine", "length ratio", *signs, "time (s)", "time ratio", "peak MB", "cost ×1000"):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in rows:
        agreement = row.sign_agreement or {}
        lowest = min(agreement.values(), default=None)
        shares = [lowest] if is_wide else [agreement.get(group) for group in groups]
        table.add_row(
            row.name,
            _number(row.cosine, ".3f"),
            _number(row.length_ratio, ".3f"),
            *(_number(share, ".0%") for share in shares),
            _number(row.seconds, ".2f" if row.seconds < 10 else ".0f"),
            _number(row.relative_seconds, ".1f"),
            _number(None if row.peak_bytes is None else row.peak_bytes / 1e6, ",.2f"),
            _number(None if row.cost is None else row.cost.total / 1000, ",.0f"),
        )
    return table


def scores_table(statistics: Statistics) -> Table:
    """Rows of a method for each score, with its median, quartiles, mean and confidence interval over seeds."""
    table = _table(f"Over {statistics.n_seeds} seeds, at the best by validation loss within the budget")
    table.add_column("method", no_wrap=True, vertical="bottom")
    table.add_column("score", no_wrap=True, vertical="bottom")
    for column in (r"median \[quartiles]", "mean ± 95%", "trials", "time\n(s)"):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    for row in statistics.rows:
        low, high = row.n_trials
        once = [
            f"{low}" if low == high else f"{low}–{high}",
            _number(row.seconds.median, ",.1f"),
        ]
        for k, score in enumerate(shown_scores(statistics)):
            found = (escape(words) for words in spread_lines(score, row.scores[score]))
            table.add_row("" if k else row.name, _SHORT[score], *found, *([] if k else once))
    return table


def against_table(statistics: Statistics) -> Table:
    """Rows of a method for each score: how it does against the reference, seed by seed."""
    table = _table(f"Against {statistics.reference}, seed by seed")
    table.add_column("method", no_wrap=True, vertical="bottom")
    table.add_column("score", no_wrap=True, vertical="bottom")
    for column in ("won/tied\n/lost", "difference ± 95%", "p", "Wilcoxon's\np"):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    for row in statistics.rows:
        for k, score in enumerate(shown_scores(statistics) if row.against else ()):
            table.add_row("" if k else row.name, _SHORT[score], *against_cells(score, row))
    return table


def anytime_table(statistics: Statistics) -> Table:
    """Rows of a method for each loss: when it came to what the reference has ended with, and its mean on the way."""
    table = _table(f"On the way to the budget, and when the end of {statistics.reference} was reached")
    table.add_column("method", no_wrap=True, vertical="bottom")
    table.add_column("score", no_wrap=True, vertical="bottom")
    for column in ("reached", "on\nseeds", "mean on\nthe way", "won/tied\n/lost", "difference ± 95%"):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    for row in statistics.rows:
        for k, score in enumerate(row.anytime):
            table.add_row("" if k else row.name, _SHORT[score], *anytime_cells(score, row, statistics.n_seeds))
    return table


def _table(title: str | None = None) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )


def _number(x: float | None, form: str) -> str:
    return "–" if x is None or math.isnan(x) else format(x, form)
