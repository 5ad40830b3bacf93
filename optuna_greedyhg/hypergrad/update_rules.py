"""Update rules Φ: one training step as a pure function of weights, gradient, optimizer state and hyperparameters.

    (w_t, s_t) = Φ(w_{t−1}, g_{t−1}, s_{t−1}, θ(α)),      g = ∇_w L_train(w, α)

Each is a few lines of arithmetic that agrees step for step with the ``torch.optim`` class of the same name. Any of a
rule's own hyperparameters θ is a number, or the *name* of a hyperparameter in α, which then is refined:

    >>> SGD(lr="lr", momentum=0.9, weight_decay="weight_decay")

Products with B_t need the *pull-back* of a covector (v, s̄) on (w_t, s_t) to g and to θ, products with A_t that to w and
s as well. Each of these rules has it beside its equation; that of any other rule is left to autograd:

    ū = (v, s̄)·∂Φ/∂g,      θ̄ = (v, s̄)·∂Φ/∂θ,      (w̄, s̄) ← (v, s̄)·∂Φ/∂(w, s)

They are written here, and not taken from ``torch.optim``, because the derivatives of ``differentiable=True`` are
refused or silently wrong for several of them (SGD's weight decay with momentum, nesterov momentum).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.trees import Tensors

Slots = dict[str, Tensors]
"""The optimizer's state s: one tree like the weights for each kind of state (momentum, moments)."""

_FAR = 1e6  # a coordinate at which a value is as good as at the end of its domain

Ranges = Mapping[str, tuple[float, float | None]]
"""The least value of each of a rule's own hyperparameters, and the one that it must stay below, if there is one."""

Theta = Mapping[str, Tensor | float]
"""A rule's own hyperparameters by name, each a number or a 0-dimensional tensor."""


class UpdateRule(Protocol):
    """One step of training, differentiable in everything it is given but ``n_steps``."""

    @property
    def theta(self) -> dict[str, float | str]:
        """Its own hyperparameters: a number, or the name of the hyperparameter in α to use."""

    @property
    def penalty(self) -> float | str:
        """The coupled L2 penalty, which adds penalty/2·‖w‖² to the training loss; 0 where there is none."""

    @property
    def moment(self) -> str | None:
        """The slot that holds a running sum of gradients, if there is one."""

    def init(self, parameters: Tensors) -> Slots:
        """The state before the first step."""

    def step(
        self, parameters: Tensors, gradient: Tensors, slots: Slots, theta: Theta, n_steps: int
    ) -> tuple[Tensors, Slots]:
        """The weights and the state after one step, as new tensors; ``n_steps`` counts the steps made before.

        Where many trials are lanes of one computation, and in CUDA graphs, it is a 0-dimensional float64 tensor.
        """

    def preconditioner(self, slots: Slots, theta: Theta, n_steps: int) -> Tensors | None:
        """The diagonal P that multiplies the first moment, given the state after step ``n_steps``; ``None`` for I."""

    def transition(self, curvature: Tensor, theta: Theta, n_steps: int) -> Tensor:
        """What step ``n_steps`` does to a perturbation of (w, m) along an eigenvector of P^(1/2)·(H + penalty)·P^(1/2).

        Args:
            curvature: Eigenvalues, shape (k,).
            theta: The rule's own hyperparameters.
            n_steps: Which step, counted from 1.

        Returns:
            Matrices that multiply columns (δw) or, with a first moment m, (δw, δm); shape (k, 1, 1) or (k, 2, 2).
        """


class Made(NamedTuple):
    """A step that has been made: what Φ has read, and the optimizer's state that came of it."""

    parameters: Tensors
    gradient: Tensors
    slots: Slots
    theta: Theta
    n_steps: int
    slots_after: Slots


class PulledBack(NamedTuple):
    """A covector pulled back through an update rule.

    Attributes:
        factor: A number, by which a product with H entries is scaled in place of a ū with P.
        u: ū, but for the factor.
        theta: θ̄, 0-dimensional, for every θ that has a name in α.
        parameters: w̄, on the weights w_{t−1}, without what goes through the gradient; empty if it was not asked for.
        slots: Likewise s̄, on the state s_{t−1}.
    """

    factor: Tensor | float
    u: Tensors
    theta: Tensors
    parameters: Tensors
    slots: Slots


class PullsBack(UpdateRule, Protocol):
    """An update rule that knows its own derivative."""

    def pull_back(self, v: Tensors, on_slots: Slots, made: Made, *, to_state: bool) -> PulledBack:
        """ū and θ̄, and w̄ and s̄ if they are asked for.

        Args:
            v: On the weights w_t.
            on_slots: s̄, on the state s_t; kinds that are left out are zero.
            made: The step.
            to_state: Whether w_{t−1} and s_{t−1} are not held fixed.
        """


