"""Writes idx files as MNIST's, of images whose class can be seen."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor


def write_idx(path: Path, array: Tensor) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.to(torch.uint8).numpy().tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_folder(folder: Path, n_train: int, n_val: int, *, prefix: str = "", suffix: str = ".gz") -> None:
    for part, n in (("train", n_train), ("t10k", n_val)):
        labels = torch.arange(n) % 10
        images = torch.zeros(n, 28, 28)
        images[torch.arange(n), 2 * labels] = 255
        write_idx(folder / f"{prefix}{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}{part}-labels-idx1-ubyte{suffix}", labels)
