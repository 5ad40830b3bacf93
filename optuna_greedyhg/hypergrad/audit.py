"""Estimators of the hypergradient against the exact one, on one horizon of a problem: how good, how slow, how large.

The weights are trained from w_0 for some steps with α where it starts. From there comes one *window* of T steps, whose
exact hypergradient d is that of reverse mode. Every estimate d̂ is compared with it, in α's coordinates:

    cosine = d̂·d / (‖d̂‖·‖d‖)      length ratio = ‖d̂‖ / ‖d‖      sign agreement = share of i with sign(d̂_i) = sign(d_i)

The cosine says whether a small step along −d̂ is a good one. The length matters less to an outer optimizer that rescales
its gradients, as Adam does; of which the very first step is one along the signs alone.

All estimators see the same window: every step is replayed with the batch and the random numbers that it had in plain
training, and has a validation batch of its own, whoever asks for it. So d, and all estimates that look at w_T alone,
are of the last step's batch; a running sum (``Greedy``) reads all T of them, as it does in a descent, and differs by
that, too. Where validation batches are all the same full one, it does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.batches import Batch, Stream
from optuna_greedyhg.hypergrad.clock import side_by_side
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.domains import Hyperparameter, to_coordinates
from optuna_greedyhg.hypergrad.estimators import Estimator, Fixed, Folded, Reverse, fold
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.product_modes import ProductMode
from optuna_greedyhg.hypergrad.products import InnerStep, Products, StepRecipe, TrainState
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import UpdateRule, require_hyperparameters


class DivergedError(RuntimeError):
    """There is nothing to compare with: training, or the exact hypergradient, is NaN or infinite."""


@dataclass(frozen=True)
class AuditRow:
    """One estimator, audited.

    Attributes:
        name: What the caller calls it.
        cosine: Between the estimate and the exact hypergradient, over all groups; NaN where one of them is zero.
        length_ratio: The estimate's length, relative to the exact one's.
        cosine_by_group: The cosine within each group of hyperparameters; ±1 where it is one number.
        sign_agreement: The share of each group's entries whose sign is the exact one's; the sign of 0 is 0.
        seconds: Wall-clock time of one horizon, its training included; the median of some repeats.
        relative_seconds: The same, relative to plain training of that horizon, measured side by side.
        peak_bytes: The most memory that tensors held at a time beyond what was held at the start; ``None`` if unknown.
        cost: What the horizon has cost, its training included; ``None`` if unknown.
        product_mode: How products have differentiated the training loss twice, all estimators alike; ``None`` for not.
        error: What went wrong; ``None`` for nothing. All numbers are NaN or ``None`` where the estimator has raised it.
    """

    name: str
    cosine: float = math.nan
    length_ratio: float = math.nan
    cosine_by_group: Mapping[str, float] | None = None
    sign_agreement: Mapping[str, float] | None = None
    seconds: float = math.nan
    relative_seconds: float = math.nan
    peak_bytes: int | None = None
    cost: Cost | None = None
    product_mode: ProductMode | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """A dictionary of plain numbers, the cost's among them; what is not finite is ``None``."""
        flat = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in ("cost", "product_mode")}
        flat["product_mode"] = self.product_mode and self.product_mode.value
        cost = {} if self.cost is None else asdict(self.cost)
        return {**flat, "cost": None if self.cost is None else self.cost.total, **cost}


