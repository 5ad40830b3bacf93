"""Hyper-cleaning at size: one weight for each of 50 000 training images, in minibatches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from optuna.trial import BaseTrial
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.evaluation import Online
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.update_rules import SGD, UpdateRule
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.base import Settings, accuracy
from optuna_greedyhg.tasks.fashion import EVAL_BATCH, N_CLASSES, batched, make_conv_net, read_files
from optuna_greedyhg.trials.alpha import Alpha

_BATCH = 500


class FashionWeights:
    """The training file's images, of which half have their label replaced, but for a sixth that validates, clean.

    The network is that of ``fashion-cleaning``, trained on batches of 500 by SGD with momentum 0.9, whose learning rate
    the sampler suggests; the test file is the test split. A trial sees every image 30 times.

    Args:
        folder: Holds the four idx files.
        seed: Seeds the splits, corruption and initial weights.
        device: Where to compute.
        share: The share of training labels that are replaced.
        val_batch: Number of validation images that one hypergradient term sees.

    Raises:
        DataError: If there is no folder, or its files cannot be read.
    """

    name: ClassVar[str] = "fashion-weights"
    summary: ClassVar[str] = (
        "Fashion-MNIST from a folder of idx files, half of the labels corrupted: 50 000 example weights, minibatches"
    )
    settings: ClassVar[Settings] = Settings(
        horizon=10, n_outer_steps=300, outer_lr=0.1, evaluate=Online(), evaluate_every=25, inherit=True
    )
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 0.05}
    diagnostics: ClassVar[tuple[str, ...]] = cleaning.DIAGNOSTICS

    def __init__(
        self,
        folder: Path | None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        share: float = 0.5,
        val_batch: int = 100,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        (images, labels), (test_images, test_labels) = read_files(folder, self.name)
        order = torch.randperm(len(labels), generator=generator)
        held_out, chosen = order[: len(order) // 6], order[len(order) // 6 :]
        noisy, self.is_wrong = cleaning.corrupt(labels[chosen], share, N_CLASSES, generator)
        self._train = TensorDataset(*(x.to(device) for x in (images[chosen], noisy, torch.arange(len(chosen)))))
        self._val = batched(images[held_out].to(device), labels[held_out].to(device), val_batch)
        self._test = batched(test_images.to(device), test_labels.to(device), EVAL_BATCH)
        self._device = torch.device(device)
        self._seed = seed

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        lr = trial.suggest_float("lr", 1e-2, 0.3, log=True)
        alpha.tensor(cleaning.LOGITS, torch.zeros(len(self.is_wrong)))
        with randomness.seeded(self._seed, torch.device("cpu")):
            model = make_conv_net()
        problem = BilevelProblem(
            model=model.to(self._device),
            train_loss=cleaning.weighted_loss,
            val_loss=cleaning.clean_loss,
            train_batches=_shuffled(self._train),
            val_batches=self._val,
            test_batches=self._test,
            metrics={"accuracy": accuracy},
            cuda_graphs=True,
        )
        return problem, SGD(lr=lr, momentum=0.9)

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return cleaning.mean_weights(values[cleaning.LOGITS], self.is_wrong)


def _shuffled(dataset: TensorDataset) -> DataLoader[Any]:
    """Batches that are indexed at once, instead of put together image by image, which takes longer than a step."""
    order = BatchSampler(RandomSampler(dataset), batch_size=_BATCH, drop_last=False)
    return DataLoader(dataset, sampler=order, batch_size=None)
