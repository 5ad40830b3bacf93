"""Spectral propagation: the update rule's true response to the curvature of the training loss, where v feels it.

    v·h_n = r(n; λ_bulk)·v + Σ_i (r(n; λ_i) − r(n; λ_bulk)) (q_iᵀv) q_i

r(n; λ) is what n steps of the update rule make of a perturbation along a direction of curvature λ: (1 − lr·λ)^n for
gradient descent. With momentum it is a covector on (w, m), so that the optimizer's state is propagated, too.

(λ_i, q_i) are the Ritz pairs of the Hessian in the Krylov space span{v, Hv, H²v, ...} of the validation gradient, found
by Lanczos iterations and made anew every few steps. The λ_i are the nodes of the Gauss quadrature of vᵀ·r(n; H)·v
(Golub and Meurant, 1994); leading eigenpairs are among them in so far as v has a part in them. Those of the largest
|λ| from block power iterations cost more, leave the many small curvatures to one number, and lead astray when they are
kept until the weights have moved on.

The Hessian is that of the mean loss over the last few batches. One minibatch will not do: it is sharper than their mean
in directions of its own, which the steps on the other batches do not see.

A preconditioned rule (Adam) has its response in preconditioned coordinates, P^(1/2)·H·P^(1/2), where P is taken as
constant from one refresh to the next.

A response that would grow along a positive curvature is held at its size. Beyond the edge of stability (lr·λ > 2 for
gradient descent) weights swing from side to side, but do not leave: higher derivatives of the loss hold them there
(Damian et al., "Self-stabilization", ICLR 2023), where n steps of the quadratic model would multiply them by hundreds.
Along a negative curvature growth is what happens, but for a preconditioned rule: P^(1/2)·H·P^(1/2) is huge at weights
that have had hardly a gradient (±1e8 in the first steps), where in truth P falls as soon as one comes.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.batches import Batch, is_same
from optuna_greedyhg.hypergrad.curvature import lanczos
from optuna_greedyhg.hypergrad.products import Covector, InnerStep, StepRecipe
from optuna_greedyhg.hypergrad.propagators import Overhead, Propagated, Propagator
from optuna_greedyhg.hypergrad.randomness import RandomState
from optuna_greedyhg.hypergrad.trees import Tensors


class Response(NamedTuple):
    """r(n; λ) along every known direction and elsewhere, in preconditioned coordinates.

    Attributes:
        root: The diagonal of P^(1/2); ``None`` for a rule without a preconditioner.
        vectors: The directions q_i, orthonormal rows of shape (k, P).
        transitions: What one step does to a perturbation of w or, if m = 2, of w and the rule's first moment: along
            every direction, and at the end in all the rest. Shape (k + 1, m, m).
        moment: The slot that holds the first moment; ``None`` if m = 1.
    """

    root: Tensor | None
    vectors: Tensor
    transitions: Tensor
    moment: str | None

    def after(self, steps: range) -> Tensor:
        """Σ_n r(n; λ) over these n, the first rows of the transitions' powers; shape (k + 1, m)."""
        row: Tensor = torch.linalg.matrix_power(self.transitions, steps[0])[:, 0]
        total = row
        for _ in steps[1:]:
            row = torch.einsum("ki,kij->kj", row, self.transitions)
            total = total + row
        return total


@dataclass
class Spectrum:
    """What spectral propagation knows at one step.

    Attributes:
        recipes: The last steps on different batches, whose mean loss has its curvature measured.
        refresh_at: The number of remaining steps at which it is due to be measured again.
        response: What followed from it; ``None`` in a state that another has followed.
    """

    recipes: tuple[StepRecipe, ...]
    refresh_at: int
    response: Response | None


