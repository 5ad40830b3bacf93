"""Repeatable randomness: every window of training draws from its own seed, and a step can be replayed exactly.

Dropout, augmentation and shuffling draw from torch's global generators, or from those of Python and NumPy. A window
runs under ``seeded``, so that the same seed gives the same training whatever ran before it, and the caller's generators
are left as they were. The global generators belong to the process: trials in several *threads* that use dropout, or
shuffle, are not repeatable; processes are. Neither is what draws from a generator of its own that nobody can find, as a
dataset may from ``numpy.random.default_rng()``.

Within a window, a step is replayed from the state of torch's generators alone: its batch is kept, and what is left to
draw, in a loss or a model, is drawn from these.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

RandomState = tuple[Tensor, ...]
"""The states of torch's global generators, first the CPU's, and of others; tensors on the CPU."""


@contextmanager
def seeded(seed: int, device: torch.device, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Runs the block with all global generators, and those given, seeded, and puts them back afterwards."""
    with _preserved(device, generators), _others_seeded(seed):
        for generator in (torch.default_generator, *generators):
            generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield


@contextmanager
def restored(state: RandomState, device: torch.device, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Runs the block from a captured random state, and puts the present one back afterwards."""
    with _preserved(device, generators):
        _restore(state, device, generators)
        yield


def capture(device: torch.device, generators: Sequence[torch.Generator] = ()) -> RandomState:
    """The state of the generators that a step on ``device`` may draw from, and of those given."""
    state: tuple[Tensor, ...] = (torch.get_rng_state(),)
    if device.type == "cuda":
        state += (torch.cuda.get_rng_state(device),)
    return (*state, *(generator.get_state() for generator in generators))


def capture_others() -> tuple[Any, Any]:
    """The states of Python's global generator, and of NumPy's, if the process has NumPy: who draws has imported it."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def restore_others(state: tuple[Any, Any]) -> None:
    """Puts these generators into a captured state."""
    pythons, numpys = state
    random.setstate(pythons)
    if numpys is not None:
        sys.modules["numpy"].random.set_state(numpys)


@contextmanager
def _others_seeded(seed: int) -> Iterator[None]:
    present = capture_others()
    random.seed(seed)
    if present[1] is not None:
        sys.modules["numpy"].random.seed(seed % 2**32)
    try:
        yield
    finally:
        restore_others(present)


@contextmanager
def _preserved(device: torch.device, generators: Sequence[torch.Generator]) -> Iterator[None]:
    present = capture(device, generators)
    try:
        yield
    finally:
        _restore(present, device, generators)


def _restore(state: RandomState, device: torch.device, generators: Sequence[torch.Generator]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
    for generator, its in zip(generators, state[len(state) - len(generators) :], strict=True):
        generator.set_state(its)
