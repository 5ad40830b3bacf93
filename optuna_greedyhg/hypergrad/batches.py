"""Streams of batches: anything that can be iterated over, once or again and again.

A *batch* is a tensor, a tuple, list or dictionary of batches, or any object that the losses understand. A *source* is
a ``DataLoader``, a list of batches, an endless generator, or one full batch, which then is every step's batch: a
tensor, a dictionary, or a tuple of tensors and dictionaries with at least one tensor. A list is always of batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import randomness

Batch = Any
Source = Iterable[Batch]

_CPU = torch.device("cpu")  # whose generators decide the order of batches


def as_source(batches: Any, name: str, device: torch.device = _CPU) -> Source:
    """``batches`` itself, or a list of one where it is a full batch (see above), which is moved to ``device``.

    Raises:
        TypeError: If ``batches`` cannot be iterated over.
        ValueError: If it is known to be empty.
    """
    if isinstance(batches, (Tensor, Mapping)) or _is_full_batch(batches):
        if n_examples(batches) == 0:
            raise ValueError(f"{name} must hold at least one example, but it is empty.")
        return [to_device(batches, device)]
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches (a DataLoader, a list) or one full batch (a tensor, a tuple of "
            f"tensors, a dictionary), but got {type(batches).__name__}."
        )
    if isinstance(batches, Sized) and len(batches) == 0:
        raise ValueError(f"{name} must hold at least one batch, but it is empty.")
    return batches


def generators_of(source: Source) -> tuple[torch.Generator, ...]:
    """The random generators that a ``DataLoader`` was given for itself, apart from torch's global ones."""
    samplers = (getattr(source, "sampler", None), getattr(source, "batch_sampler", None))
    holders = (source, *samplers, *(getattr(sampler, "sampler", None) for sampler in samplers))
    found = (getattr(holder, "generator", None) for holder in holders)
    return tuple(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))


class Position(TypedDict):
    """Where a stream is."""

    n_drawn: int
    """Number of batches drawn in the present pass over the source."""
    random_state: randomness.RandomState
    """Of the generators, when that pass began."""


class Stream:
    """An endless iterator over a source: it starts again when the source ends.

    Args:
        source: The source.
        name: What it is called in errors.
        pin: Whether batches on the CPU are put into pinned memory, from which a CUDA device fetches them while the
            program goes on.

    Raises:
        RuntimeError: From ``next``, if the source ends and cannot be started again.
    """

    def __init__(self, source: Source, name: str, *, pin: bool = False) -> None:
        self._source = source
        self._pin = pin
        self._name = name
        self._iterator: Iterator[Batch] | None = None
        self._position: Position | None = None
        self._generators = generators_of(source)

    @property
    def position(self) -> Position | None:
        """Where it is; ``None`` before the first batch."""
        return None if self._position is None else self._position.copy()

    def seek(self, position: Position | None) -> None:
        """Goes to where another stream over an equal source was, if it has not been used itself.

        The order of a pass must be decided when it begins, as a ``DataLoader``'s is.
        """
        if position is None:
            return
        with randomness.restored(position["random_state"], _CPU, self._generators):
            for _ in range(position["n_drawn"]):
                next(self)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Batch:
        for _ in range(2):
            if self._iterator is None:
                random_state = randomness.capture(_CPU, self._generators)
                self._iterator = iter(self._source)
                self._position = Position(n_drawn=0, random_state=random_state)
            assert self._position is not None
            try:
                batch = next(self._iterator)
            except StopIteration:
                self._iterator = None
            else:
                self._position["n_drawn"] += 1
                return _mapped(batch, _pinned) if self._pin else batch
        raise RuntimeError(
            f"{self._name} ended and yields nothing when started again: it is a one-shot iterator. Pass something that "
            "can be iterated over again (a list, a DataLoader) or that never ends."
        )


