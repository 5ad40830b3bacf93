"""Slow exact answers, computed without the package's products: autograd through all the steps, and differences.

Everything here calls the user's own module with the weights swapped in. The update rules alone are shared, and those
are compared with ``torch.optim``, through which :func:`by_torch_optim` trains from the first step to the last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from optuna_greedyhg.hypergrad.products import TrainState
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, AdamW, UpdateRule
from tests.problems import Case

_TORCH_CLASS = {SGD: torch.optim.SGD, Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}


def assert_agree(actual: Tensors, expected: Tensors, rtol: float) -> None:
    """Group by group, the largest difference is at most ``rtol`` of the largest number expected, which is not zero."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].shape == x.shape, name
        scale, error = float(x.abs().max()), float((actual[name] - x).abs().max())
        assert scale > 0, f"{name} is expected to be zero: nothing is compared"
        assert error <= rtol * scale, f"{name}: {actual[name]} is {error / scale:.2e} from {x}"


class Point(NamedTuple):
    """Weights, buffers and optimizer state, whose graph goes on."""

    parameters: Tensors
    buffers: Tensors
    slots: dict[str, Tensors]


def exact(case: Case, start: TrainState, alpha: Tensors, first: int, n_steps: int, seed: int = 0) -> Tensors:
    """dL_val(w_T, α)/dα by autograd through steps ``first``, ..., ``first + n_steps − 1``; buffers are constants."""
    z = _leaves(alpha)
    point = Point(start.parameters, start.buffers, start.slots)
    with _seeded(seed):
        for i in range(n_steps):
            point = _step(case, point, z, first + i, start.n_steps + i)
    return _gradients(_validate(case, point, z, 0), z)


def greedy(
    case: Case,
    start: TrainState,
    alpha: Tensors,
    first: int,
    n_steps: int,
    gamma: float,
    seed: int = 0,
    n_val: int = 0,
    stride: int = 1,
) -> tuple[Tensors, Point]:
    """∇_α L_val(w_T, α) + Σ_t γ^{T−t} v_t·B_t term by term, every B_t from its own graph; and where training ended.

    Validation batches are taken in order from number ``n_val``. With a stride, the term of a step between two strides
    is that of the next one which has a term.
    """
    shares = [0.0] * n_steps
    for i in range(n_steps):
        shares[i + (n_steps - 1 - i) % stride] += gamma ** (n_steps - 1 - i)
    total = {name: torch.zeros_like(x) for name, x in alpha.items()}
    point = Point(start.parameters, start.buffers, start.slots)
    with _seeded(seed):
        for i in range(n_steps):
            z = _leaves(alpha)
            after = _step(case, point, z, first + i, start.n_steps + i)
            point = _detached(after)
            if (n_steps - 1 - i) % stride:
                continue
            w = _leaves(after.parameters)
            val_loss = _validate(case, after._replace(parameters=w), z, n_val)
            v, direct = _gradients(val_loss, w), _gradients(val_loss, z)
            term = _gradients(_dot(v, after.parameters), z)
            total = {name: total[name] + shares[i] * term[name] for name in total}
            n_val += 1
    return {name: direct[name] + total[name] for name in total}, point


def terminal_greedy(
    case: Case, start: TrainState, alpha: Tensors, first: int, n_steps: int, gamma: float, seed: int = 0
) -> Tensors:
    """∇_α L_val(w_T, α) + Σ_t γ^{T−t} v_T·B_t, every B_t from its own graph, all graphs at once."""
    terms, point = [], Point(start.parameters, start.buffers, start.slots)
    with _seeded(seed):
        for i in range(n_steps):
            z = _leaves(alpha)
            after = _step(case, point, z, first + i, start.n_steps + i)
            terms.append((z, after.parameters))
            point = _detached(after)
    z, w = _leaves(alpha), _leaves(point.parameters)
    val_loss = _validate(case, point._replace(parameters=w), z, 0)
    v, total = _gradients(val_loss, w), _gradients(val_loss, z)
    for i, (z, after) in enumerate(terms):
        term = _gradients(_dot(v, after), z)
        total = {name: total[name] + gamma ** (n_steps - 1 - i) * term[name] for name in total}
    return total