@dataclass(frozen=True, eq=False)
class HypergradientAudit:
    """Compares estimators with exact reverse mode on one horizon of a problem.

    The window is trained once, at the first ``run``, and kept with its batches. An estimator then costs
    ``n_repeats + 2`` horizons, one of them slowed down by the measurement of memory; the exact one, memory O(T·P).

    Memory is that of all tensors which the window makes: graphs, states kept for a sweep back, what is carried from one
    horizon to the next. The window's batches and random states are held by the audit, and count for nobody.

    Args:
        problem: The bilevel problem; of a distribution of episodes, one of them.
        hyperparameters: α: where each group starts, and its domain.
        update_rule: The inner optimizer Φ.
        horizon: Number T of steps in the window.
        at_step: Number of training steps before the window.
        n_warm_up: Number of horizons before the window over which an estimator is folded, for what it carries from one
            to the next. With 0 the numbers are those of a first outer step: HyperDistill fits its scale, and pays for
            it, spectral propagation knows no batch but the window's. With more they are those of a later one; what is
            carried into the window is then part of the memory still, but not of time and cost.
        n_repeats: Number of repeats whose median is the time; there is one before them that does not count.
        seed: Seeds batches, dropout and augmentation, as in :func:`descend`.

    Raises:
        ValueError: If a number is out of its range, the warm-up does not fit in before the window, there are no
            hyperparameters, the update rule names one that does not exist or is not 0-dimensional, or an outer
            parameter is not among them.
    """

    problem: BilevelProblem
    hyperparameters: Mapping[str, Hyperparameter]
    _: KW_ONLY
    update_rule: UpdateRule
    horizon: int = 50
    at_step: int = 200
    n_warm_up: int = 0
    n_repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {"horizon": 1, "at_step": 0, "n_warm_up": 0, "n_repeats": 1, "seed": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, but got {value!r}.")
        if self.n_warm_up * self.horizon > self.at_step:
            raise ValueError(
                f"{self.n_warm_up} horizons of {self.horizon} steps do not fit in the at_step={self.at_step} steps "
                "before the window; audit a later step, or take fewer to warm up."
            )
        require_hyperparameters(self.update_rule, self.hyperparameters)
        self.problem.require_outer_parameters(self.hyperparameters)

    def run(self, estimators: Mapping[str, Estimator[Any]]) -> list[AuditRow]:
        """One row for each estimator; one that raises an error has a row that says so.

        Raises:
            DivergedError: If training, or the exact hypergradient, is not finite.
        """
        exact = self._exact
        return [self._row(name, estimator, exact) for name, estimator in estimators.items()]

    def _row(self, name: str, estimator: Estimator[Any], exact: Tensors) -> AuditRow:
        cost = Cost()
        try:
            carried = self._warmed(estimator, cost)
            before = replace(cost)
            folded = _in_float64(self._window(estimator, carried, cost).estimate)
            estimate = {group: folded[group] for group in exact}  # in this order
            cost = _since(before, cost)
            timed = [lambda: self._window(Fixed()), lambda: self._window(estimator, carried)]
            plain, seconds = side_by_side(timed, self.problem.device, self.n_repeats)
            n_bytes = peak_bytes(lambda: self._window(estimator, self._warmed(estimator, Cost())), self.problem.device)
            row = AuditRow(
                name,
                cosine=_cosine(trees.flatten(estimate), trees.flatten(exact)),
                length_ratio=float(trees.norm(estimate) / trees.norm(exact)),
                cosine_by_group={group: _cosine(estimate[group], x) for group, x in exact.items()},
                sign_agreement={group: _sign_agreement(estimate[group], x) for group, x in exact.items()},
                seconds=seconds,
                relative_seconds=seconds / plain,
                peak_bytes=n_bytes,
                cost=cost,
                product_mode=self._path.recipes[-1].products.product_mode if cost.n_products else None,
            )
        except Exception as error:  # of any kind: the caller's own estimators are audited, too
            return AuditRow(name, error=f"{type(error).__name__}: {error}")
        if not trees.all_finite(estimate.values()):
            return replace(row, error="The estimate has entries that are NaN or infinite.")
        return row

    @cached_property
    def _exact(self) -> Tensors:
        exact = _in_float64(self._window(Reverse()).estimate)
        if not trees.all_finite(exact.values()):
            raise DivergedError(
                f"The exact hypergradient of the {self.horizon} steps after step {self.at_step} is NaN or infinite, "
                "although the weights are not; take a shorter horizon or a lower learning rate."
            )
        return exact

    def _warmed(self, estimator: Estimator[Any], cost: Cost) -> Any:
        """What an estimator carries into the window, where products with steps carried there count on ``cost``, too."""
        carried = None
        for k in range(self.n_warm_up):
            carried = self._fold(estimator, k, carried, cost).carried
        return carried

    def _window(self, estimator: Estimator[Any], carried: Any = None, cost: Cost | None = None) -> Folded:
        return self._fold(estimator, self.n_warm_up, carried, cost or Cost())

    def _fold(self, estimator: Estimator[Any], k: int, carried: Any, cost: Cost) -> Folded:
        """One of the horizons kept, the last of which is the window, folded by an estimator."""
        path = self._path

        def make_step(before: TrainState, t: int, keep_graph: bool) -> InnerStep:
            recipe, val_batch = path.recipes[k * self.horizon + t - 1], path.val_batches[k * self.horizon + t - 1]
            products = copy.copy(recipe.products)
            products.cost, products.val_stream = cost, Stream([val_batch], "val_batches")
            return replace(recipe, products=products).make(before, keep_graph=keep_graph)

        with self.problem.seeded(self.seed):  # for what an estimator may draw itself
            return fold(estimator, carried, path.alpha, path.starts[k], self.horizon, make_step)

    @cached_property
    def _path(self) -> _Path:
        """Plain training through the window, of which the end is kept."""
        problem = self.problem
        products = Products(problem, {name: h.domain for name, h in self.hyperparameters.items()}, self.update_rule)
        path = _Path(to_coordinates(self.hyperparameters, problem.device, problem.dtype), [], [], [])
        state, n_steps = products.initial_state(), self.at_step + self.horizon
        first = self.at_step - self.n_warm_up * self.horizon
        with problem.seeded(self.seed):
            for i, batch in enumerate(problem.first_batches(n_steps)):
                step = products.step(state, path.alpha, batch, remaining=(n_steps - 1 - i) % self.horizon)
                if i >= first:
                    path.recipes.append(step.recipe)
                    if (i - first) % self.horizon == 0:
                        path.starts.append(state)
                state = step.after
                if not state.is_finite():
                    raise DivergedError(
                        f"Training has diverged: the weights are NaN or infinite after step {i + 1} of {n_steps}; "
                        "lower the learning rate, or audit a window that ends before."
                    )
            path.val_batches.extend(islice(problem.val_stream(), len(path.recipes)))
        return path


class _Path(NamedTuple):
    """The end of plain training: the horizons to warm up, and the window."""

    alpha: Tensors
    starts: list[TrainState]  # of every horizon
    recipes: list[StepRecipe]  # of all their steps
    val_batches: list[Batch]  # likewise


def _since(before: Cost, after: Cost) -> Cost:
    return Cost(**{f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(Cost)})


def _in_float64(tree: Tensors) -> Tensors:
    return {name: x.detach().to("cpu", torch.float64) for name, x in tree.items()}


def _cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


def _sign_agreement(x: Tensor, y: Tensor) -> float:
    return float((x.sign() == y.sign()).double().mean())


def _plain(x: Any) -> Any:
    """What JSON can say: numbers that are finite, ``None`` for others."""
    if isinstance(x, Mapping):
        return {key: _plain(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x
