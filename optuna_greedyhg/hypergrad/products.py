"""Derivatives of one training step, the only place that calls autograd.

A step is (w_t, s_t) = Φ(w_{t−1}, g, s_{t−1}, θ(α)) with g = ∇_w L_train(w_{t−1}, α). With
A_t = ∂(w_t, s_t)/∂(w_{t−1}, s_{t−1}) and B_t = ∂(w_t, s_t)/∂α, a covector v on (w_t, s_t) is pulled back in two parts:
through the update rule, which is elementwise and cheap, and through the gradient, a second derivative of the loss:

    u = v·∂Φ/∂g,      v·B = u·∂g/∂α + (v·∂Φ/∂θ)·∂θ/∂α,      v·A = u·∇²_w L_train + v·∂Φ/∂(w, s)

u·∂g/∂α is taken in reverse over the training step's own graph, which is kept until the product is made and then freed,
or is built again by replaying the step with the same batch and random numbers. Where an operator of the loss has no
second derivative in reverse, or where the problem says so, it is taken in another of the ``product_modes``.

All derivatives in α are with respect to its unconstrained *coordinates* (see ``domains``). Buffers (BatchNorm's running
statistics) are constants of the derivatives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from optuna_greedyhg.hypergrad import graphs, randomness, trees
from optuna_greedyhg.hypergrad.batches import Batch, Stream
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.domains import Domain, Unbounded, Values
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.product_modes import (
    Along,
    ModeInUse,
    ProductMode,
    along_by_differences,
    along_by_forward_mode,
    require_whole,
)
from optuna_greedyhg.hypergrad.randomness import RandomState
from optuna_greedyhg.hypergrad.second_derivatives import Demand, LeanOperators, lean_among
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import (
    Made,
    Slots,
    Theta,
    UpdateRule,
    has_constant_jacobian,
    pulls_back,
    resolve,
)


@dataclass(frozen=True)
class TrainState:
    """Everything that training carries from one step to the next."""

    parameters: Tensors
    buffers: Tensors
    slots: Slots
    n_steps: int

    @property
    def tensors(self) -> list[Tensor]:
        """What a step changes and the next one starts from: weights and the optimizer's state."""
        return [x for tree in (self.parameters, *self.slots.values()) for x in tree.values()]

    def is_finite(self) -> bool:
        """Whether nothing in it is NaN or infinite; Adam with an infinite moment leaves the weights where they are."""
        return trees.all_finite(self.tensors)


@dataclass(frozen=True)
class Covector:
    """A row vector v on the state (w, s); kinds of state that are left out of ``slots`` are zero."""

    parameters: Tensors
    slots: Slots = field(default_factory=dict)


