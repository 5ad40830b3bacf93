"""Where a hyperparameter may live, and the unconstrained coordinate in which it is moved.

Gradient descent wants to move freely; a learning rate wants to stay in [1e-3, 1]. So every hyperparameter α has a
*value* x, which the losses and the update rule see, and a *coordinate* z, any real number of the same shape, in which
hypergradients are taken and outer steps are made:

    Unbounded()                      x = z
    Positive()                       x = exp(z)
    Interval(low, high)              x = low + (high − low)·σ(z/s)
    Interval(low, high, log=True)    x = low·(high/low)^σ(z/s)

An interval is spanned by the same range of z whatever its width, so one outer learning rate serves them all: at the
middle of an interval, a step of 0.1 in z moves x by 2.5/s percent of the (logarithmic) width. The slowness s is 1 by
default, as for a strength of every feature, about which nobody but the hypergradient has anything to say. Numbers that
a sampler seeds have s = 3. Where in its interval such a number should be is the sampler's question; what gradients
taken online say about it is local, and a learning rate that follows them quickly drifts to where it suits the next
steps of training.

    >>> learning_rate = Hyperparameter(torch.tensor(0.1), Interval(1e-3, 1.0, log=True, slowness=3.0))
    >>> example_logits = Hyperparameter(torch.zeros(1000))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad.trees import Tensors

# Relative distance that a coordinate keeps from the ends of an interval, where σ has no finite inverse. A seed on the
# end itself is so moved by a ten thousandth of the width.
_MARGIN = 1e-4


@runtime_checkable
class Domain(Protocol):
    """A smooth one-to-one map between coordinates in R and values, elementwise on tensors of any shape."""

    def to_value(self, coordinate: Tensor) -> Tensor:
        """The value x(z); differentiable."""

    def to_coordinate(self, value: Tensor) -> Tensor:
        """The coordinate z(x), finite. Raises ``ValueError`` where the value lies outside of the domain."""


@dataclass(frozen=True)
class Unbounded:
    """All real numbers: x = z."""

    def to_value(self, coordinate: Tensor) -> Tensor:
        return coordinate

    def to_coordinate(self, value: Tensor) -> Tensor:
        _require(bool(torch.isfinite(value).all()), "finite", value)
        return value


@dataclass(frozen=True)
class Positive:
    """Positive numbers on a log scale: x = exp(z)."""

    def to_value(self, coordinate: Tensor) -> Tensor:
        return coordinate.exp()

    def to_coordinate(self, value: Tensor) -> Tensor:
        _require(bool((torch.isfinite(value) & (value > 0)).all()), "finite and positive", value)
        return value.log()


@dataclass(frozen=True)
class Interval:
    """Numbers between two bounds: x = low + (high − low)·σ(z/slowness), or the same in log x.

    Raises:
        ValueError: If ``low < high`` does not hold, a bound is not finite, ``log`` is set with ``low <= 0``, or the
            slowness is not finite and above 0.
    """

    low: float
    high: float
    log: bool = False
    slowness: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"An interval needs finite bounds with low < high, but got low={self.low}, high={self.high}."
            )
        if self.log and self.low <= 0:
            raise ValueError(f"An interval on a log scale needs a positive low, but got low={self.low}.")
        if not 0 < self.slowness < math.inf:
            raise ValueError(f"slowness must be finite and above 0, but got {self.slowness}.")

    def to_value(self, coordinate: Tensor) -> Tensor:
        low, width = self._origin_and_width()
        position = low + width * torch.sigmoid(coordinate / self.slowness)
        return (position.exp() if self.log else position).clamp(self.low, self.high)

    def to_coordinate(self, value: Tensor) -> Tensor:
        inside = (value >= self.low) & (value <= self.high)  # False for NaN, too
        # A float64 bound rounded to float32 may fall just outside of itself.
        near = torch.isclose(value, value.new_tensor(self.low)) | torch.isclose(value, value.new_tensor(self.high))
        _require(bool((inside | near).all()), f"within [{self.low}, {self.high}]", value)
        low, width = self._origin_and_width()
        fraction = ((value.log() if self.log else value) - low) / width
        return self.slowness * torch.logit(fraction.clamp(_MARGIN, 1 - _MARGIN))

    def _origin_and_width(self) -> tuple[float, float]:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return low, high - low


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class Hyperparameter:
    """One group of hyperparameters: the value it starts from, a tensor of any shape, and the domain it stays in.

    Raises:
        TypeError: If ``init`` is not a floating point tensor.
        ValueError: If ``init`` lies outside of the domain.
    """

    init: Tensor
    domain: Domain = field(default_factory=Unbounded)

    def __post_init__(self) -> None:
        if not isinstance(self.init, Tensor) or not self.init.is_floating_point():
            got = self.init.dtype if isinstance(self.init, Tensor) else type(self.init).__name__
            raise TypeError(
                f"A hyperparameter starts from a floating point tensor, but got {got}; use torch.tensor(float(x)), or "
                "x.float()."
            )
        self.domain.to_coordinate(self.init)


def to_coordinates(hyperparameters: Mapping[str, Hyperparameter], device: torch.device, dtype: torch.dtype) -> Tensors:
    """The starting point of a descent: every group's coordinate, as new tensors of one device and dtype."""
    values = to_values(hyperparameters, device, dtype)
    return {name: h.domain.to_coordinate(values[name]) for name, h in hyperparameters.items()}


def to_values(hyperparameters: Mapping[str, Hyperparameter], device: torch.device, dtype: torch.dtype) -> Tensors:
    """The values that every group starts from, as new tensors of one device and dtype."""
    return {name: h.init.detach().to(device, dtype, copy=True) for name, h in hyperparameters.items()}


class Values(Mapping[str, Tensor]):
    """The hyperparameters as a loss sees them: ``alpha["lr"]`` is the value, differentiable in its coordinate.

    It remembers which groups were read (``used``), so that a product with a loss that never looked at a group is known
    to be zero without building a graph for it.
    """

    def __init__(self, domains: Mapping[str, Domain], coordinates: Mapping[str, Tensor]) -> None:
        self._domains = domains
        self._coordinates = coordinates
        self._values: Tensors = {}
        self._used: set[str] = set()

    @property
    def used(self) -> frozenset[str]:
        return frozenset(self._used)

    @property
    def coordinates(self) -> Mapping[str, Tensor]:
        """Where they are."""
        return self._coordinates

    def at(self, coordinates: Mapping[str, Tensor]) -> Values:
        """The same groups elsewhere; what is read there counts as read here."""
        other = Values(self._domains, coordinates)
        other._used = self._used
        return other

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._domains:
            raise KeyError(
                f"No hyperparameter {name!r}; there are {sorted(self._domains)}. Declare it before the loss reads it."
            )
        self._used.add(name)
        if name not in self._values:
            self._values[name] = self._domains[name].to_value(self._coordinates[name])
        return self._values[name]

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the value to find out
        return name in self._domains

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)


def _require(holds: bool, rule: str, value: Tensor) -> None:
    if not holds:
        shown = value.item() if value.ndim == 0 else f"values from {value.min().item()} to {value.max().item()}"
        raise ValueError(f"A hyperparameter must be {rule}, but got {shown}; start it inside its domain.")
