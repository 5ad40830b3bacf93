"""Forward mode: the exact hypergradient, by carrying the weights' derivatives along with the weights.

    Z_t = A_t·Z_{t−1} + B_t,   Z_0 = 0,      d = ∇_α L_val(w_T, α) + ∇_w L_val(w_T, α)·Z_T

Z_t = d(w_t, s_t)/dα has a column for each hyperparameter; all columns are pushed forward at once.

Source: forward-hypergradient of Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization",
ICML 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.estimators.base import Estimator, Traits
from optuna_greedyhg.hypergrad.products import InnerStep, Tangents
from optuna_greedyhg.hypergrad.trees import Tensors


@dataclass(frozen=True)
class Forward(Estimator[Tangents | None]):
    """The exact hypergradient for a few hyperparameters: online, without a sweep back.

    Costs H·T products and one validation gradient; memory O(P·H), whatever T is. The training loss must be one that
    ``torch.func`` can differentiate. Buffers are constants of the derivatives, as they are for :class:`Reverse`.
    """

    traits: ClassVar[Traits] = Traits(
        online=True,
        long_horizon=True,
        products="H·T",
        val_gradients="1",
        train_gradients="0",
        memory="O(P·H)",
        own_hyperparameters=True,
    )

    def init(self, alpha: Tensors) -> Tangents | None:
        return None

    def observe(self, memory: Tangents | None, step: InnerStep) -> Tangents | None:
        return step.push_forward(memory)

    def estimate(self, memory: Tangents | None, end: InnerStep) -> Tensors:
        assert memory is not None
        v = end.validation()
        flat = torch.stack(
            [torch.tensordot(dw.flatten(1), v.gradient[name].flatten(), 1) for name, dw in memory.parameters.items()]
        ).sum(dim=0)
        return trees.add(v.direct, trees.unflatten(flat, v.direct))
