"""The paper's hyper-cleaning of Fashion-MNIST, which reads MNIST as well: both come as idx files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from optuna.trial import BaseTrial
from torch import Tensor, nn

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.evaluation import Online
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.update_rules import SGD, UpdateRule
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.base import Settings, accuracy
from optuna_greedyhg.tasks.idx import DataError, read_images_and_labels
from optuna_greedyhg.trials.alpha import Alpha

N_CLASSES = 10
N_TRAIN = 1000
EVAL_BATCH = 1000


class FashionCleaning:
    """Hyper-cleaning of 1000 training images, as in the paper: one weight an example, judged online.

    Three convolutions of 8 channels and a linear layer; full batches; SGD with momentum 0.9, whose learning rate the
    sampler suggests. As in the paper, the 10 000 images of the test file validate. Another 10 000 of the training file,
    which serve for nothing else, are the test split. Unlike in the paper, a hypergradient sees the validation images in
    batches of ``val_batch``; evaluations see all.

    Args:
        folder: Holds the four idx files.
        seed: Seeds the choice of images, corruption and initial weights.
        device: Where to compute.
        share: The share of training labels that are replaced.
        val_batch: Number of validation images that one hypergradient term sees.

    Raises:
        DataError: If there is no folder, or its files cannot be read.

    Source: Yakovlev, 2024, "data hyper-cleaning".
    """

    name: ClassVar[str] = "fashion-cleaning"
    summary: ClassVar[str] = (
        "Fashion-MNIST from a folder of idx files, half of the labels corrupted: 1000 example weights"
    )
    settings: ClassVar[Settings] = Settings(
        horizon=10, n_outer_steps=200, outer_lr=0.1, evaluate=Online(), evaluate_every=10, inherit=True
    )
    defaults: ClassVar[Mapping[str, Any]] = {"lr": 0.1}
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
        (images, labels), (val_images, val_labels) = read_files(folder, self.name)
        order = torch.randperm(len(labels), generator=generator)
        chosen, held_out = order[:N_TRAIN], order[N_TRAIN : N_TRAIN + 10_000]
        noisy, self.is_wrong = cleaning.corrupt(labels[chosen], share, N_CLASSES, generator)
        self._train = tuple(x.to(device) for x in (images[chosen], noisy, torch.arange(N_TRAIN)))
        self._val = batched(val_images.to(device), val_labels.to(device), val_batch)
        self._test = batched(images[held_out].to(device), labels[held_out].to(device), EVAL_BATCH)
        self._device = torch.device(device)
        self._seed = seed

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[BilevelProblem, UpdateRule]:
        lr = trial.suggest_float("lr", 1e-2, 0.3, log=True)
        alpha.tensor(cleaning.LOGITS, torch.zeros(N_TRAIN))
        return self.problem(), SGD(lr=lr, momentum=0.9)

    def problem(self) -> BilevelProblem:
        """The network, the losses and the data; the example weights' logits are called ``example_logits`` in α."""
        with randomness.seeded(self._seed, torch.device("cpu")):
            model = make_conv_net()
        return BilevelProblem(
            model=model.to(self._device),
            train_loss=cleaning.weighted_loss,
            val_loss=cleaning.clean_loss,
            train_batches=self._train,
            val_batches=self._val,
            test_batches=self._test,
            metrics={"accuracy": accuracy},
            cuda_graphs=True,
        )

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        return cleaning.mean_weights(values[cleaning.LOGITS], self.is_wrong)


def make_conv_net() -> nn.Sequential:
    """The paper's network for 28×28 images: 3 × (5×5 convolution of 8 channels, leaky ReLU, 2×2 max-pool), linear.

    Leaky ReLU comes after the pooling, of which it is a quarter of the work and, being increasing, the same function.
    """
    layers: list[nn.Module] = []
    for n_in in (1, 8, 8):
        layers += [nn.Conv2d(n_in, 8, kernel_size=5, padding=2), nn.MaxPool2d(2), nn.LeakyReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 3 * 3, N_CLASSES))
    for p in net.parameters():  # about twice as fast on a CPU
        p.data = p.data.contiguous(memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format)
    return net


def read_files(folder: Path | None, task: str) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels of the training file, and of the test file, in the layout that the network likes.

    Raises:
        DataError: If there is no folder, or its files cannot be read.
    """
    if folder is None:
        raise DataError(f"{task} needs a data folder with Fashion-MNIST's four idx files.")

    def read(kind: str) -> tuple[Tensor, Tensor]:
        images, labels = read_images_and_labels(folder, kind)
        # By to(): contiguous() leaves images of one channel as they are, and then all layers get the slow layout.
        return images.to(memory_format=torch.channels_last), labels

    return read("train"), read("t10k")


def batched(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches in their order."""
    return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