class Tangents(NamedTuple):
    """Derivatives of the state (w, s) in H directions, each tree's tensors with a new first dimension of length H."""

    parameters: Tensors
    slots: Slots


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
        self.train_stream: Stream = problem.train_stream()
        self.val_stream: Stream = problem.val_stream()
        self.cost = Cost()
        self.mode = ModeInUse(problem.product_mode)
        self.has_lean = True  # until the loss has shown that it has not: to look for lean operators takes time
        self._domains = dict(domains)

    @property
    def domains(self) -> Mapping[str, Domain]:
        """Every hyperparameter's domain, by name."""
        return dict(self._domains)

    @property
    def product_mode(self) -> ProductMode | None:
        """How u·∂g/∂α is taken; ``None`` while it has not been: none is needed where the update rule alone reads α."""
        return self.mode.proven

    @property
    def position(self) -> dict[str, Any]:
        """Where the streams of batches are."""
        kept = self.problem.n_kept_batches
        return {"n_kept": kept, "train": self.train_stream.position, "val": self.val_stream.position}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Takes the streams to where those of an equal problem were, in this process or another."""
        self.problem.first_batches(position["n_kept"])
        self.train_stream.seek(position["train"])
        self.val_stream.seek(position["val"])

    def values(self, alpha: Mapping[str, Tensor]) -> Values:
        """α's values at these coordinates."""
        return Values(self._domains, alpha)

    def on(self, problem: BilevelProblem, cost: Cost | None = None) -> Products:
        """The same for another problem with the same model, from the beginning of its streams.

        Args:
            problem: The other problem; if it is the same, its streams go on.
            cost: Where to count; together with this one's by default.
        """
        if problem is self.problem and cost is None:
            return self
        other = copy.copy(self)
        other.problem = problem
        other.train_stream, other.val_stream = problem.train_stream(), problem.val_stream()
        other.cost = self.cost if cost is None else cost
        return other

    def drawing_from(self, train_stream: Stream, val_stream: Stream) -> Products:
        """The same problem with batches from elsewhere, and costs counted from zero."""
        other = copy.copy(self)
        other.train_stream, other.val_stream, other.cost = train_stream, val_stream, Cost()
        return other

    def with_rule(self, update_rule: UpdateRule) -> Products:
        """The same problem, streams and costs under another update rule."""
        other = copy.copy(self)
        other.update_rule = update_rule
        return other

    def at_values(self) -> Products:
        """The same problem, streams and costs, with α's values themselves as its coordinates."""
        other = copy.copy(self)
        other._domains = dict.fromkeys(self._domains, Unbounded())
        return other

    def initial_state(self) -> TrainState:
        """w_0, and the update rule's state before the first step."""
        parameters = self.problem.initial_parameters
        return TrainState(parameters, self.problem.initial_buffers, self.update_rule.init(parameters), 0)

    def step(
        self, state: TrainState, alpha: Tensors, batch: Batch, *, keep_graph: bool = False, remaining: int = 0
    ) -> InnerStep:
        """Makes one training step.

        Args:
            state: (w_{t−1}, s_{t−1}).
            alpha: The coordinates of α.
            batch: The training batch.
            keep_graph: Keep the gradient's graph for the first product that is asked for.
            remaining: The number T − t of steps that come after it in its horizon.
        """
        recipe = StepRecipe(self, alpha, batch, _capture(self.problem), remaining)
        return recipe.cook(state, keep_graph)

    def train(self, state: TrainState, alpha: Tensors, batches: Iterable[Batch]) -> TrainState:
        """The state after a plain training step on each batch; none of these steps can be made again."""
        for batch in batches:
            state = StepRecipe(self, alpha, batch, random_state=(), remaining=0).cook(state, keep_graph=False).after
        return state

    def validate(self, state: TrainState, alpha: Tensors, batch: Batch) -> Validation:
        """L_val and both of its gradients at one state, in one pass."""
        with torch.enable_grad():
            w, z = trees.leaves(state.parameters), trees.leaves(alpha)
            values = self.values(z)
            loss = self.problem.validate(w, state.buffers, values, batch)
        _require_gradient(loss, "val_loss")
        gradient, direct = _grad([loss], [w, z], [torch.ones_like(loss)])
        self.cost.n_val_gradients += self.problem.n_examples(batch)
        return Validation(loss.detach(), gradient, direct)


