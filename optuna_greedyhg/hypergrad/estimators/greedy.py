"""Greedy hypergradients, aggregated: every step's own validation gradient, discounted by its age.

    d̂(γ) = ∇_α L_val(w_T, α) + Σ_{t=1..T} γ^{T−t} · v_t·B_t,      v_t = ∇_w L_val(w_t, α)

The product A_T···A_{t+1} of the exact hypergradient, and v_T on its left, are replaced by γ^{T−t} v_t. So one running
sum is enough: memory O(P+H) whatever T is, T products, no reverse sweep, and no need for converged training.

Source: K. Yakovlev, "Generalized greedy gradient-based hyperparameter optimization", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.estimators.base import Estimator
from optuna_greedyhg.hypergrad.products import Covector, InnerStep
from optuna_greedyhg.hypergrad.trees import Tensors


@dataclass(frozen=True)
class Greedy(Estimator[Tensors]):
    """The greedy estimate with decay γ; ``Greedy(gamma=0.0)`` is T1–T2 (Luketina et al., 2016), v_T·B_T alone.

    Costs T products and T validation gradients per outer step (one of each for γ = 0), in O(P+H) memory.

    The sum's zero is that of the hypergradient only when weights are carried on between outer steps: with γ > 0 and
    weights that restart from w_0, early v_t never vanish and the descent stops at a wrong point.

    Args:
        gamma: The decay γ in [0, 1]. 1 − lr·(typical curvature of the training loss) is the best single number.

    Raises:
        ValueError: If ``gamma`` is outside of [0, 1].
    """

    gamma: float = 0.9

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], but got {self.gamma}.")

    @property
    def biased_in_restart_mode(self) -> bool:
        return self.gamma > 0.0

    def keeps_graph(self, t: int, horizon: int) -> bool:
        return self.gamma > 0.0 or t == horizon

    def init(self, alpha: Tensors) -> Tensors:
        return trees.zeros_like(alpha)

    def observe(self, memory: Tensors, step: InnerStep) -> Tensors:
        if self.gamma == 0.0:
            return memory  # every term but the last is multiplied by zero: do not pay for it
        return trees.add(trees.scale(self.gamma, memory), step.times_b(Covector(step.validation().gradient)))

    def estimate(self, memory: Tensors, end: InnerStep) -> Tensors:
        if self.gamma == 0.0:
            memory = end.times_b(Covector(end.validation().gradient))
        return trees.add(end.validation().direct, memory)
