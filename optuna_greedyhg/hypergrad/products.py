"""Derivatives of one training step, the only place that calls autograd.

A step is (w_t, s_t) = Φ(w_{t−1}, g, s_{t−1}, θ(α)) with g = ∇_w L_train(w_{t−1}, α). With
A_t = ∂(w_t, s_t)/∂(w_{t−1}, s_{t−1}) and B_t = ∂(w_t, s_t)/∂α, a covector v on (w_t, s_t) is pulled back in two parts:
through the update rule, which is elementwise and cheap, and through the gradient, a second derivative of the loss:

    u = v·∂Φ/∂g,      v·B = u·∂g/∂α + (v·∂Φ/∂θ)·∂θ/∂α,      v·A = u·∇²_w L_train + v·∂Φ/∂(w, s)

u·∂g/∂α is taken in reverse over the training step's own graph, which is kept until the product is made and then freed,
or is built again by replaying the step with the same batch and random state.

All derivatives in α are with respect to its unconstrained *coordinates* (see ``domains``). Buffers (BatchNorm's running
statistics) are constants of the derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import batches, randomness, trees
from optuna_greedyhg.hypergrad.batches import Batch, Stream
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.domains import Domain, Values
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.randomness import RandomState
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import Slots, UpdateRule, resolve


@dataclass(frozen=True)
class TrainState:
    """Everything that training carries from one step to the next."""

    parameters: Tensors
    buffers: Tensors
    slots: Slots
    n_steps: int

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return trees.all_finite(self.parameters.values())


@dataclass(frozen=True)
class Covector:
    """A row vector v on the state (w, s); kinds of state that are left out of ``slots`` are zero."""

    parameters: Tensors
    slots: Slots = field(default_factory=dict)


class Validation(NamedTuple):
    """The validation loss at one state, and its two gradients."""

    loss: Tensor
    """L_val(w, α), 0-dimensional."""
    gradient: Tensors
    """∇_w L_val(w, α)."""
    direct: Tensors
    """∇_α L_val(w, α), zero where the loss does not read α."""


class Products:
    """The derivatives of a problem trained by an update rule, and the count of what they have cost.

    Args:
        problem: The two losses, the model and the batches.
        domains: Every hyperparameter's domain, by name.
        update_rule: Φ.
    """

    def __init__(self, problem: BilevelProblem, domains: Mapping[str, Domain], update_rule: UpdateRule) -> None:
        self.problem = problem
        self.update_rule = update_rule
        self.val_stream: Stream = problem.val_stream()
        self.cost = Cost()
        self._domains = dict(domains)

    def values(self, alpha: Mapping[str, Tensor]) -> Values:
        """α's values at these coordinates."""
        return Values(self._domains, alpha)

    def initial_state(self) -> TrainState:
        """w_0, and the update rule's state before the first step."""
        parameters = self.problem.initial_parameters
        return TrainState(parameters, self.problem.initial_buffers, self.update_rule.init(parameters), 0)

    def step(
        self, state: TrainState, alpha: Tensors, batch: Batch, *, keep_graph: bool = False, replayable: bool = False
    ) -> InnerStep:
        """Makes one training step.

        Args:
            state: (w_{t−1}, s_{t−1}).
            alpha: The coordinates of α.
            batch: The training batch.
            keep_graph: Keep the gradient's graph for the first product that is asked for.
            replayable: Note the random state, so that the step can be replayed where it draws random numbers.
        """
        random_state = randomness.capture(self.problem.device) if replayable else None
        graph = self._gradient(state, alpha, batch, create_graph=keep_graph)
        gradient = {name: g.detach() for name, g in graph.gradient.items()}
        with torch.no_grad():
            theta = resolve(self.update_rule, self.values(alpha))
            parameters, slots = self.update_rule.step(state.parameters, gradient, state.slots, theta, state.n_steps)
        after = TrainState(parameters, graph.buffers, slots, state.n_steps + 1)
        kept = graph if keep_graph and graph.reads else None
        return InnerStep(self, state, after, alpha, batch, gradient, graph.reads, random_state, kept)

    def validate(self, state: TrainState, alpha: Tensors, batch: Batch) -> Validation:
        """L_val and both of its gradients at one state, in one pass."""
        with torch.enable_grad():
            w, z = trees.leaves(state.parameters), trees.leaves(alpha)
            values = self.values(z)
            loss = self.problem.validate(w, state.buffers, values, batch)
        _require_gradient(loss, "val_loss")
        gradient, direct = _grad([loss], [w, z])
        self.cost.n_val_gradients += batches.n_examples(batch)
        return Validation(loss.detach(), gradient, direct)

    def _gradient(self, state: TrainState, alpha: Tensors, batch: Batch, *, create_graph: bool) -> _Graph:
        with torch.enable_grad():
            w, z = trees.leaves(state.parameters), trees.leaves(alpha)
            values = self.values(z)
            loss, buffers = self.problem.train(w, state.buffers, values, batch)
            _require_gradient(loss, "train_loss")
            (gradient,) = _grad([loss], [w], create_graph=create_graph)
        self.cost.n_train_gradients += batches.n_examples(batch)
        return _Graph(gradient, buffers, w, z, tuple(name for name in z if name in values.used))


