"""Data hyper-cleaning: some of the training labels are wrong, and every training example has a weight to be learnt.

    L_train(w, α) = mean_i σ(α_i)·ℓ_i(w),      L_val(w) = mean_i ℓ_i(w) on clean examples

A label is replaced by a uniformly random class with probability p, so that some of the replaced are right by chance.
Which ones are wrong is known here, and never told: good weights are high on clean and low on corrupted examples.

Source: Franceschi et al., ICML 2017; the setting of Yakovlev, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from optuna_greedyhg.hypergrad.problem import Model

LOGITS = "example_logits"
DIAGNOSTICS = ("weight_clean", "weight_corrupted")

Batch = tuple[Tensor, ...]


class Corrupted(NamedTuple):
    """Labels of which some have been replaced."""

    labels: Tensor
    """int64, shape (n,)."""
    is_wrong: Tensor
    """Whether a label now differs from the true one; bool, shape (n,)."""


def corrupt(labels: Tensor, share: float, n_classes: int, generator: torch.Generator) -> Corrupted:
    """Replaces each label by a uniformly random class with probability ``share``."""
    replaced = torch.rand(len(labels), generator=generator) < share
    random = torch.randint(n_classes, labels.shape, generator=generator)
    noisy = torch.where(replaced, random, labels)
    return Corrupted(noisy, noisy != labels)


def weighted_loss(model: Model, alpha: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """``mean_i σ(α_i)·ℓ_i`` over a batch of images, labels and their positions in the training set."""
    images, labels, index = batch
    losses = F.cross_entropy(model(images), labels, reduction="none")
    return (torch.sigmoid(alpha[LOGITS][index]) * losses).mean()


def clean_loss(model: Model, alpha: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The mean cross-entropy over a batch of images and labels."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def mean_weights(logits: Tensor, is_wrong: Tensor) -> dict[str, float]:
    """The mean weight σ(α_i) of the clean and of the corrupted examples."""
    weights = torch.sigmoid(logits.detach().cpu())
    means = (weights[~is_wrong].mean().item(), weights[is_wrong].mean().item())
    return dict(zip(DIAGNOSTICS, means, strict=True))
