"""How soon a run has found what it has found: its mean along the way, and when it reached something.

A run's best score so far is a step function s(c) of what has been spent. Two numbers are read off it:

    mean along the way   1/(end − start) · ∫ s(c) dc from start to end
    reached for good     the least c from which on s is no worse than a target

The test loss of what is best by validation loss goes up and down. That it was low once, by chance, is of no use to
anybody who has only the validation loss to go by, so reaching means to stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from optuna_greedyhg.report.runs import Run


def mean_along_the_way(run: Run, score: str, start: float, end: float) -> float:
    """The mean of a run's best so far over the costs from ``start`` to ``end``; NaN if there is none at ``start``."""
    steps = _steps(run, score)
    if not steps or steps[0][0] > start or end <= start:
        return math.nan
    area = 0.0
    for (cost, value), (until, _) in zip(steps, [*steps[1:], (math.inf, math.nan)], strict=True):
        area += value * max(0.0, min(until, end) - max(cost, start))
    return area / (end - start)


def reached_for_good(run: Run, score: str, target: float) -> float:
    """The cost from which on a run's loss is no higher than ``target``; infinite if it ends above."""
    since = math.inf
    for cost, value in reversed(_steps(run, score)):
        if value > target:
            break
        since = cost
    return since


def common_start(runs: Sequence[Run]) -> float:
    """The least cost at which all runs have found something; infinite if one has not."""
    return max((run.curve[0].cost if run.curve else math.inf for run in runs), default=math.inf)


def _steps(run: Run, score: str) -> list[tuple[float, float]]:
    return [(point.cost, point.scores[score]) for point in run.curve if score in point.scores]
