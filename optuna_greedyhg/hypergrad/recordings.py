"""Training recorded as CUDA graphs: what Python asks of a GPU is written down once, and then asked for by one call.

A step of a small model takes a GPU less time than Python takes to ask for its some hundred operations. So a function
of tensors, such as a whole horizon of training steps and products, is *recorded*, and replayed on other numbers:

    the first time    it is called, as without recordings; that warms up what CUDA sets up at its first use
    the second time   its operations are recorded, and then replayed
    from then on      its arguments are copied to where the recorded ones were, and its operations replayed

What is no tensor, the logic of an estimator for example, has run when it was recorded, and does not run again. So what
decides about the operations, settings and the shapes of all arguments, is a recording's *key*. Random numbers of the
GPU's own generator are drawn anew in every replay; those of other generators would not be, and are looked out for.

Source: PyTorch, "CUDA semantics", on CUDA graphs.
"""

from __future__ import annotations

import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import batches, randomness
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.randomness import RandomState

_MAX_RECORDINGS = 8  # each keeps memory of its own
_MAX_KEYS = 64


class Result(NamedTuple):
    """What a function comes to.

    Attributes:
        tensors: Dictionaries, lists and tuples of tensors.
        cost: What it has cost, which is the same in every replay.
    """

    tensors: Any
    cost: Cost


Function = Callable[[Any], Result]
"""Of dictionaries, lists and tuples of tensors, which it does not change."""


class NotRecordable(Exception):
    """A function does what no replay would do again; the message says what."""


