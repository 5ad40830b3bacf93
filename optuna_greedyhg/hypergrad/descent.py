"""The outer loop, one for all estimators: roll out, estimate, step α, guard, evaluate, remember the best.

    for k = 1, 2, ...:   w, d̂ = one horizon of training from w under α, folded by the estimator
                         α ← α − (a step of the outer optimizer along d̂)

*Online* (the default), w is carried on from one outer step to the next while α moves, as one long training. With
``restart=True``, every outer step trains again from w_0; so it does, on each of its episodes, for a
:class:`~optuna_greedyhg.hypergrad.episodes.MetaProblem`, and d̂ is their mean.

α drifts: the last is rarely the best, so every few steps α is evaluated by a declared protocol (``evaluation``), and
what comes out is the best of those evaluated, the seed among them. Where an evaluation has trained weights of its own,
w goes on from these (``rebase``).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import evaluation, trees
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.domains import Hyperparameter, to_coordinates, to_values
from optuna_greedyhg.hypergrad.episodes import Problem
from optuna_greedyhg.hypergrad.estimators import Estimator, Fixed
from optuna_greedyhg.hypergrad.evaluation import Evaluation, Online, Protocol, Retrain
from optuna_greedyhg.hypergrad.outer import ADAM, OuterOptimizer
from optuna_greedyhg.hypergrad.product_modes import ProductMode
from optuna_greedyhg.hypergrad.products import Products, TrainState
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import UpdateRule, require_hyperparameters, require_ranges
from optuna_greedyhg.hypergrad.work import Horizon, RollOut, Walk, Work

Stop = Literal["finished", "patience", "diverged"]


@dataclass(frozen=True)
class OuterStep:
    """Where a descent stands after an outer step.

    Attributes:
        index: Number of outer steps made; 0 is the seed, before any.
        values: The values of α after it.
        val_loss: The validation loss at the end of its horizon, on one batch and weights carried along (or its mean
            over the episodes); NaN if the estimator did not ask for it.
        hypergradient_norm: The Euclidean norm of d̂ in α's coordinates, before clipping; NaN at 0.
        evaluation: α's evaluation under the protocol, on the steps of the grid; ``None`` between.
        best: The best evaluation so far.
        cost: All that has been spent so far, evaluations included.
        stopped: Why this is the last step; ``None`` while there are more to come.
        resume_point: All that the descent needs to go on from here, as ``descend(resume_from=...)``. It is made of
            tensors, batches, numbers, strings, ``None``, and tuples, lists and dictionaries of these, which are not to
            be changed; ``torch.save`` writes it, and ``torch.load(weights_only=True)`` reads it.
        product_mode: How products have differentiated the training loss twice; ``None`` if there has been none.
    """

    index: int
    values: Tensors
    val_loss: float
    hypergradient_norm: float
    evaluation: Evaluation | None
    best: Evaluation
    cost: Cost
    stopped: Stop | None
    resume_point: Mapping[str, Any] = field(repr=False)
    product_mode: ProductMode | None = None


Descent = Generator[Work | OuterStep, Any, None]
"""A walk that also yields what it has come to after every outer step."""


@dataclass(frozen=True)
class DescentOptions:
    """The settings of a descent; see :func:`descend` for their meaning.

    Raises:
        ValueError: If a number is out of its range, or ``evaluate`` is an unknown string.
    """

    horizon: int = 10
    n_outer_steps: int = 50
    outer_optimizer: OuterOptimizer = ADAM
    evaluate: Protocol | Literal["retrain", "online"] = "retrain"
    evaluate_every: int = 10
    metric: str = "loss"
    maximize: bool = False
    patience: int | None = None
    restart: bool = False
    rebase: bool = True
    max_hypergradient_norm: float | None = None
    max_failures: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        at_least = {"horizon": 1, "n_outer_steps": 0, "evaluate_every": 1, "patience": 1, "max_failures": 0, "seed": 0}
        for name, low in at_least.items():
            value = getattr(self, name)
            if not (name == "patience" and value is None) and (not isinstance(value, Integral) or value < low):
                raise ValueError(f"{name} must be an integer of at least {low}, but got {value!r}.")
            if value is not None:
                object.__setattr__(self, name, int(value))  # NumPy's integers are not JSON's
        if self.max_hypergradient_norm is not None and not self.max_hypergradient_norm > 0:
            raise ValueError(f"max_hypergradient_norm must be above 0, or None, but got {self.max_hypergradient_norm}.")
        if not isinstance(self.evaluate, Protocol) and self.evaluate not in ("retrain", "online"):
            raise ValueError(
                f"evaluate must be 'retrain', 'online', Retrain(n_steps) or Online(), but got {self.evaluate!r}."
            )
        if self.protocol == Retrain(None):
            raise ValueError("Without outer steps, say how long to train for a value: evaluate=Retrain(n_steps=...).")

    @property
    def protocol(self) -> Retrain | Online:
        """The protocol of evaluation, with its number of steps filled in."""
        if self.evaluate == "online" or isinstance(self.evaluate, Online):
            return Online()
        declared = self.evaluate.n_steps if isinstance(self.evaluate, Retrain) else None
        return Retrain(declared or self.horizon * self.n_outer_steps or None)

    def suited_to(self, problem: Problem) -> DescentOptions:
        """The same, with what a problem of episodes implies: restarts, and evaluations by a training of one horizon.

        Raises:
            ValueError: If the problem has episodes, and evaluations are to be online.
        """
        if not problem.episodic:
            return self
        if isinstance(self.protocol, Online):
            raise ValueError(
                "Episodes are trained from the initial weights and then left, so there are no weights to evaluate "
                "online; use evaluate='retrain' or Retrain(n_steps)."
            )
        declared = self.evaluate.n_steps if isinstance(self.evaluate, Retrain) else None
        return replace(self, restart=True, evaluate=Retrain(declared or self.horizon))

    def is_better(self, a: Evaluation, b: Evaluation) -> bool:
        """Whether ``a`` has a strictly better score than ``b``; NaN is worse than everything."""
        return self.loss_of(a) < self.loss_of(b)

    def loss_of(self, evaluation: Evaluation) -> float:
        """The score with the sign of a loss; +inf where it is NaN or the validation loss is not finite."""
        score = evaluation.scores[self.metric]
        # A metric can be finite where training has diverged: the argmax of NaN is a class, too.
        if math.isnan(score) or not math.isfinite(evaluation.scores["loss"]):
            return math.inf
        return -score if self.maximize else score


def descend(
    problem: Problem,
    hyperparameters: Mapping[str, Hyperparameter],
    *,
    update_rule: UpdateRule,
    estimator: Estimator[Any] | None,
    options: DescentOptions | None = None,
    resume_from: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[OuterStep]:
    """Refines hyperparameters by hypergradient descent, yielding after every outer step.

    The first item is the seed's own evaluation, with index 0. A caller stops a descent by not asking for more.

    Args:
        problem: The bilevel problem, or a distribution of episodes.
        hyperparameters: α: where each group starts and the domain it stays in.
        update_rule: The inner optimizer Φ.
        estimator: The hypergradient's estimator; ``None`` keeps α at the seed. Where α alone is judged, by
            :class:`Retrain`, the seed is evaluated and that is all.
        options: The settings below as one object; given either so or one by one.
        resume_from: A step's ``resume_point``, from a descent with the same arguments: the next item is the step after
            it, and all is as if there had been no break (to the bit, on one kind of machine). Batches are drawn again
            up to where they were, in the order decided at the beginning of the pass.

    Keyword Args:
        horizon: Number T of training steps in one outer step.
        n_outer_steps: Number of steps of α.
        outer_optimizer: Makes the optimizer of α's coordinates from a list of tensors; Adam with lr 0.3 by default.
        evaluate: The protocol of evaluation: :class:`Retrain` (or ``"retrain"``) or :class:`Online` (``"online"``).
        evaluate_every: Number of outer steps between two evaluations; the first and the last α are always evaluated.
        metric: What is evaluated: ``"loss"`` or one of the problem's metrics. Descent is always along ``val_loss``.
        maximize: Whether a larger metric is a better one.
        patience: Stop after this many evaluations in a row without a new best; ``None`` never does.
        restart: Train every horizon from w_0 again, instead of carrying the weights on; episodes always do.
        rebase: After every evaluation, the seed's among them, go on from the weights that it has trained, if they are
            finite, and not with ``restart``. Hypergradients at the end of a training suit a whole one better than those
            at its beginning, where a learning rate cannot be large enough; and those weights are paid for already.
        max_hypergradient_norm: Scale longer hypergradients down to this norm.
        max_failures: After NaN or infinity, the descent goes back to the last good state and halves the step from
            there; it gives up after this many failures in a row. Good steps double the length again, up to the full.
        seed: Seeds batches, dropout and augmentation. Equal seeds give equal trainings, whatever α is.

    Raises:
        ValueError: If a setting is out of its range, there are no hyperparameters, the update rule names one that does
            not exist or is not 0-dimensional, an outer parameter is not among them, ``metric`` is unknown, a problem
            of episodes is to be evaluated online, or ``resume_from`` belongs to other hyperparameters or weights.
        TypeError: If a setting is unknown.
    """
    if options is not None and settings:
        raise TypeError(f"Give either options or single settings, but got both: {sorted(settings)}.")
    options = options or DescentOptions(**settings)
    return _at_once(descent(problem, hyperparameters, update_rule, estimator, options, resume_from))


def descent(
    problem: Problem,
    hyperparameters: Mapping[str, Hyperparameter],
    update_rule: UpdateRule,
    estimator: Estimator[Any] | None,
    options: DescentOptions,
    resume_from: Mapping[str, Any] | None = None,
) -> Descent:
    """What :func:`descend` does, as a walk that leaves the training to others; with its arguments and errors."""
    require_hyperparameters(update_rule, hyperparameters)
    if estimator is not None:
        require_ranges(update_rule, hyperparameters)
    first = problem.val_episodes[0]
    first.require_outer_parameters(hyperparameters)
    if options.metric not in first.metrics:
        raise ValueError(
            f"metric must be one of {first.metrics}, but got {options.metric!r}; name it in the problem's metrics."
        )
    restarts = options.restart and not problem.episodic  # MetaProblem says why episodes are no matter for a warning
    if estimator is not None and restarts and estimator.biased_in_restart_mode:
        warnings.warn(
            f"{estimator} uses validation gradients of all steps, whose sum does not vanish at the optimum when every "
            "outer step restarts from the initial weights; use restart=False, Greedy(gamma=0.0) or Reverse().",
            stacklevel=3,
        )
    products = Products(first, {name: h.domain for name, h in hyperparameters.items()}, update_rule)
    return _outer_loop(problem, products, hyperparameters, estimator, options.suited_to(problem), resume_from)


def next_step(descent: Descent) -> Walk[OuterStep]:
    """The work up to a descent's next outer step, which is what comes of it; there must be one more."""
    item = next(descent)
    while not isinstance(item, OuterStep):
        item = descent.send((yield item))
    return item


