"""What a product, a validation gradient and an evaluation cost on a problem, measured beside a training gradient.

    price of a pass = (its seconds / its examples) / (seconds of a training step / examples of its batch)

A product's time includes what it takes to keep the graph of the step that it is made of. Small batches make passes
dear, as every call has a cost of its own; so all are measured in the batches that the problem has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

from optuna_greedyhg.hypergrad import batches
from optuna_greedyhg.hypergrad.clock import side_by_side
from optuna_greedyhg.hypergrad.cost import Cost, Prices
from optuna_greedyhg.hypergrad.domains import Hyperparameter, to_coordinates
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.products import Covector, InnerStep, Products
from optuna_greedyhg.hypergrad.update_rules import UpdateRule

_N_STEPS = 5


def measured_prices(
    problem: BilevelProblem,
    hyperparameters: Mapping[str, Hyperparameter],
    update_rule: UpdateRule,
    *,
    max_seconds: float = 5.0,
) -> Prices:
    """Times each kind of pass at the initial weights, with α where it starts.

    Args:
        problem: The bilevel problem; its validation batches are passed over once for each repeat.
        hyperparameters: α.
        update_rule: The inner optimizer.
        max_seconds: About how long it may take; the median of 3 to 15 repeats counts, after one that warms up.
    """
    products = Products(problem, {name: h.domain for name, h in hyperparameters.items()}, update_rule)
    alpha = to_coordinates(hyperparameters, problem.device, problem.dtype)
    start, train_batches = products.initial_state(), list(problem.first_batches(_N_STEPS))
    val_batches = list(islice(products.val_stream, _N_STEPS))
    n_train = sum(batches.n_examples(batch) for batch in train_batches)

    def train(*, keep_graph: bool) -> list[InnerStep]:
        return [products.step(start, alpha, batch, keep_graph=keep_graph) for batch in train_batches]

    def multiply() -> None:
        for step in train(keep_graph=True):
            pull_back(step, v)

    def validate() -> None:
        for batch in val_batches:
            products.validate(start, alpha, batch)

    def evaluate() -> int:
        return problem.evaluate("val", start.parameters, start.buffers, products.values(alpha))[1]

    with problem.seeded(0):
        v = Covector(products.validate(start, alpha, val_batches[0]).gradient)
        pull_back = _kind_of_product(products, train(keep_graph=True)[0], v)
        functions: list[Callable[[], object]] = [lambda: train(keep_graph=False), multiply, validate, evaluate]
        n_repeats = min(max(int(max_seconds / sum(side_by_side(functions, problem.device, 1))), 3), 15)
        step, multiplied, validated, evaluated = side_by_side(functions, problem.device, n_repeats)
    of_one = step / n_train
    return Prices(
        val_gradient=validated / sum(batches.n_examples(batch) for batch in val_batches) / of_one,
        product=max(multiplied - step, 0.0) / n_train / of_one,
        evaluation=evaluated / evaluate() / of_one,
    )


def _kind_of_product(products: Products, step: InnerStep, v: Covector) -> Callable[[InnerStep, Covector], object]:
    """v·B, which is what estimators ask for most; v·A where the training loss does not read α, and v·B is free."""
    products.cost = Cost()
    step.times_b(v)
    return InnerStep.times_b if products.cost.n_products > 0 else InnerStep.times_a
