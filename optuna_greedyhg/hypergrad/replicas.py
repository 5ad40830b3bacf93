"""Many descents at once on one device: the work that their walks ask for, done as one computation.

Each descent is a *lane*. Lanes have weights, optimizer states, α, batches and random seeds of their own, and one
architecture. A round does, for all lanes together, what each has asked for: a whole horizon, or some steps of a plain
training, so that a lane in a long training keeps no other waiting for more than a horizon. What comes out for a lane is
what ``work.perform()`` gives, to rounding, unless the loss draws random numbers: those are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from optuna_greedyhg.hypergrad import randomness, trees
from optuna_greedyhg.hypergrad.batches import Batch
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.estimators import Estimator
from optuna_greedyhg.hypergrad.product_modes import ProductMode
from optuna_greedyhg.hypergrad.products import Products, TrainState
from optuna_greedyhg.hypergrad.stacking import LanesBatch, StackedProblem, StackedRule, side_by_side
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.work import Horizon, RollOut, Trained, Training

Lanework = Horizon | Training
Outcome = Trained | RollOut | Exception | Training
"""What has come of a lane's work: its answer, the error that it has failed by, or what is left of it."""


def require_stackable(estimator: Estimator[Any] | None) -> None:
    """Raises ``ValueError`` if an estimator cannot be that of lanes."""
    if estimator is not None and not estimator.stackable:
        raise ValueError(
            "Lanes need an estimator that treats all entries of the weights alike, but "
            f"{estimator} does not; use Greedy(gamma), or refine trials one by one."
        )


class Replicas:
    """Does the work of many lanes together, round by round.

    What the first lane asks for decides the architecture: all others must be like it.

    Args:
        n_steps: The most steps of a plain training in one round, if lanes wait that ask for anything else.
    """

    def __init__(self, n_steps: int) -> None:
        self._n_steps = n_steps
        self._example: Lanework | None = None
        self._n_rounds = 0

    def require_alike(self, work: Lanework) -> None:
        """Raises ``ValueError`` if the first work of a lane cannot be done together with that of the first lane."""
        if work.products.problem.product_mode is ProductMode.DIFFERENCES:
            raise ValueError(
                "Lanes cannot have ProductMode.DIFFERENCES, whose step would be one for all of them; take another "
                "mode, or refine trials one by one."
            )
        self._example = self._example or work
        products, expected = work.products, self._example.products
        why = products.problem.unlike(expected.problem)
        if not why and products.update_rule != expected.update_rule:
            why = f"its update rule is {products.update_rule}, and not {expected.update_rule}"
        if not why and _shapes(work.alpha) != _shapes(self._example.alpha):
            why = f"its hyperparameters are {_shapes(work.alpha)}, and not {_shapes(self._example.alpha)}"
        if why:
            raise ValueError(
                f"All lanes must have the architecture of the first, but {why}; declare on alpha, or put into the "
                "batches, what differs from trial to trial, or refine trials one by one."
            )

    def perform(self, works: Sequence[Lanework]) -> list[Outcome]:
        """One round: what has come of each lane's work, in their order."""
        outcomes: dict[int, Outcome] = {}
        groups = _groups(works)
        for members in groups:
            self._n_rounds += 1
            its = [works[i] for i in members]
            with randomness.seeded(self._n_rounds, its[0].products.problem.device):
                outcomes |= zip(members, self._perform_alike(its, others_wait=len(groups) > 1), strict=True)
        return [outcomes[i] for i in range(len(works))]

    def _perform_alike(self, works: Sequence[Any], *, others_wait: bool) -> Sequence[Outcome]:
        lanes = [_Lane(work) for work in works]
        n_steps = min(work.n_steps for work in works)
        try:
            if isinstance(works[0], Horizon):
                outcomes: Sequence[Outcome] = _roll_out(works, lanes)
            else:
                outcomes = _train(works, lanes, min(n_steps, self._n_steps) if others_wait else n_steps)
        except Exception as error:  # of which lane it is cannot be told
            return [error] * len(works)
        return [lane.error or outcome for lane, outcome in zip(lanes, outcomes, strict=True)]


class _Lane:
    """Where a lane gets its batches from, with the random numbers that it would have alone."""

    def __init__(self, work: Lanework) -> None:
        self.products = work.products
        self.error: Exception | None = None
        self._problem = work.products.problem
        self._train = work.batches if isinstance(work, Training) else work.products.train_stream
        if isinstance(work, Training):
            self.random_state = work.random_state
        elif not self._problem.has_fixed_batches:
            with self._problem.seeded(work.seed):
                self.random_state = self._problem.random_state()

    def train_batch(self) -> Batch:
        """The next one; ``None`` if there was an error, now or before."""
        return self._draw(self._train)

    def val_batch(self) -> Batch:
        """Likewise."""
        return self._draw(self.products.val_stream)

    def _draw(self, source: Iterator[Batch]) -> Batch:
        if self.error is not None:
            return None
        try:
            if self._problem.has_fixed_batches:
                return next(source)
            with self._problem.restored(self.random_state):
                batch = next(source)
                self.random_state = self._problem.random_state()
            return batch
        except Exception as error:
            self.error = error
            return None


