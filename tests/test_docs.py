"""The table of estimators in the documentation, against what is counted and what comes out."""

import gc
import re
from math import ceil
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.domains import Hyperparameter, Positive
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, Fixed
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests.problems import CPU, Case, Specimen, Weights, float64, isotropic

DOCS = Path(__file__).parent.parent / "docs"
N_WEIGHTS, N_HYPERPARAMETERS, HORIZON = 16, 3, 7
ALL = {**ESTIMATORS, "fixed": Fixed()}
EVERY_ESTIMATOR = pytest.mark.parametrize("name", ESTIMATORS)


def penalised() -> Specimen:
    """A quadratic training loss in 16 weights with as many curvatures, and three penalties."""
    curvature, group = torch.linspace(0.1, 3.0, N_WEIGHTS, dtype=torch.float64), torch.arange(N_WEIGHTS) % 3

    def train_loss(model, alpha, batch):
        return (0.5 * (curvature + alpha["penalties"][group]) * model() ** 2 - batch.mean() * model()).sum()

    return Specimen(
        module=Weights(*torch.linspace(-1.0, 2.0, N_WEIGHTS).tolist()),
        train_loss=train_loss,
        val_loss=lambda model, alpha, batch: ((model() - 0.5) ** 2).sum() + (alpha["penalties"] ** 2).sum(),
        hyperparameters={"penalties": Hyperparameter(float64(0.1, 0.2, 0.3), Positive())},
        train_batches=[torch.ones(1, dtype=torch.float64)],
    )


class Descent:
    """Horizons of an estimator under an α that stays, each on the same batches."""

    def __init__(self, name, case, batches=None):
        self.estimator, self.carried, self.batches = ALL[name], None, batches or [case.train_batch(0)] * HORIZON
        self.products, self.alpha = case.products(), case.alpha()
        self.state = self.products.initial_state()

    def observed(self):
        """The memory after a horizon's last step, and that step."""
        estimator, horizon = self.estimator, len(self.batches)
        memory = estimator.init(self.alpha) if self.carried is None else estimator.resume(self.alpha, self.carried)
        for t, batch in enumerate(self.batches, start=1):
            keep = estimator.keeps_graph(t, horizon)
            step = self.products.step(self.state, self.alpha, batch, keep_graph=keep, remaining=horizon - t)
            memory, self.state = estimator.observe(memory, step), step.after
        return memory, step

    def fold(self):
        """One horizon's estimate."""
        with randomness.seeded(0, CPU):
            memory, end = self.observed()
            estimate = self.estimator.estimate(memory, end)
        self.carried = self.estimator.carry(memory)
        return estimate


def value(expression, settings):
    """What a count of the table comes to."""
    python = re.sub(r"(?<=\d)(?=[A-Z(])", "*", expression).replace("·", "*").replace("−", "-")
    return eval(python.replace("⌈", "ceil(").replace("⌉", ")"), {"ceil": ceil, "min": min}, settings)


def settings_of(name, n_batches):
    """The letters of the table's counts, and the number of outer steps after which costs repeat."""
    estimator, letters, period = ALL[name], {"T": HORIZON, "H": N_HYPERPARAMETERS}, 1
    if name == "spectral":
        spectral = estimator.propagator
        letters |= {"k": spectral.rank, "r": spectral.refresh_every, "b": min(spectral.n_batches, n_batches)}
    elif name == "strided":
        letters["s"] = estimator.stride
    elif name == "ift":
        letters["K"] = estimator.solver.n_terms
    elif name == "ift-cg":
        letters["K"] = estimator.solver.max_steps
    elif name == "distill":
        letters["F"] = period = estimator.fit_every
    return letters, period


def test_every_estimator_has_its_row_in_the_table():
    page = (DOCS / "estimators.md").read_text(encoding="utf-8")
    assert all(f"| [{name}](#{name}) |" in page for name in ESTIMATORS)