@dataclass(frozen=True)
class StepRecipe:
    """All that a training step is made of but the state it starts from, so that it can be made again, from any state.

    Attributes:
        products: The problem, its update rule, and the count of costs.
        alpha: The coordinates of α.
        batch: The training batch.
        random_state: The state of the random generators when the step was first made.
        remaining: The number T − t of steps that come after it in its horizon.
    """

    products: Products
    alpha: Tensors
    batch: Batch
    random_state: RandomState
    remaining: int

    def make(self, state: TrainState, *, keep_graph: bool = False) -> InnerStep:
        """The step from another state, or again from the same, with the random numbers that it had."""
        with self.replayed():
            return self.cook(state, keep_graph)

    def with_rule(self, update_rule: UpdateRule) -> StepRecipe:
        """The same step by another update rule."""
        return replace(self, products=self.products.with_rule(update_rule))

    def cook(self, state: TrainState, keep_graph: bool) -> InnerStep:
        """The step with the random numbers that come."""
        create_graph = keep_graph and self.products.mode.current is ProductMode.REVERSE
        gradient, buffers, reads, graph = self._gradient(state, create_graph=create_graph)
        with_graph = keep_graph and not pulls_back(self.products.update_rule)
        update = self.update(state, gradient, with_graph=with_graph)
        parameters = {name: w.detach() for name, w in update.parameters.items()}
        slots = {kind: {name: x.detach() for name, x in tree.items()} for kind, tree in update.slots.items()}
        after = TrainState(parameters, buffers, slots, state.n_steps + 1)
        kept = graph if reads else None
        return InnerStep(self, state, after, gradient, reads, kept, update if with_graph else None)

    def update(self, state: TrainState, gradient: Tensors, *, with_graph: bool, of_state: bool = False) -> _Update:
        """Φ(w_{t−1}, g, s_{t−1}, θ(α)), with its graph down to g and α, and to w and s if they are wanted."""
        rule = self.products.update_rule
        with torch.set_grad_enabled(with_graph):
            g, z = (trees.leaves(tree) if with_graph else tree for tree in (gradient, self.alpha))
            w, s = state.parameters, state.slots
            if of_state:
                w, s = trees.leaves(w), {kind: trees.leaves(tree) for kind, tree in s.items()}
            parameters, slots = rule.step(w, g, s, resolve(rule, self.products.values(z)), state.n_steps)
        return _Update(parameters, slots, g, z, w, s)

    def to_coordinates(self, theta_bar: Tensors) -> Tensors:
        """θ̄·∂θ/∂α, by hyperparameter, of a covector on some of the update rule's own."""
        with torch.enable_grad():
            z = trees.leaves(self.alpha)
            theta = resolve(self.products.update_rule, self.products.values(z))
        named = {key: x for key, x in theta.items() if key in theta_bar and isinstance(x, Tensor)}
        return _grad([*named.values()], [z], [theta_bar[key].to(x.dtype) for key, x in named.items()])[0]

    def graph_at(self, state: TrainState) -> _Graph:
        """The graph of ∇_w L_train at a state, with the random numbers that the step had."""
        with self.replayed():
            graph = self._gradient(state, create_graph=True).graph
        assert graph is not None
        return graph

    def along(self, mode: ProductMode, state: TrainState, u: Tensors, to_state: bool, reads: tuple[str, ...]) -> Along:
        """u·∇²_w L_train and u·∂g/∂α in a mode that needs no graph, with the random numbers that the step had."""

        def loss(w: Tensors, z: Tensors) -> Tensor:
            with self.replayed(), _plain_attention():
                values = self.products.values({**self.alpha, **z})
                # Lanes have a loss each; nothing couples them, so that the derivatives of the sum are theirs.
                return self.products.problem.train(w, state.buffers, values, self.batch)[0].sum()

        take = along_by_forward_mode if mode is ProductMode.FORWARD else along_by_differences
        return take(loss, state.parameters, {name: self.alpha[name] for name in reads}, u, to_state)

    def replayed(self) -> AbstractContextManager[None]:
        """Within the block, the step's random numbers are drawn again."""
        problem = self.products.problem
        if problem.recorder is not None:
            return problem.recorder.restored(self.random_state)
        return randomness.restored(self.random_state, problem.device)

    def _gradient(self, state: TrainState, *, create_graph: bool) -> _Gradient:
        demand = Demand()
        lean = create_graph and not self.products.problem.vectorized and self.products.has_lean
        operators = LeanOperators(demand) if lean else None
        w, z = trees.leaves(state.parameters), trees.leaves(self.alpha)
        values = self.products.values(z)
        versions = {name: x._version for name, x in w.items()}  # autograd's count of writes, described in its notes
        with torch.enable_grad(), _plain_attention() if create_graph else nullcontext():
            with operators or nullcontext():
                loss, buffers = self.products.problem.train(w, state.buffers, values, self.batch)
            _require_gradient(loss, "train_loss")
            # Of a constant, the derivative would leave out what a function that is differentiable once makes of it.
            one = torch.ones_like(loss, requires_grad=create_graph)
            (gradient,) = _grad([loss], [w], [one], create_graph=create_graph)
        _require_unwritten(w, versions)
        _require_dense(gradient)
        if operators is not None:
            self.products.has_lean = operators.found or self.products.problem.has_lean_layers
        self.products.cost.n_train_gradients += self.products.problem.n_examples(self.batch)
        detached = {name: g.detach() for name, g in gradient.items()}
        reads = tuple(name for name in z if name in values.used)
        return _Gradient(detached, buffers, reads, _graph(loss, gradient, w, z, demand) if create_graph else None)


