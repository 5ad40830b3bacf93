"""Training recorded as CUDA graphs: what Python asks of a GPU is written down once, and then asked for by one call.

A step of a small model takes a GPU less time than Python takes to ask for its some hundred operations. So a function
of tensors, such as a whole horizon of training steps and products, is *recorded*, and replayed on other numbers:

    its first call    is watched: whatever would not happen again in a replay speaks against recording
    its second call   is recorded, and replayed; the replay must come to what the call has come to
    from then on      its arguments are copied to where the recorded ones were, and its operations replayed

What is no tensor, the logic of an estimator for example, has run when it was recorded, and does not run again. So what
decides about the operations, settings and the shapes of all arguments, must be the same for a recording to be replayed.
Random numbers of the GPU's own generator are drawn anew in every replay.

Only the main thread records: while it does, no other may use the GPU.

Source: PyTorch, "CUDA semantics", on CUDA graphs.
"""

from __future__ import annotations

import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

# Python's view of every operation has no public name yet; PyTorch's notes on extending it say to import it from here.
from torch.utils._python_dispatch import TorchDispatchMode

from optuna_greedyhg.hypergrad import batches, randomness
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.product_modes import ProductMode
from optuna_greedyhg.hypergrad.randomness import RandomState

MAX_RECORDINGS = 8  # each keeps memory of its own
_MAX_KINDS = 64


class Result(NamedTuple):
    """What a function comes to.

    Attributes:
        tensors: A tuple of dictionaries, lists and tuples of tensors.
        cost: What it has cost, which is the same in every replay.
        mode: How its products were made; ``None`` if there were none.
    """

    tensors: tuple[Any, ...]
    cost: Cost
    mode: ProductMode | None


Function = Callable[[Any], Result]
"""Of dictionaries, lists and tuples of tensors, which it does not change."""


class Settings(NamedTuple):
    """What decides about a function's operations, beside the shapes of its arguments.

    Attributes:
        estimator: What folds a horizon; ``None`` for plain training.
        n_steps: Number of training steps; ``None`` where the arguments say it.
        update_rule: Φ.
        domains: Every hyperparameter's.
        mode: What products are tried in; ``None`` where there are none.
    """

    estimator: Any
    n_steps: int | None
    update_rule: Any
    domains: Mapping[str, Any]
    mode: ProductMode | None

    def is_same(self, other: Settings) -> bool:
        """Equal objects of a user's own may do otherwise, so that estimator and rule must be the very same."""
        same = self.estimator is other.estimator and self.update_rule is other.update_rule and self.mode is other.mode
        return same and self.n_steps == other.n_steps and self.domains == other.domains


class Graph(Protocol):
    """A device's operations, recorded once."""

    def record(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, in whose tensors the results of every replay will be; there are none yet."""

    def replay(self) -> None:
        """Does the operations again, on what is in their arguments now."""


class CudaGraph:
    """A :class:`Graph` of a CUDA device.

    Args:
        device: The device.
        pool: Where graphs that are never replayed at the same time have their memory in common.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device = device
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Result]) -> Result:
        # Threads that pin a loader's batches may go on calling CUDA.
        settings: dict[str, Any] = {"pool": self._pool, "capture_error_mode": "thread_local"}
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, stream=_recording_stream(self._device), **settings),
        ):
            return work()

    def replay(self) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def cuda_recorder(device: torch.device) -> Recorder:
    """A recorder of CUDA graphs."""

    @cache
    def pool() -> Any:
        return torch.cuda.graph_pool_handle()

    return Recorder(lambda: CudaGraph(device, pool()), device)


@dataclass(eq=False)
class Family:
    """The functions of the same settings, and what a recorder knows of them.

    Attributes:
        settings: What decides about their operations, beside the shapes of their arguments.
        order: That in which they take their batches; ``None`` before the first call.
        given_up: Whether they are not to be recorded.
        calls: The kinds of arguments that they have been called with.
    """

    settings: Settings
    order: str | None = None
    given_up: bool = False
    calls: list[_Call] = field(default_factory=list)

    def give_up(self, why: str) -> None:
        """Leaves them unrecorded from now on, and says why."""
        warnings.warn(f"This part of the training goes on without CUDA graphs: {why}.", stacklevel=2)
        self.given_up = True


