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
        return self.n_train_gradients + self.n_val_gradients + self.n_products + self.n_evaluations / 3

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.n_train_gradients + other.n_train_gradients,
            self.n_val_gradients + other.n_val_gradients,
            self.n_products + other.n_products,
            self.n_evaluations + other.n_evaluations,
        )
