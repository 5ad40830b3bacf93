"""HyperDistill: one product, at a distilled state of the weights, in place of a whole horizon of them.

    d̂ = ∇_α L_val(w_T, α) + θ·c_T·(v_T·B*),      v_T = ∇_w L_val(w_T, α),   c_t = 1 + γ + … + γ^{t−1}

If every A_t were γ·I, the hypergradient would be c_T times a mean of v_T·B_t with weights γ^{T−t}/c_T. For that mean of
products stands the product at the mean: B* is the B of a step from the *distilled* state w*_T,

    w*_t = p_t·w*_{t−1} + (1 − p_t)·w_{t−1},      p_t = (γ − γ^t)/(1 − γ^t) = 1 − 1/c_t

with a batch drawn from the horizon's, D_t with the probability γ^{T−t}/c_T that it has in the mean. What γ·I gets wrong
in length is put right by a number θ, fitted now and then: over the last s steps of a horizon, s = 1..T, let g_s be
DrMAD's sum and u_s the product distilled from the same points of the straight line; then

    θ = Σ_s c_s ⟨u_s, g_s⟩ / Σ_s c_s² ‖u_s‖²,      which minimizes   Σ_s ‖g_s − θ·c_s·u_s‖²

Source: Lee et al., "Online hyperparameter meta-learning with hypergradient distillation", ICLR 2022. There π·u/‖u‖ is
written for the product, with π = θ·c·‖u‖, which is the same; α moves after every inner step, here after T of them; D*
mixes examples from all batches in the shares that are here probabilities, as a batch may be any object; θ is fitted in
trainings of its own, here in a horizon that is made anyway. The optimizer's state is distilled like the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import randomness, trees
from optuna_greedyhg.hypergrad.estimators.base import Estimator, Traits
from optuna_greedyhg.hypergrad.estimators.drmad import Line
from optuna_greedyhg.hypergrad.products import Covector, InnerStep, StepRecipe, TrainState
from optuna_greedyhg.hypergrad.trees import Tensors


class Distilled(NamedTuple):
    """What is known of a horizon after t steps.

    Attributes:
        theta: The present θ.
        age: Number of horizons since it was fitted, that one included.
        line: The horizon as DrMAD sees it, where θ is to be fitted.
        draws: For s = 1..T, the number of steps that follow the one whose batch stands for those of the last s.
        total: c_t.
        point: w*_t, with the optimizer's state and the buffers.
        n_steps: The mean number of steps made before, of which ``point`` has the nearest whole one.
        recipe: D*, as soon as it has come.
    """

    theta: float
    age: int
    line: Line | None
    draws: tuple[int, ...] = ()
    total: float = 0.0
    point: TrainState | None = None
    n_steps: float = 0.0
    recipe: StepRecipe | None = None


class Sample(NamedTuple):
    """One equation g ≈ θ·c·u for θ."""

    c: float
    u: Tensors
    g: Tensors


@dataclass(frozen=True)
class HyperDistill(Estimator[Distilled]):
    """One product at distilled weights, with a fitted length; online, and constant in memory.

    Costs one product, one validation gradient and one more training gradient per outer step; memory O(P+H). An outer
    step with a fit, the first and then every ``fit_every``-th, costs 3T−1 products and 2T training gradients more, and
    keeps the batches of its horizon.

    A sample that is not finite (DrMAD's line may lead where training has not been) is left out of the fit. Where no
    sample is left, or all products are zero, θ stays what it was, and it starts as 1. θ may be negative: where the
    horizon's early steps outweigh the late ones, the product points the wrong way.

    Args:
        gamma: The decay γ in [0, 1]. With γ = 0 the distilled point is the last one, and the direction that of T1–T2.
        fit_every: Number of horizons, outer steps that is, from one fit of θ to the next.

    Raises:
        ValueError: If a number is out of its range.
    """

    gamma: float = 0.9
    fit_every: int = 50
    traits: ClassVar[Traits] = Traits(
        online=True,
        long_horizon=True,
        products="1 + (3T − 1)/F",
        val_gradients="1",
        train_gradients="1 + 2T/F",
        memory="O(P + H)",
        own_hyperparameters=True,
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.gamma <= 1.0 or self.fit_every < 1:
            raise ValueError(f"gamma must be in [0, 1] and fit_every at least 1, but got {self}.")

    def init(self, alpha: Tensors) -> Distilled:
        return Distilled(1.0, 0, Line(None, ()))

    def carry(self, memory: Distilled) -> tuple[float, int]:
        return memory.theta, memory.age

    def resume(self, alpha: Tensors, carried: tuple[float, int]) -> Distilled:
        theta, age = carried
        is_due = age >= self.fit_every
        return Distilled(theta, 0, Line(None, ())) if is_due else Distilled(theta, age, None)

    def observe(self, memory: Distilled, step: InnerStep) -> Distilled:
        draws = memory.draws or self._draw(step)
        total = self.gamma * memory.total + 1
        n_steps = memory.n_steps + (step.before.n_steps - memory.n_steps) / total
        memory = memory._replace(
            line=memory.line and memory.line.extended(step),
            draws=draws,
            total=total,
            point=_mean(memory.point or step.before, step.before, 1 / total, round(n_steps)),
            n_steps=n_steps,
            recipe=step.recipe if step.remaining == draws[-1] else memory.recipe,
        )
        if step.remaining > 0:
            return memory
        theta = memory.theta if memory.line is None else fitted(self._samples(memory, step), memory.theta)
        return memory._replace(theta=theta, age=memory.age + 1)

    def estimate(self, memory: Distilled, end: InnerStep) -> Tensors:
        assert memory.recipe is not None
        assert memory.point is not None
        v = end.validation()
        product = memory.recipe.make(memory.point, keep_graph=True).times_b(Covector(v.gradient))
        return trees.add_scaled(v.direct, memory.theta * memory.total, product)

    def _draw(self, first: InnerStep) -> tuple[int, ...]:
        """``Distilled.draws``: of the last s steps, the one that n others follow has the probability γ^n/c_s."""
        recipe, horizon = first.recipe, first.remaining + 1
        # Seeded like training is, without taking a number from it or depending on those that it will take.
        with randomness.restored(recipe.random_state, recipe.products.problem.device):
            seed = int(torch.randint(2**62, ()))
        chances, draws, total = Random(seed), [0], 1.0
        for n in range(1, horizon):
            total += self.gamma**n
            draws.append(n if chances.random() * total < self.gamma**n else draws[-1])
        return tuple(draws)

    def _samples(self, memory: Distilled, end: InnerStep) -> Iterable[Sample]:
        """For s = 1..T: c_s, u_s and g_s."""
        line, v = memory.line, Covector(end.validation().gradient)
        assert line is not None
        horizon = len(line.recipes)
        g, c, beta = trees.zeros_like(end.recipe.alpha), 0.0, 0.0
        for s, term in enumerate(line.terms(end.after, v), start=1):
            g, c = trees.add(g, term), c + self.gamma ** (s - 1)
            beta += self.gamma ** (s - 1) / c * ((horizon - s) / horizon - beta)
            recipe = line.recipes[horizon - 1 - memory.draws[s - 1]]
            yield Sample(c, recipe.make(line.point(end.after, beta), keep_graph=True).times_b(v), g)


def fitted(samples: Iterable[Sample], otherwise: float) -> float:
    """θ by least squares over the finite samples; ``otherwise`` where these do not determine it."""
    total: Tensor | None = None
    for c, u, g in samples:
        pair = torch.stack([c * trees.dot(u, g), c**2 * trees.dot(u, u)]).double()
        pair = torch.where(torch.isfinite(pair).all(), pair, 0.0)  # without a wait
        total = pair if total is None else total + pair
    along, length = (0.0, 0.0) if total is None else total.tolist()
    return along / length if length > 0 else otherwise


def _mean(x: TrainState, y: TrainState, weight: float, n_steps: int) -> TrainState:
    """(1 − weight)·x + weight·y; buffers are y's."""
    return replace(
        y,
        parameters=trees.lerp(x.parameters, y.parameters, weight),
        slots={kind: trees.lerp(tree, y.slots[kind], weight) for kind, tree in x.slots.items()},
        n_steps=n_steps,
    )
