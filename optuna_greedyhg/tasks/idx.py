"""Reads idx files, the format of MNIST: two zero bytes, a type, a number of dimensions, their sizes, the data."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

_UNSIGNED_BYTE = 0x08


class DataError(Exception):
    """A task's data is not there, or cannot be read."""


def read_idx(path: Path) -> Tensor:
    """The array in an idx file of unsigned bytes, gzipped or not; uint8, of the shape that the file declares.

    Raises:
        DataError: If the file is not in this format, or shorter or longer than it declares.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path} is not an idx file of unsigned bytes: it begins with {raw[:4].hex() or 'nothing'}.")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"{path} declares {math.prod(shape)} bytes of data, but holds {len(raw) - start}; copy it again."
        )
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=start).reshape(shape)


def read_images_and_labels(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images, float32 in [0, 1] of shape (n, 1, height, width), and labels, int64 of shape (n,).

    Args:
        folder: Holds ``<part>-images-idx3-ubyte`` and ``<part>-labels-idx1-ubyte``, each with or without ``.gz``; the
            names may have a prefix that ends in ``-``, as in ``mnist-train-images-idx3-ubyte.gz``.
        part: ``"train"`` or ``"t10k"``.

    Raises:
        DataError: If the folder or a file is missing or cannot be read.
    """
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"))
    if len(images) != len(labels):
        raise DataError(
            f"{folder} holds {len(images)} {part} images, but {len(labels)} labels; do they belong together?"
        )
    return images.float().div(255).unsqueeze(1), labels.long()


def _find(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"The data folder {folder} does not exist, or is no folder; name the one that holds {name}.gz.")
    found = sorted(p for p in folder.iterdir() if p.name.removesuffix(".gz") == name or _without_prefix(p.name) == name)
    if not found:
        raise DataError(f"The data folder {folder} holds no {name} or {name}.gz; name the one that does.")
    return found[0]


def _without_prefix(name: str) -> str:
    return name.removesuffix(".gz").partition("-")[2]
