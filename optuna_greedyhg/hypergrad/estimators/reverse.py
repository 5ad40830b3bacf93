"""Reverse mode: the exact hypergradient of one horizon, by a sweep back over all its steps.

    d = ∇_α L_val(w_T, α) + Σ_{t=T..1} v_t·B_t,      v_T = (∇_w L_val(w_T, α), 0),   v_{t−1} = v_t·A_t

v is a covector on weights *and* optimizer state, so momentum and moments are differentiated through.

Source: reverse-hypergradient of Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization",
ICML 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.estimators.base import Estimator, Traits
from optuna_greedyhg.hypergrad.products import Covector, InnerStep
from optuna_greedyhg.hypergrad.trees import Tensors


@dataclass(frozen=True)
class Reverse(Estimator[tuple[InnerStep, ...]]):
    """The exact hypergradient, given the weights and the optimizer state at the start of the horizon.

    Buffers are constants of the derivatives: where the validation loss reads BatchNorm's running statistics, what the
    weights have done to these is left out, a difference of some percent.

    Costs 2T−1 products, one validation gradient, and T more training gradients, because each step is replayed rather
    than its graph kept; memory O(T·P) for the weights of every step, and for its gradient and optimizer state where the
    update rule's derivative reads them.

    Args:
        keep_graphs: Whether to keep the graphs of all steps, and with them all activations, instead of replaying; not
            those of steps in which the update rule alone reads α.
    """

    keep_graphs: bool = False
    stackable: ClassVar[bool] = True

    @property
    def traits(self) -> Traits:
        return Traits(
            online=False,
            long_horizon=True,
            products="2T − 1",
            val_gradients="1",
            train_gradients="0" if self.keep_graphs else "T",
            memory="O(P·T + H), T graphs" if self.keep_graphs else "O(P·T + H)",
            own_hyperparameters=True,
        )

    def keeps_graph(self, t: int, horizon: int) -> bool:
        return self.keep_graphs

    def init(self, alpha: Tensors) -> tuple[InnerStep, ...]:
        return ()

    def observe(self, memory: tuple[InnerStep, ...], step: InnerStep) -> tuple[InnerStep, ...]:
        return (*memory, step.light())

    def estimate(self, memory: tuple[InnerStep, ...], end: InnerStep) -> Tensors:
        v = Covector(end.validation().gradient)
        estimate = end.validation().direct
        for step in reversed(memory[1:]):
            v, term = step.times_ab(v)
            estimate = trees.add(estimate, term)
        return trees.add(estimate, memory[0].times_b(v))
