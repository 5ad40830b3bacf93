"""Horizons and trainings by recordings (see ``recordings``): what they are step by step, but asked for at once.

Within a recorded function the number of steps made so far is a tensor, as it differs from replay to replay. Its batches
are drawn before, in the order in which the estimator asks for them, which its first horizon shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad.batches import Batch, Stream, tensors_of
from optuna_greedyhg.hypergrad.estimators import Folded
from optuna_greedyhg.hypergrad.products import Products, TrainState
from optuna_greedyhg.hypergrad.recordings import Family, Function, Recorder, Result, Settings
from optuna_greedyhg.hypergrad.trees import Tensors

_STEPS_AT_ONCE = 10  # of plain training
_MAX_HORIZON = 100  # a recording holds the batches of all its steps, and some hundred operations for each


class Ended(NamedTuple):
    """What is left of a horizon when its last step is forgotten.

    Attributes:
        state: (w_T, s_T).
        hypergradient: The estimate.
        val_loss: L_val at the end; ``None`` if the estimator did not ask.
        carried: What the estimator has kept.
    """

    state: TrainState
    hypergradient: Tensors
    val_loss: Tensor | None
    carried: Any


Fold = Callable[[Products, TrainState, Tensors], Folded]
"""The steps of a horizon from a state, under the coordinates of an α, folded by the estimator."""


def end_of(folded: Folded) -> Ended:
    """What is left of it."""
    validated = folded.end.validated
    return Ended(folded.end.after, folded.estimate, None if validated is None else validated.loss, folded.carried)


def roll_out(
    recorder: Recorder, products: Products, estimator: Any, fold: Fold, state: TrainState, alpha: Tensors, n_steps: int
) -> Ended:
    """One horizon, by a recording if it can be.

    Args:
        recorder: Knows the recordings.
        products: The problem, its update rule and its streams.
        estimator: Decides, beside the arguments, about the fold.
        fold: The horizon, step by step.
        state: (w_0, s_0).
        alpha: The coordinates of α.
        n_steps: Number T of training steps.
    """
    family = recorder.family(
        Settings(estimator, n_steps, products.update_rule, products.domains, products.mode.current)
    )
    if family.given_up:
        return end_of(fold(products, state, alpha))
    if family.order is None:
        noted = _Noted()
        train, val = noted.passing(products.train_stream, "t"), noted.passing(products.val_stream, "v")
        its = products.drawing_from(Stream(train, "train_batches"), Stream(val, "val_batches"))
        ended = end_of(fold(its, state, alpha))
        products.cost.charge(its.cost)
        family.order = noted.order
        why = noted.why_not_ahead()
        if ended.carried is not None:
            why = f"{estimator} takes along what it knows from one horizon to the next"
        elif n_steps > _MAX_HORIZON:
            why = f"a horizon of {n_steps} steps is longer than the {_MAX_HORIZON} that are recorded"
        if why is not None:
            family.give_up(why)
        return ended

    def function(arguments: Any) -> Result:
        state, alpha, train, val = arguments
        its = products.drawing_from(Stream(train, "train_batches"), Stream(val, "val_batches"))
        ended = end_of(fold(its, TrainState(*state), alpha))
        if ended.carried is not None:
            raise RuntimeError(f"{estimator} must carry nothing from any horizon to the next, if not from the first.")
        return Result((*_parts(ended.state), ended.hypergradient, [ended.val_loss]), its.cost, its.mode.proven)

    streams = {"t": products.train_stream, "v": products.val_stream}
    drawn: dict[str, list[Batch]] = {"t": [], "v": []}
    for kind in family.order:
        drawn[kind].append(next(streams[kind]))
    arguments = _parts(_counted_by_tensor(state)), alpha, drawn["t"], drawn["v"]
    *after, hypergradient, (val_loss,) = _called(recorder, family, function, arguments, products)
    return Ended(replace(TrainState(*after), n_steps=state.n_steps + n_steps), hypergradient, val_loss, None)


def train(
    recorder: Recorder, products: Products, state: TrainState, alpha: Tensors, batches: Iterator[Batch]
) -> TrainState:
    """The state after a step of plain training on each batch, by recordings of several steps if it can be."""
    family = recorder.family(Settings(None, None, products.update_rule, products.domains, None))

    def function(arguments: Any) -> Result:
        state, alpha, taken = arguments
        its = products.drawing_from(products.train_stream, products.val_stream)
        return Result(_parts(its.train(TrainState(*state), alpha, taken)), its.cost, None)

    while not family.given_up:
        if family.order is None:
            noted = _Noted()
            state = products.train(state, alpha, noted.passing(islice(batches, _STEPS_AT_ONCE), "t"))
            family.order = noted.order
            why = noted.why_not_ahead()
            if why is not None:
                family.give_up(why)
        elif taken := list(islice(batches, _STEPS_AT_ONCE)):
            arguments = _parts(_counted_by_tensor(state)), alpha, taken
            after = _called(recorder, family, function, arguments, products)
            state = replace(TrainState(*after), n_steps=state.n_steps + len(taken))
        else:
            return state
    return products.train(state, alpha, batches)


def _called(
    recorder: Recorder, family: Family, function: Function, arguments: Any, products: Products
) -> tuple[Any, ...]:
    """What the function comes to, when its cost and its mode are taken down."""
    result = recorder.call(family, function, arguments)
    products.cost.charge(result.cost)
    products.mode.proven = result.mode or products.mode.proven
    return result.tensors


class _Noted:
    """Batches that pass by, and the order of their kinds."""

    def __init__(self) -> None:
        self.order = ""
        self._tensors: list[tuple[Tensor, int]] = []

    def passing(self, source: Iterator[Batch], kind: str) -> Iterator[Batch]:
        """The same batches."""
        for batch in source:
            self.order += kind
            self._tensors += [(x, x._version) for x in tensors_of(batch)]
            yield batch

    def why_not_ahead(self) -> str | None:
        """Why they cannot be drawn before they are needed, if they cannot."""
        changed = any(x._version != version for x, version in self._tensors)  # autograd's count of writes
        return "batches are written into after they were handed out" if changed else None


def _parts(state: TrainState) -> tuple[Any, ...]:
    return state.parameters, state.buffers, state.slots, state.n_steps


def _counted_by_tensor(state: TrainState) -> TrainState:
    # In double precision, in which Python has the powers of an Adam's β, whatever that of the weights.
    device = next(iter(state.parameters.values())).device
    n_steps: Any = torch.full((), state.n_steps, dtype=torch.float64, device=device)
    return replace(state, n_steps=n_steps)