def _at_once(descent: Descent) -> Iterator[OuterStep]:
    answer = None
    with suppress(StopIteration):
        while True:
            item = descent.send(answer)
            if isinstance(item, OuterStep):
                yield item
                answer = None
            else:
                answer = item.perform()


def _outer_loop(
    problem: Problem,
    products: Products,
    hyperparameters: Mapping[str, Hyperparameter],
    estimator: Estimator[Any] | None,
    options: DescentOptions,
    resume_from: Mapping[str, Any] | None,
) -> Descent:
    moves, online = estimator is not None, isinstance(options.protocol, Online)
    estimator = estimator or Fixed()
    device, dtype = products.problem.device, products.problem.dtype
    # The seed is evaluated at its exact values, which a round trip through coordinates may change in the last digits.
    exact, seed_values = products.at_values(), to_values(hyperparameters, device, dtype)
    if moves:
        alpha = to_coordinates(hyperparameters, device, dtype)
    else:
        products, alpha = exact, seed_values
    # Where α alone is the result, nothing is learnt from training on under an α that does not move.
    n_outer_steps = options.n_outer_steps if moves or online else 0
    walker = _Walker(problem, products, estimator, alpha, options)
    nan = math.nan
    stopped: Stop | None
    if resume_from is None:
        seed = yield from _evaluate(problem, exact, seed_values, products.initial_state(), 0, options)
        best = seed = replace(seed, values={name: h.init for name, h in hyperparameters.items()})
        walker.rebase(seed.state)
        since_best, made = 0, 0
        stopped = "finished" if n_outer_steps == 0 else None
        point = walker.resume_point(0, best, since_best)
        yield OuterStep(0, seed.values, nan, nan, seed, best, replace(products.cost), stopped, point)
    else:
        best, since_best, made = walker.resume(resume_from)

    for k in range(made + 1, n_outer_steps + 1):
        roll_out = yield from walker.roll_out(k)
        if roll_out is None:
            point = walker.resume_point(k, best, since_best)
            mode = products.product_mode
            yield OuterStep(k, best.values, nan, nan, None, best, replace(products.cost), "diverged", point, mode)
            return
        norm, trained_under = trees.norm(roll_out.hypergradient), walker.alpha
        if moves:
            if k == 1:
                _warn_of_idle(roll_out.hypergradient, estimator)
            walker.move(_clipped(roll_out.hypergradient, norm, options.max_hypergradient_norm))

        evaluated: Evaluation | None = None
        stopped = "finished" if k == n_outer_steps else None
        if k % options.evaluate_every == 0 or k == n_outer_steps:
            judged = trained_under if online else walker.alpha
            evaluated = yield from _evaluate(problem, products, judged, roll_out.state, k, options)
            walker.rebase(evaluated.state)
            improved = options.is_better(evaluated, best)
            best = evaluated if improved else best
            since_best = 0 if improved else since_best + 1
            if options.patience is not None and since_best >= options.patience and stopped is None:
                stopped = "patience"
        values = trees.clone(dict(products.values(walker.alpha)))
        val_loss = nan if roll_out.val_loss is None else float(roll_out.val_loss)
        point = walker.resume_point(k, best, since_best)
        cost, mode = replace(products.cost), products.product_mode
        yield OuterStep(k, values, val_loss, float(norm), evaluated, best, cost, stopped, point, mode)
        if stopped:
            return


