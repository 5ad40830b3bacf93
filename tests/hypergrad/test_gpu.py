"""The same answers on a GPU as on a CPU, and nobody who waits for it within a horizon."""

from contextlib import contextmanager

import pytest
import torch

from optuna_greedyhg.hypergrad.domains import to_coordinates
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, fold
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam
from tests.problems import SPECIMENS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
RULES = {"SGD": SGD(lr=0.1, momentum=0.9, weight_decay=0.01), "Adam": Adam(lr=0.05)}
ONLINE = ("first-order", "t1t2", "greedy", "terminal", "reverse")


def horizon_of(name, specimen, rule, device, horizon=4):
    """The work of one horizon of a named estimator on a device."""
    problem = specimen.problem(device=device)
    alpha = to_coordinates(specimen.hyperparameters, problem.device, problem.dtype)
    products = Products(problem, {key: h.domain for key, h in specimen.hyperparameters.items()}, rule)

    def make_step(before, t, keep_graph):
        batch = next(products.train_stream)
        return products.step(before, alpha, batch, keep_graph=keep_graph, remaining=horizon - t)

    def run():
        return fold(ESTIMATORS[name], None, alpha, products.initial_state(), horizon, make_step).estimate

    return run


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("specimen", ["full-batch", "minibatches", "batchnorm"])  # dropout draws other numbers there
@pytest.mark.parametrize("name", sorted(ESTIMATORS.keys() - {"distill"}))
def test_estimates_are_those_of_the_cpu(name, specimen, rule):
    on_cpu, on_cuda = (
        horizon_of(name, SPECIMENS[specimen](), RULES[rule], device)() for device in (torch.device("cpu"), CUDA)
    )
    for group, x in on_cpu.items():
        assert on_cuda[group].device.type == "cuda"
        torch.testing.assert_close(on_cuda[group].cpu(), x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("specimen", ["full-batch", "dropout", "batchnorm"])
@pytest.mark.parametrize("name", ONLINE)
def test_nobody_waits_within_a_horizon(name, specimen):
    run = horizon_of(name, SPECIMENS[specimen](), RULES["SGD"], CUDA)
    run()
    with no_waiting():
        run()


def test_auto_is_the_gpu_and_loaders_are_pinned():
    specimen = SPECIMENS["minibatches"]()
    problem = specimen.problem(device="auto")
    assert problem.device.type == "cuda"
    assert all(x.is_pinned() for x in next(problem.train_stream()))
    full = specimen.problem(device="auto", train_batches=specimen.train_batches[0])
    assert {x.device.type for x in next(full.train_stream())} == {"cuda"}


def test_memory_does_not_grow_with_the_horizon():
    short, long = (horizon_of("greedy", SPECIMENS["full-batch"](), RULES["SGD"], CUDA, horizon=T) for T in (10, 1000))
    short()
    assert peak_bytes(long, CUDA) <= 1.02 * peak_bytes(short, CUDA)
