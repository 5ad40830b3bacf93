"""Augmentation of digits with fifteen magnitudes, all of them seeded by the sampler and refined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from optuna.trial import BaseTrial
from torch import Tensor, nn

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.evaluation import Retrain
from optuna_greedyhg.hypergrad.problem import BilevelProblem, Model
from optuna_greedyhg.hypergrad.update_rules import SGD, UpdateRule
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.augmentation import MAGNITUDES, augment
from optuna_greedyhg.tasks.base import Settings, accuracy
from optuna_greedyhg.tasks.digits import N_CLASSES, load_splits
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.policies import Promising


class DigitsAugment:
    """How far to rotate, shift, blur, ... the few training images; validation and test see theirs as they are.

    A tanh network 64-32-10, 100 training examples, 300 for validation, 1397 for the test; full batches, 200 steps of
    SGD with momentum 0.9.

    Args:
        seed: Seeds splits and initial weights.
        device: Where to compute.
    """

    name: ClassVar[str] = "digits-augment"
    summary: ClassVar[str] = "scikit-learn digits, 100 training images: fifteen magnitudes of augmentation"
    settings: ClassVar[Settings] = Settings(
        horizon=10,
        n_outer_steps=60,
        outer_lr=0.1,
        evaluate=Retrain(200),
        evaluate_every=10,
        patience=2,
        policy=Promising(0.1, n_startup_trials=0, share=0.3),
    )
    defaults: ClassVar[Mapping[str, Any]] = {name: high / 10 for name, high in MAGNITUDES.items()}
    diagnostics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._splits = load_splits(100, 300, torch.Generator().manual_seed(seed), self._device)
        self._seed = seed

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        for name, high in MAGNITUDES.items():
            alpha.suggest_float(name, 0.0, high)
        with randomness.seeded(self._seed, torch.device("cpu")):
            model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, N_CLASSES))
        problem = BilevelProblem(
            model=model.to(self._device),
            train_loss=_train_loss,
            val_loss=cleaning.clean_loss,
            train_batches=self._splits.train,
            val_batches=self._splits.val,
            test_batches=self._splits.test,
            metrics={"accuracy": accuracy},
            cuda_graphs=True,
        )
        return problem, SGD(lr=0.1, momentum=0.9)

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


def _train_loss(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(augment(images, alpha)), labels)
