"""Greedy hypergradients, aggregated: every step's own validation gradient, propagated to the end by a simple map.

    d̂ = ∇_α L_val(w_T, α) + Σ_{t=1..T} (v_t·h_{T−t})·B_t,      v_t = ∇_w L_val(w_t, α)

In the paper h_n = γ^n: the product A_T···A_{t+1} of the exact hypergradient, and v_T on its left, are replaced by
γ^{T−t} v_t. So one running sum is enough: memory O(P+H) whatever T is, T products, no reverse sweep, and no need for
converged training. Other maps h_n are in ``propagators``. The *terminal* variant has v_T in place of v_t.

With a *stride* of k, only the steps t = T, T−k, T−2k, ... have a term. Each stands for the k steps that end with it, or
for as many as there are, whose own v·B is taken to be the same:

    d̂ = ∇_α L_val(w_T, α) + Σ_t v_t·(h_{T−t} + ... + h_{T−t+m−1})·B_t,      m = min(k, t)

so that the sum is that of k = 1 where v_t·B_t does not vary: with h_n = γ^n, the weights of the terms add up to
(1 − γ^T)/(1 − γ), whatever k is.

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
    has_begun: bool
    n_skipped: int  # steps since the last one that had a term
    start: TrainState | None
    recipes: tuple[StepRecipe, ...]


@dataclass(frozen=True, repr=False)
class Greedy(Estimator[Sum]):
    """The greedy estimate with decay γ; ``Greedy(gamma=0.0)`` is T1–T2 (Luketina et al., 2016), v_T·B_T alone.

    Costs T products and T validation gradients per outer step (one of each for γ = 0), in O(P+H) memory; with a stride
    of k, ⌈T/k⌉ of each. The terminal variant costs as many products, T−1 more training gradients and one validation
    gradient; it keeps the horizon's batches and the last step's graph, and carries nothing over to the next horizon.

    The sum's zero is that of the hypergradient only when weights are carried on between outer steps: with running
    validation gradients and weights that restart from w_0, early v_t never vanish and the descent stops at a wrong
    point. The terminal variant has no such bias.

    Args:
        gamma: The decay γ in [0, 1]. 1 − lr·(typical curvature of the training loss) is the best single number.
        propagator: Propagates otherwise than by γ^n, for example :class:`Spectral`; ``gamma`` then is not used.
        terminal: Whether v_T takes the place of all v_t, in a second pass over the horizon.
        stride: Every how many steps, counted from the last, there is a term.

    Raises:
        ValueError: If ``gamma`` is outside of [0, 1], or ``stride`` is below 1.
    """

    gamma: float = 0.9
    propagator: Propagator[Any] | None = None
    terminal: bool = False
    stride: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma must be in [0, 1], but got {self.gamma}.")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, but got {self.stride}.")

    def __repr__(self) -> str:
        how = f"gamma={self.gamma}" if self.propagator is None else f"propagator={self.propagator}"
        others = [", terminal=True"] * self.terminal + [f", stride={self.stride}"] * (self.stride > 1)
        return f"{type(self).__name__}({how}{''.join(others)})"

    @property
    def traits(self) -> Traits:
        reaches_back, overhead = self._propagator.reaches(1), self._propagator.overhead
        replays = self.terminal and reaches_back
        n_terms = "1" if not reaches_back else "T" if self.stride == 1 else "⌈T/s⌉"
        return Traits(
            online=not replays,
            long_horizon=reaches_back,
            products=_sum(n_terms, overhead.products),
            val_gradients="1" if self.terminal else n_terms,
            train_gradients=_sum("T − 1" if replays else "0", overhead.train_gradients),
            memory=overhead.memory + (", T batches" if replays else ""),
            own_hyperparameters=True,
        )

    @property
    def biased_in_restart_mode(self) -> bool:
        return not self.terminal and self._propagator.reaches(1)

    @property
    def stackable(self) -> bool:
        return self._propagator.stackable

    def keeps_graph(self, t: int, horizon: int) -> bool:
        return self._has_term(horizon - t) and (not self.terminal or t == horizon)

    def init(self, alpha: Tensors) -> Sum:
        return Sum(trees.zeros_like(alpha), None, None, False, 0, None, ())

    def carry(self, memory: Sum) -> Any:
        return None if memory.known is None else self._propagator.carry(memory.known)

    def resume(self, alpha: Tensors, carried: Any) -> Sum:
        return self.init(alpha)._replace(carried=carried)

    def observe(self, memory: Sum, step: InnerStep) -> Sum:
        if self.terminal and self._propagator.reaches(1):
            recipes = (*memory.recipes, step.recipe) if step.remaining > 0 else memory.recipes
            return memory._replace(start=memory.start or step.before, recipes=recipes)
        if self._has_term(step.remaining):
            return self._add(memory, step, step)
        return memory._replace(n_skipped=memory.n_skipped + 1)

    def estimate(self, memory: Sum, end: InnerStep) -> Tensors:
        if memory.start is not None:  # of the second pass, whose last step is still there from the first
            state = memory.start
            for recipe in memory.recipes:
                has_term = self._has_term(recipe.remaining)
                step = recipe.make(state, keep_graph=has_term)
                memory = self._add(memory, step, end) if has_term else memory._replace(n_skipped=memory.n_skipped + 1)
                state = step.after
            memory = self._add(memory, end, end)
        return trees.add(end.validation().direct, memory.total)

    def _has_term(self, remaining: int) -> bool:
        """Whether a step is worth the cost of a product: neither between two strides nor without any influence."""
        return remaining % self.stride == 0 and self._propagator.reaches(remaining)

    def _add(self, memory: Sum, step: InnerStep, validated: InnerStep) -> Sum:
        """Adds the term v·(h_{T−t} + ...)·B_t of one step, with v that of another or its own."""
        propagator, v = self._propagator, validated.validation().gradient
        n_steps = min(memory.n_skipped + 1, self.stride)
        steps = range(step.remaining, step.remaining + n_steps)
        with step.held():
            if memory.has_begun:
                known = propagator.proceed(memory.known, step, v, steps[-1])
            else:
                known = propagator.begin(memory.carried, step, v, steps[-1])
            factor, propagated = propagator.propagate(known, v, steps)
            total = trees.add_scaled(memory.total, factor, step.times_b(propagated))
        return memory._replace(total=total, known=known, has_begun=True, n_skipped=0)

    @property
    def _propagator(self) -> Propagator[Any]:
        return self.propagator or (Decay(self.gamma) if self.gamma > 0.0 else LastStep())


def _sum(*counts: str) -> str:
    return " + ".join(count for count in counts if count != "0") or "0"