def pulls_back(rule: UpdateRule) -> TypeGuard[PullsBack]:
    """Whether the rule has a pull-back of its own; one that is inherited does not belong to a step that is not."""
    return _comes_with_step(rule, "pull_back")


def has_constant_jacobian(rule: UpdateRule) -> bool:
    """Whether the rule's pull-back reads neither g nor s: Φ is linear in (w, g, s), and θ are numbers.

    A rule says so by a property of this name, which does not belong to a step that was overridden either.
    """
    known = pulls_back(rule) and _comes_with_step(rule, "has_constant_jacobian")
    return known and bool(rule.has_constant_jacobian)  # type: ignore[attr-defined]


def _comes_with_step(rule: UpdateRule, member: str) -> bool:
    owners = [next((cls for cls in type(rule).__mro__ if name in vars(cls)), None) for name in ("step", member)]
    return owners[1] is not None and owners[0] is owners[1]


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, as ``torch.optim.SGD`` with ``dampening=0``:

        d = g + wd·w,   m ← μ·m + d,   w ← w − lr·m   (nesterov: w ← w − lr·(d + μ·m))

    Args:
        lr: Learning rate.
        momentum: The factor μ in [0, 1).
        weight_decay: The coupled L2 penalty wd.
        nesterov: Whether to look ahead along the momentum; needs ``momentum``.

    Raises:
        ValueError: If a number is out of its range, or ``nesterov`` is set without momentum.
    """

    lr: float | str = 1e-3
    momentum: float | str = 0.0
    weight_decay: float | str = 0.0
    nesterov: bool = False
    ranges: ClassVar[Ranges] = {"lr": (0, None), "momentum": (0, 1), "weight_decay": (0, None)}

    def __post_init__(self) -> None:
        _check_numbers(self.theta, self.ranges)
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("Nesterov's step needs a momentum above 0, but got momentum=0.0.")

    @property
    def theta(self) -> dict[str, float | str]:
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}

    @property
    def penalty(self) -> float | str:
        return self.weight_decay

    @property
    def moment(self) -> str | None:
        return None if self.momentum == 0.0 else "momentum"

    @property
    def has_constant_jacobian(self) -> bool:
        return not hyperparameter_names(self)

    def init(self, parameters: Tensors) -> Slots:
        return {} if self.momentum == 0.0 else {"momentum": trees.zeros_like(parameters)}

    def step(
        self, parameters: Tensors, gradient: Tensors, slots: Slots, theta: Theta, n_steps: int
    ) -> tuple[Tensors, Slots]:
        lr, mu = theta["lr"], theta["momentum"]
        d = _decayed(gradient, parameters, theta["weight_decay"])
        m = {k: _add_scaled(d[k], mu, slots["momentum"][k]) for k in d} if slots else d
        direction = self._direction(d, m, mu)
        after = {k: _add_scaled(w, -lr, direction[k]) for k, w in parameters.items()}
        return after, {"momentum": m} if slots else {}

    def pull_back(self, v: Tensors, on_slots: Slots, made: Made, *, to_state: bool) -> PulledBack:
        """With m̄ on the momentum, and ∂w/∂m = −lr:

            ū = m̄ − lr·v,   lr̄ = −v·m_t,   μ̄ = ū·m_{t−1},   w̄d = ū·w_{t−1},   w̄ = v + wd·ū,   m̄ ← μ·ū

        nesterov: ū = m̄ − lr·(1 + μ)·v,   lr̄ = −v·(d + μ·m_t),   μ̄ = ū·m_{t−1} − lr·v·(m_t − m_{t−1}),
        m̄ ← μ·(ū + lr·v)
        """
        lr, mu, wd = (made.theta[k] for k in ("lr", "momentum", "weight_decay"))
        factor, u = -lr * (1 + mu) if self.nesterov else -lr, v
        if on_slots:
            factor, u = 1.0, {k: _add_scaled(m_bar, factor, v[k]) for k, m_bar in on_slots["momentum"].items()}

        def to_lr() -> Tensor:
            d = _decayed(made.gradient, made.parameters, wd)
            return -trees.dot(v, self._direction(d, made.slots_after.get("momentum", d), mu))

        def to_momentum() -> Tensor:
            before, after = made.slots["momentum"], made.slots_after["momentum"]
            through_m = factor * trees.dot(u, before)
            return through_m - lr * trees.dot(v, trees.sub(after, before)) if self.nesterov else through_m

        def to_weight_decay() -> Tensor:
            return factor * trees.dot(u, made.parameters)

        theta_bar = _of_names(self, lr=to_lr, momentum=to_momentum, weight_decay=to_weight_decay)
        if not to_state:
            return PulledBack(factor, u, theta_bar, {}, {})
        w_bar = _decayed(v, u, wd * factor)
        if not made.slots:
            return PulledBack(factor, u, theta_bar, w_bar, {})
        m_bar = trees.scale(mu * factor, u)
        if self.nesterov:
            m_bar = {k: _add_scaled(x, mu * lr, v[k]) for k, x in m_bar.items()}
        return PulledBack(factor, u, theta_bar, w_bar, {"momentum": m_bar})

    def _direction(self, d: Tensors, m: Tensors, mu: Tensor | float) -> Tensors:
        return {k: _add_scaled(d[k], mu, m[k]) for k in d} if self.nesterov else m

    def preconditioner(self, slots: Slots, theta: Theta, n_steps: int) -> None:
        return None

    def transition(self, curvature: Tensor, theta: Theta, n_steps: int) -> Tensor:
        lr, mu = theta["lr"], theta["momentum"]
        if self.moment is None:
            return (1 - lr * curvature)[:, None, None]
        m_to_m = mu * torch.ones_like(curvature)
        if self.nesterov:
            return _matrices(1 - lr * (1 + mu) * curvature, -lr * mu * m_to_m, curvature, m_to_m)
        return _matrices(1 - lr * curvature, -lr * m_to_m, curvature, m_to_m)


@dataclass(frozen=True)
class Adam:
    """Adam with a coupled L2 penalty, as ``torch.optim.Adam``; at step t = 1, 2, ...:

        d = g + wd·w,   m ← β1·m + (1−β1)·d,   v ← β2·v + (1−β2)·d²,
        w ← w − lr · (m/(1−β1^t)) / (√(v/(1−β2^t)) + ε)

    The derivative of √v is taken as 0 where v = 0 (a weight that never had a gradient), so that it is finite.

    Args:
        lr: Learning rate.
        betas: The decay rates (β1, β2) of the two moments, each in [0, 1).
        eps: The term ε added to the denominator.
        weight_decay: The penalty wd.

    Raises:
        ValueError: If a number is out of its range.
    """

    lr: float | str = 1e-3
    betas: tuple[float | str, float | str] = (0.9, 0.999)
    eps: float | str = 1e-8
    weight_decay: float | str = 0.0
    decoupled: ClassVar[bool] = False
    ranges: ClassVar[Ranges] = {
        "lr": (0, None),
        "beta1": (0, 1),
        "beta2": (0, 1),
        "eps": (0, None),
        "weight_decay": (0, None),
    }

    def __post_init__(self) -> None:
        _check_numbers(self.theta, self.ranges)

    @property
    def theta(self) -> dict[str, float | str]:
        beta1, beta2 = self.betas
        return {"lr": self.lr, "beta1": beta1, "beta2": beta2, "eps": self.eps, "weight_decay": self.weight_decay}

    @property
    def penalty(self) -> float | str:
        return 0.0 if self.decoupled else self.weight_decay

    @property
    def moment(self) -> str | None:
        return "exp_avg"

    def init(self, parameters: Tensors) -> Slots:
        return {"exp_avg": trees.zeros_like(parameters), "exp_avg_sq": trees.zeros_like(parameters)}

    def step(
        self, parameters: Tensors, gradient: Tensors, slots: Slots, theta: Theta, n_steps: int
    ) -> tuple[Tensors, Slots]:
        lr, beta1, beta2, eps, wd = (theta[k] for k in ("lr", "beta1", "beta2", "eps", "weight_decay"))
        if self.decoupled:
            d, decayed = gradient, {k: (1 - lr * wd) * w for k, w in parameters.items()}
        else:
            d, decayed = _decayed(gradient, parameters, wd), parameters
        m = {k: _add_scaled(beta1 * slots["exp_avg"][k], 1 - beta1, d[k]) for k in d}
        v = {k: _add_scaled(beta2 * slots["exp_avg_sq"][k], 1 - beta2, d[k] * d[k]) for k in d}
        bias1, bias2 = (_like(1 - beta ** (n_steps + 1), parameters) for beta in (beta1, beta2))
        after = {k: _add_scaled(w, -lr / bias1, m[k] / (_sqrt(v[k] / bias2) + eps)) for k, w in decayed.items()}
        return after, {"exp_avg": m, "exp_avg_sq": v}

    def pull_back(self, v: Tensors, on_slots: Slots, made: Made, *, to_state: bool) -> PulledBack:
        """With s for the second moment, b_i = 1 − β_i^t, r = √(s_t/b2), h = r + ε and x = m_t/h, so that Δw = −lr/b1·x:

            m̄ ← m̄ − lr/b1·v/h,   h̄ = lr/b1·v·x/h,   s̄ ← s̄ + h̄/(2·b2·r),   ū = (1−β1)·m̄ + 2·(1−β2)·s̄·d,
            l̄r = −v·x/b1,   ε̄ = Σh̄,   w̄d = ū·w_{t−1},
            β̄1 = m̄·(m_{t−1} − d) + lr·v·x·∂b1/∂β1/b1²,   β̄2 = s̄·(s_{t−1} − d²) − h̄·r/(2·b2)·∂b2/∂β2,
            w̄ = v + wd·ū,   and on the state of t−1   β1·m̄,   β2·s̄

        decoupled: w̄d = −lr·v·w_{t−1}, l̄r has −wd·v·w_{t−1} as well, and w̄ = (1 − lr·wd)·v
        """
        w, g, slots, theta, n_steps, slots_after = made
        lr, beta1, beta2, eps, wd = (theta[k] for k in ("lr", "beta1", "beta2", "eps", "weight_decay"))
        t = n_steps + 1
        bias1, bias2 = (_like(1 - beta**t, w) for beta in (beta1, beta2))
        to_bias1, to_bias2 = (_like(-t * beta ** (t - 1), w) for beta in (beta1, beta2))
        d = g if self.decoupled else _decayed(g, w, wd)
        r = {k: torch.sqrt(s / bias2) for k, s in slots_after["exp_avg_sq"].items()}
        h = {k: r[k] + eps for k in r}
        x = {k: m / h[k] for k, m in slots_after["exp_avg"].items()}
        m_bar = {k: v[k] / h[k] * (-lr / bias1) for k in v}
        h_bar = {k: m_bar[k] * -x[k] for k in v}
        s_bar = {k: torch.where(r[k] > 0, h_bar[k] / r[k] / (2 * bias2), 0.0) for k in v}
        if "exp_avg" in on_slots:
            m_bar = trees.add(m_bar, on_slots["exp_avg"])
        if "exp_avg_sq" in on_slots:
            s_bar = trees.add(s_bar, on_slots["exp_avg_sq"])
        u = {k: (1 - beta1) * m_bar[k] + 2 * (1 - beta2) * s_bar[k] * d[k] for k in v}

        def to_lr() -> Tensor:
            return -trees.dot(v, x) / bias1 - (wd * trees.dot(v, w) if self.decoupled else 0.0)

        def to_beta1() -> Tensor:
            through_m = trees.dot(m_bar, trees.sub(slots["exp_avg"], d))
            return through_m + lr * trees.dot(v, x) * to_bias1 / bias1**2

        def to_beta2() -> Tensor:
            through_s = trees.dot(s_bar, {k: s - d[k] * d[k] for k, s in slots["exp_avg_sq"].items()})
            return through_s - trees.dot(h_bar, r) / (2 * bias2) * to_bias2

        def to_eps() -> Tensor:
            return torch.stack([x.sum() for x in h_bar.values()]).sum()

        def to_weight_decay() -> Tensor:
            return -lr * trees.dot(v, w) if self.decoupled else trees.dot(u, w)

        named = _of_names(self, lr=to_lr, beta1=to_beta1, beta2=to_beta2, eps=to_eps, weight_decay=to_weight_decay)
        if not to_state:
            return PulledBack(1.0, u, named, {}, {})
        w_bar = trees.scale(1 - lr * wd, v) if self.decoupled else _decayed(v, u, wd)
        return PulledBack(
            1.0, u, named, w_bar, {"exp_avg": trees.scale(beta1, m_bar), "exp_avg_sq": trees.scale(beta2, s_bar)}
        )

    def preconditioner(self, slots: Slots, theta: Theta, n_steps: int) -> Tensors:
        bias2 = 1 - theta["beta2"] ** n_steps
        return {k: 1 / (_sqrt(v / bias2) + theta["eps"]) for k, v in slots["exp_avg_sq"].items()}

    def transition(self, curvature: Tensor, theta: Theta, n_steps: int) -> Tensor:
        lr, beta1 = theta["lr"], theta["beta1"]
        kept = 1 - lr * theta["weight_decay"] if self.decoupled else 1.0
        rate = lr / (1 - beta1**n_steps)
        w_to_m, m_to_m = (1 - beta1) * curvature, beta1 * torch.ones_like(curvature)
        return _matrices(kept - rate * w_to_m, -rate * m_to_m, w_to_m, m_to_m)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay, as ``torch.optim.AdamW``: d = g, and w ← (1 − lr·wd)·w first."""

    weight_decay: float | str = 1e-2
    decoupled: ClassVar[bool] = True


