"""The most memory that tensors have held at a time while a function ran, beyond what they held before.

On CUDA the allocator keeps count. On a CPU nobody does, so every operation's results are looked at as they are made:
each *storage* (views share one) that none of the operation's arguments has is new, and counts until it is freed.

That needs ``TorchDispatchMode``, whose module has a leading underscore although PyTorch's documentation and its own
flop and memory counters are built on it; it is the only hook that sees the operations inside autograd too. This file is
the only one that uses it. What it does not see, some kilobytes here: scratch memory inside a single kernel, and tensors
made by no operation, such as the state of a random generator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Calls ``function`` and returns the peak of the memory of tensors that it has allocated and not yet freed.

    On a CPU it runs some times slower than it would by itself. On CUDA the device's peak statistics are reset.

    Args:
        function: Takes no argument; what it returns counts as held until the end.
        device: Where it computes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held_before = torch.cuda.memory_allocated(device)
        function()
        return int(torch.cuda.max_memory_allocated(device) - held_before)
    live = _LiveStorages()
    with live:
        function()
    return live.peak


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages that are made within the block, and how many bytes those alive have together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._n_bytes = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # By identity: a storage has one Python object for as long as it lives.
        given = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if id(storage) not in given and id(storage) not in self._alive:
                self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = id(storage), storage.nbytes()

        def freed(_: object) -> None:
            self._n_bytes -= n_bytes
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self._n_bytes += n_bytes
        self.peak = max(self.peak, self._n_bytes)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(tree, Tensor):
        # The parts of sparse tensors have passed by, too; those on the meta device have no memory.
        if tree.layout == torch.strided and not tree.is_meta:
            yield tree.untyped_storage()
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _storages(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _storages(item)
