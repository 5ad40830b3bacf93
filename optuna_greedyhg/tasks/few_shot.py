"""Few-shot learning: every episode is a task of a few classes with a few examples each, drawn from many classes.

The network warps: every other layer is a hyperparameter, which all episodes share, and the layers between are trained
on each episode anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optuna_greedyhg.hypergrad.episodes import Episode

WARP_LAYERS = ("3", "4", "10", "11", "17", "18")
"""The layers 2, 4 and 6 of ``make_warp_net``, each a convolution and its normalization."""


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class FewShot:
    """Episodes of ``n_way`` classes, with ``n_shot`` images of each to train on and ``n_val`` others to be judged by.

    Args:
        images: Shape (classes, images of each, channels, height, width).
        n_way: Number of classes in an episode.
        n_shot: Number of training images of each class.
        n_val: Number of validation images of each class.

    Raises:
        ValueError: If there are too few classes, or images of each.
    """

    images: Tensor
    n_way: int
    n_shot: int
    n_val: int

    def __post_init__(self) -> None:
        n_classes, n_images = self.images.shape[:2]
        if not (1 <= self.n_way <= n_classes and self.n_shot >= 1 and self.n_val >= 1):
            raise ValueError(
                f"An episode needs 1 to {n_classes} classes and at least one image to train on and one to validate on, "
                f"but got n_way={self.n_way}, n_shot={self.n_shot}, n_val={self.n_val}."
            )
        if self.n_shot + self.n_val > n_images:
            raise ValueError(f"There are {n_images} images of each class, fewer than {self.n_shot} + {self.n_val}.")

    def draw(self) -> Episode:
        """An episode of full batches, drawn with torch's global generator."""
        n_classes, n_images = self.images.shape[:2]
        classes = torch.randperm(n_classes)[: self.n_way]
        chosen = torch.rand(self.n_way, n_images).argsort(dim=1)[:, : self.n_shot + self.n_val]
        images = self.images[classes[:, None], chosen]
        return Episode(_batch(images[:, : self.n_shot]), _batch(images[:, self.n_shot :]))

    def draw_many(self, n: int, seed: int) -> list[Episode]:
        """``n`` episodes of a seed, which leave the global generator as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [self.draw() for _ in range(n)]


def make_warp_net(n_channels: int, size: int, n_way: int, width: int = 32) -> nn.Sequential:
    """Three blocks of two 3×3 convolutions, of which the second warps, and 2×2 max-pooling; then a linear head.

    Every convolution is normalized by its batch's own statistics, in evaluation, too, as is usual in few-shot learning:
    what an image is taken for depends on the others. Without, training at the rates that the papers give diverges, or
    nothing reaches the head. Leaky ReLU comes after the pooling, of which it is a quarter of the work and, being
    increasing, the same function.

    Args:
        n_channels: Number of channels of an image.
        size: Height and width of an image.
        n_way: Number of classes.
        width: Number of channels of each convolution.
    """
    layers: list[nn.Module] = []
    for n_in in (n_channels, width, width):
        layers += [*_convolution(n_in, width), nn.LeakyReLU()]
        layers += [*_convolution(width, width), nn.MaxPool2d(2), nn.LeakyReLU()]
        size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, n_way))


def _convolution(n_in: int, n_out: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out, track_running_stats=False)


def _batch(images: Tensor) -> tuple[Tensor, Tensor]:
    """(classes, images of each, ...) as images and labels."""
    labels = torch.arange(len(images), device=images.device).repeat_interleave(images.shape[1])
    return images.flatten(0, 1).to(memory_format=torch.channels_last), labels