@dataclass(frozen=True)
class Spectral(Propagator[Spectrum]):
    """The response to the curvatures that the validation gradient feels.

    Costs ``rank`` Hessian-vector products every ``refresh_every`` steps, each on ``n_batches`` batches, all but one of
    which need a training gradient more; memory O(rank·P), and the graphs of ``n_batches`` training steps at once.

    Args:
        rank: Number of Ritz pairs. In a horizon of T steps, no more than T have a meaning.
        bulk: The response to what of v is outside of their span: ``"auto"`` has the curvature of the Rayleigh quotient
            of the validation gradient; a number γ takes γ^n, without an effect on the optimizer's state.
        refresh_every: Number of inner steps for which the pairs serve; they are made anew at the start of a horizon.
        n_batches: Number of the last batches whose mean loss counts. A full batch counts once.

    Raises:
        ValueError: If a number is out of its range.
    """

    rank: int = 10
    bulk: float | Literal["auto"] = "auto"
    refresh_every: int = 10
    n_batches: int = 4
    overhead: ClassVar[Overhead] = Overhead("b·min(k, T)·⌈T/r⌉", "(b − 1)·⌈T/r⌉", "O(k·P + H)")

    def __post_init__(self) -> None:
        for name, low in {"rank": 0, "refresh_every": 1, "n_batches": 1}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, but got {getattr(self, name)}.")
        if self.bulk != "auto" and not (isinstance(self.bulk, (int, float)) and 0.0 <= self.bulk <= 1.0):
            raise ValueError(f"bulk must be 'auto' or a number in [0, 1], but got {self.bulk!r}.")

    def carry(self, state: Spectrum) -> list[tuple[Batch, RandomState]]:
        """The last batches, each with the random numbers of its step."""
        return [(recipe.batch, recipe.random_state) for recipe in state.recipes]

    def begin(self, carried: Any, step: InnerStep, v: Tensors, reach: int) -> Spectrum:
        known = (replace(step.recipe, batch=batch, random_state=state) for batch, state in carried or ())
        recipes = self._recipes(tuple(known), step, wait=True)
        return self._measured(recipes, step, v, reach)

    def proceed(self, state: Spectrum, step: InnerStep, v: Tensors, reach: int) -> Spectrum:
        recipes = self._recipes(state.recipes, step, wait=False)
        if step.remaining > state.refresh_at or reach == 0:
            return replace(state, recipes=recipes)
        state.response = None  # as large as the weights k times, and not to be held beside the next
        return self._measured(recipes, step, v, reach)

    def propagate(self, state: Spectrum, v: Tensors, steps: range) -> Propagated:
        assert state.response is not None
        root, vectors, _, moment = state.response
        x = _scaled(trees.flatten(v), root)
        components, responses = vectors @ x, state.response.after(steps)

        def respond(part: int) -> Tensor:
            along, rest = responses[:-1, part], responses[-1, part]
            return rest * x + ((along - rest) * components) @ vectors

        on_weights = respond(0) if root is None else respond(0) / root
        slots = {} if moment is None else {moment: trees.unflatten(_scaled(respond(1), root), v)}
        return Propagated(1.0, Covector(trees.unflatten(on_weights, v), slots))

    def _recipes(self, known: tuple[StepRecipe, ...], step: InnerStep, *, wait: bool) -> tuple[StepRecipe, ...]:
        """The last steps on different batches, the present one at the end."""
        others = [recipe for recipe in known if not is_same(recipe.batch, step.recipe.batch, wait=wait)]
        return (*others, step.recipe)[-self.n_batches :]

    def _measured(self, recipes: tuple[StepRecipe, ...], step: InnerStep, v: Tensors, reach: int) -> Spectrum:
        n_vectors = min(self.rank, reach + 1)
        with _Curvature(step, recipes, v) as curvature:
            pairs = lanczos(curvature, curvature.coordinates(v), max(n_vectors, self.bulk == "auto"))
        along = curvature.transitions(pairs.values[:n_vectors])
        if self.bulk == "auto":
            bulk = curvature.transitions(pairs.quotient)
        else:
            bulk = along.new_zeros(1, *along.shape[1:])
            bulk[:, 0, 0] = self.bulk
        response = Response(curvature.root, pairs.vectors[:n_vectors], torch.cat([along, bulk]), step.rule.moment)
        return Spectrum(recipes, step.remaining - self.refresh_every, response)


class _Curvature:
    """Products of rows with P^(1/2)·(H + penalty)·P^(1/2), H being that of several batches at a step's weights.

    A context within which the batches' graphs are kept.
    """

    def __init__(self, step: InnerStep, recipes: tuple[StepRecipe, ...], like: Tensors) -> None:
        self.step = step
        self._recipes = recipes
        self._like = like
        self._theta = step.theta
        preconditioner = step.rule.preconditioner(step.after.slots, self._theta, step.after.n_steps)
        self.root = None if preconditioner is None else trees.flatten(preconditioner).sqrt()
        self._held = ExitStack()
        self._steps: list[InnerStep] = []

    def __enter__(self) -> _Curvature:
        alpha, before = self.step.recipe.alpha, self.step.before
        others = [replace(recipe, alpha=alpha).make(before, keep_graph=True) for recipe in self._recipes[:-1]]
        self._steps = [self._held.enter_context(step.held()) for step in (*others, self.step)]
        return self

    def __exit__(self, *exception: object) -> None:
        self._steps = []
        self._held.close()

    def __call__(self, rows: Tensor) -> Tensor:
        rows = _scaled(rows, self.root)
        vectors = trees.unflatten(rows, self._like)
        products = sum(trees.flatten_rows(step.times_hessian(vectors)) for step in self._steps) / len(self._steps)
        return _scaled(products + self.step.penalty * rows, self.root)

    def coordinates(self, v: Tensors) -> Tensor:
        """A covector in preconditioned coordinates."""
        return _scaled(trees.flatten(v), self.root)

    def transitions(self, curvatures: Tensor) -> Tensor:
        """What a step makes of perturbations along k curvatures, shape (k, m, m)."""
        transitions = self.step.rule.transition(curvatures, self._theta, self.step.after.n_steps)
        held = curvatures > 0 if self.root is None else torch.ones_like(curvatures, dtype=torch.bool)
        return torch.where(held[:, None, None], _without_growth(transitions), transitions)


def _without_growth(transitions: Tensor) -> Tensor:
    """Matrices of shape (k, m, m), m at most 2, each divided by its spectral radius where that is above 1."""
    if transitions.shape[-1] == 1:
        radius = transitions[:, 0, 0].abs()
    else:
        half_trace = (transitions[:, 0, 0] + transitions[:, 1, 1]) / 2
        determinant = transitions[:, 0, 0] * transitions[:, 1, 1] - transitions[:, 0, 1] * transitions[:, 1, 0]
        discriminant = half_trace**2 - determinant
        real, conjugate = half_trace.abs() + discriminant.clamp_min(0).sqrt(), determinant.clamp_min(0).sqrt()
        radius = torch.where(discriminant > 0, real, conjugate)
    return transitions / radius.clamp_min(1.0)[:, None, None]


def _scaled(x: Tensor, root: Tensor | None) -> Tensor:
    return x if root is None else x * root