class Achieved(NamedTuple):
    """What a descent has come to.

    Attributes:
        n_outer_steps: Number of outer steps made.
        best: The best evaluation so far.
        cost: All that has been spent so far.
    """

    n_outer_steps: int
    best: Evaluation
    cost: Cost


def achieved_at(resume_point: Mapping[str, Any]) -> Achieved:
    """What the step of a ``resume_point`` said, to go on telling where another process has left off."""
    best = resume_point["best"]
    evaluation = Evaluation(**{**best, "state": TrainState(**best["state"])})
    return Achieved(resume_point["made"], evaluation, Cost(**resume_point["cost"]))


class _Walker:
    """Where a descent is: α, the weights, the outer optimizer's state; and the last good point to go back to."""

    def __init__(
        self,
        problem: Problem,
        products: Products,
        estimator: Estimator[Any],
        alpha: Tensors,
        options: DescentOptions,
    ) -> None:
        self.alpha = alpha
        self._problem = problem
        self._products = products
        self._estimator = estimator
        self._options = options
        self._outer = _Outer(options.outer_optimizer, alpha)
        self._optimizer_state = self._outer.initial_state
        self._start = self._state = products.initial_state()
        self._carried: Any = None
        self._last_good: _Point | None = None
        self._step_scale = 1.0

    def rebase(self, state: TrainState) -> None:
        """Goes on from the weights of an evaluation, if that is asked for and they are finite."""
        if self._options.rebase and not self._options.restart and state.is_finite():
            self._state = state
            self._last_good = self._last_good and self._last_good._replace(state=state)

    def roll_out(self, k: int) -> Walk[RollOut | None]:
        """The k-th horizon, under an α for which it is finite; ``None`` if there have been too many failures."""
        for _ in range(self._options.max_failures + 1):
            roll_out: RollOut = yield Horizon(
                self._problem,
                self._products,
                self._estimator,
                self._carried,
                self.alpha,
                self._state,
                self._options.horizon,
                self._options.seed + k,
            )
            if roll_out.is_finite:
                self._step_scale = min(1.0, 2 * self._step_scale)
                self._state = self._start if self._options.restart else roll_out.state
                # What an estimator knows of one episode, curvatures for example, is not true of another.
                self._carried = None if self._problem.episodic else roll_out.carried
                return roll_out
            if self._last_good is None:
                return None
            self._step_scale /= 2
            self._state = self._last_good.state
            self._step()
        return None

    def move(self, hypergradient: Tensors) -> None:
        """Moves α along the hypergradient of the horizon just rolled out, which has been good."""
        self._last_good = _Point(self.alpha, self._state, self._optimizer_state, hypergradient)
        self._step()

    def resume_point(self, made: int, best: Evaluation, since_best: int) -> dict[str, Any]:
        """What ``resume`` takes."""
        return {
            "made": made,
            "alpha": self.alpha,
            "state": _as_dict(self._state),
            "optimizer_state": self._optimizer_state,
            "last_good": None if self._last_good is None else {**self._last_good._asdict(), "state": None},
            "step_scale": self._step_scale,
            "carried": self._carried,
            "position": self._products.position,
            "cost": _as_dict(self._products.cost),
            "best": {**_as_dict(best), "state": _as_dict(best.state)},
            "since_best": since_best,
        }

    def resume(self, point: Mapping[str, Any]) -> tuple[Evaluation, int, int]:
        """Goes to where another walker was, and returns the best evaluation, those since it, and the steps made."""
        state, achieved = TrainState(**point["state"]), achieved_at(point)
        _require_alike("hyperparameters", point["alpha"], self.alpha)
        _require_alike("weights", state.parameters, self._start.parameters)
        self.alpha, self._state = point["alpha"], state
        self._optimizer_state = point["optimizer_state"]
        # Where the last good α was left, training stood where it stands now.
        self._last_good = point["last_good"] and _Point(**{**point["last_good"], "state": state})
        self._step_scale, self._carried = point["step_scale"], point["carried"]
        self._products.seek(point["position"])
        for name, count in asdict(achieved.cost).items():
            setattr(self._products.cost, name, count)
        return achieved.best, point["since_best"], achieved.n_outer_steps

    def _step(self) -> None:
        assert self._last_good is not None
        self.alpha, self._optimizer_state = self._outer.step(self._last_good, self._step_scale)


