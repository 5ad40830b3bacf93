"""Discrete and continuous together: the network's shape is black-box, how it is trained is refined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from optuna.trial import BaseTrial
from torch import Tensor, nn

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.evaluation import Retrain
from optuna_greedyhg.hypergrad.problem import BilevelProblem, Model
from optuna_greedyhg.hypergrad.update_rules import SGD, UpdateRule
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.base import Settings, accuracy
from optuna_greedyhg.tasks.digits import N_CLASSES, load_splits
from optuna_greedyhg.tasks.digits_mlp import smoothed_cross_entropy
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.policies import Promising

_ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class DigitsMixed:
    """Width, depth and activation by the sampler alone; learning rate, weight decay, label smoothing, noise refined.

    150 training examples, 300 for validation, 1347 for the test; full batches, SGD with momentum 0.9. A wider network
    costs no more, as costs are counted in examples.

    Args:
        seed: Seeds splits and initial weights.
        device: Where to compute.
    """

    name: ClassVar[str] = "digits-mixed"
    summary: ClassVar[str] = "scikit-learn digits: shape of a network black-box; lr, decay, smoothing, noise refined"
    settings: ClassVar[Settings] = Settings(
        horizon=10,
        n_outer_steps=60,
        outer_lr=0.1,
        evaluate=Retrain(300),
        evaluate_every=10,
        patience=2,
        policy=Promising(0.1, n_startup_trials=0, share=0.3),
    )
    defaults: ClassVar[Mapping[str, Any]] = {
        "width": 32,
        "depth": 1,
        "activation": "relu",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "label_smoothing": 0.05,
        "input_noise": 0.05,
    }
    diagnostics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._splits = load_splits(150, 300, torch.Generator().manual_seed(seed), self._device)
        self._seed = seed

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        width = alpha.suggest_int("width", 8, 128, log=True)
        depth = alpha.suggest_int("depth", 1, 3)
        activation = alpha.suggest_categorical("activation", list(_ACTIVATIONS))
        alpha.suggest_float("lr", 1e-3, 1.0, log=True)
        alpha.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
        alpha.suggest_float("label_smoothing", 0.0, 0.5)
        alpha.suggest_float("input_noise", 0.0, 1.0)
        with randomness.seeded(self._seed, torch.device("cpu")):
            model = make_mlp(width, depth, activation)
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
        return problem, SGD(lr="lr", momentum=0.9, weight_decay="weight_decay")

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


def make_mlp(width: int, depth: int, activation: str) -> nn.Sequential:
    """``depth`` hidden layers of a width."""
    layers: list[nn.Module] = []
    for n_in in (64, *[width] * (depth - 1)):
        layers += [nn.Linear(n_in, width), _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(width, N_CLASSES))


def _train_loss(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    noisy = images + alpha["input_noise"] * torch.randn_like(images)
    return smoothed_cross_entropy(model(noisy), labels, alpha["label_smoothing"])
