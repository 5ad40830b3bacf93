"""Horizons and trainings by recordings (see ``recordings``): what they are step by step, but asked for at once.

Within a recorded function the number of steps made so far is a tensor, as it differs from replay to replay. Its batches
are drawn before, in the order in which the estimator asks for them, which its first horizon shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad.batches import Batch, Stream
from optuna_greedyhg.hypergrad.estimators import Folded
from optuna_greedyhg.hypergrad.products import Products, TrainState
from optuna_greedyhg.hypergrad.recordings import Recorder, Result
from optuna_greedyhg.hypergrad.trees import Tensors

_STEPS_AT_ONCE = 10


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
    settings = estimator, n_steps, products.update_rule, products.domains
    if recorder.has_given_up(settings):
        return end_of(fold(products, state, alpha))
    n_after, start = state.n_steps + n_steps, _counted_by_tensor(state)
    order = recorder.order_of(settings)
    if order is None:
        taken: list[str] = []
        train, val = _noted(products.train_stream, "t", taken), _noted(products.val_stream, "v", taken)
        its = products.drawing_from(Stream(train, "train_batches"), Stream(val, "val_batches"))
        ended = end_of(fold(its, start, alpha))
        products.cost.charge(its.cost)
        recorder.remember_order(settings, "".join(taken))
        if ended.carried is not None:
            recorder.give_up(settings, f"{estimator} takes along what it knows from one horizon to the next")
        return ended._replace(state=replace(ended.state, n_steps=n_after))

    def function(arguments: Any) -> Result:
        state, alpha, train, val = arguments
        its = products.drawing_from(Stream(train, "train_batches"), Stream(val, "val_batches"))
        ended = end_of(fold(its, TrainState(*state), alpha))
        return Result((_parts(ended.state), ended.hypergradient, [ended.val_loss]), its.cost)

    streams = {"t": products.train_stream, "v": products.val_stream}
    drawn: dict[str, list[Batch]] = {"t": [], "v": []}
    for kind in order:
        drawn[kind].append(next(streams[kind]))
    result = recorder.call(settings, function, (_parts(start), alpha, drawn["t"], drawn["v"]))
    products.cost.charge(result.cost)
    after, hypergradient, (val_loss,) = result.tensors
    return Ended(replace(TrainState(*after), n_steps=n_after), hypergradient, val_loss, None)


def train(
    recorder: Recorder, products: Products, state: TrainState, alpha: Tensors, batches: Iterator[Batch], n_steps: int
) -> TrainState:
    """The state after some steps of plain training, by recordings of several steps if it can be."""

    def function(arguments: Any) -> Result:
        state, alpha, taken = arguments
        its = products.drawing_from(products.train_stream, products.val_stream)
        state = TrainState(*state)
        for batch in taken:
            state = its.step(state, alpha, batch).after
        return Result(_parts(state), its.cost)

    settings = None, products.update_rule, products.domains
    for done in range(0, n_steps, _STEPS_AT_ONCE):
        taken = [next(batches) for _ in range(min(_STEPS_AT_ONCE, n_steps - done))]
        arguments = _parts(_counted_by_tensor(state)), alpha, taken
        given_up = recorder.has_given_up(settings)
        result = function(arguments) if given_up else recorder.call(settings, function, arguments)
        products.cost.charge(result.cost)
        state = replace(TrainState(*result.tensors), n_steps=state.n_steps + len(taken))
    return state


def _parts(state: TrainState) -> tuple[Any, ...]:
    return state.parameters, state.buffers, state.slots, state.n_steps


def _counted_by_tensor(state: TrainState) -> TrainState:
    # In double precision, in which Python has the powers of an Adam's β, whatever that of the weights.
    device = next(iter(state.parameters.values())).device
    n_steps: Any = torch.full((), state.n_steps, dtype=torch.float64, device=device)
    return replace(state, n_steps=n_steps)


def _noted(stream: Iterator[Batch], kind: str, taken: list[str]) -> Iterator[Batch]:
    for batch in stream:
        taken.append(kind)
        yield batch
