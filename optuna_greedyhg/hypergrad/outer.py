"""The outer optimizer: what moves α's coordinates along hypergradients, and what keeps it from going too far.

An outer optimizer is any function from a list of tensors to a ``torch.optim.Optimizer``. Adam is the default, as the
lengths of hypergradients differ by orders of magnitude between estimators, horizons and hyperparameters, and Adam's
steps do not depend on them. Two wrappers bound its path, and nest:

    Decaying(rate)         the k-th step has the learning rate lr·rate^k
    TrustRegion(radius)    |z − z_0| ≤ radius in every coordinate, z_0 being the seed

Together, with Adam's steps of at most about lr: first fast, then fine, and never further from the seed than that.

    >>> outer_optimizer = Decaying(0.95, TrustRegion(2.0, partial(torch.optim.Adam, lr=0.3)))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

OuterOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

ADAM: OuterOptimizer = partial(torch.optim.Adam, lr=0.3)


@dataclass(frozen=True)
class Decaying:
    """An outer optimizer whose learning rate shrinks with every step: lr_k = lr·rate^(k−1) in the k-th.

    Args:
        rate: In (0, 1]; 1 changes nothing. The whole path of Adam is then no longer than about lr/(1 − rate).
        optimizer: What makes the steps.

    Raises:
        ValueError: If the rate is out of its range.
    """

    rate: float
    optimizer: OuterOptimizer = ADAM

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, but got {self.rate}.")

    def __call__(self, coordinates: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = self.optimizer(coordinates)

        def decay(stepped: torch.optim.Optimizer, *_: Any) -> None:
            # A learning rate is part of the optimizer's state, so that steps taken back take their decay back, too.
            for group in stepped.param_groups:
                group["lr"] = group["lr"] * self.rate

        optimizer.register_step_post_hook(decay)
        return optimizer


@dataclass(frozen=True)
class TrustRegion:
    """An outer optimizer that stays near the seed: after every step, z ← z_0 + clip(z − z_0, ±radius), elementwise.

    In an :class:`~optuna_greedyhg.hypergrad.domains.Interval` seeded in its middle, a radius as large as its slowness
    leaves about a quarter of the width to either side.

    Args:
        radius: In coordinates, above 0.
        optimizer: What makes the steps.

    Raises:
        ValueError: If the radius is not above 0.
    """

    radius: float
    optimizer: OuterOptimizer = ADAM

    def __post_init__(self) -> None:
        if not self.radius > 0 or math.isinf(self.radius):
            raise ValueError(f"radius must be finite and above 0, but got {self.radius}.")

    def __call__(self, coordinates: list[Tensor]) -> torch.optim.Optimizer:
        optimizer = self.optimizer(coordinates)
        seed = [z.detach().clone() for z in coordinates]

        def project(*_: Any) -> None:
            with torch.no_grad():
                for z, z_0 in zip(coordinates, seed, strict=True):
                    z.clamp_(z_0 - self.radius, z_0 + self.radius)

        optimizer.register_step_post_hook(project)
        return optimizer