def distilled(
    case: Case, states: list[TrainState], alpha: Tensors, first: int, gamma: float, draws: Sequence[int]
) -> tuple[Tensors, float]:
    """HyperDistill's estimate over the steps between ``states``, and the θ fitted there; means and sums written out.

    The product that stands for the last s steps has the batch of the one that ``draws[s − 1]`` others follow.
    """
    n, last = len(states) - 1, states[-1]
    z, w = _leaves(alpha), _leaves(last.parameters)
    val_loss = _validate(case, Point(w, last.buffers, last.slots), z, 0)
    direct, zeros = _gradients(val_loss, z), {name: torch.zeros_like(x) for name, x in w.items()}
    v = v_t = Point(_gradients(val_loss, w), {}, dict.fromkeys(last.slots, zeros))

    def product(points: list[TrainState], draw: int) -> Tensors:
        shares = torch.tensor([gamma**i for i in range(len(points))], dtype=torch.float64)
        return _pull_back(case, _mean(points, shares / shares.sum()), alpha, v, first + n - 1 - draw)[1]

    line = [_mean([states[0], last], torch.tensor([1 - t / n, t / n], dtype=torch.float64)) for t in range(n)]
    tail, x, y = torch.zeros(sum(e.numel() for e in alpha.values()), dtype=torch.float64), [], []
    for s in range(1, n + 1):
        v_t, term = _pull_back(case, line[n - s], alpha, v_t, first + n - s)
        tail = tail + _flat(term)
        x.append(sum(gamma**i for i in range(s)) * _flat(product(line[n - s :][::-1], draws[s - 1])))
        y.append(tail)
    theta = float(torch.linalg.lstsq(torch.cat(x)[:, None], torch.cat(y)[:, None]).solution)
    scale = theta * sum(gamma**i for i in range(n))
    term = product(states[-2::-1], draws[-1])
    return {name: direct[name] + scale * term[name] for name in alpha}, theta


def online_descent(
    case: Case, gamma: float, horizon: int, optimizer: Callable[..., Any], seeds: range
) -> list[Tensors]:
    """α's values after every outer step of greedy descent from a single stream of batches, by the textbook loop."""
    leaves = _leaves(case.alpha())
    outer = optimizer(list(leaves.values()))
    point, n_steps, trajectory = case.state_after(0), 0, []
    for seed in seeds:
        alpha = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        estimate, end = greedy(case, point, alpha, n_steps, horizon, gamma, seed, n_val=n_steps)
        for name, leaf in leaves.items():
            leaf.grad = estimate[name]
        outer.step()
        n_steps += horizon
        point = TrainState(end.parameters, end.buffers, end.slots, n_steps)
        trajectory.append({name: x.detach().clone() for name, x in case.values(leaves).items()})
    return trajectory


def by_torch_optim(case: Case, alpha: Tensors, n_steps: int, seed: int = 0) -> Iterator[nn.Module]:
    """A copy of the user's module after each step of the ``torch.optim`` class that the rule is named after."""
    module = copy.deepcopy(case.specimen.module)
    values = case.values(alpha)
    optimizer = torch_optimizer(case.rule, list(module.parameters()), values)
    with _seeded(seed):
        for t in range(n_steps):
            optimizer.zero_grad()
            case.specimen.train_loss(module, values, case.train_batch(t)).backward()
            optimizer.step()
            yield module


def torch_optimizer(rule: UpdateRule, parameters: list[nn.Parameter], values: Tensors) -> torch.optim.Optimizer:
    """The ``torch.optim`` counterpart of an update rule at given hyperparameters."""
    theta = {key: float(values[value]) if isinstance(value, str) else value for key, value in rule.theta.items()}
    if isinstance(rule, Adam):
        theta["betas"] = (theta.pop("beta1"), theta.pop("beta2"))
    if isinstance(rule, SGD):
        theta["nesterov"] = rule.nesterov
    return _TORCH_CLASS[type(rule)](parameters, **theta)


def val_loss_by_torch_optim(case: Case, alpha: Tensors, n_steps: int, seed: int = 0) -> float:
    """L_val(w_T(α), α) with w_T trained from w_0 by ``torch.optim``."""
    *_, module = by_torch_optim(case, alpha, n_steps, seed)
    with torch.no_grad():
        return float(case.specimen.val_loss(module.eval(), case.values(alpha), case.val_batch(0)))


def implicit(case: Case, end: TrainState, alpha: Tensors) -> Tensors:
    """∇_α L_val − v·(∂F/∂w)⁻¹·∂F/∂α at given weights, F = ∇_w L_train + wd·w on the first batch, by dense matrices."""
    z, w = _leaves(alpha), _leaves(end.parameters)
    values = case.values(z)
    loss = _call(case.specimen.module, case.specimen.train_loss, w, dict(end.buffers), values, case.train_batch(0))
    weight_decay = 0.0 if isinstance(case.rule, AdamW) else case.rule.theta["weight_decay"]
    penalty = values[weight_decay] if isinstance(weight_decay, str) else weight_decay
    loss = loss + 0.5 * penalty * sum(x.square().sum() for x in w.values())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(w.values()), create_graph=True)])
    by_w, by_z = (
        [torch.autograd.grad(g, list(leaves.values()), retain_graph=True, materialize_grads=True) for g in gradient]
        for leaves in (w, z)
    )
    jacobian = torch.stack([torch.cat([x.flatten() for x in row]) for row in by_w])
    val_loss = _validate(case, Point(w, end.buffers, end.slots), z, 0)
    v, direct = _gradients(val_loss, w), _gradients(val_loss, z)
    q = torch.linalg.solve(jacobian.T, torch.cat([x.flatten() for x in v.values()]))
    return {name: direct[name] - sum(q[i] * row[k] for i, row in enumerate(by_z)) for k, name in enumerate(z)}


