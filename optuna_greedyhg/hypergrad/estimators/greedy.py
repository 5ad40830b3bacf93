"""Greedy hypergradients, aggregated: every step's own validation gradient, propagated to the end by a simple map.

    d̂ = ∇_α L_val(w_T, α) + Σ_{t=1..T} (v_t·h_{T−t})·B_t,      v_t = ∇_w L_val(w_t, α)

In the paper h_n = γ^n: the product A_T···A_{t+1} of the exact hypergradient, and v_T on its left, are replaced by
γ^{T−t} v_t. So one running sum is enough: memory O(P+H) whatever T is, T products, no reverse sweep, and no need for
converged training. Other maps h_n are in ``propagators``. The *terminal* variant has v_T in place of v_t.

Source: K. Yakovlev, "Generalized greedy gradient-based hyperparameter optimization", 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.estimators.base import Estimator, Traits
from optuna_greedyhg.hypergrad.products import InnerStep, StepRecipe, TrainState
from optuna_greedyhg.hypergrad.propagators import Decay, LastStep, Propagator
from optuna_greedyhg.hypergrad.trees import Tensors


class Sum(NamedTuple):
    """The running sum, what the propagator knows, and, for the terminal variant, how to make the steps again."""

    total: Tensors
    carried: Any
    known: Any
    n_observed: int
    start: TrainState | None
    recipes: tuple[StepRecipe, ...]


@dataclass(frozen=True, repr=False)
class Greedy(Estimator[Sum]):
    """The greedy estimate with decay γ; ``Greedy(gamma=0.0)`` is T1–T2 (Luketina et al., 2016), v_T·B_T alone.

    Costs T products and T validation gradients per outer step (one of each for γ = 0), in O(P+H) memory. The terminal
    variant costs T products, T more training gradients and one validation gradient; it keeps the horizon's
    batches, and carries nothing over to the next horizon.

    The sum's zero is that of the hypergradient only when weights are carried on between outer steps: with running
    validation gradients and weights that restart from w_0, early v_t never vanish and the descent stops at a wrong
    point. The terminal variant has no such bias.

    Args:
        gamma: The decay γ in [0, 1]. 1 − lr·(typical curvature of the training loss) is the best single number.
        propagator: Propagates otherwise than by γ^n, for example :class:`Spectral`; ``gamma`` then is not used.
        terminal: Whether v_T takes the place of all v_t, in a second pass over the horizon.

    Raises:
        ValueError: If ``gamma`` is outside of [0, 1].
    """

    gamma: float = 0.9
    propagator: Propagator[Any] | None = None
    terminal: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], but got {self.gamma}.")

    def __repr__(self) -> str:
        how = f"gamma={self.gamma}" if self.propagator is None else f"propagator={self.propagator}"
        return f"{type(self).__name__}({how}{', terminal=True' if self.terminal else ''})"

    @property
    def traits(self) -> Traits:
        reaches_back, overhead = self._propagator.reaches(1), self._propagator.overhead
        n_terms = "T" if reaches_back else "1"
        return Traits(
            online=not self.terminal,
            long_horizon=reaches_back,
            products=_sum(n_terms, overhead.products),
            val_gradients="1" if self.terminal else n_terms,
            train_gradients=_sum("T" if self.terminal else "0", overhead.train_gradients),
            memory=overhead.memory + (", T batches" if self.terminal else ""),
            own_hyperparameters=True,
        )

    @property
    def biased_in_restart_mode(self) -> bool:
        return not self.terminal and self._propagator.reaches(1)

    @property
    def stackable(self) -> bool:
        return self._propagator.stackable

    def keeps_graph(self, t: int, horizon: int) -> bool:
        return not self.terminal and self._propagator.reaches(horizon - t)

    def init(self, alpha: Tensors) -> Sum:
        return Sum(trees.zeros_like(alpha), None, None, 0, None, ())

    def carry(self, memory: Sum) -> Any:
        return None if memory.known is None else self._propagator.carry(memory.known)

    def resume(self, alpha: Tensors, carried: Any) -> Sum:
        return self.init(alpha)._replace(carried=carried)

    def observe(self, memory: Sum, step: InnerStep) -> Sum:
        if self.terminal:
            return memory._replace(start=memory.start or step.before, recipes=(*memory.recipes, step.recipe))
        if not self._propagator.reaches(step.remaining):
            return memory._replace(n_observed=memory.n_observed + 1)  # do not pay for a term that is zero
        return self._add(memory, step, step.validation().gradient)

    def estimate(self, memory: Sum, end: InnerStep) -> Tensors:
        if self.terminal:
            assert memory.start is not None
            state = memory.start
            for recipe in memory.recipes:
                step = recipe.make(state, keep_graph=self._propagator.reaches(recipe.remaining))
                if self._propagator.reaches(recipe.remaining):
                    memory = self._add(memory, step, end.validation().gradient)
                state = step.after
        return trees.add(end.validation().direct, memory.total)

    def _add(self, memory: Sum, step: InnerStep, v: Tensors) -> Sum:
        """Adds the term (v·h_{T−t})·B_t of one step."""
        propagator = self._propagator
        with step.held():
            if memory.n_observed == 0:
                known = propagator.begin(memory.carried, step, v)
            else:
                known = propagator.proceed(memory.known, step, v)
            term = step.times_b(propagator.propagate(known, v, step.remaining))
        return memory._replace(total=trees.add(memory.total, term), known=known, n_observed=memory.n_observed + 1)

    @property
    def _propagator(self) -> Propagator[Any]:
        return self.propagator or (Decay(self.gamma) if self.gamma > 0.0 else LastStep())


def _sum(*counts: str) -> str:
    return " + ".join(count for count in counts if count != "0") or "0"
