"""Several losses on one network: how much each auxiliary head counts is a hyperparameter, judged by the main one alone.

L_train(w, α) = ℓ_digit + a_parity·ℓ_parity + a_high·ℓ_high + a_loop·ℓ_loop + a_reconstruction·ℓ_reconstruction
"""

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
from optuna_greedyhg.tasks.base import Settings
from optuna_greedyhg.tasks.digits import N_CLASSES, load_splits
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.policies import Promising

_WITH_LOOP = (0, 6, 8, 9)
_QUESTIONS = ("parity", "high", "loop")  # each answered by one logit, in this order
_HEADS = (*_QUESTIONS, "reconstruction")


class DigitsHeads:
    """Which digit; beside it whether it is odd, at least 5, drawn with a loop, and what the image was.

    A shared tanh layer of 32 units and linear heads; 100 training examples, 300 for validation, 1397 for the test; full
    batches, SGD with momentum 0.9. The learning rate and the weight decay are refined, too.

    Args:
        seed: Seeds splits and initial weights.
        device: Where to compute.
    """

    name: ClassVar[str] = "digits-heads"
    summary: ClassVar[str] = "scikit-learn digits: weights of four auxiliary heads, lr, weight decay"
    settings: ClassVar[Settings] = Settings(
        horizon=10,
        n_outer_steps=60,
        outer_lr=0.1,
        evaluate=Retrain(300),
        evaluate_every=10,
        patience=2,
        policy=Promising(0.1, n_startup_trials=0, share=0.3),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 0.1, "weight_decay": 1e-4, **dict.fromkeys(_HEADS, 0.1)}
    diagnostics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._splits = load_splits(100, 300, torch.Generator().manual_seed(seed), self._device)
        self._seed = seed

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        alpha.suggest_float("lr", 1e-3, 1.0, log=True)
        alpha.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
        for head in _HEADS:
            alpha.suggest_float(head, 1e-3, 10.0, log=True)
        with randomness.seeded(self._seed, torch.device("cpu")):
            model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, N_CLASSES + len(_QUESTIONS) + 64))
        problem = BilevelProblem(
            model=model.to(self._device),
            train_loss=_train_loss,
            val_loss=_digit_loss,
            train_batches=self._splits.train,
            val_batches=self._splits.val,
            test_batches=self._splits.test,
            metrics={"accuracy": _accuracy},
            cuda_graphs=True,
        )
        return problem, SGD(lr="lr", momentum=0.9, weight_decay="weight_decay")

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


def answers(labels: Tensor) -> Tensor:
    """Whether digits are odd, at least 5, and drawn with a loop; float32 of shape (n, 3)."""
    loops = torch.stack([labels == digit for digit in _WITH_LOOP]).any(dim=0)
    return torch.stack([labels % 2 == 1, labels >= 5, loops], dim=1).float()


def _train_loss(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    logits, questions, reconstruction = model(images).split([N_CLASSES, len(_QUESTIONS), 64], dim=1)
    asked = F.binary_cross_entropy_with_logits(questions, answers(labels), reduction="none").mean(dim=0)
    losses = [*asked, F.mse_loss(reconstruction, images)]
    weighted = [alpha[head] * loss for head, loss in zip(_HEADS, losses, strict=True)]
    return F.cross_entropy(logits, labels) + torch.stack(weighted).sum()


def _digit_loss(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    logits: Tensor = model(images)[:, :N_CLASSES]
    return F.cross_entropy(logits, labels)


def _accuracy(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    predictions: Tensor = model(images)[:, :N_CLASSES].argmax(dim=1)
    return (predictions == labels).double().mean()