def hessian(case: Case, state: TrainState, alpha: Tensors, t: int, seed: int) -> Tensor:
    """∇²_w L_train on batch ``t`` as a matrix, over the weights' entries in their order."""
    w, buffers = _leaves(state.parameters), {name: x.clone() for name, x in state.buffers.items()}
    with _seeded(seed):
        module, loss = case.specimen.module, case.specimen.train_loss
        value = _call(module, loss, w, buffers, case.values(alpha), case.train_batch(t))
    gradient = torch.autograd.grad(value, list(w.values()), create_graph=True)
    rows = (_gradients(entry, w).values() for g in gradient for entry in g.reshape(-1))
    return torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])


def central_differences(f: Callable[[Tensors], float], x: Tensors, h: float | Tensors = 3e-4) -> Tensors:
    """df/dx entry by entry, with an error of order h⁴."""
    result = {name: torch.zeros_like(t) for name, t in x.items()}
    for name, tensor in x.items():
        steps = torch.full_like(tensor, h) if isinstance(h, float) else h[name]
        for i, step in enumerate(steps.reshape(-1).tolist()):
            near, far = (_at(f, x, name, i, k * step) - _at(f, x, name, i, -k * step) for k in (1, 2))
            result[name].view(-1)[i] = (8 * near - far) / (12 * step)
    return result


def _at(f: Callable[[Tensors], float], x: Tensors, name: str, i: int, step: float) -> float:
    moved = x[name].clone()
    moved.view(-1)[i] += step
    return f({**x, name: moved})


def _step(case: Case, point: Point, z: Tensors, t: int, n_steps: int) -> Point:
    alpha = case.values(z)
    w = {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in point.parameters.items()}
    buffers = {name: x.clone() for name, x in point.buffers.items()}
    loss = _call(case.specimen.module, case.specimen.train_loss, w, buffers, alpha, case.train_batch(t))
    g = torch.autograd.grad(loss, list(w.values()), create_graph=True, materialize_grads=True)
    theta = {key: alpha[value] if isinstance(value, str) else value for key, value in case.rule.theta.items()}
    parameters, slots = case.rule.step(w, dict(zip(w, g, strict=True)), point.slots, theta, n_steps)
    return Point(parameters, {name: x.detach() for name, x in buffers.items()}, slots)


def _pull_back(case: Case, start: TrainState, alpha: Tensors, v: Point, t: int) -> tuple[Point, Tensors]:
    """v·A and v·B of step ``t`` made from ``start``, with v on weights and optimizer state."""
    w, z = _leaves(start.parameters), _leaves(alpha)
    slots = {kind: _leaves(tree) for kind, tree in start.slots.items()}
    after = _step(case, Point(w, start.buffers, slots), z, t, start.n_steps)
    along = _dot(v.parameters, after.parameters) + sum(_dot(v.slots[kind], tree) for kind, tree in after.slots.items())
    by_slots = {kind: _gradients(along, tree) for kind, tree in slots.items()}
    return Point(_gradients(along, w), {}, by_slots), _gradients(along, z)


def _mean(states: list[TrainState], shares: Tensor) -> TrainState:
    def mean(trees: list[Tensors]) -> Tensors:
        return {name: sum(p * tree[name] for p, tree in zip(shares, trees, strict=True)) for name in trees[0]}

    slots = {kind: mean([state.slots[kind] for state in states]) for kind in states[0].slots}
    n_steps = round(float(sum(p * state.n_steps for p, state in zip(shares, states, strict=True))))
    return TrainState(mean([state.parameters for state in states]), states[0].buffers, slots, n_steps)


def _flat(tree: Tensors) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tree.values()])


def _validate(case: Case, point: Point, z: Tensors, t: int) -> Tensor:
    module = copy.deepcopy(case.specimen.module).eval()
    loss = case.specimen.val_loss
    return _call(module, loss, point.parameters, point.buffers, case.values(z), case.val_batch(t))


class _LossOf(nn.Module):
    """A loss as a module, so that ``functional_call`` can swap the weights of the model inside it."""

    def __init__(self, module: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self, alpha: Tensors, batch: Any) -> Tensor:
        return self.loss(self.module, alpha, batch)


def _call(module: nn.Module, loss: Any, parameters: Tensors, buffers: Tensors, alpha: Tensors, batch: Any) -> Tensor:
    tensors = {f"module.{name}": x for name, x in {**parameters, **buffers}.items()}
    return functional_call(_LossOf(module, loss), tensors, (alpha, batch))


def _gradients(output: Tensor, inputs: Tensors) -> Tensors:
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return dict(zip(inputs, torch.autograd.grad(output, list(inputs.values()), **options), strict=True))


def _leaves(tree: Tensors) -> Tensors:
    return {name: x.detach().clone().requires_grad_() for name, x in tree.items()}


def _detached(point: Point) -> Point:
    parameters, buffers, slots = point
    return Point(
        {name: x.detach() for name, x in parameters.items()},
        buffers,
        {kind: {name: x.detach() for name, x in tree.items()} for kind, tree in slots.items()},
    )


def _dot(v: Tensors, w: Tensors) -> Tensor:
    return torch.stack([(v[name] * w[name]).sum() for name in v]).sum()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
