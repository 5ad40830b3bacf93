"""DrMAD: the reverse sweep along the straight line from the first weights to the last, instead of the path itself.

    d̂ = ∇_α L_val(w_T, α) + Σ_{t=T..1} v_t·B̃_t,      v_T = (∇_w L_val(w_T, α), 0),   v_{t−1} = v_t·Ã_t

Ã_t and B̃_t are those of step t made from w̃_{t−1} = (1 − β)·w_0 + β·w_T with β = (t−1)/T; the optimizer's state is
interpolated likewise.

Source: Fu et al., "DrMAD: distilling reverse-mode automatic differentiation for optimizing hyperparameters of deep
neural networks", IJCAI 2016. There the momentum is recomputed from the path; here it is interpolated, which serves
every update rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar, NamedTuple

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.estimators.base import Estimator, Traits
from optuna_greedyhg.hypergrad.products import Covector, InnerStep, StepRecipe, TrainState
from optuna_greedyhg.hypergrad.trees import Tensors


class Line(NamedTuple):
    """The start of the line, and the steps that were made along it."""

    start: TrainState | None
    recipes: tuple[StepRecipe, ...]

    def extended(self, step: InnerStep) -> Line:
        """With one more step."""
        return Line(self.start or step.before, (*self.recipes, step.recipe))

    def point(self, end: TrainState, beta: float) -> TrainState:
        """The point (1 − β)·start + β·end; buffers are the start's."""
        start = self.start
        assert start is not None
        return TrainState(
            parameters=trees.lerp(start.parameters, end.parameters, beta),
            buffers=start.buffers,
            slots={kind: trees.lerp(tree, end.slots[kind], beta) for kind, tree in start.slots.items()},
            n_steps=start.n_steps + round(beta * len(self.recipes)),
        )

    def terms(self, end: TrainState, v: Covector) -> Iterator[Tensors]:
        """v_t·B̃_t for t = T, ..., 1, given v = v_T."""
        horizon = len(self.recipes)
        for t in range(horizon, 0, -1):
            step = self.recipes[t - 1].make(self.point(end, (t - 1) / horizon), keep_graph=True)
            if t > 1:
                v, term = step.times_ab(v)
            else:
                term = step.times_b(v)
            yield term


@dataclass(frozen=True)
class DrMAD(Estimator[Line]):
    """The recursion of reverse mode along a straight line.

    Costs 2T−1 products, one validation gradient, and T more training gradients; memory O(P+H), and the batches of one
    horizon. Not online: the end must be known before the sweep begins.
    """

    traits: ClassVar[Traits] = Traits(
        online=False,
        long_horizon=True,
        products="2T − 1",
        val_gradients="1",
        train_gradients="T",
        memory="O(P + H), T batches",
        own_hyperparameters=True,
    )

    def init(self, alpha: Tensors) -> Line:
        return Line(None, ())

    def observe(self, memory: Line, step: InnerStep) -> Line:
        return memory.extended(step)

    def estimate(self, memory: Line, end: InnerStep) -> Tensors:
        v = end.validation()
        return reduce(trees.add, memory.terms(end.after, Covector(v.gradient)), v.direct)
