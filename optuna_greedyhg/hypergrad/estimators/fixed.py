"""Fixed: no hypergradient at all, so that α stays where the sampler has put it.

    d̂ = 0

With it, an unrefined trial goes through the same training and the same evaluations as a refined one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.estimators.base import Estimator, Traits
from optuna_greedyhg.hypergrad.products import InnerStep
from optuna_greedyhg.hypergrad.trees import Tensors


@dataclass(frozen=True)
class Fixed(Estimator[Tensors]):
    """Zero, at no cost: neither products nor validation gradients."""

    traits: ClassVar[Traits] = Traits(
        online=True,
        long_horizon=False,
        products="0",
        val_gradients="0",
        train_gradients="0",
        memory="O(P + H)",
        own_hyperparameters=False,
    )

    stackable: ClassVar[bool] = True

    def init(self, alpha: Tensors) -> Tensors:
        return trees.zeros_like(alpha)

    def observe(self, memory: Tensors, step: InnerStep) -> Tensors:
        return memory

    def estimate(self, memory: Tensors, end: InnerStep) -> Tensors:
        return memory
