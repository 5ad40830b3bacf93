"""How a product differentiates the training loss's gradient: three ways to the same numbers.

    u·∂g/∂α and u·∂g/∂w,      g = ∇_w L_train(w, α)

- *Reverse*: over the training step's own graph of g. The fastest, as the step's forward pass is shared: with F for one,
  about 2F more. Every activation of a step is kept until its product is made.
- *Forward*: the derivative of ∇L_train along u, as second derivatives are symmetric: u·∂g/∂α = d/dε ∇_α L(w + ε·u, α).
  No graph is kept: where α is in the loss alone, each activation and its derivative along u are freed as soon as the
  next layer has read them. About 3F.
- *Differences*: (∇L(w + ε·u, α) − ∇L(w − ε·u, α)) / 2ε, for operators that have no second derivative of either kind.
  Two gradients; right to 1e-3 in float32 and to 1e-8 in float64.

They are the same where g is the whole gradient of L. Of a loss with a part that is cut off (``.detach()``,
``no_grad``), second derivatives are not symmetric: in reverse that part is a constant, u·∂g/∂α is right, and u·∂g/∂w
lacks what it would do; forward and by differences, it moves with w in places, and neither is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

from optuna_greedyhg.hypergrad import graphs, trees
from optuna_greedyhg.hypergrad.trees import Tensors

_SHORTENED = {"LinalgSolveExBackward0", "LinalgSlogdetBackward0", "LinalgDetBackward0"}
"""Operators whose gradient PyTorch computes by a shorter formula, without a tangent, where it makes no graph."""

Loss = Callable[[Tensors, Tensors], Tensor]
"""L(w, z), z being α's coordinates."""


class ProductMode(Enum):
    """How products differentiate the training loss twice."""

    REVERSE = "reverse"
    FORWARD = "forward"
    DIFFERENCES = "differences"


class Along(NamedTuple):
    """d/dε of ∇_w L and ∇_z L at w + ε·u; each empty where it was not asked for."""

    weights: Tensors
    coordinates: Tensors


class UnsupportedOperatorError(RuntimeError):
    """An operator of the training loss has no second derivative in the mode that products are made in."""


@dataclass
class ModeInUse:
    """The mode that is forced; or else reverse, until an operator refuses, and then forward.

    Attributes:
        forced: What the caller has asked for, if anything.
        current: What the next product is tried in.
        proven: What the last product was made in; ``None`` while there has been none.
        refusals: What operators have said, by mode.
    """

    forced: ProductMode | None = None
    current: ProductMode = ProductMode.REVERSE
    proven: ProductMode | None = None
    refusals: dict[ProductMode, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.current = self.forced or self.current

    def make(self, take: Callable[[ProductMode], Along]) -> Along:
        """The product that ``take`` makes in the mode that it is given.

        Raises:
            UnsupportedOperatorError: If an operator refuses, and there is no other mode to go to.
        """
        try:
            product = take(self.current)
        except RuntimeError as error:
            if not _is_refusal(error):
                raise
            self.refusals[self.current] = str(error).splitlines()[0]
            if self.forced is None and self.current is ProductMode.REVERSE:
                self.current = ProductMode.FORWARD
                return self.make(take)
            said = "; ".join(f"{mode.value}: {text!r}" for mode, text in self.refusals.items())
            raise UnsupportedOperatorError(
                f"All operators of the training loss must have a second derivative, but in the mode {said}. Use "
                "another operator, or BilevelProblem(product_mode=ProductMode.DIFFERENCES), which needs none."
            ) from error
        self.proven = self.current
        return product


def along_by_forward_mode(loss: Loss, w: Tensors, z: Tensors, u: Tensors, of_weights: bool) -> Along:
    """Dual numbers carry u through the loss and its gradient.

    Args:
        loss: L.
        w: The weights, a constant but for the direction.
        z: The coordinates to differentiate by.
        u: The direction, like ``w``.
        of_weights: Whether the derivative of ∇_w L is wanted as well.
    """
    with forward_ad.dual_level(), torch.enable_grad():
        # Weights that need no gradient keep no activations: all that is left behind is what reads z.
        primals = trees.leaves(w) if of_weights else w
        duals = {name: forward_ad.make_dual(x, u[name]) for name, x in primals.items()}  # type: ignore[no-untyped-call]
        leaves = trees.leaves(z)
        gradients = _gradient(loss(duals, leaves), [duals if of_weights else {}, leaves])
        weights, coordinates = ({name: _tangent(g) for name, g in tree.items()} for tree in gradients)
    return Along(weights, coordinates)


def along_by_differences(loss: Loss, w: Tensors, z: Tensors, u: Tensors, of_weights: bool) -> Along:
    """Central differences of the gradient, with the step that suits the dtype; arguments as in forward mode."""
    length = trees.norm(u)
    epsilon = torch.finfo(length.dtype).eps ** (1 / 3) * (1 + trees.norm(w)) / length.clamp_min(1e-30)

    def gradient_at(step: Tensor) -> list[Tensors]:
        with torch.enable_grad():
            moved = trees.leaves({name: x + step * u[name] for name, x in w.items()})
            leaves = trees.leaves(z)
            return _gradient(loss(moved, leaves), [moved if of_weights else {}, leaves])

    beyond, before = gradient_at(epsilon), gradient_at(-epsilon)
    weights, coordinates = (
        {name: (x[name] - y[name]) / (2 * epsilon) for name in x} for x, y in zip(beyond, before, strict=True)
    )
    return Along(weights, coordinates)


def require_whole(edges: Iterable[GradientEdge]) -> None:
    """Raises ``RuntimeError`` if a graph, at whose end these edges are, is cut by a function differentiable once."""
    if graphs.is_cut(graphs.behind(edge.node for edge in edges)):
        raise RuntimeError("trying to differentiate twice a torch.autograd.Function with @once_differentiable")


def _gradient(loss: Tensor, sources: list[Tensors]) -> list[Tensors]:
    flat = [x for tree in sources for x in tree.values()]
    if not flat or not loss.requires_grad:  # nothing is asked for, or the loss reads α without depending on it
        return [trees.zeros_like(tree) for tree in sources]
    names = {node.name() for node in graphs.behind([loss.grad_fn])}
    bars = iter(
        torch.autograd.grad(
            loss, flat, create_graph=not names.isdisjoint(_SHORTENED), allow_unused=True, materialize_grads=True
        )
    )
    return [{name: next(bars) for name in tree} for tree in sources]


def _tangent(dual: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return torch.zeros_like(dual) if tangent is None else tangent.detach()


def _is_refusal(error: RuntimeError) -> bool:
    """Whether an operator has no second derivative; PyTorch has no class of errors for it."""
    text = str(error).lower()
    refusals = ("not implemented", "double backward", "differentiate twice", "forward ad")
    of_dtype = "not implemented for '" in text  # which a loss says of a tensor of the wrong kind
    return not of_dtype and (isinstance(error, NotImplementedError) or any(refusal in text for refusal in refusals))