class InnerStep:
    """One training step (w_{t−1}, s_{t−1}) → (w_t, s_t), which offers its derivatives to an estimator.

    Attributes:
        recipe: What it was made of.
        before: The state that it started from.
        after: The state that it ended in.
        gradient: ∇_w L_train(w_{t−1}, α).
    """

    def __init__(
        self,
        recipe: StepRecipe,
        before: TrainState,
        after: TrainState,
        gradient: Tensors,
        reads: tuple[str, ...],
        graph: _Graph | None,
        update: _Update | None,
    ) -> None:
        self.recipe = recipe
        self.before = before
        self.after = after
        self.gradient = gradient
        self._reads = reads
        self._graph = graph
        self._update = update
        self._held = False
        self._validation: Validation | None = None

    @property
    def remaining(self) -> int:
        """The number T − t of steps that come after it in its horizon."""
        return self.recipe.remaining

    @property
    def rule(self) -> UpdateRule:
        """The update rule that it was made by."""
        return self.recipe.products.update_rule

    @property
    def theta(self) -> Theta:
        """The rule's own hyperparameters at α."""
        return resolve(self.rule, self.recipe.products.values(self.recipe.alpha))

    @property
    def penalty(self) -> Tensor | float:
        """The rule's coupled L2 penalty at α."""
        penalty = self.rule.penalty
        return self.recipe.products.values(self.recipe.alpha)[penalty] if isinstance(penalty, str) else penalty

    def light(self) -> InnerStep:
        """The step for products with covectors alone, which takes over the graph of this one.

        Where these read neither the gradient nor the optimizer's state, it has them without their data.
        """
        if not has_constant_jacobian(self.rule):
            return self
        before, after = (replace(state, slots=_without_data(state.slots)) for state in (self.before, self.after))
        gradient = {name: g.to("meta") for name, g in self.gradient.items()}
        graph, self._graph = self._graph, None
        return InnerStep(self.recipe, before, after, gradient, self._reads, graph, None)

    @contextmanager
    def held(self) -> Iterator[InnerStep]:
        """Within the block, all products share one graph, instead of building it again for each but the first."""
        outer, self._held = self._held, True
        try:
            yield self
        finally:
            self._held = outer
            if not outer:
                self._graph = self._update = None

    @property
    def validated(self) -> Validation | None:
        """What ``validation`` has computed, if anybody has asked for it."""
        return self._validation

    def validation(self) -> Validation:
        """L_val at ``after`` on the next validation batch; computed once, however often it is asked for."""
        if self._validation is None:
            products = self.recipe.products
            self._validation = products.validate(self.after, self.recipe.alpha, next(products.val_stream))
        return self._validation

    def times_b(self, v: Covector) -> Tensors:
        """v·B_t, by hyperparameter; ``before`` is held fixed."""
        return self._pull_back(v, to_state=False, to_alpha=True)[1]

    def times_a(self, v: Covector) -> Covector:
        """v·A_t, on weights and optimizer state."""
        return self._pull_back(v, to_state=True, to_alpha=False)[0]

    def times_ab(self, v: Covector) -> tuple[Covector, Tensors]:
        """v·A_t and v·B_t, from one graph."""
        return self._pull_back(v, to_state=True, to_alpha=True)

    def push_forward(self, tangents: Tangents | None) -> Tangents:
        """A_t·Z + B_t, for all coordinates of α at once, in the order of the tree's flattened entries.

        Args:
            tangents: Z = d(w_{t−1}, s_{t−1})/dα; ``None`` is zero.

        Raises:
            RuntimeError: If ``torch.func`` computes another gradient than the step has had: for tensors that are not
                contiguous, it may fill a dropout mask in another order.
        """
        recipe, before = self.recipe, self.before
        problem, rule = recipe.products.problem, recipe.products.update_rule
        n_coordinates = sum(z.numel() for z in recipe.alpha.values())

        def phi(w: Tensors, s: Slots, z: Tensors) -> tuple[tuple[Tensors, Slots], Tensors]:
            alpha = recipe.products.values(z)
            g = torch.func.grad(lambda w: problem.train(w, before.buffers, alpha, recipe.batch)[0])(w)
            return rule.step(w, g, s, resolve(rule, alpha), before.n_steps), g

        def push(dw: Tensors, ds: Slots, dz: Tensors) -> tuple[tuple[Tensors, Slots], Tensors]:
            primals = (before.parameters, before.slots, recipe.alpha)
            # Three results, as has_aux says, which the function's type does not.
            _, pushed, gradient = torch.func.jvp(phi, primals, (dw, ds, dz), has_aux=True)  # type: ignore[misc]
            return pushed, gradient

        if tangents is None:
            slots = {kind: _stacked_zeros(tree, n_coordinates) for kind, tree in before.slots.items()}
            tangents = Tangents(_stacked_zeros(before.parameters, n_coordinates), slots)
        example = next(iter(before.parameters.values()))
        basis = trees.unflatten(torch.eye(n_coordinates, dtype=problem.dtype, device=example.device), recipe.alpha)
        with recipe.replayed(), _plain_attention():
            pushed, gradients = torch.func.vmap(push, randomness="same")(tangents.parameters, tangents.slots, basis)
            drawn = _capture(problem)
        if not all(map(torch.equal, drawn, recipe.random_state)):
            _require_same({name: g[0] for name, g in gradients.items()}, self.gradient)
        recipe.products.cost.n_products += n_coordinates * problem.n_examples(recipe.batch)
        return Tangents(*pushed)

    def times_hessian(self, vectors: Tensors) -> Tensors:
        """v·∇²_w L_train(w_{t−1}, α) for several v at once.

        Args:
            vectors: Trees like the weights, stacked along a new first dimension.
        """
        # One by one: a batch of products would keep as many times the activations; vmap does not know channels_last.
        n = len(next(iter(vectors.values())))
        with self.held():
            rows = [self._through_gradient({k: x[i] for k, x in vectors.items()}, True, ())[0] for i in range(n)]
        return {k: torch.stack([row[k] for row in rows]) if rows else torch.zeros_like(x) for k, x in vectors.items()}

    def _pull_back(self, v: Covector, *, to_state: bool, to_alpha: bool) -> tuple[Covector, Tensors]:
        """v·A_t and v·B_t, each empty unless it is asked for."""
        factor, u, z_bar, state_bar = self._through_rule(v, to_state, to_alpha)
        reads = self._reads if to_alpha else ()
        if reads or to_state:
            through_w, through_z = self._through_gradient(u, to_state, reads)
            z_bar = {name: x + factor * through_z[name] if name in through_z else x for name, x in z_bar.items()}
            if to_state:
                is_one = isinstance(factor, float) and factor == 1.0  # to ask a tensor would wait for the device
                state_bar[0] = trees.add(state_bar[0], through_w if is_one else trees.scale(factor, through_w))
        if not to_state:
            return Covector({}), z_bar
        return Covector(state_bar[0], dict(zip(self.before.slots, state_bar[1:], strict=True))), z_bar

    def _through_rule(self, v: Covector, to_state: bool, to_alpha: bool) -> _ThroughRule:
        rule, before = self.rule, self.before
        if pulls_back(rule):
            made = Made(before.parameters, self.gradient, before.slots, self.theta, before.n_steps, self.after.slots)
            factor, u, theta_bar, w_bar, slots_bar = rule.pull_back(v.parameters, v.slots, made, to_state=to_state)
            state_bar = [w_bar, *(slots_bar[kind] for kind in before.slots)] if to_state else []
            return _ThroughRule(factor, u, self.recipe.to_coordinates(theta_bar) if to_alpha else {}, state_bar)
        update = self._take_update(to_state)
        pairs = [(x, v.parameters[k]) for k, x in update.parameters.items()]
        pairs += [(x, v.slots[kind][k]) for kind in v.slots for k, x in update.slots[kind].items()]
        moving = [(x, x_bar) for x, x_bar in pairs if x.requires_grad]  # a count of steps depends on nothing
        outputs, cotangents = ([pair[i] for pair in moving] for i in (0, 1))
        sources = [update.g, update.z if to_alpha else {}, *([update.w, *update.s.values()] if to_state else [])]
        u, z_bar, *through_state = _grad(outputs, sources, cotangents, retain_graph=self._held)
        return _ThroughRule(1.0, u, z_bar, through_state)

    def _through_gradient(self, u: Tensors, to_state: bool, reads: tuple[str, ...]) -> tuple[Tensors, Tensors]:
        """u·∇²_w L_train (empty unless ``to_state``) and u·∂g/∂α for the hyperparameters ``reads``."""
        products, n_results = self.recipe.products, bool(to_state) + bool(reads)
        if not n_results:
            return {}, {}

        def take(mode: ProductMode) -> Along:
            if mode is ProductMode.REVERSE:
                return self._through_graph(u, to_state, reads)
            return self.recipe.along(mode, self.before, u, to_state, reads)

        product = products.mode.make(take)
        products.cost.n_products += products.problem.n_examples(self.recipe.batch) * n_results
        return product.weights, product.coordinates

    def _through_graph(self, u: Tensors, to_state: bool, reads: tuple[str, ...]) -> Along:
        graph = self._take_graph()
        graph.demand.inputs = to_state or graph.through_lean
        w = graph.w if to_state else {}
        z = {name: graph.z[name] for name in reads}
        if graph.calls_python:
            require_whole(graph.edges.values())
        cotangents = [u[name] for name in graph.edges]
        return Along(*_grad([*graph.edges.values()], [w, z], cotangents, retain_graph=self._held))

    def _take_update(self, of_state: bool) -> _Update:
        """The step's update with its graph, which is there for one use, as the gradient's is."""
        if of_state:  # which the kept graph does not reach
            return self.recipe.update(self.before, self.gradient, with_graph=True, of_state=True)
        update = self._update or self.recipe.update(self.before, self.gradient, with_graph=True)
        self._update = update if self._held else None
        return update

    def _take_graph(self) -> _Graph:
        """The step's graph, which is there for one use, as autograd frees it, unless the step is held."""
        graph = self._graph or self.recipe.graph_at(self.before)
        self._graph = graph if self._held else None
        return graph


