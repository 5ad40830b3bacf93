"""Training recorded as CUDA graphs: what Python asks of a GPU is written down once, and then asked for by one call.

A step of a small model takes a GPU less time than Python takes to ask for its some hundred operations. So a function
of tensors, such as a whole horizon of training steps and products, is *recorded*, and replayed on other numbers:

    the first time    it is called, as without recordings, which shows whether it can be recorded
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
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

    return Recorder(lambda: CudaGraph(device, *shared()), device, _waits)


@contextmanager
def _waits() -> Iterator[list[str]]:
    """Takes down what PyTorch says of operations that wait for a CUDA device; other warnings go their way."""
    before, found = torch.cuda.get_sync_debug_mode(), list[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}, line {warning.lineno}")
        elif "Synchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class Recorder:
    """Calls functions, and records those that are called again.

    Args:
        make_graph: Makes an empty graph.
        device: Where the functions compute.
        watched: Within the context, takes down in its list what waits for the device.
    """

    def __init__(
        self,
        make_graph: Callable[[], Graph],
        device: torch.device,
        watched: Callable[[], AbstractContextManager[list[str]]],
    ) -> None:
        self._make_graph = make_graph
        self._device = device
        self._watched = watched
        self._known: list[tuple[Any, _Recording | None]] = []  # None: called, and not recorded yet
        self._orders: list[tuple[Any, str]] = []
        self._given_up: list[Any] = []
        self._is_recording = False
        self._goes_back = False  # whether a step has been made again since this was last unset

    @property
    def n_recordings(self) -> int:
        """How many there are."""
        return sum(its is not None for _, its in self._known)

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

        Raises:
            RuntimeError: If the function cannot be recorded for a reason that its first call has not shown.
        """
        key = settings, batches.kind_of(arguments), _pattern(arguments)
        position = next((i for i, (known, _) in enumerate(self._known) if known == key), None)
        if position is None:
            result, why = self._called(function, arguments)
            if why is not None:
                self.give_up(settings, why)
            elif len(self._known) < _MAX_KEYS:
                self._known.append((key, None))
            return result
        recording = self._known[position][1]
        if recording is None:
            if self.n_recordings >= _MAX_RECORDINGS:
                return function(arguments)
            recording = self._recorded(function, arguments)
            self._known[position] = key, recording
        return recording.replay(arguments)

    def capture(self) -> RandomState:
        """The state of the generators, for a step to be made again from; nothing while a function is recorded."""
        return () if self._is_recording else randomness.capture(self._device)

    @contextmanager
    def restored(self, state: RandomState) -> Iterator[None]:
        """Runs the block from a captured state, and puts the present one back."""
        self._goes_back = True
        with nullcontext() if self._is_recording else randomness.restored(state, self._device):
            yield

    def _called(self, function: Function, arguments: Any) -> tuple[Result, str | None]:
        """What the function comes to, and why it cannot be recorded, if it cannot."""
        before, others = randomness.capture(self._device), randomness.capture_others()
        self._goes_back = False
        with self._watched() as waits:
            result = function(arguments)
        after = randomness.capture(self._device)
        if not torch.equal(before[0], after[0]) or _differ(others, randomness.capture_others()):
            return result, "it draws random numbers from another generator than the GPU's own"
        if self._goes_back and not all(map(torch.equal, before, after)):
            return result, "steps that have drawn random numbers are made again from the same ones"
        if waits:
            return result, f"it waits for the GPU: {waits[0]}"
        return result, _foreign(arguments)

    def _recorded(self, function: Function, arguments: Any) -> _Recording:
        self._is_recording = True
        try:
            return _Recording(self._make_graph(), function, arguments, self._device)
        except Exception as error:
            raise RuntimeError(
                "With cuda_graphs=True, a CUDA graph must be able to hold all that losses and update rule ask of the "
                f"GPU, but recording has failed: {error} Start a new process without cuda_graphs=True."
            ) from error
        finally:
            self._is_recording = False


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


def _foreign(batch: Any) -> str | None:
    """What speaks against recording if a batch holds anything but tensors and constants; ``None`` if nothing does."""
    if isinstance(batch, (dict, tuple, list)):
        items = batch.values() if isinstance(batch, dict) else batch
        return next((why for why in map(_foreign, items) if why is not None), None)
    if isinstance(batch, (Tensor, str, bytes, int, float, type(None))):
        return None
    return f"batches hold a {type(batch).__name__}, in which there may be tensors"


def _pattern(arguments: Any) -> tuple[int, ...]:
    """Of each tensor, the position of the first that is the same one: a full batch is every step's."""
    firsts: dict[int, int] = {}
    return tuple(firsts.setdefault(id(x), i) for i, x in enumerate(batches.tensors_of(arguments)))


def _differ(x: Any, y: Any) -> bool:
    return pickle.dumps(x) != pickle.dumps(y)  # there are arrays in it