def _groups(works: Sequence[Lanework]) -> list[list[int]]:
    """The positions of what can be done together."""
    kinds: list[Any] = []
    groups: list[list[int]] = []
    for i, work in enumerate(works):
        kind = work.products.domains, (work.estimator, work.n_steps) if isinstance(work, Horizon) else None
        if kind not in kinds:
            kinds.append(kind)
            groups.append([])
        groups[kinds.index(kind)].append(i)
    return groups


def _roll_out(works: Sequence[Horizon], lanes: Sequence[_Lane]) -> list[RollOut]:
    products = _stacked_products(works[0].products, lanes)
    alpha, state = trees.stack([work.alpha for work in works]), _stack([work.state for work in works])
    folded = replace(works[0], products=products, alpha=alpha, state=state).fold(products)
    _charge(lanes, products.cost)
    validated, n = folded.end.validated, len(works)
    losses = [] if validated is None else [validated.loss]
    is_finite = trees.finite_entries([*folded.end.after.tensors, *folded.estimate.values(), *losses])
    states = _unstack(folded.end.after, [work.state.n_steps + work.n_steps for work in works])
    hypergradients = trees.unstack(folded.estimate, n)
    val_losses = [None] * n if validated is None else list(validated.loss.unbind())
    return [RollOut(*parts) for parts in zip(states, hypergradients, val_losses, [None] * n, is_finite, strict=True)]


def _train(works: Sequence[Training], lanes: Sequence[_Lane], n: int) -> list[Trained | Training]:
    products = _stacked_products(works[0].products, lanes)
    alpha = trees.stack([work.alpha for work in works])
    # The stacked state has no name here, which would keep it to the end.
    state = products.train(_stack([work.state for work in works]), alpha, islice(products.train_stream, n))
    _charge(lanes, products.cost)
    states = _unstack(state, [work.state.n_steps + n for work in works])
    return [
        Trained(after, lane.random_state)
        if work.n_steps == n
        else replace(work, state=after, n_steps=work.n_steps - n, random_state=lane.random_state)
        for work, lane, after in zip(works, lanes, states, strict=True)
    ]


def _stacked_products(example: Products, lanes: Sequence[_Lane]) -> Products:
    device = example.problem.device

    def drawn(train: bool) -> Iterator[LanesBatch]:
        while True:
            many = [lane.train_batch() if train else lane.val_batch() for lane in lanes]
            failed = [lane.error is not None for lane in lanes]
            if all(failed):
                raise next(lane.error for lane in lanes if lane.error is not None)
            # What a lane that has failed goes on with does not matter, as nobody sees its results.
            any_other = many[failed.index(False)]
            yield side_by_side([any_other if out else batch for batch, out in zip(many, failed, strict=True)], device)

    problem = StackedProblem(example.problem, drawn(True), drawn(False))
    products = Products(problem, example.domains, StackedRule(example.update_rule))
    for lane in lanes:
        lane.products.mode = products.mode = example.mode
    return products


def _stack(states: Sequence[TrainState]) -> TrainState:
    first = states[0]
    return TrainState(
        trees.stack([state.parameters for state in states]),
        trees.stack([state.buffers for state in states]),
        {kind: trees.stack([state.slots[kind] for state in states]) for kind in first.slots},
        _counts(states, next(iter(first.parameters.values())).device),
    )


def _counts(states: Sequence[TrainState], device: torch.device) -> Any:
    # In double precision, in which Python has the powers of an Adam's β, whatever that of the weights.
    return torch.tensor([state.n_steps for state in states], dtype=torch.float64, device=device)


def _unstack(state: TrainState, n_steps: Sequence[int]) -> list[TrainState]:
    n = len(n_steps)
    slots = {kind: trees.unstack(tree, n) for kind, tree in state.slots.items()}
    return [
        TrainState(parameters, buffers, {kind: slots[kind][i] for kind in slots}, n_steps[i])
        for i, (parameters, buffers) in enumerate(
            zip(trees.unstack(state.parameters, n), trees.unstack(state.buffers, n), strict=True)
        )
    ]


def _charge(lanes: Sequence[_Lane], cost: Cost) -> None:
    """To each lane its own part of what a computation has cost, whose counts are vectors."""
    counts = {name: torch.as_tensor(count).expand(len(lanes)).tolist() for name, count in vars(cost).items()}
    for i, lane in enumerate(lanes):
        lane.products.cost.charge(Cost(**{name: count[i] for name, count in counts.items()}))


def _shapes(tree: Tensors) -> dict[str, str]:
    return {name: str(list(x.shape)) for name, x in tree.items()}
