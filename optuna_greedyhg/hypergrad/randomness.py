"""Repeatable randomness: every window of training draws from its own seed, and a step can be replayed exactly.

Dropout, augmentation and shuffling draw from torch's global generators. A window runs under ``seeded``, so that the
same seed gives the same training whatever ran before it, and the caller's generators are left as they were. The global
generators belong to the process: trials in several *threads* that use dropout, or shuffle, are not repeatable;
processes are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

RandomState = tuple[Tensor, ...]


@contextmanager
def seeded(seed: int, device: torch.device, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Runs the block with torch's global generators, and those given, seeded, and puts them back afterwards."""
    states = [generator.get_state() for generator in generators]
    try:
        with _preserved(device):
            for generator in (torch.default_generator, *generators):
                generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed(seed)
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def restored(state: RandomState, device: torch.device) -> Iterator[None]:
    """Runs the block from a captured random state, and puts the present one back afterwards."""
    with _preserved(device):
        _restore(state, device)
        yield


def capture(device: torch.device) -> RandomState:
    """The state of the generators that a step on ``device`` may draw from."""
    state: tuple[Tensor, ...] = (torch.get_rng_state(),)
    if device.type == "cuda":
        state += (torch.cuda.get_rng_state(device),)
    return state


@contextmanager
def _preserved(device: torch.device) -> Iterator[None]:
    present = capture(device)
    try:
        yield
    finally:
        _restore(present, device)


def _restore(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