@dataclass(eq=False)
class _Call:
    """Arguments of one kind, and the recording of what is done with such; ``None`` until the second call."""

    kind: Any
    recording: _Recording | None = None


class Recorder:
    """Calls functions, and records those that are called again.

    Args:
        make_graph: Makes an empty graph.
        device: Where the functions compute.
    """

    def __init__(self, make_graph: Callable[[], Graph], device: torch.device) -> None:
        self._make_graph = make_graph
        self._device = device
        self._families: list[Family] = []
        self._is_recording = False
        self._goes_back = False  # whether a step has been made again since this was last unset

    def __reduce__(self) -> tuple[Any, ...]:
        return cuda_recorder, (self._device,)  # which knows nothing yet

    @property
    def n_recordings(self) -> int:
        """How many there are."""
        return sum(call.recording is not None for call in self._calls)

    @property
    def _calls(self) -> list[_Call]:
        return [call for family in self._families for call in family.calls]

    def family(self, settings: Settings) -> Family:
        """That of these settings."""
        found = next((family for family in self._families if family.settings.is_same(settings)), None)
        if found is None:
            found = Family(settings)
            self._families.append(found)
        return found

    def call(self, family: Family, function: Function, arguments: Any) -> Result:
        """What the function comes to, replayed if it can be.

        Args:
            family: That of the function.
            function: The function.
            arguments: Dictionaries, lists and tuples of tensors, and what else is in batches.

        Raises:
            RuntimeError: If the function cannot be recorded for a reason that its first call has not shown.
        """
        kind = batches.kind_of(arguments), _pattern(arguments)
        known = next((call for call in family.calls if call.kind == kind), None)
        if known is None:
            result, why = self._watched(function, arguments)
            if why is not None:
                family.give_up(why)
            elif len(self._calls) < _MAX_KINDS:
                family.calls.append(_Call(kind))
            return result
        if known.recording is not None:
            return known.recording.replay(arguments)
        if self.n_recordings >= MAX_RECORDINGS:
            return function(arguments)
        start, result = randomness.capture(self._device), function(arguments)
        recording = self._recorded(function, arguments)
        with randomness.restored(start, self._device):
            replayed = recording.replay(arguments)
        if _is_near(replayed.tensors, result.tensors):
            known.recording = recording
        else:
            family.give_up("a replay comes to other numbers, so that something in it changes from step to step")
        return result

    def capture(self) -> RandomState:
        """The state of the generators, for a step to be made again from; nothing while a function is recorded."""
        return () if self._is_recording else randomness.capture(self._device)

    @contextmanager
    def restored(self, state: RandomState) -> Iterator[None]:
        """Runs the block from a captured state, and puts the present one back."""
        self._goes_back = True
        with nullcontext() if self._is_recording else randomness.restored(state, self._device):
            yield

    def _watched(self, function: Function, arguments: Any) -> tuple[Result, str | None]:
        """What the function comes to, and why it cannot be recorded, if it cannot."""
        tensors = [x.detach().to(self._device, non_blocking=True) for x in batches.tensors_of(arguments)]
        versions = [x._version for x in tensors]  # autograd's count of writes, described in its notes
        before, others = randomness.capture(self._device), randomness.capture_others()
        self._goes_back = False
        with _Waits(self._device) as waits:
            result = function(batches.with_tensors(arguments, iter(tensors)))
        after = randomness.capture(self._device)
        hosts_moved = not torch.equal(before[0], after[0]) or _differ(others, randomness.capture_others())
        drawn_again = self._goes_back and not all(map(torch.equal, before, after))
        is_main = threading.current_thread() is threading.main_thread()
        findings = (
            _foreign(arguments),
            None if is_main else "only the main thread can record, and this trial runs in another",
            f"it waits for the GPU, in {waits.found[0]}" if waits.found else None,
            "it draws random numbers from another generator than the GPU's own" if hosts_moved else None,
            "steps that have drawn random numbers are made again from the same ones" if drawn_again else None,
            "it writes into its batches" if versions != [x._version for x in tensors] else None,
        )
        return result, next((finding for finding in findings if finding is not None), None)

    def _recorded(self, function: Function, arguments: Any) -> _Recording:
        self._is_recording = True
        try:
            return _Recording(self._make_graph(), function, arguments, self._device)
        except Exception as error:
            raise RuntimeError(
                "With cuda_graphs=True, a CUDA graph must be able to hold all that losses and update rule ask of the "
                f"GPU, but recording has failed: {error.__context__ or error} Start a new process without it."
            ) from error
        finally:
            self._is_recording = False