class _Point(NamedTuple):
    """A place that the descent can go back to: α, the hypergradient there, and where training stood."""

    alpha: Tensors
    state: TrainState
    optimizer_state: dict[str, Any]
    hypergradient: Tensors


class _Outer:
    """A torch optimizer as a function from a point to the next α and its own next state."""

    def __init__(self, make_optimizer: OuterOptimizer, alpha: Tensors) -> None:
        self._leaves = {name: z.clone().requires_grad_() for name, z in alpha.items()}
        self._optimizer = make_optimizer(list(self._leaves.values()))
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise ValueError("The outer optimizer must step without a closure, which LBFGS does not; use Adam or SGD.")
        self.initial_state = _copied(self._optimizer.state_dict())

    def step(self, point: _Point, scale: float) -> tuple[Tensors, dict[str, Any]]:
        """α after one step from ``point``, its length times ``scale``; and the optimizer's state after it."""
        # Also after a step from there, as some optimizers' states are cast when they are loaded: as if gone on with.
        self._optimizer.load_state_dict(_copied(point.optimizer_state))  # it keeps and mutates what it loads
        with torch.no_grad():
            for name, leaf in self._leaves.items():
                leaf.copy_(point.alpha[name])
                leaf.grad = point.hypergradient[name].clone()
        self._optimizer.step()
        displacement = trees.sub(trees.clone(self._leaves), point.alpha)
        return trees.add_scaled(point.alpha, scale, displacement), _copied(self._optimizer.state_dict())


