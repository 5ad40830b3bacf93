"""What is compared, by names such as tpe+greedy: a sampler with or without an estimator, or a task's defaults."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler

from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, Estimator

DEFAULTS = "defaults"


def _make_qmc(seed: int) -> BaseSampler:
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        return QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False, warn_asynchronous_seeding=False)


def _make_cmaes(seed: int) -> BaseSampler:
    # What it does not model, the only parameter of a study for example, it draws at random.
    return CmaEsSampler(seed=seed, warn_independent_sampling=False)


SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = MappingProxyType(
    {
        "tpe": lambda seed: TPESampler(seed=seed),
        "random": lambda seed: RandomSampler(seed=seed),
        "gp": lambda seed: GPSampler(seed=seed),
        "cmaes": _make_cmaes,
        "qmc": _make_qmc,
    }
)
"""The samplers that draw seeds, by name: functions of a random seed."""


@dataclass(frozen=True)
class Method:
    """How a study of a task is run.

    Attributes:
        name: ``"defaults"``, or the sampler's and, behind a plus, the estimator's.
        sampler: A key of ``SAMPLERS``.
        estimator: Refines all trials; ``None`` for trials that evaluate their seed.
    """

    name: str
    sampler: str
    estimator: Estimator[Any] | None

    @property
    def is_defaults(self) -> bool:
        """Whether its only trial is that of the task's defaults."""
        return self.name == DEFAULTS


def method_named(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: If there is no such sampler or estimator.
    """
    if name == DEFAULTS:
        return Method(name, "random", None)
    sampler, plus, estimator = name.partition("+")
    if sampler not in SAMPLERS:
        raise ValueError(
            f"A method is {DEFAULTS!r} or one of the samplers {', '.join(SAMPLERS)}, with +ESTIMATOR or without, but "
            f"got {name!r}."
        )
    if plus and estimator not in ESTIMATORS:
        raise ValueError(f"There is no estimator {estimator!r} in {name!r}, only {', '.join(ESTIMATORS)}.")
    return Method(name, sampler, ESTIMATORS[estimator] if plus else None)