class _Recording:
    """A function's operations, where its arguments have to be, and where its results will be."""

    def __init__(self, graph: Graph, function: Function, arguments: Any, device: torch.device) -> None:
        self._graph = graph
        tensors, pattern = list(batches.tensors_of(arguments)), _pattern(arguments)
        self._firsts = sorted(set(pattern))
        mine = {i: tensors[i].detach().to(device, copy=True) for i in self._firsts}
        self._arguments = list(mine.values())
        self._loaded: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(mine)
        filled = batches.with_tensors(arguments, iter([mine[i] for i in pattern]))
        self._result = graph.record(lambda: function(filled))

    def replay(self, arguments: Any) -> Result:
        tensors = list(batches.tensors_of(arguments))
        for k, i in enumerate(self._firsts):
            its, loaded = tensors[i], self._loaded[k]
            if loaded is None or loaded[0]() is not its or loaded[1] != its._version:
                self._arguments[k].copy_(its.detach(), non_blocking=True)
                self._loaded[k] = weakref.ref(its), its._version
        self._graph.replay()
        copies = iter([x.clone() for x in batches.tensors_of(self._result.tensors)])
        return self._result._replace(tensors=batches.with_tensors(self._result.tensors, copies))


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes down the operations on a device whose results Python waits for, or that copy to or from another.

    Attributes:
        found: Their names.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device.type
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*args, result) if isinstance(x, Tensor)} - {"meta"}
        copies = func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default) and len(devices) > 1
        if self._type in devices and (copies or _waits(func, args)):
            self.found.append(str(func))
        return result


def _waits(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether Python must know the result's numbers, or its shape, to go on."""
    if function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
        return any(x.dtype in (torch.bool, torch.uint8) for x in args[1] if isinstance(x, Tensor))  # a mask
    return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags


def _foreign(batch: Any) -> str | None:
    """What speaks against recording if a batch holds anything but plain tensors and constants."""
    if isinstance(batch, (dict, tuple, list)):
        items = batch.values() if isinstance(batch, dict) else batch
        return next((why for why in map(_foreign, items) if why is not None), None)
    if isinstance(batch, Tensor):
        return None if batch.layout is torch.strided else f"batches hold a tensor of layout {batch.layout}"
    if isinstance(batch, (str, bytes, int, float, type(None))):
        return None
    return f"batches hold a {type(batch).__name__}, in which there may be tensors"


def _pattern(arguments: Any) -> tuple[int, ...]:
    """Of each tensor, the position of the first that is the same one: a full batch is every step's."""
    firsts: dict[int, int] = {}
    return tuple(firsts.setdefault(id(x), i) for i, x in enumerate(batches.tensors_of(arguments)))


def _is_near(trees: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether each tree is the other but for the order of summation; of NaN, nothing is said here."""
    for tree, other in zip(trees, others, strict=True):
        pairs = [*zip(batches.tensors_of(tree), batches.tensors_of(other), strict=True)]
        lengths = [torch.stack([torch.linalg.vector_norm(z.double()) for z in (x - y, y)]) for x, y in pairs]
        distance, length = torch.stack(lengths).norm(dim=0) if lengths else torch.zeros(2)
        dtype = pairs[0][0].dtype if pairs else torch.float64
        if bool(distance > torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps ** (1 / 3) * length):
            return False
    return True


def _differ(x: Sequence[Any], y: Sequence[Any]) -> bool:
    return pickle.dumps(x) != pickle.dumps(y)  # there are arrays in it
