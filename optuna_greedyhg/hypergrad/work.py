"""A descent's demands for training, apart from who trains: walks, and the two kinds of work that they ask for.

A *walk* is a generator that yields the work it needs done, is sent what has come of it, and returns its result. The
logic of a descent is written as one, so that it need not know whether it is alone:

    at_once(walk)     does each piece of work as soon as it is asked for
    replicas          does the pieces that many walks have asked for as one computation

    >>> state = at_once(evaluation.train)(products, alpha, n_steps, seed)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import recorded, trees
from optuna_greedyhg.hypergrad.batches import Batch
from optuna_greedyhg.hypergrad.episodes import Problem
from optuna_greedyhg.hypergrad.estimators import Estimator, Folded, fold
from optuna_greedyhg.hypergrad.products import InnerStep, Products, TrainState
from optuna_greedyhg.hypergrad.randomness import RandomState
from optuna_greedyhg.hypergrad.trees import Tensors

P = ParamSpec("P")
T = TypeVar("T")


class Work(Protocol):
    """A piece of training that a walk asks for."""

    def perform(self) -> Any:
        """Does it, and returns what the walk is to be sent."""


Walk = Generator[Work, Any, T]


def at_once(walk: Callable[P, Walk[T]]) -> Callable[P, T]:
    """The same function, which does all the work itself and returns the walk's result.

    An error in the work is raised where the walk has asked for it.
    """

    @functools.wraps(walk)
    def walked(*args: P.args, **kwargs: P.kwargs) -> T:
        walking = walk(*args, **kwargs)
        try:
            work = next(walking)
            while True:
                try:
                    answer = work.perform()
                except BaseException as error:
                    work = walking.throw(error)
                else:
                    work = walking.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    return walked


class Trained(NamedTuple):
    """What plain training comes to: the state, and where the random generators are."""

    state: TrainState
    random_state: RandomState


@dataclass(frozen=True)
class Training:
    """Plain training under one α; its answer is a :class:`Trained`.

    Attributes:
        products: The problem and its update rule.
        alpha: The coordinates of α.
        state: Where it starts.
        batches: Its batches, of which it takes ``n_steps``.
        n_steps: Number of training steps.
        random_state: Of the generators when it starts.
    """

    products: Products
    alpha: Tensors
    state: TrainState
    batches: Iterator[Batch]
    n_steps: int
    random_state: RandomState

    def perform(self) -> Trained:
        """The steps, one after the other."""
        products, problem = self.products, self.products.problem
        batches = islice(self.batches, self.n_steps)
        with problem.restored(self.random_state):
            if problem.recorder is None:
                state = products.train(self.state, self.alpha, batches)
            else:
                state = recorded.train(problem.recorder, products, self.state, self.alpha, batches)
            return Trained(state, problem.random_state())


class RollOut(NamedTuple):
    """What one horizon comes to.

    Attributes:
        state: Where training has ended; that of the first episode where there are several.
        hypergradient: The estimate, or the mean of the episodes'.
        val_loss: The validation loss at the end, or the mean of the episodes'; ``None`` if the estimator did not ask.
        carried: What the estimator has kept.
        is_finite: Whether nothing in it is NaN or infinite: state, hypergradient, loss.
    """

    state: TrainState
    hypergradient: Tensors
    val_loss: Tensor | None
    carried: Any
    is_finite: bool


@dataclass(frozen=True)
class Horizon:
    """One horizon of training under one α, folded by an estimator; its answer is a :class:`RollOut`.

    Attributes:
        problem: What draws the episodes that are trained; the problem of ``products`` itself where there are none.
        products: The problem and its update rule.
        estimator: The hypergradient's estimator.
        carried: What it has kept of the horizon before.
        alpha: The coordinates of α.
        state: Where training starts.
        n_steps: Number T of training steps.
        seed: Seeds the episodes, the order of batches, dropout and augmentation.
    """

    problem: Problem
    products: Products
    estimator: Estimator[Any]
    carried: Any
    alpha: Tensors
    state: TrainState
    n_steps: int
    seed: int

    def perform(self) -> RollOut:
        """The horizon, of every episode in turn."""
        with self.products.problem.seeded(self.seed):
            episodes = [self.products.on(episode) for episode in self.problem.draw_episodes()]
            return _mean([self.roll_out(products) for products in episodes])

    def roll_out(self, products: Products) -> RollOut:
        """The horizon for one problem, with the random numbers that come."""
        recorder = products.problem.recorder
        if recorder is None or self.carried is not None:
            ended = recorded.end_of(self.fold(products))
        else:
            ended = recorded.roll_out(
                recorder, products, self.estimator, self._fold_from, self.state, self.alpha, self.n_steps
            )
        asked = [] if ended.val_loss is None else [ended.val_loss]
        is_finite = trees.all_finite([*ended.state.tensors, *ended.hypergradient.values(), *asked])
        return RollOut(*ended, is_finite)

    def _fold_from(self, products: Products, state: TrainState, alpha: Tensors) -> Folded:
        return replace(self, state=state, alpha=alpha).fold(products)

    def fold(self, products: Products) -> Folded:
        """The steps, folded by the estimator."""

        def make_step(before: TrainState, t: int, keep_graph: bool) -> InnerStep:
            batch = next(products.train_stream)
            return products.step(before, self.alpha, batch, keep_graph=keep_graph, remaining=self.n_steps - t)

        return fold(self.estimator, self.carried, self.alpha, self.state, self.n_steps, make_step)


def _mean(roll_outs: list[RollOut]) -> RollOut:
    """The first, with all episodes' mean hypergradient and validation loss."""
    total = functools.reduce(trees.add, (roll_out.hypergradient for roll_out in roll_outs))
    losses = [roll_out.val_loss for roll_out in roll_outs if roll_out.val_loss is not None]
    return roll_outs[0]._replace(
        hypergradient=trees.scale(1 / len(roll_outs), total),
        val_loss=torch.stack(losses).mean() if losses else None,
        is_finite=all(roll_out.is_finite for roll_out in roll_outs),
    )