class _Graph(NamedTuple):
    """The graph of g = ∇_w L_train without g itself: the edges at its end, and the leaves w and z (α's coordinates)."""

    edges: Mapping[str, GradientEdge]
    w: Tensors
    z: Tensors
    demand: Demand
    through_lean: bool
    """Whether the input or weights of an operator that computes what is wanted depend on α."""
    calls_python: bool
    """Whether there is a ``torch.autograd.Function`` of the user's, which may be differentiable once."""


def _graph(loss: Tensor, gradient: Tensors, w: Tensors, z: Tensors, demand: Demand) -> _Graph:
    # The gradient of a weight that the loss does not read has no graph, and a derivative of zero.
    edges = {name: get_gradient_edge(g) for name, g in gradient.items() if g.requires_grad}
    nodes = graphs.behind([loss.grad_fn])
    lean = lean_among(nodes)
    behind_them = graphs.behind(before for node in lean for before, _ in node.next_functions)
    calls_python = any(map(graphs.is_of_python, nodes - lean))
    return _Graph(edges, w, z, demand, graphs.reach(behind_them, z.values()), calls_python)


class _Gradient(NamedTuple):
    """∇_w L_train at a state, the buffers after it, the hyperparameters that it reads, and its graph, empty or not."""

    gradient: Tensors
    buffers: Tensors
    reads: tuple[str, ...]
    graph: _Graph | None


