"""First-order: the direct gradient alone, as if the weights did not depend on the hyperparameters.

    d̂ = ∇_α L_val(w_T, α)

Source: the first-order baseline of Yakovlev (2024); FO-MAML (Finn et al., 2017) for shared weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optuna_greedyhg.hypergrad.estimators.base import Estimator, Traits
from optuna_greedyhg.hypergrad.products import InnerStep
from optuna_greedyhg.hypergrad.trees import Tensors


@dataclass(frozen=True)
class FirstOrder(Estimator[None]):
    """The direct gradient; no products. It is zero, and α stays where it is, if the validation loss does not read α."""

    traits: ClassVar[Traits] = Traits(
        online=True,
        long_horizon=False,
        products="0",
        val_gradients="1",
        train_gradients="0",
        memory="O(P + H)",
        own_hyperparameters=False,
    )

    stackable: ClassVar[bool] = True

    def init(self, alpha: Tensors) -> None:
        return None

    def observe(self, memory: None, step: InnerStep) -> None:
        return None

    def estimate(self, memory: None, end: InnerStep) -> Tensors:
        return end.validation().direct