class Graph(Protocol):
    """A device's operations, recorded once."""

    def record(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, in whose tensors the results of every replay will be; there are none yet."""

    def replay(self) -> None:
        """Does the operations again, on what is in their arguments now."""


class CudaGraph:
    """A :class:`Graph` of a CUDA device.

    Args:
        device: The device.
        pool: Where graphs that are never replayed at the same time have their memory in common.
        stream: On which it is recorded.
    """

    def __init__(self, device: torch.device, pool: Any, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._pool = pool
        self._stream = stream
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Any]) -> Any:
        # Other threads, such as one that pins a loader's batches, may go on calling CUDA.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            return work()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


def cuda_recorder(device: torch.device) -> Recorder:
    """A recorder of CUDA graphs."""

    @cache
    def shared() -> tuple[Any, torch.cuda.Stream]:
        return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    return Recorder(lambda: CudaGraph(device, *shared()), device)


class Recorder:
    """Calls functions, and records those that are called again.

    Args:
        make_graph: Makes an empty graph.
        device: Where the functions compute.
    """

    def __init__(self, make_graph: Callable[[], Graph], device: torch.device) -> None:
        self._make_graph = make_graph
        self._device = device
        self._known: list[tuple[Any, _Recording | bool]] = []  # a bool: not recorded yet, and whether it draws
        self._orders: list[tuple[Any, str]] = []
        self._given_up: list[Any] = []
        self._draws: bool | None = None  # while a function is being recorded

    @property
    def n_recordings(self) -> int:
        """How many there are."""
        return sum(isinstance(its, _Recording) for _, its in self._known)

    def order_of(self, settings: Any) -> str | None:
        """The order in which functions of these settings take their batches; ``None`` before the first call."""
        return next((order for known, order in self._orders if known == settings), None)

    def remember_order(self, settings: Any, order: str) -> None:
        """Takes it down."""
        self._orders.append((settings, order))

    def has_given_up(self, settings: Any) -> bool:
        """Whether functions of these settings are not to be recorded."""
        return settings in self._given_up

    def give_up(self, settings: Any, why: str) -> None:
        """Leaves functions of these settings unrecorded from now on, and says why."""
        warnings.warn(f"This part of the training goes on without CUDA graphs: {why}.", stacklevel=2)
        self._given_up.append(settings)

    def call(self, settings: Any, function: Function, arguments: Any) -> Result:
        """What the function comes to, replayed if it can be.

        Args:
            settings: All that decides about its operations beside the shapes of its arguments; compared by ``==``.
            function: The function.
            arguments: Dictionaries, lists and tuples of tensors, and what else is in batches.
        """
        key = settings, batches.kind_of(arguments), _pattern(arguments)
        position = next((i for i, (known, _) in enumerate(self._known) if known == key), None)
        if position is None:
            before = randomness.capture(self._device)
            result = function(arguments)
            draws = not all(map(torch.equal, before[1:], randomness.capture(self._device)[1:]))  # the device's own
            if len(self._known) < _MAX_KEYS:
                self._known.append((key, draws))
            return result
        recording = self._known[position][1]
        if isinstance(recording, bool):
            if self.n_recordings >= _MAX_RECORDINGS:
                return function(arguments)
            try:
                _require_plain(arguments)
                recording = self._recorded(function, arguments, recording)
            except Exception as error:
                self.give_up(settings, str(error).partition("\n")[0].rstrip(".") or type(error).__name__)
                return function(arguments)
            self._known[position] = key, recording
        return recording.replay(arguments)

    def capture(self) -> RandomState:
        """The state of the generators, for a step to be made again from; nothing while a function is recorded."""
        return randomness.capture(self._device) if self._draws is None else ()

    @contextmanager
    def restored(self, state: RandomState) -> Iterator[None]:
        """Runs the block from a captured state, and puts the present one back."""
        if self._draws:
            raise NotRecordable("a step that has drawn random numbers is made again from the same")
        with nullcontext() if self._draws is not None else randomness.restored(state, self._device):
            yield

    def _recorded(self, function: Function, arguments: Any, draws: bool) -> _Recording:
        present, others = randomness.capture(self._device), randomness.capture_others()
        self._draws = draws
        try:
            recording = _Recording(self._make_graph(), function, arguments, self._device)
        finally:
            self._draws = None
            moved = not torch.equal(present[0], torch.get_rng_state()) or _differ(others, randomness.capture_others())
            randomness.restore(present, self._device)
            randomness.restore_others(others)
        if moved:
            raise NotRecordable("it draws random numbers from a generator that is not the GPU's")
        return recording


class _Recording:
    """A function's operations, where its arguments have to be, and where its results will be."""

    def __init__(self, graph: Graph, function: Function, arguments: Any, device: torch.device) -> None:
        self._graph = graph
        tensors = list(batches.tensors_of(arguments))
        self._firsts = sorted(set(_pattern(arguments)))
        mine = {i: tensors[i].to(device, copy=True) for i in self._firsts}
        self._arguments = list(mine.values())
        self._loaded: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(mine)
        filled = batches.with_tensors(arguments, iter([mine[i] for i in _pattern(arguments)]))
        self._result = graph.record(lambda: function(filled))

    def replay(self, arguments: Any) -> Result:
        tensors = list(batches.tensors_of(arguments))
        for k, i in enumerate(self._firsts):
            its, loaded = tensors[i], self._loaded[k]
            if loaded is None or loaded[0]() is not its or loaded[1] != its._version:
                self._arguments[k].copy_(its, non_blocking=True)
                self._loaded[k] = weakref.ref(its), its._version
        self._graph.replay()
        copies = iter([x.clone() for x in batches.tensors_of(self._result.tensors)])
        return Result(batches.with_tensors(self._result.tensors, copies), self._result.cost)


def _require_plain(batch: Any) -> None:
    """Raises :class:`NotRecordable` if a batch holds anything but tensors and constants."""
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    for item in items:
        _require_plain(item)
    if not isinstance(batch, (Tensor, dict, tuple, list, str, bytes, int, float, type(None))):
        raise NotRecordable(f"batches hold a {type(batch).__name__}, in which there may be tensors")


def _pattern(arguments: Any) -> tuple[int, ...]:
    """Of each tensor, the position of the first that is the same one: a full batch is every step's."""
    firsts: dict[int, int] = {}
    return tuple(firsts.setdefault(id(x), i) for i, x in enumerate(batches.tensors_of(arguments)))


def _differ(x: Any, y: Any) -> bool:
    return pickle.dumps(x) != pickle.dumps(y)  # there are arrays in it
