"""One run of a method: what had been found each time that something better was, and what had been spent until then."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from optuna_greedyhg.hypergrad.cost import Cost, Prices
from optuna_greedyhg.report.history import history, number
from optuna_greedyhg.trials import records

ROUNDING = 1e-9
"""Relative difference of two sums of costs that are the same."""
SCORES = ("val_loss", "test_loss", "val_accuracy", "test_accuracy")


@dataclass(frozen=True)
class Point:
    """The best that a run had found at some time.

    Attributes:
        cost: What had been spent until then, in training gradients of one example.
        seconds: Wall-clock time inside trials until then.
        scores: Those of ``SCORES`` that it has, by name.
    """

    cost: float
    seconds: float
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """A method's study on one seed of a task.

    Attributes:
        method: The method's name.
        seed: The task's seed.
        n_trials: Number of finished trials.
        cost: What they have cost, in training gradients of one example.
        seconds: Wall-clock time inside them.
        counts: The passes that the cost is made of.
        curve: What had been found within the budget, from worse to better validation loss.
    """

    method: str
    seed: int
    n_trials: int
    cost: float
    seconds: float
    counts: Cost
    curve: tuple[Point, ...]

    def has_spent(self, budget: float) -> bool:
        """Whether it has cost the budget, but for rounding."""
        return self.cost >= budget * (1 - ROUNDING)

    def score(self, name: str) -> float:
        """One of ``SCORES`` at the best that was found within the budget; NaN if there is none."""
        return self.curve[-1].scores.get(name, math.nan) if self.curve else math.nan

    def as_json(self) -> dict[str, Any]:
        """A flat dictionary of plain numbers; the curve is a list of [cost, seconds, val loss, test loss]."""
        final = self.curve[-1].scores if self.curve else {}
        return {
            "method": self.method,
            "seed": self.seed,
            "n_trials": self.n_trials,
            "cost": self.cost,
            "seconds": self.seconds,
            **{f.name: getattr(self.counts, f.name) for f in fields(Cost)},
            **{name: final.get(name) for name in SCORES},
            "best_value_curve": [
                [p.cost, p.seconds, p.scores.get("val_loss"), p.scores.get("test_loss")] for p in self.curve
            ],
        }


def run_from_json(row: Mapping[str, Any]) -> Run:
    """The run that :meth:`Run.as_json` has written; of accuracies, only those of its end."""
    curve = [
        Point(cost, seconds, {s: x for s, x in zip(SCORES, losses, strict=False) if x is not None})
        for cost, seconds, *losses in row["best_value_curve"]
    ]
    if curve:
        final = {s: row[s] for s in SCORES if row[s] is not None}
        curve[-1] = Point(curve[-1].cost, curve[-1].seconds, final)
    counts = Cost(**{f.name: row[f.name] for f in fields(Cost)})
    return Run(row["method"], row["seed"], row["n_trials"], row["cost"], row["seconds"], counts, tuple(curve))


def run_of(study: optuna.Study, *, method: str, seed: int, prices: Prices, budget: float) -> Run:
    """Reads a run from its study, which may be unfinished.

    Every evaluation that was made counts, whatever became of its trial, but none that was complete beyond the budget.
    """
    trials = [finish.trial for finish in history(study)]
    counts, seconds, curve = Cost(), 0.0, list[Point]()
    for trial in trials:
        duration, refining = _duration(trial), trial.user_attrs.get(records.COST + "seconds", 0.0)
        for row in records.read_improvements(trial):
            cost = prices.of(counts + Cost(**{f.name: int(row[f.name] or 0) for f in fields(Cost)}))
            scores = {name: x for name in SCORES if (x := number(row.get(name))) is not None}
            loss = scores.get("val_loss", math.inf)
            if loss < (curve[-1].scores["val_loss"] if curve else math.inf) and cost <= budget * (1 + ROUNDING):
                # What the sampler has taken to draw the seed came first.
                curve.append(Point(cost, seconds + (duration - refining) + (row["seconds"] or 0.0), scores))
        counts += records.cost_of(trial)
        seconds += duration
    return Run(method, seed, len(trials), prices.of(counts), seconds, counts, tuple(curve))


def _duration(trial: FrozenTrial) -> float:
    """Seconds from a trial's start, when its seed is drawn, to its end."""
    refining = float(trial.user_attrs.get(records.COST + "seconds", 0.0))
    return max(refining, 0.0 if trial.duration is None else trial.duration.total_seconds())
