"""A network on digits with ten scalar hyperparameters, all of them seeded by the sampler and refined.

    L_train(w, α) = smoothed cross-entropy of noisy images − c·entropy + Σ_layers a_l·‖W_l‖²

Noise is reparameterized, σ·ε with ε from torch's generator, so that it is differentiable in σ and replayed with a step.
"""

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
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.policies import Promising

_DECAYS = ("decay_1", "decay_2", "decay_3")
_NOISES = ("input_noise", "hidden_noise_1", "hidden_noise_2")


class NoisyMLP(nn.Module):
    """A tanh network 64-32-32-10 that can add Gaussian noise to its input and to each hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, N_CLASSES)])

    def forward(self, x: Tensor, *deviations: Tensor) -> Tensor:
        """Logits; ``deviations`` are the standard deviations of the noise before each layer, or none at all."""
        for k, layer in enumerate(self.layers):
            x = torch.tanh(x) if k > 0 else x
            x = layer(x + deviations[k] * torch.randn_like(x) if deviations else x)
        return x


class DigitsMLP:
    """The learning rate, the momentum, a weight decay for each layer, label smoothing, three noises, and a penalty.

    200 training examples, 300 for validation, 1297 for the test; full batches.

    Args:
        seed: Seeds splits and initial weights.
        device: Where to compute.
    """

    name: ClassVar[str] = "digits-mlp"
    summary: ClassVar[str] = "scikit-learn digits, a network of three layers: ten scalars, from lr to label smoothing"
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
        "lr": 0.1,
        "momentum": 0.9,
        **dict.fromkeys(_DECAYS, 1e-4),
        **dict.fromkeys(_NOISES, 0.05),
        "label_smoothing": 0.05,
        "confidence_penalty": 0.01,
    }
    diagnostics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._splits = load_splits(200, 300, torch.Generator().manual_seed(seed), self._device)
        self._seed = seed

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        alpha.suggest_float("lr", 1e-3, 1.0, log=True)
        alpha.suggest_float("momentum", 0.5, 0.99)
        for name in _DECAYS:
            alpha.suggest_float(name, 1e-6, 1e-1, log=True)
        for name in _NOISES:
            alpha.suggest_float(name, 0.0, 1.0)
        alpha.suggest_float("label_smoothing", 0.0, 0.5)
        alpha.suggest_float("confidence_penalty", 0.0, 0.5)
        with randomness.seeded(self._seed, torch.device("cpu")):
            model = NoisyMLP()
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
        return problem, SGD(lr="lr", momentum="momentum")

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: Tensor) -> Tensor:
    """As ``F.cross_entropy(label_smoothing=...)``, and differentiable in the smoothing; the mean over examples."""
    losses = -torch.log_softmax(logits, dim=1)
    of_label = losses.gather(1, labels.unsqueeze(1)).squeeze(1)
    return ((1 - smoothing) * of_label + smoothing * losses.mean(dim=1)).mean()


def _train_loss(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    logits = model(images, *(alpha[name] for name in _NOISES))
    log_probabilities = torch.log_softmax(logits, dim=1)
    negative_entropy = (log_probabilities.exp() * log_probabilities).sum(dim=1).mean()
    matrices = [w for _, w in model.named_parameters() if w.ndim == 2]
    penalties = [alpha[name] * w.square().sum() for name, w in zip(_DECAYS, matrices, strict=True)]
    fit = smoothed_cross_entropy(logits, labels, alpha["label_smoothing"])
    return fit + alpha["confidence_penalty"] * negative_entropy + torch.stack(penalties).sum()