@EVERY_ESTIMATOR
def test_each_has_a_section_with_its_source(name):
    page = (DOCS / "estimators.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### {name}\n(.*?)(?=^### |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert re.match(r"\n    d", section), "begins with the equation"
    assert "\nSource: " in section


@pytest.mark.parametrize("n_batches", [1, HORIZON])
@pytest.mark.parametrize("name", ALL)
def test_costs_are_those_of_the_table(name, n_batches):
    batches = list(torch.linspace(1.0, 2.0, n_batches).double()[:, None]) * (HORIZON // n_batches)
    descent, traits = Descent(name, Case(penalised(), SGD(lr=0.1)), batches), ALL[name].traits
    letters, period = settings_of(name, n_batches)
    descent.fold()  # the first horizon may cost more
    descent.products.cost = Cost()
    for _ in range(period):
        descent.fold()
    cost = descent.products.cost
    assert cost.n_products == pytest.approx(period * value(traits.products, letters))
    assert cost.n_val_gradients == pytest.approx(period * value(traits.val_gradients, letters))
    assert cost.n_train_gradients == pytest.approx(period * (HORIZON + value(traits.train_gradients, letters)))


@EVERY_ESTIMATOR
def test_those_that_see_the_learning_rate_are_said_to(name):
    hyperparameters = {"lr": Hyperparameter(float64(0.1), Positive())}
    specimen = isotropic()
    case = Case(
        Specimen(specimen.module, lambda model, alpha, _: (model() ** 2).sum(), specimen.val_loss, hyperparameters),
        SGD(lr="lr"),
    )
    assert bool(Descent(name, case).fold()["lr"] != 0) == ESTIMATORS[name].traits.own_hyperparameters


@EVERY_ESTIMATOR
def test_those_that_look_back_are_said_to(name):
    """Where all v·B_t are equal, the estimates that count more than the last are longer than it."""
    case = Case(isotropic(), SGD(lr=0.2))
    last, whole = (Descent(estimator, case).fold()["angle"].norm() for estimator in ("t1t2", name))
    assert bool(whole > 1.5 * last) == ESTIMATORS[name].traits.long_horizon


@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"first-order"}))
def test_all_are_exact_over_one_step_but_those_that_need_convergence(name):
    case = Case(penalised(), SGD(lr=0.1))
    estimate, exact = (Descent(n, case, [case.train_batch(0)]).fold()["penalties"] for n in (name, "reverse"))
    assert torch.allclose(estimate, exact, rtol=1e-9) != ESTIMATORS[name].traits.needs_convergence


def kept(memory, is_wanted):
    """The number of objects of a kind that can be reached from a memory."""
    seen, todo, found = set(), [memory], 0
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(x))
        found += is_wanted(x)
        todo.extend(gc.get_referents(x))
    return found


@EVERY_ESTIMATOR
def test_memory_grows_with_the_horizon_only_where_it_is_said_to(name):
    traits, weights, batches = ESTIMATORS[name].traits, [], []
    for horizon in (HORIZON, 2 * HORIZON):
        given = [torch.full((11, 5), 1 + t / horizon, dtype=torch.float64) for t in range(horizon)]
        descent = Descent(name, Case(penalised(), SGD(lr=0.1)), given)
        descent.fold()  # after which there are horizons without anything to be fitted or found for the first time
        memory, _ = descent.observed()
        weights.append(kept(memory, lambda x: isinstance(x, torch.Tensor) and x.shape == (N_WEIGHTS,)))
        batches.append(kept(memory, lambda x: isinstance(x, torch.Tensor) and x.shape == (11, 5)))
    assert (weights[1] > weights[0] + HORIZON) == ("P·T" in traits.memory)
    assert weights[1] == weights[0] or "P·T" in traits.memory
    assert (batches[1] >= batches[0] + HORIZON) == (not traits.online)
    assert (batches[1] == batches[0]) == traits.online
    assert ("T batches" in traits.memory) == (not traits.online and "P·T" not in traits.memory)
