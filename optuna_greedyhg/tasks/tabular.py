"""Linear models on scikit-learn's tables, with an L2 and a smooth L1 strength for every feature.

    L_train(w, α) = mean_i ℓ_i(w) + Σ_features a_f·‖w_f‖² + b_f·Σ_k (√(w_fk² + ε²) − ε)

The sampler seeds the two common levels, gradients refine the vectors a and b: an elastic net whose strengths tell
useful features from useless ones. Features are standardized by the training split.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from optuna.trial import BaseTrial
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor, nn

from optuna_greedyhg.hypergrad.domains import Interval
from optuna_greedyhg.hypergrad.evaluation import Retrain
from optuna_greedyhg.hypergrad.problem import BilevelProblem, Loss, Model
from optuna_greedyhg.hypergrad.update_rules import SGD, UpdateRule
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.base import Settings, accuracy
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.policies import Promising

_L2, _L1 = Interval(1e-6, 1.0, log=True), Interval(1e-6, 0.1, log=True)
_EPSILON = 1e-2  # of the smooth L1, for standardized features


class _Tabular:
    """A table, split into thirds of which the last is the larger; softmax or least squares, 200 full-batch steps.

    Args:
        seed: Seeds the splits.
        device: Where to compute.
    """

    name: ClassVar[str]
    n_outputs: ClassVar[int]
    """Number of classes; 1 for a regression, whose targets are standardized, too."""
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
    defaults: ClassVar[Mapping[str, Any]] = {"l2_level": 1e-3, "l1_level": 1e-4}
    diagnostics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        features, targets = self._load()
        x, y = torch.as_tensor(features, dtype=torch.float32), torch.as_tensor(targets)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        n_train = n_val = len(x) // 3
        train = order[:n_train]
        x = _standardized(x, train)
        y = y.long() if self.n_outputs > 1 else _standardized(y.float().unsqueeze(1), train)
        cuts = [n_train, n_val, len(x) - n_train - n_val]
        parts = zip(torch.split(x[order].to(device), cuts), torch.split(y[order].to(device), cuts), strict=True)
        self._train, self._val, self._test = parts
        self._device = torch.device(device)

    def _load(self) -> tuple[Any, Any]:
        """Features, shape (n, d), and targets, shape (n,), as NumPy arrays."""
        raise NotImplementedError

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        n_features = self._train[0].shape[1]
        l2 = trial.suggest_float("l2_level", _L2.low, _L2.high, log=True)
        l1 = trial.suggest_float("l1_level", _L1.low, _L1.high, log=True)
        alpha.tensor("l2", torch.full((n_features,), l2), _L2)
        alpha.tensor("l1", torch.full((n_features,), l1), _L1)
        model = nn.Linear(n_features, self.n_outputs)
        for weights in model.parameters():
            nn.init.zeros_(weights)
        classifies = self.n_outputs > 1
        loss = cleaning.clean_loss if classifies else _squared_loss
        problem = BilevelProblem(
            model=model.to(self._device),
            train_loss=partial(_penalized_loss, loss),
            val_loss=loss,
            train_batches=self._train,
            val_batches=self._val,
            test_batches=self._test,
            metrics={"accuracy": accuracy} if classifies else None,
            cuda_graphs=True,
        )
        return problem, SGD(lr=0.1, momentum=0.9)

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}


class DiabetesRidge(_Tabular):
    """Disease progression of 442 patients by 10 measurements and all their products: 65 features."""

    name: ClassVar[str] = "diabetes-ridge"
    summary: ClassVar[str] = "scikit-learn diabetes, least squares: an L2 and an L1 strength for each of 65 features"
    n_outputs: ClassVar[int] = 1

    def _load(self) -> tuple[Any, Any]:
        features, targets = load_diabetes(return_X_y=True)
        return PolynomialFeatures(2, include_bias=False).fit_transform(features), targets


class BreastCancerRidge(_Tabular):
    """569 tumours, benign or malignant, by 30 features."""

    name: ClassVar[str] = "breast-cancer-ridge"
    summary: ClassVar[str] = "scikit-learn breast cancer, softmax: an L2 and an L1 strength for each of 30 features"
    n_outputs: ClassVar[int] = 2

    def _load(self) -> tuple[Any, Any]:
        features, targets = load_breast_cancer(return_X_y=True)
        return features, targets


class WineRidge(_Tabular):
    """178 wines of three growers by 13 features."""

    name: ClassVar[str] = "wine-ridge"
    summary: ClassVar[str] = "scikit-learn wine, softmax: an L2 and an L1 strength for each of 13 features"
    n_outputs: ClassVar[int] = 3

    def _load(self) -> tuple[Any, Any]:
        features, targets = load_wine(return_X_y=True)
        return features, targets


def _standardized(x: Tensor, rows: Tensor) -> Tensor:
    """Columns of zero mean and unit deviation on some of the rows."""
    return (x - x[rows].mean(dim=0)) / x[rows].std(dim=0).clamp_min(1e-12)


def _squared_loss(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    features, targets = batch
    return F.mse_loss(model(features), targets)


def _penalized_loss(loss: Loss, model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    weight = dict(model.named_parameters())["weight"]
    l1 = (weight.square() + _EPSILON**2).sqrt() - _EPSILON
    return loss(model, alpha, batch) + (alpha["l2"] * weight.square() + alpha["l1"] * l1).sum()