def hyperparameter_names(rule: UpdateRule) -> frozenset[str]:
    """The names in α that the rule uses for its own hyperparameters."""
    return frozenset(value for value in rule.theta.values() if isinstance(value, str))


def require_hyperparameters(rule: UpdateRule, hyperparameters: Mapping[str, Hyperparameter]) -> None:
    """Raises ``ValueError`` if there are none, or the rule names one that is missing or not 0-dimensional."""
    if not hyperparameters:
        raise ValueError("There must be at least one hyperparameter to refine, but none was declared.")
    for name in sorted(hyperparameter_names(rule)):
        if name not in hyperparameters:
            raise ValueError(f"{rule} uses the hyperparameter {name!r}, but there are only {sorted(hyperparameters)}.")
        if hyperparameters[name].init.ndim != 0:
            shape = tuple(hyperparameters[name].init.shape)
            raise ValueError(f"The update rule's hyperparameter {name!r} must be 0-dimensional, but has shape {shape}.")


def require_ranges(rule: UpdateRule, hyperparameters: Mapping[str, Hyperparameter]) -> None:
    """Raises ``ValueError`` if one that the rule names may be moved to where the rule is none."""
    ranges: Ranges = getattr(rule, "ranges", {})  # rules of users may have none
    for key, (low, high) in ranges.items():
        name = rule.theta[key]
        if not isinstance(name, str):
            continue
        ends = torch.tensor([-_FAR, _FAR], dtype=torch.float64)
        lowest, highest = hyperparameters[name].domain.to_value(ends).tolist()
        if lowest < low or (high is not None and highest > high):
            raise ValueError(
                f"{key} must be {_in_words(low, high)}, but the hyperparameter {name!r} may move from {lowest:g} to "
                f"{highest:g}; give it a domain such as Interval(low, high), or other bounds."
            )