class _Update(NamedTuple):
    """Φ's results with, where it was asked for, their graph down to the leaves g, z (α's coordinates), w and s."""

    parameters: Tensors
    slots: Slots
    g: Tensors
    z: Tensors
    w: Tensors
    s: Slots


class _ThroughRule(NamedTuple):
    """A covector pulled back through Φ: to g, but for a factor, to α's coordinates, and to w and each tree of s."""

    factor: Tensor | float
    u: Tensors
    z: Tensors
    state: list[Tensors]


def _grad(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    inputs: list[Tensors],
    cotangents: list[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> list[Tensors]:
    """The derivatives of ``cotangents``·``outputs``, one tree for each tree of ``inputs``; zero where there is none."""
    flat = [x for tree in inputs for x in tree.values()]
    if outputs and flat:
        bars = iter(
            torch.autograd.grad(
                outputs,
                flat,
                cotangents,
                create_graph=create_graph,
                retain_graph=create_graph or retain_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    else:
        bars = iter([torch.zeros_like(x) for x in flat])
    return [{name: next(bars) for name in tree} for tree in inputs]


def _capture(problem: BilevelProblem) -> RandomState:
    return randomness.capture(problem.device) if problem.recorder is None else problem.recorder.capture()


def _plain_attention() -> AbstractContextManager[None]:
    """Scaled dot-product attention by its plain kernel: the fused ones have no second derivative, of either kind."""
    return sdpa_kernel(SDPBackend.MATH)


def _without_data(slots: Slots) -> Slots:
    return {kind: {name: x.to("meta") for name, x in tree.items()} for kind, tree in slots.items()}


def _stacked_zeros(tree: Tensors, n: int) -> Tensors:
    return {name: x.new_zeros(n, *x.shape) for name, x in tree.items()}


def _require_same(replayed: Tensors, gradient: Tensors) -> None:
    """Dropout with another mask makes another gradient; another order of summation does not, at this tolerance."""
    distance, length = trees.norm(trees.sub(replayed, gradient)), trees.norm(gradient)
    if distance > torch.finfo(length.dtype).eps ** (1 / 3) * length:  # of NaN, nothing is said here
        raise RuntimeError(
            "A step and its derivative must draw the same random numbers, but under torch.func the gradient is "
            f"{distance / length:.0%} off the step's: a dropout mask is filled in another order there if its tensor is "
            "not contiguous, or on a GPU. Make it .contiguous(), or use Reverse(), which needs no torch.func."
        )


def _require_unwritten(w: Tensors, versions: Mapping[str, int]) -> None:
    for name, x in w.items():
        if x._version != versions[name]:
            raise ValueError(
                f"The model must not write into its weights when it is called, but it has changed {name!r} in place, "
                "which changes the weights that trainings start from, too. Leave out max_norm of nn.Embedding, and "
                "normalize what the embedding returns."
            )


def _require_dense(gradient: Tensors) -> None:
    for name, g in gradient.items():
        if g.layout != torch.strided:
            raise ValueError(
                f"The gradient of all weights must be dense, but that of {name!r} is {g.layout}; make the embedding "
                "with sparse=False."
            )


def _require_gradient(loss: Tensor, name: str) -> None:
    if not loss.requires_grad:
        raise ValueError(
            f"{name} must depend on the weights through differentiable operations, but its result has no gradient. "
            "Look for .detach(), .item(), torch.no_grad() or a round trip through NumPy."
        )