class InnerStep:
    """One training step (w_{t−1}, s_{t−1}) → (w_t, s_t), which offers its derivatives to an estimator.

    Attributes:
        before: The state that the step started from.
        after: The state that it ended in.
        alpha: The coordinates of α that it was made with.
        batch: Its training batch.
        gradient: ∇_w L_train(w_{t−1}, α).
    """

    def __init__(
        self,
        products: Products,
        before: TrainState,
        after: TrainState,
        alpha: Tensors,
        batch: Batch,
        gradient: Tensors,
        reads: tuple[str, ...],
        random_state: RandomState | None,
        graph: _Graph | None,
    ) -> None:
        self.before = before
        self.after = after
        self.alpha = alpha
        self.batch = batch
        self.gradient = gradient
        self._products = products
        self._reads = reads
        self._random_state = random_state
        self._graph = graph
        self._validation: Validation | None = None

    @property
    def validated(self) -> Validation | None:
        """What ``validation`` has computed, if anybody has asked for it."""
        return self._validation

    def validation(self) -> Validation:
        """L_val at ``after`` on the next validation batch; computed once, however often it is asked for."""
        if self._validation is None:
            products = self._products
            self._validation = products.validate(self.after, self.alpha, next(products.val_stream))
        return self._validation

    def times_b(self, v: Covector) -> Tensors:
        """v·B_t, by hyperparameter; ``before`` is held fixed."""
        return self._pull_back(v, to_state=False)[1]

    def times_ab(self, v: Covector) -> tuple[Covector, Tensors]:
        """v·A_t and v·B_t, from one graph."""
        return self._pull_back(v, to_state=True)

    def _pull_back(self, v: Covector, *, to_state: bool) -> tuple[Covector, Tensors]:
        """v·A_t (empty unless ``to_state``) and v·B_t."""
        rule, before = self._products.update_rule, self.before
        with torch.enable_grad():
            w, g, z = trees.leaves(before.parameters), trees.leaves(self.gradient), trees.leaves(self.alpha)
            s = {kind: trees.leaves(tree) for kind, tree in before.slots.items()}
            theta = resolve(rule, self._products.values(z))
            parameters, slots = rule.step(w, g, s, theta, before.n_steps)
        outputs = [*parameters.values(), *(x for kind in v.slots for x in slots[kind].values())]
        cotangents = [*(v.parameters[name] for name in parameters), *(v.slots[k][n] for k in v.slots for n in slots[k])]
        sources = [g, z, *([w, *s.values()] if to_state else [])]
        u, z_bar, *state_bar = _grad(outputs, sources, cotangents)

        if self._reads or to_state:
            through_w, through_z = self._through_gradient(u, to_state)
            z_bar = {name: x + through_z[name] if name in through_z else x for name, x in z_bar.items()}
            if to_state:
                state_bar[0] = trees.add(state_bar[0], through_w)
        if not to_state:
            return Covector({}), z_bar
        return Covector(state_bar[0], dict(zip(s, state_bar[1:], strict=True))), z_bar

    def _through_gradient(self, u: Tensors, to_state: bool) -> tuple[Tensors, Tensors]:
        """u·∇²_w L_train (empty unless ``to_state``) and u·∂g/∂α for the hyperparameters that the loss reads."""
        graph, self._graph = self._graph or self._replay(), None  # autograd frees a graph at its first use
        w = graph.w if to_state else {}
        z = {name: graph.z[name] for name in graph.reads}
        # A gradient that is constant in w and α (a loss linear in both) has no graph, and a derivative of zero.
        live = [name for name, g in graph.gradient.items() if g.requires_grad]
        w_bar, z_bar = _grad([graph.gradient[name] for name in live], [w, z], [u[name] for name in live])
        self._products.cost.n_products += batches.n_examples(self.batch) * (bool(z) + bool(w))
        return w_bar, z_bar

    def _replay(self) -> _Graph:
        if self._random_state is None:
            return self._products._gradient(self.before, self.alpha, self.batch, create_graph=True)
        with randomness.restored(self._random_state, self._products.problem.device):
            return self._products._gradient(self.before, self.alpha, self.batch, create_graph=True)


class _Graph(NamedTuple):
    """g = ∇_w L_train with, where it was asked for, its graph down to the leaves w and z (α's coordinates)."""

    gradient: Tensors
    buffers: Tensors
    w: Tensors
    z: Tensors
    reads: tuple[str, ...]


def _grad(
    outputs: list[Tensor], inputs: list[Tensors], cotangents: list[Tensor] | None = None, create_graph: bool = False
) -> list[Tensors]:
    """The derivatives of ``cotangents``·``outputs``, one tree for each tree of ``inputs``; zero where there is none."""
    flat = [x for tree in inputs for x in tree.values()]
    if outputs and flat:
        options = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
        bars = iter(torch.autograd.grad(outputs, flat, cotangents, **options))
    else:
        bars = iter([torch.zeros_like(x) for x in flat])
    return [{name: next(bars) for name in tree} for tree in inputs]


def _require_gradient(loss: Tensor, name: str) -> None:
    if not loss.requires_grad:
        raise ValueError(
            f"{name} must depend on the weights through differentiable operations, but its result has no gradient. "
            "Look for .detach(), .item(), torch.no_grad() or a round trip through NumPy."
        )
