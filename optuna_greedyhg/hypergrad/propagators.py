"""What stands in for the product of Jacobians A_T···A_{t+1} in a greedy estimate: v ↦ v·h_n, with n = T − t.

LastStep          h_0 = I, h_n = 0                                   T1–T2
Decay(gamma)      h_n = γ^n                                          the paper's
Spectral          h_n = the response of the update rule to the curvature of the training loss (``spectral``)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

from optuna_greedyhg.hypergrad.products import Covector, InnerStep
from optuna_greedyhg.hypergrad.trees import Tensors

State = TypeVar("State")


class Overhead(NamedTuple):
    """What a propagator costs beside the products that it propagates for, written like an estimator's ``Traits``."""

    products: str = "0"
    train_gradients: str = "0"
    memory: str = "O(P + H)"


class Propagated(NamedTuple):
    """A covector with a number in front, by which a product with H entries is scaled in place of a v with P."""

    factor: float
    v: Covector


class Propagator(Protocol[State]):
    """A family h_0, h_1, ... of linear maps on covectors."""

    @property
    def overhead(self) -> Overhead:
        """What it costs in an outer step."""
        return Overhead()

    @property
    def stackable(self) -> bool:
        """Whether it treats all entries alike, as an estimator may."""
        return False

    def reaches(self, n: int) -> bool:
        """Whether h_n is anything but zero, so that a product is worth its cost."""
        return True

    def carry(self, state: State) -> Any:
        """What is worth keeping of one horizon for the next; as an estimator's, and by default nothing."""
        return None

    def begin(self, carried: Any, step: InnerStep, v: Tensors, reach: int) -> State:
        """What is known at the first step of a horizon that has a term.

        Args:
            carried: What was kept of the horizon before; ``None`` in the first.
            step: The step; it is followed by ``step.remaining`` others.
            v: The validation gradient to be propagated.
            reach: The largest n of all the h_n to be asked for from now on.
        """

    def proceed(self, state: State, step: InnerStep, v: Tensors, reach: int) -> State:
        """What is known at a later step of the same horizon, by default the same; ``state`` may be used up."""
        return state

    def propagate(self, state: State, v: Tensors, steps: range) -> Propagated:
        """v·Σ_n h_n over these n, a range without gaps, as a covector on weights and optimizer state."""


@dataclass(frozen=True)
class LastStep(Propagator[None]):
    """Only the last step counts: h_0 = I and all others are zero."""

    stackable: ClassVar[bool] = True

    def reaches(self, n: int) -> bool:
        return n == 0

    def begin(self, carried: None, step: InnerStep, v: Tensors, reach: int) -> None:
        return None

    def propagate(self, state: None, v: Tensors, steps: range) -> Propagated:
        return Propagated(float(0 in steps), Covector(v))


@dataclass(frozen=True)
class Decay(Propagator[None]):
    """h_n = γ^n.

    Args:
        gamma: The decay γ in (0, 1].

    Raises:
        ValueError: If ``gamma`` is outside of (0, 1].
    """

    gamma: float = 0.9
    stackable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma <= 1.0:
            raise ValueError(f"gamma must be in (0, 1], but got {self.gamma}; for 0 there is LastStep().")

    def begin(self, carried: None, step: InnerStep, v: Tensors, reach: int) -> None:
        return None

    def propagate(self, state: None, v: Tensors, steps: range) -> Propagated:
        return Propagated(sum(self.gamma**n for n in steps), Covector(v))
