"""The problem that every method solves: example weights, full batches, SGD with momentum from the same weights.

    L_train(w, α) = mean_i σ(α_i)·ℓ_i(w),      L_val(w) = mean_i ℓ_i(w)

The images are a noisy prototype of their class each, so that there is something to be learnt; half of the training
labels are random. α = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from step_cost import MODELS
from torch import Tensor, nn

LR, MOMENTUM = 0.01, 0.9
GAMMA = 0.9
N_TERMS, SCALE = 5, 0.1  # of Neumann's series


class Batch(NamedTuple):
    """Images of shape (n, 1, 28, 28), and labels."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Setting:
    """One network, and one number of training steps.

    Attributes:
        model: Its name in ``step_cost.MODELS``.
        horizon: T.
        n_examples: Of training and of validation, which are as many.
    """

    model: str
    horizon: int
    n_examples: int

    def net(self) -> nn.Sequential:
        """The network with the weights w_0; a new one each time."""
        torch.manual_seed(0)
        return MODELS[self.model]()

    @cached_property
    def train(self) -> Batch:
        """The training batch, of whose labels half are random."""
        images, labels = self._draw(1)
        generator = torch.Generator().manual_seed(3)
        wrong = torch.rand(self.n_examples, generator=generator) < 0.5
        return Batch(images, torch.where(wrong, torch.randint(10, labels.shape, generator=generator), labels))

    @cached_property
    def val(self) -> Batch:
        """The validation batch."""
        return self._draw(2)

    def _draw(self, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        prototypes = torch.randn(10, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        labels = torch.randint(10, (self.n_examples,), generator=generator)
        images = prototypes[labels] + 3 * torch.randn(self.n_examples, 1, 28, 28, generator=generator)
        return Batch(images.to(memory_format=torch.channels_last), labels)


def train_loss(net: Callable[[Tensor], Tensor], logits: Tensor, batch: Batch) -> Tensor:
    """``mean_i σ(α_i)·ℓ_i``."""
    losses = F.cross_entropy(net(batch.images), batch.labels, reduction="none")
    return (torch.sigmoid(logits) * losses).mean()


def val_loss(net: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """``mean_i ℓ_i``."""
    return F.cross_entropy(net(batch.images), batch.labels)


class Method(NamedTuple):
    """How a package computes one estimate of the hypergradient.

    Attributes:
        estimator: The name in ``ours.ESTIMATORS`` of what has the same formula.
        prepare: Does once what need not be repeated, compilation apart, and returns the work that is timed: T training
            steps from w_0, then the estimate, shape (n,).
    """

    estimator: str
    prepare: Callable[[Setting], Callable[[], Tensor]]


def plain_training(setting: Setting) -> Callable[[], list[Tensor]]:
    """The T training steps that all methods make, as anybody would write them: the work that gives w_T."""
    initial, logits = setting.net().state_dict(), torch.zeros(setting.n_examples)
    net = setting.net()

    def run() -> list[Tensor]:
        net.load_state_dict(initial)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
        for _ in range(setting.horizon):
            optimizer.zero_grad()
            train_loss(net, logits, setting.train).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    return run