def _copied(state: Any) -> Any:
    """A torch optimizer's state that nobody else mutates, many times faster than by ``copy.deepcopy``."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copied(item) for key, item in state.items()}
    return [_copied(item) for item in state] if isinstance(state, list) else copy.deepcopy(state)


def _evaluate(
    problem: Problem, products: Products, alpha: Tensors, carried: TrainState, k: int, options: DescentOptions
) -> Walk[Evaluation]:
    if isinstance(options.protocol, Online):
        return evaluation.evaluate(products, alpha, carried, k, options.seed)
    assert options.protocol.n_steps is not None
    return (yield from evaluation.retrain(problem, products, alpha, options.protocol.n_steps, k, options.seed))


def _as_dict(instance: Any) -> dict[str, Any]:
    """A dataclass's fields, not copied."""
    return {f.name: getattr(instance, f.name) for f in fields(instance)}


def _require_alike(what: str, found: Tensors, expected: Tensors) -> None:
    shapes = [{name: (tuple(x.shape), x.dtype) for name, x in tree.items()} for tree in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"resume_from must be of a descent with the same {what}, {shapes[1]}, but got {shapes[0]}.")


def _clipped(hypergradient: Tensors, norm: Tensor, max_norm: float | None) -> Tensors:
    if max_norm is None:
        return hypergradient
    factor = torch.clamp(max_norm / norm, max=1.0)
    return {name: x * factor for name, x in hypergradient.items()}


def _warn_of_idle(hypergradient: Tensors, estimator: Estimator[Any]) -> None:
    idle = sorted(name for name, x in hypergradient.items() if not bool(x.any()))
    if idle:
        warnings.warn(
            f"{estimator} sees no effect of the hyperparameters {idle}: their hypergradient is exactly zero. Check "
            "that a loss or the update rule reads them, and that the estimator looks through the one that does.",
            stacklevel=4,
        )
