"""What a run has cost, in examples: the one currency in which all methods are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Cost:
    """Numbers of examples that passed through a gradient, a product or an evaluation.

    A batch of 100 examples in one training step counts 100 training gradients, however many weights there are.
    Products that need no pass over data (the learning rate's own) are free.
    """

    n_train_gradients: int = 0
    """∇_w L_train, of training steps, fair re-evaluations and replays."""
    n_val_gradients: int = 0
    """∇_w L_val and ∇_α L_val, which share their pass."""
    n_products: int = 0
    """v·B and v·A, second derivatives of L_train times a vector."""
    n_evaluations: int = 0
    """Forward passes over the validation split without a gradient; the test split is nobody's cost."""

    @property
    def total(self) -> float:
        """One number, in gradients of one example: a product counts as one, an evaluation as a third."""
        return Prices().of(self)

    def charge(self, other: Cost) -> None:
        """Adds another to this one, for all who count on it."""
        self.n_train_gradients += other.n_train_gradients
        self.n_val_gradients += other.n_val_gradients
        self.n_products += other.n_products
        self.n_evaluations += other.n_evaluations

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.n_train_gradients + other.n_train_gradients,
            self.n_val_gradients + other.n_val_gradients,
            self.n_products + other.n_products,
            self.n_evaluations + other.n_evaluations,
        )


@dataclass(frozen=True)
class Prices:
    """What one example costs in each kind of pass, where one in a training gradient costs 1.

    The defaults count passes, and are the same on every machine; ``measured_prices`` times them on a problem.
    """

    val_gradient: float = 1.0
    product: float = 1.0
    evaluation: float = 1 / 3

    def of(self, cost: Cost) -> float:
        """The cost as one number, in training gradients of one example."""
        return (
            cost.n_train_gradients
            + self.val_gradient * cost.n_val_gradients
            + self.product * cost.n_products
            + self.evaluation * cost.n_evaluations
        )
