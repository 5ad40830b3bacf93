"""A CUDA graph for a CPU: the operations that were asked for, done again on the memory that they had then."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape:
    """Python does not run again in a replay, and results are there from the first replay on, as on a device."""

    n_recorded = n_replayed = 0

    def record(self, work):
        Tape.n_recorded += 1
        with _Listening() as listening:
            result = work()
        self._calls = listening.calls
        for function, _, _, out in self._calls:
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.is_floating_point() and _makes_new(function):
                    x.detach().fill_(-77)
        return result

    @torch.no_grad()
    def replay(self):
        Tape.n_replayed += 1
        for function, args, kwargs, out in self._calls:
            if _makes_new(function):
                for mine, its in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(mine, Tensor) and mine.device.type != "meta":
                        mine.detach().copy_(its)
            elif function._schema.is_mutable:
                function(*args, **kwargs)


class _Listening(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def _makes_new(function):
    """Whether the results are new tensors, and no views and nothing that was written to."""
    return not function._schema.is_mutable and all(x.alias_info is None for x in function._schema.returns)
