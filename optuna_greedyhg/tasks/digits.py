"""Tasks on scikit-learn's digits: 1797 images of 8×8 pixels in 10 classes, which come with the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from optuna.trial import BaseTrial
from sklearn.datasets import load_digits
from torch import Tensor, nn

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.domains import Interval
from optuna_greedyhg.hypergrad.evaluation import Retrain
from optuna_greedyhg.hypergrad.problem import BilevelProblem, Model
from optuna_greedyhg.hypergrad.update_rules import SGD, UpdateRule
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.base import Settings, accuracy
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.policies import Promising

N_CLASSES = 10


class Splits(NamedTuple):
    """Images, float32 in [0, 1] of shape (n, 64), and labels, int64 of shape (n,)."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_splits(n_train: int, n_val: int, generator: torch.Generator, device: torch.device) -> Splits:
    """Shuffled digits; what training and validation leave over is the test split."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    x = (torch.as_tensor(images, dtype=torch.float32) / 16)[order].to(device)
    y = torch.as_tensor(labels, dtype=torch.int64)[order].to(device)
    cuts = [n_train, n_val, len(y) - n_train - n_val]
    return Splits(*zip(torch.split(x, cuts), torch.split(y, cuts), strict=True))


class DigitsCleaning:
    """Hyper-cleaning of digits: one weight a training example, the learning rate and the weight decay.

    A tanh network 64-32-10, 300 training examples of which half have their label replaced, 300 for validation, 1197 for
    the test; full batches, SGD with momentum 0.9.

    Args:
        seed: Seeds splits, corruption and initial weights.
        device: Where to compute.
        share: The share of training labels that are replaced.
    """

    name: ClassVar[str] = "digits-cleaning"
    summary: ClassVar[str] = "scikit-learn digits, half of the labels corrupted: 300 example weights, lr, weight decay"
    settings: ClassVar[Settings] = Settings(
        horizon=10,
        n_outer_steps=100,
        outer_lr=0.1,
        evaluate=Retrain(500),
        evaluate_every=20,
        patience=2,
        policy=Promising(0.3),
        inherit=True,
    )
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 0.1, "weight_decay": 1e-4}
    diagnostics: ClassVar[tuple[str, ...]] = cleaning.DIAGNOSTICS

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu", share: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._device = torch.device(device)
        self._splits = load_splits(300, 300, generator, self._device)
        images, labels = self._splits.train
        noisy, self.is_wrong = cleaning.corrupt(labels.cpu(), share, N_CLASSES, generator)
        self._train = (images, noisy.to(device), torch.arange(len(noisy), device=device))
        self._seed = seed

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        alpha.suggest_float("lr", 1e-3, 1.0, log=True)
        alpha.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
        alpha.tensor(cleaning.LOGITS, torch.zeros(len(self.is_wrong)))
        with randomness.seeded(self._seed, torch.device("cpu")):
            model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, N_CLASSES))
        problem = BilevelProblem(
            model=model.to(self._device),
            train_loss=cleaning.weighted_loss,
            val_loss=cleaning.clean_loss,
            train_batches=self._train,
            val_batches=self._splits.val,
            test_batches=self._splits.test,
            metrics={"accuracy": accuracy},
            cuda_graphs=True,
        )
        return problem, SGD(lr="lr", momentum=0.9, weight_decay="weight_decay")

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return cleaning.mean_weights(values[cleaning.LOGITS], self.is_wrong)


class DigitsL2:
    """Softmax regression on digits with one L2 strength a pixel: the sampler seeds their common level.

        L_train(w, α) = mean_i ℓ_i(w) + Σ_pixels s_p·‖w_p‖²,      s in [1e-6, 1]

    150 training examples, 300 for validation, 1347 for the test; full batches, 200 steps of SGD from zero weights.

    Args:
        seed: Seeds the splits.
        device: Where to compute.
    """

    name: ClassVar[str] = "digits-l2"
    summary: ClassVar[str] = (
        "scikit-learn digits, softmax regression: 64 L2 strengths, one a pixel, seeded by one level"
    )
    settings: ClassVar[Settings] = Settings(
        horizon=10,
        n_outer_steps=30,
        outer_lr=0.3,
        evaluate=Retrain(200),
        evaluate_every=5,
        trust_radius=0.25,
        patience=2,
        policy=Promising(0.1, n_startup_trials=0, share=0.4),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"strength": 1e-3}
    diagnostics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._splits = load_splits(150, 300, torch.Generator().manual_seed(seed), self._device)

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        level = trial.suggest_float("strength", 1e-6, 1.0, log=True)
        alpha.tensor("strengths", torch.full((64,), level), Interval(1e-6, 1.0, log=True))
        model = nn.Linear(64, N_CLASSES)
        for weights in model.parameters():
            nn.init.zeros_(weights)
        problem = BilevelProblem(
            model=model.to(self._device),
            train_loss=_penalized_loss,
            val_loss=cleaning.clean_loss,
            train_batches=self._splits.train,
            val_batches=self._splits.val,
            test_batches=self._splits.test,
            metrics={"accuracy": accuracy},
            cuda_graphs=True,
        )
        return problem, SGD(lr=0.5, momentum=0.9)

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


def _penalized_loss(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    weight = dict(model.named_parameters())["weight"]
    return F.cross_entropy(model(images), labels) + (alpha["strengths"] * weight.square()).sum()
