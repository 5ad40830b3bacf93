"""Many problems of one architecture as one problem, and an update rule that steps all of their weights.

    w, s, α with a new first dimension, "lanes";     L(w, α) = (L_1(w_1, α_1), ..., L_n(w_n, α_n))

Lanes do not depend on each other, so the derivative of the sum of L gives each lane's own gradient, and a product of
second derivatives each lane's own product. The loss is called once, under ``torch.vmap``; all else, autograd included,
sees tensors that are larger. What is linear and treats all entries alike, as most estimators, need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, vmap

from optuna_greedyhg.hypergrad import batches
from optuna_greedyhg.hypergrad.batches import Batch, Stacked
from optuna_greedyhg.hypergrad.domains import Values
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import Slots, Theta, UpdateRule


class Part(NamedTuple):
    """Some lanes' batches, all of one kind.

    Attributes:
        lanes: Which; ``None`` for all, in their order.
        stacked: Their batches.
    """

    lanes: Tensor | None
    stacked: Stacked


class LanesBatch(NamedTuple):
    """A batch for every lane. Where sources end with a smaller batch, they are of several kinds.

    Attributes:
        parts: The lanes by the kinds of their batches.
        order: Where each lane is in the parts one after the other; ``None`` if there is but one.
        n_examples: Of each lane, int64.
    """

    parts: list[Part]
    order: Tensor | None
    n_examples: Tensor


def side_by_side(many: Sequence[Batch], device: torch.device) -> LanesBatch:
    """The lanes' batches as one, on a device."""
    distinct = {id(batch): batch for batch in many}  # few, where lanes go through one list
    members: list[list[int]] = []
    kinds: list[Any] = []
    kind_at: dict[int, int] = {}
    for key, batch in distinct.items():
        kind = batches.kind_of(batch)
        if kind not in kinds:
            kinds.append(kind)
            members.append([])
        kind_at[key] = kinds.index(kind)
    for i, batch in enumerate(many):
        members[kind_at[id(batch)]].append(i)
    sizes = {key: batches.n_examples(batch) for key, batch in distinct.items()}
    n_examples = torch.tensor([sizes[id(batch)] for batch in many])
    if len(members) == 1:
        return LanesBatch([Part(None, _stacked(many, device))], None, n_examples)
    parts = [Part(torch.tensor(lanes, device=device), _stacked([many[i] for i in lanes], device)) for lanes in members]
    order = torch.argsort(torch.tensor([*chain.from_iterable(members)]))
    return LanesBatch(parts, order.to(device), n_examples)


def _stacked(many: Sequence[Batch], device: torch.device) -> Stacked:
    stacked = batches.stack(many)
    return stacked._replace(tensors=batches.to_device(stacked.tensors, device))


class StackedProblem(BilevelProblem):
    """The problems of several lanes as one, whose losses are vectors: one loss a lane.

    Args:
        example: Any lane's problem; the others are like it (see :meth:`BilevelProblem.unlike`).
        train_batches: Yields a :class:`LanesBatch` for every training step.
        val_batches: Likewise, for every validation gradient.
    """

    def __init__(
        self, example: BilevelProblem, train_batches: Iterable[LanesBatch], val_batches: Iterable[LanesBatch]
    ) -> None:
        vars(self).update(vars(example))
        self._example = example
        self._train_source, self._val_source = train_batches, val_batches

    @property
    def vectorized(self) -> bool:
        return True

    def n_examples(self, batch: LanesBatch) -> Any:
        """Of each lane; costs then are vectors, too."""
        return batch.n_examples

    def train(
        self, parameters: Tensors, buffers: Tensors, alpha: Mapping[str, Tensor], batch: LanesBatch
    ) -> tuple[Tensor, Tensors]:
        losses, after = _over_lanes(self._example.train, parameters, buffers, alpha, batch)
        return losses, after

    def validate(self, parameters: Tensors, buffers: Tensors, alpha: Mapping[str, Tensor], batch: LanesBatch) -> Tensor:
        def validate(*args: Any) -> tuple[Tensor, Tensors]:
            return self._example.validate(*args), {}

        return _over_lanes(validate, parameters, buffers, alpha, batch)[0]


