"""The protocol by which α gets its value: one and the same for refined and unrefined trials.

A validation loss read off in the middle of a descent belongs to weights that were carried along its whole path, under
many different α. It cannot be compared with the value of a black-box trial, whose weights were trained under one. So a
value comes from a declared protocol:

- :class:`Retrain`: train afresh from w_0 with α fixed for a declared number of steps, then evaluate. The result is α.
  Where there are held-out episodes, each is trained afresh, and the value is the mean over them.
- :class:`Online`: evaluate the weights carried along. They are the result, and α was a means.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.episodes import Problem
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.products import Products, TrainState
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.work import Training, Walk

_STEPS_BETWEEN_CHECKS = 50


@dataclass(frozen=True)
class Evaluation:
    """The value of one α under a protocol.

    Attributes:
        outer_step: The outer step at which it was made; 0 is the seed.
        values: The values of α.
        scores: The validation split's loss and metrics, by name; NaN or infinite where training diverged.
        test_scores: The same on the test split, to be recorded and never chosen by; empty if there is none.
        state: The weights that were evaluated; those of the first episode where there are several.
    """

    outer_step: int
    values: Tensors
    scores: Mapping[str, float]
    test_scores: Mapping[str, float]
    state: TrainState


@dataclass(frozen=True)
class Retrain:
    """Train from w_0 with α fixed for ``n_steps`` steps, then evaluate the validation split.

    Every training draws the same batches and the same random numbers, so that two values differ by α alone. The first
    ``n_steps`` batches of a one-shot iterator are kept in memory for it.

    Args:
        n_steps: Number of training steps; ``None`` is as many as all outer steps together make, or for episodes as a
            horizon has.
    """

    n_steps: int | None = None

    def __post_init__(self) -> None:
        if self.n_steps is not None and self.n_steps < 1:
            raise ValueError(f"n_steps must be at least 1, but got {self.n_steps}.")


@dataclass(frozen=True)
class Online:
    """Evaluate the weights carried along by the descent; they, and not α, are the result.

    They belong to the α that they were last trained with, which is recorded with them.
    """


Protocol = Retrain | Online


def train(products: Products, alpha: Tensors, n_steps: int, seed: int) -> Walk[TrainState]:
    """The weights after ``n_steps`` steps from w_0 with α fixed; stops early once they are not finite any more.

    Args:
        products: The problem and its update rule.
        alpha: The coordinates of α.
        n_steps: Number of training steps.
        seed: Seeds the order of the batches, dropout and augmentation.
    """
    state = products.initial_state()
    with products.problem.seeded(seed):
        batches = products.problem.first_batches(n_steps)
        random_state = products.problem.random_state()
    for done in range(0, n_steps, _STEPS_BETWEEN_CHECKS):
        n = min(_STEPS_BETWEEN_CHECKS, n_steps - done)
        state, random_state = yield Training(products, alpha, state, batches, n, random_state)
        if not state.is_finite():
            break
    return state


def evaluate(products: Products, alpha: Tensors, state: TrainState, outer_step: int, seed: int) -> Evaluation:
    """The scores of given weights. The test split is not part of the method, nor of what it costs."""
    problem, values = products.problem, products.values(alpha)
    with problem.seeded(seed):
        scores, n_examples = problem.evaluate("val", state.parameters, state.buffers, values)
        test_scores, _ = problem.evaluate("test", state.parameters, state.buffers, values)
    products.cost.n_evaluations += n_examples
    return Evaluation(outer_step, trees.clone(dict(values)), scores, test_scores, state)


def retrain(
    problem: Problem, products: Products, alpha: Tensors, n_steps: int, outer_step: int, seed: int
) -> Walk[Evaluation]:
    """The mean scores of trainings from w_0 on the problem's held-out episodes, which are the problem itself if alone.

    The episodes that are there to be tested on are trained and evaluated likewise, at nobody's cost.
    """
    # α does not move in it, so that its values are worth computing once.
    values, products = trees.clone(dict(products.values(alpha))), products.at_values()

    def judged(episode: BilevelProblem, cost: Cost | None = None) -> Walk[Evaluation]:
        its = products.on(episode, cost)
        state = yield from train(its, values, n_steps, seed)
        return evaluate(its, values, state, outer_step, seed)

    val, test = [], []
    for episode in problem.val_episodes:
        val.append((yield from judged(episode)))
    for episode in problem.test_episodes:
        test.append((yield from judged(episode, Cost())))
    test_scores = [evaluation.scores for evaluation in test] or [evaluation.test_scores for evaluation in val]
    return replace(val[0], scores=_mean([evaluation.scores for evaluation in val]), test_scores=_mean(test_scores))


def _mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(score[name] for score in scores) for name in scores[0]}
