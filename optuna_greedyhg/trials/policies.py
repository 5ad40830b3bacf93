"""Which trials of a study are refined, and how far: black-box and gradient search mixed in one study.

Refinement costs more than the evaluation of a seed, and not every seed is worth it. A policy decides for each trial:

    Always(), Never()        all trials or none
    Fraction(p)              this part of them, by their numbers
    Promising(quantile)      those whose seeds are among the best so far, for a share of the study's cost
    Budget(total_cost)       all, until the study has cost this much

All trials get their values by one protocol, whatever is decided, so that ``study.best_trial`` compares them. Where α is
judged by a fresh training, a trial that is not refined has its seed's value; where the weights are the result, it
trains for as many steps under its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from optuna_greedyhg.hypergrad.descent import DescentOptions
from optuna_greedyhg.hypergrad.evaluation import Online
from optuna_greedyhg.trials import records
from optuna_greedyhg.trials.outages import outlast

_SEED_STEP = 0  # the outer step that reports the seed's value


class Policy(Protocol):
    """Decides how far to refine a trial. It is a frozen dataclass, whose ``str`` is recorded with the trial."""

    def n_outer_steps(self, trial: BaseTrial, seed_value: float | None, options: DescentOptions) -> int:
        """The number of outer steps to make, from 0 (leave the seed as it is) to ``options.n_outer_steps``.

        Args:
            trial: The running trial, or a fixed one; ``trial.study`` knows what has been.
            seed_value: The value that the trial has if it is not refined; ``None`` with ``evaluate="online"``, where
                it is not known before a training to the end.
            options: The settings of the descent.
        """


@dataclass(frozen=True)
class Always:
    """Refines all trials."""

    def n_outer_steps(self, trial: BaseTrial, seed_value: float | None, options: DescentOptions) -> int:
        return options.n_outer_steps


@dataclass(frozen=True)
class Never:
    """Refines no trial."""

    def n_outer_steps(self, trial: BaseTrial, seed_value: float | None, options: DescentOptions) -> int:
        return 0


@dataclass(frozen=True)
class Fraction:
    """Refines a fraction ``p`` of all trials, chosen by a hash of their numbers: the same ones in every run.

    Args:
        p: The probability with which a trial is refined, from 0 to 1.
        seed: Another seed chooses other trials.

    Raises:
        ValueError: If ``p`` is not a probability.
    """

    p: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must be from 0 to 1, but got {self.p}.")

    def n_outer_steps(self, trial: BaseTrial, seed_value: float | None, options: DescentOptions) -> int:
        digest = hashlib.sha256(f"{self.seed}:{trial.number}".encode()).digest()
        uniform = int.from_bytes(digest[:8], "big") / 2**64
        return options.n_outer_steps if uniform < self.p else 0


@dataclass(frozen=True)
class Promising:
    """Refines a trial whose seed is among the best ``quantile`` of all seeds so far, its own included.

    A seed's value is the one reported at outer step 0. It is compared with those of the study's complete trials. Where
    a few numbers decide, most of the budget is better spent on seeds: ``share`` leaves the rest of it to them.

    Args:
        quantile: The part of the seeds that is worth it, above 0 and up to 1.
        n_startup_trials: All seeds are good enough until this many trials are complete.
        share: The part of the study's cost, see :class:`Cost`, that trials which were refined may have made up so far,
            above 0 and up to 1; while they have made up more, no trial is refined, however good its seed. Trials that
            run beside this one are not counted, nor what a killed one has cost.

    Raises:
        ValueError: If a number is out of its range, or values are made online.
    """

    quantile: float = 0.5
    n_startup_trials: int = 5
    share: float = 1.0

    def __post_init__(self) -> None:
        for name, part in (("quantile", self.quantile), ("share", self.share)):
            if not 0 < part <= 1:
                raise ValueError(f"{name} must be above 0 and up to 1, but got {part}.")
        if self.n_startup_trials < 0:
            raise ValueError(f"n_startup_trials must not be negative, but got {self.n_startup_trials}.")

    def n_outer_steps(self, trial: BaseTrial, seed_value: float | None, options: DescentOptions) -> int:
        if seed_value is None:
            raise ValueError(
                f"{self} needs the value of a trial's seed, which evaluate='online' does not know before the end; use "
                "evaluate='retrain', or Fraction(p)."
            )
        complete = _earlier(trial, TrialState.COMPLETE)
        others = [t.intermediate_values[_SEED_STEP] for t in complete if _SEED_STEP in t.intermediate_values]
        rank = 1 + sum(other > seed_value if options.maximize else other < seed_value for other in others)
        promising = len(others) < self.n_startup_trials or rank <= self.quantile * (len(others) + 1)
        return options.n_outer_steps if promising and self._has_share_left(trial) else 0

    def _has_share_left(self, trial: BaseTrial) -> bool:
        if self.share == 1:
            return True
        ended = _ended(trial)
        return _cost(t for t in ended if records.was_refined(t)) <= self.share * _cost(ended)


@dataclass(frozen=True)
class Budget:
    """Refines all trials until those of the study that have ended have cost ``total_cost``, evaluations and all.

    The trial that goes over the budget is still refined to its end, and so are those that run beside it.

    Args:
        total_cost: In gradients of one example, see :class:`Cost`.

    Raises:
        ValueError: If the budget is negative.
    """

    total_cost: float

    def __post_init__(self) -> None:
        if not self.total_cost >= 0:
            raise ValueError(f"total_cost must not be negative, but got {self.total_cost}.")

    def n_outer_steps(self, trial: BaseTrial, seed_value: float | None, options: DescentOptions) -> int:
        return options.n_outer_steps if _cost(_ended(trial)) < self.total_cost else 0


def decide(policy: Policy, trial: BaseTrial, seed_value: float | None, options: DescentOptions) -> int:
    """What the policy says.

    Raises:
        ValueError: If that cannot be done: it is out of range, or part of the way where all trials must train as long.
    """
    n, most = policy.n_outer_steps(trial, seed_value, options), options.n_outer_steps
    if not isinstance(n, int) or not 0 <= n <= most:
        raise ValueError(f"A policy must return an integer from 0 to n_outer_steps={most}, but {policy} returns {n!r}.")
    if isinstance(options.protocol, Online) and 0 < n < most:
        raise ValueError(
            f"With evaluate='online' a trial must be refined to the end or not at all, as its weights must be trained "
            f"as long as all others, but {policy} returns {n} of {most} outer steps; use evaluate='retrain'."
        )
    return n


def _cost(trials: Iterable[FrozenTrial]) -> float:
    return sum(records.cost_of(trial).total for trial in trials)


def _ended(trial: BaseTrial) -> list[FrozenTrial]:
    return _earlier(trial, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def _earlier(trial: BaseTrial, *states: TrialState) -> list[FrozenTrial]:
    """The trials of the study in one of these states; a fixed trial has none."""
    return outlast(trial.study.get_trials, deepcopy=False, states=states) if isinstance(trial, Trial) else []
