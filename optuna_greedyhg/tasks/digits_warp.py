"""Few-shot learning of digits: a layer that warps, learnt on many episodes of five digits, tested on the other five."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from optuna.trial import BaseTrial
from sklearn.datasets import load_digits
from torch import Tensor, nn

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.episodes import MetaProblem
from optuna_greedyhg.hypergrad.evaluation import Retrain
from optuna_greedyhg.hypergrad.update_rules import SGD, UpdateRule
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.base import Settings, accuracy
from optuna_greedyhg.tasks.few_shot import FewShot
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.policies import Promising

_N_IMAGES = 150  # of each digit
_HORIZON = 5


class DigitsWarp:
    """Three digits told apart after five steps on two images of each; the layer in the middle is a hyperparameter.

    A ReLU network 64-32-32-3 whose second layer, 1056 numbers, is shared by all episodes and refined; the others are
    trained on each episode anew, at a learning rate that the sampler suggests. Half of the images of the digits 0 to 4
    make the episodes of training, the other half 20 episodes of validation; the test has 20 of the digits 5 to 9.

    Args:
        seed: Seeds images, held-out episodes and initial weights.
        device: Where to compute.
    """

    name: ClassVar[str] = "digits-warp"
    summary: ClassVar[str] = "scikit-learn digits, few-shot episodes: a warp layer of 1056 weights"
    settings: ClassVar[Settings] = Settings(
        horizon=_HORIZON,
        n_outer_steps=60,
        outer_lr=3e-3,
        evaluate=Retrain(_HORIZON),
        evaluate_every=10,
        patience=2,
        policy=Promising(0.3),
    )
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 0.3}
    diagnostics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, seed: int = 0, device: torch.device | str = "cpu") -> None:
        images, labels = load_digits(return_X_y=True)
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.as_tensor(images, dtype=torch.float32) / 16, torch.as_tensor(labels)
        order = torch.randperm(len(y), generator=generator)
        of_digits = torch.stack([x[order][y[order] == digit][:_N_IMAGES] for digit in range(10)]).to(device)
        # As one channel of 8×8 images, which the network's first layer flattens.
        of_digits = of_digits.reshape(10, _N_IMAGES, 1, 8, 8)
        half = _N_IMAGES // 2
        self._episodes = FewShot(of_digits[:5, :half], n_way=3, n_shot=2, n_val=10)
        self._val = FewShot(of_digits[:5, half:], n_way=3, n_shot=2, n_val=10).draw_many(20, seed)
        self._test = FewShot(of_digits[5:], n_way=3, n_shot=2, n_val=10).draw_many(20, seed)
        self._device = torch.device(device)
        self._seed = seed

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[MetaProblem, UpdateRule]:
        lr = trial.suggest_float("lr", 1e-2, 3.0, log=True)
        with randomness.seeded(self._seed, torch.device("cpu")):
            model = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
            )
        problem = MetaProblem(
            model=model.to(self._device),
            outer_parameters=["3"],
            train_loss=cleaning.clean_loss,
            val_loss=cleaning.clean_loss,
            draw=self._episodes.draw,
            n_episodes=4,
            val_episodes=self._val,
            test_episodes=self._test,
            metrics={"accuracy": accuracy},
            cuda_graphs=True,
        )
        for name, weights in problem.outer_parameters.items():
            alpha.tensor(name, weights)
        return problem, SGD(lr=lr, momentum=0.9)

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return {}
