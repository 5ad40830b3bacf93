"""The estimators that are compared, by the names that a command line and the documentation call them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from optuna_greedyhg.hypergrad.curvature import ConjugateGradients, Neumann
from optuna_greedyhg.hypergrad.estimators.base import Estimator
from optuna_greedyhg.hypergrad.estimators.distill import HyperDistill
from optuna_greedyhg.hypergrad.estimators.drmad import DrMAD
from optuna_greedyhg.hypergrad.estimators.first_order import FirstOrder
from optuna_greedyhg.hypergrad.estimators.forward import Forward
from optuna_greedyhg.hypergrad.estimators.greedy import Greedy
from optuna_greedyhg.hypergrad.estimators.implicit import Implicit
from optuna_greedyhg.hypergrad.estimators.reverse import Reverse
from optuna_greedyhg.hypergrad.spectral import Spectral

ESTIMATORS: Mapping[str, Estimator[Any]] = MappingProxyType(
    {
        "first-order": FirstOrder(),
        "t1t2": Greedy(gamma=0.0),
        "greedy": Greedy(),
        "strided": Greedy(stride=5),
        "terminal": Greedy(terminal=True),
        "spectral": Greedy(propagator=Spectral()),
        "ift": Implicit(Neumann()),
        "ift-cg": Implicit(ConjugateGradients()),
        "drmad": DrMAD(),
        "distill": HyperDistill(),
        "reverse": Reverse(),
        "forward": Forward(),
    }
)
"""Every estimator in its usual configuration."""