def evaluation_set(source: Source, name: str, n_batches: int | None) -> Source:
    """The batches over which a split is evaluated: a whole pass, or the first ``n_batches``.

    The batches of a one-shot iterator are drawn once and kept, so that every evaluation sees the same.

    Raises:
        ValueError: If ``source`` is a one-shot iterator, which may never end, and ``n_batches`` is ``None``.
    """
    if isinstance(source, Iterator):
        if n_batches is None:
            raise ValueError(
                f"{name} is a one-shot iterator, which may never end; say with n_eval_batches how many of its batches "
                "make an evaluation, or pass something that can be iterated over again."
            )
        return list(islice(source, n_batches))
    return source if n_batches is None else _FirstBatches(source, n_batches)


class _FirstBatches:
    def __init__(self, source: Source, n_batches: int) -> None:
        self._source = source
        self._n_batches = n_batches

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self._source), self._n_batches)


def n_examples(batch: Batch) -> int:
    """The length of the first tensor found in a batch; 1 where there is none, or it has no dimension."""
    tensor = next(tensors_of(batch), None)
    return 1 if tensor is None or tensor.ndim == 0 else tensor.shape[0]


def is_same(x: Batch, y: Batch, *, wait: bool = True) -> bool:
    """Whether two batches are one and the same, or have equal tensors.

    Args:
        x: A batch.
        y: Another.
        wait: Whether to compare tensors on other devices than the CPU, too, which waits for these.
    """
    if x is y:
        return True
    xs, ys = list(tensors_of(x)), list(tensors_of(y))
    if not wait and any(tensor.device != _CPU for tensor in xs + ys):
        return False
    return bool(xs) and len(xs) == len(ys) and all(torch.equal(a, b) for a, b in zip(xs, ys, strict=True))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors on ``device``; other objects pass through."""
    return _mapped(batch, lambda x: x.to(device, non_blocking=True))


class Stacked(NamedTuple):
    """Batches that have the same shapes, as one.

    Attributes:
        tensors: Theirs, in the order in which they are found in a batch: side by side, or the one that all share.
        dims: Of each, 0 where they are side by side, and ``None`` where it is shared.
        example: One of the batches.
    """

    tensors: list[Tensor]
    dims: list[int | None]
    example: Batch


def stack(many: Sequence[Batch]) -> Stacked:
    """Batches of one ``kind_of`` as one; what they all have in the same memory is not copied."""
    distinct = {id(batch): [*tensors_of(batch)] for batch in many}
    tensors: list[Tensor] = []
    dims: list[int | None] = []
    for k, first in enumerate(distinct[id(many[0])]):
        shared = all(_is_same_memory(of_one[k], first) for of_one in distinct.values())
        tensors.append(first if shared else torch.stack([distinct[id(batch)][k] for batch in many]))
        dims.append(None if shared else 0)
    return Stacked(tensors, dims, many[0])


def kind_of(batch: Batch) -> Any:
    """What batches must have in common to be stacked: all but their tensors' entries."""
    if isinstance(batch, Tensor):
        return batch.shape, batch.dtype, batch.device
    if isinstance(batch, Mapping):
        return [(key, kind_of(item)) for key, item in batch.items()]
    if isinstance(batch, (tuple, list)):
        return type(batch), [kind_of(item) for item in batch]
    return batch


def with_tensors(batch: Batch, tensors: Iterator[Tensor]) -> Batch:
    """The same batch with other tensors, in the order of ``tensors_of``."""
    return _mapped(batch, lambda _: next(tensors))


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """The tensors in a batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from tensors_of(item)
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield from tensors_of(item)


def _mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """The same batch with other tensors, made from its own in the order of ``tensors_of``."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(item, function) for key, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a namedtuple
        return type(batch)(*(_mapped(item, function) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_mapped(item, function) for item in batch)
    return batch


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device == _CPU else tensor


def _is_same_memory(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.data_ptr() == y.data_ptr() and x.stride() == y.stride())


def _is_full_batch(batches: Any) -> bool:
    if not isinstance(batches, tuple) or not all(isinstance(item, (Tensor, Mapping)) for item in batches):
        return False
    return any(isinstance(item, Tensor) for item in batches)