def resolve(rule: UpdateRule, alpha: Mapping[str, Tensor]) -> Theta:
    """θ(α): the rule's own hyperparameters with names replaced by α's values."""
    return {key: alpha[value] if isinstance(value, str) else value for key, value in rule.theta.items()}


def _of_names(rule: UpdateRule, **terms: Callable[[], Tensor]) -> Tensors:
    """θ̄: of these terms, those that α has a name for; the others are not computed."""
    theta = rule.theta
    return {key: term() for key, term in terms.items() if isinstance(theta[key], str)}


def _decayed(gradient: Tensors, parameters: Tensors, weight_decay: Tensor | float) -> Tensors:
    if isinstance(weight_decay, float) and weight_decay == 0.0:
        return gradient
    return {k: _add_scaled(g, weight_decay, parameters[k]) for k, g in gradient.items()}


def _like(number: Tensor | float, weights: Tensors) -> Tensor | float:
    """The number, if a tensor then in the weights' dtype: a 0-dimensional weight would take on a wider one."""
    return number.to(next(iter(weights.values())).dtype) if isinstance(number, Tensor) else number


def _add_scaled(x: Tensor, factor: Tensor | float, y: Tensor) -> Tensor:
    """``x + factor·y`` in one pass over memory, which is what an update costs."""
    return torch.addcmul(x, y, factor) if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def _matrices(w_to_w: Tensor, m_to_w: Tensor, w_to_m: Tensor, m_to_m: Tensor) -> Tensor:
    return torch.stack([torch.stack([w_to_w, m_to_w], dim=-1), torch.stack([w_to_m, m_to_m], dim=-1)], dim=-2)


def _sqrt(x: Tensor) -> Tensor:
    # √'(0) = ∞, and ∞·0 = NaN in the chain rule; the inner where keeps the unused branch finite, too.
    positive = x > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, x, 1.0)), 0.0)


def _check_numbers(theta: Mapping[str, float | str], ranges: Ranges) -> None:
    for name, (low, high) in ranges.items():
        value = theta[name]
        if not isinstance(value, str) and not (value >= low and (high is None or value < high)):
            rule = _in_words(low, high)
            raise ValueError(f"{name} must be {rule}, or the name of a hyperparameter, but got {value}.")


def _in_words(low: float, high: float | None) -> str:
    return f"at least {low}" if high is None else f"in [{low}, {high})"