_Loss = Callable[[Tensors, Tensors, Mapping[str, Tensor], Batch], tuple[Tensor, Tensors]]


def _over_lanes(
    function: _Loss, parameters: Tensors, buffers: Tensors, alpha: Mapping[str, Tensor], batch: LanesBatch
) -> tuple[Tensor, Tensors]:
    """``function`` of each lane's weights, buffers, α and batch."""
    assert isinstance(alpha, Values)

    def of_one(w: Tensors, b: Tensors, z: Tensors, its: Batch) -> tuple[Tensor, Tensors]:
        return function(w, b, alpha.at(z), its)

    losses, afters = [], []
    for lanes, (tensors, dims, example) in batch.parts:
        states = [parameters, buffers, dict(alpha.coordinates)]
        if lanes is not None:
            states = [_chosen(tree, lanes) for tree in states]
        leaves = [*batches.tensors_of(states)]
        loss, after = _vmapped(of_one, (*states, example), [*leaves, *tensors], [*[0] * len(leaves), *dims])
        losses.append(loss)
        afters.append(after)
    if batch.order is None:
        return losses[0], afters[0]
    joined = {name: torch.cat([after[name] for after in afters]) for name in afters[0]}
    return torch.cat(losses)[batch.order], _chosen(joined, batch.order)


def _vmapped(
    function: Callable[..., Any], example: tuple[Any, ...], leaves: Sequence[Tensor], dims: Sequence[int | None]
) -> Any:
    """``function`` under ``torch.vmap``, which takes nested arguments itself, but much longer to take them apart.

    Args:
        function: Of one lane's arguments.
        example: The arguments, with whatever tensors.
        leaves: All lanes' tensors in the arguments.
        dims: Of each, which dimension is the lanes'; ``None`` if they share it.
    """
    result: Any = None

    def of_leaves(*its: Tensor) -> tuple[Tensor, ...]:
        nonlocal result
        result = function(*batches.with_tensors(example, iter(its)))
        return tuple(batches.tensors_of(result))

    results = vmap(of_leaves, tuple(dims), randomness="different")(*leaves)
    return batches.with_tensors(result, iter(results))


def _chosen(tree: Mapping[str, Tensor], lanes: Tensor) -> Tensors:
    return {name: x[lanes] for name, x in tree.items()}


@dataclass(frozen=True)
class StackedRule(UpdateRule):
    """An update rule that steps every lane with that lane's own hyperparameters.

    ``n_steps`` is a vector, of which the rule sees its lane's as a 0-dimensional tensor.
    """

    rule: UpdateRule

    @property
    def theta(self) -> dict[str, float | str]:
        return self.rule.theta

    @property
    def penalty(self) -> float | str:
        return self.rule.penalty

    @property
    def moment(self) -> str | None:
        return self.rule.moment

    def init(self, parameters: Tensors) -> Slots:
        slots: Slots = vmap(self.rule.init)(parameters)
        return slots

    def step(
        self, parameters: Tensors, gradient: Tensors, slots: Slots, theta: Theta, n_steps: Any
    ) -> tuple[Tensors, Slots]:
        numbers = {key: x for key, x in theta.items() if not isinstance(x, Tensor)}
        tensors = {key: x for key, x in theta.items() if isinstance(x, Tensor)}

        def of_one(w: Tensors, g: Tensors, s: Slots, theta: Tensors, n: Any) -> tuple[Tensors, Slots]:
            return self.rule.step(w, g, s, {**numbers, **theta}, n)

        arguments = (parameters, gradient, slots, tensors, n_steps)
        leaves = [*batches.tensors_of(arguments)]
        stepped: tuple[Tensors, Slots] = _vmapped(of_one, arguments, leaves, [0] * len(leaves))
        return stepped

    def preconditioner(self, slots: Slots, theta: Theta, n_steps: int) -> Tensors | None:
        raise NotImplementedError("No stackable estimator asks for a preconditioner.")

    def transition(self, curvature: Tensor, theta: Theta, n_steps: int) -> Tensor:
        raise NotImplementedError("No stackable estimator asks for the transition of a curvature.")
