"""What runs of several methods on the same seeds say together: the numbers behind the table, the page and the file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna_greedyhg.report.anytime import common_start, mean_along_the_way, reached_for_good
from optuna_greedyhg.report.runs import SCORES, Run
from optuna_greedyhg.report.statistics import Paired, Ranking, Spread, alike, holm, paired, ranking, spread
from optuna_greedyhg.trials import records

LABELS = {
    "val_loss": "validation loss",
    "test_loss": "test loss",
    "val_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
}
JUDGED_BY = "test_loss"
"""What methods are ranked by."""
LOSSES = ("val_loss", "test_loss")


@dataclass(frozen=True)
class Anytime:
    """How soon a method has found what it has found, in one loss.

    Attributes:
        mean: Of the best so far, along the way from where all methods have found something to the end of the budget.
        against: The same, compared with the reference method; ``None`` for the reference itself.
        reached: The share of the budget after which the best so far was for good no worse than what the reference has
            ended with: the median over seeds, infinite where that is a seed that never came there.
        n_reached: On how many seeds it came there.
    """

    mean: Spread
    against: Paired | None
    reached: float
    n_reached: int


@dataclass(frozen=True)
class MethodRow:
    """One method over all seeds.

    Attributes:
        name: The method's name.
        n_trials: The smallest and the largest number of trials of a run.
        cost, seconds: Of its runs.
        scores: By name, those of ``SCORES`` that runs have.
        against: Likewise, compared with the reference method; empty for the reference itself.
        p_corrected: Likewise, the p-values of the paired t-test after Holm's correction for the number of methods.
        anytime: By name, those of ``LOSSES`` that runs have.
    """

    name: str
    n_trials: tuple[int, int]
    cost: Spread
    seconds: Spread
    scores: Mapping[str, Spread]
    against: Mapping[str, Paired]
    p_corrected: Mapping[str, float]
    anytime: Mapping[str, Anytime]


@dataclass(frozen=True)
class Statistics:
    """A comparison of methods.

    Attributes:
        reference: The method that others are compared with.
        n_seeds: Number of seeds.
        rows: One for each method.
        ranking: Of the methods, by ``JUDGED_BY``.
    """

    reference: str
    n_seeds: int
    rows: tuple[MethodRow, ...]
    ranking: Ranking

    def as_json(self) -> dict[str, Any]:
        """Dictionaries of plain numbers; what is not finite is ``None``."""
        methods = {row.name: {key: x for key, x in asdict(row).items() if key != "name"} for row in self.rows}
        content = {
            "reference": self.reference,
            "n_seeds": self.n_seeds,
            "methods": methods,
            "ranked_by": JUDGED_BY,
            "ranking": {**asdict(self.ranking), "not_told_apart": alike(self.ranking)},
        }
        plain: dict[str, Any] = records.plain(content)
        return plain


def statistics_of(runs: Sequence[Run], reference: str, budget: float) -> Statistics:
    """Compares methods, all of which have a run on every seed.

    Args:
        runs: In any order.
        reference: One of their methods.
        budget: What each run was allowed to cost.
    """
    by_method: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        by_method.setdefault(run.method, []).append(run)
    by_method = {name: by_method[name] for name in dict.fromkeys(run.method for run in runs)}
    present = [score for score in SCORES if any(math.isfinite(run.score(score)) for run in runs)]
    found = {name: {s: [run.score(s) for run in its] for s in present} for name, its in by_method.items()}
    others = [name for name in by_method if name != reference]
    against = {
        name: {s: paired(found[name][s], found[reference][s], maximize=_maximize(s)) for s in present}
        for name in others
    }
    corrected = {s: dict(zip(others, holm([against[name][s].p_t for name in others]), strict=True)) for s in present}
    rows = [
        MethodRow(
            name=name,
            n_trials=(min(run.n_trials for run in its), max(run.n_trials for run in its)),
            cost=spread([run.cost for run in its]),
            seconds=spread([run.seconds for run in its]),
            scores={s: spread([x for x in found[name][s] if math.isfinite(x)]) for s in present},
            against=against.get(name, {}),
            p_corrected={s: corrected[s][name] for s in present} if name in against else {},
            anytime={s: _anytime(s, by_method, name, reference, budget) for s in LOSSES if s in present},
        )
        for name, its in by_method.items()
    ]
    ranked = ranking({name: [run.score(JUDGED_BY) for run in its] for name, its in by_method.items()})
    return Statistics(reference, len(by_method[reference]), tuple(rows), ranked)


def _anytime(score: str, by_method: Mapping[str, Sequence[Run]], name: str, reference: str, budget: float) -> Anytime:
    starts = [common_start(runs) for runs in zip(*by_method.values(), strict=True)]

    def means(method: str) -> list[float]:
        return [
            mean_along_the_way(run, score, start, budget) for run, start in zip(by_method[method], starts, strict=True)
        ]

    pairs = zip(by_method[name], by_method[reference], strict=True)
    shares = [reached_for_good(run, score, its.score(score)) / budget for run, its in pairs]
    return Anytime(
        mean=spread([x for x in means(name) if math.isfinite(x)]),
        against=None if name == reference else paired(means(name), means(reference)),
        reached=statistics.median(shares),
        n_reached=sum(math.isfinite(share) for share in shares),
    )


def _maximize(score: str) -> bool:
    return score.endswith("accuracy")
