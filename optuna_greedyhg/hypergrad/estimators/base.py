"""What an estimator of the hypergradient is: a fold over the inner steps of one horizon."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from optuna_greedyhg.hypergrad.products import InnerStep, TrainState
from optuna_greedyhg.hypergrad.trees import Tensors

Memory = TypeVar("Memory")


@dataclass(frozen=True)
class Traits:
    """What an estimator can do, and what it costs on average in an outer step, as the documentation tabulates it.

    Counts are written as expressions of T, the number of steps in a horizon, H, the number of coordinates of α, and
    letters that the documentation explains; for an α that the training loss reads. Examples apart, they are what
    ``Cost`` counts.

    Attributes:
        online: Whether there is no second pass over the steps of a horizon, so that nothing of them need be kept.
        long_horizon: Whether it accounts for what α did to the weights before the last step.
        products: Number of products with A, B or the Hessian.
        val_gradients: Number of validation gradients.
        train_gradients: Number of training gradients, beside the T that training needs.
        memory: Its order; P is the number of weights.
        own_hyperparameters: Whether it sees the update rule's own hyperparameters (learning rate, momentum).
        needs_convergence: Whether it is only right where training has converged.
    """

    online: bool
    long_horizon: bool
    products: str
    val_gradients: str
    train_gradients: str
    memory: str
    own_hyperparameters: bool
    needs_convergence: bool = False


class Estimator(Protocol[Memory]):
    """Folds the inner steps t = 1..T of one horizon into an estimate of d = dL_val(w_T(α), α)/dα.

    An estimator is a frozen dataclass: its memory goes in and comes out. It asks the steps for products and never calls
    autograd itself. All its trees are keyed like α and hold derivatives in α's coordinates.
    """

    @property
    def traits(self) -> Traits:
        """What it can do, and what it costs."""

    @property
    def biased_in_restart_mode(self) -> bool:
        """Whether its zeros are not those of the hypergradient when every outer step trains again from w_0."""
        return False

    @property
    def stackable(self) -> bool:
        """Whether it treats all entries of its trees alike: then those of many descents can be side by side in one."""
        return False

    def keeps_graph(self, t: int, horizon: int) -> bool:
        """Whether step t will be asked for a product before the next one, from the training step's own graph."""
        return False

    def init(self, alpha: Tensors) -> Memory:
        """The memory before the very first step."""

    def carry(self, memory: Memory) -> Any:
        """What is worth keeping of one horizon's memory for the next; by default nothing.

        It may be written to a file, and is made of tensors, batches, numbers, strings, ``None``, and tuples, lists and
        dictionaries of these.
        """
        return None

    def resume(self, alpha: Tensors, carried: Any) -> Memory:
        """The memory before the first step of a horizon that follows another."""
        return self.init(alpha)

    def observe(self, memory: Memory, step: InnerStep) -> Memory:
        """The memory after one more step."""

    def estimate(self, memory: Memory, end: InnerStep) -> Tensors:
        """The estimate of d, given the last step."""


class Folded(NamedTuple):
    """What a horizon comes to."""

    estimate: Tensors
    end: InnerStep
    """The last step."""
    carried: Any
    """Of the estimator's memory, for the next horizon."""


MakeStep = Callable[[TrainState, int, bool], InnerStep]
"""``(before, t, keep_graph) -> step`` number t = 1..T of a horizon."""


def fold(
    estimator: Estimator[Any], carried: Any, alpha: Tensors, start: TrainState, horizon: int, make_step: MakeStep
) -> Folded:
    """One horizon of training, folded by an estimator.

    Args:
        estimator: The estimator.
        carried: What it has kept of the horizon before; ``None`` in the first.
        alpha: The coordinates of α.
        start: The state before the first step.
        horizon: Number T of steps.
        make_step: Makes each step, of which the next starts where the last has ended.
    """
    memory = estimator.init(alpha) if carried is None else estimator.resume(alpha, carried)
    state = start
    for t in range(1, horizon + 1):
        step = make_step(state, t, estimator.keeps_graph(t, horizon))
        memory = estimator.observe(memory, step)
        state = step.after
    return Folded(estimator.estimate(memory, step), step, estimator.carry(memory))
