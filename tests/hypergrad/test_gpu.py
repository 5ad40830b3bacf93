"""The same answers on a GPU as on a CPU, and nobody who waits for it within a horizon."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter, to_coordinates
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, fold
from optuna_greedyhg.hypergrad.evaluation import Online, Retrain
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam
from tests.hypergrad.descents import UNRECORDABLE, assert_same
from tests.problems import SPECIMENS, classification

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
    pytest.mark.filterwarnings("ignore:.*sees no effect of the hyperparameters"),
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
    try:
        torch.cuda.set_sync_debug_mode("error")
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


RECORDABLE = sorted(ESTIMATORS.keys() - UNRECORDABLE)
REPLAYED = {"terminal", "reverse", "drmad", "ift"}  # make steps again, with the random numbers that they had


def descents(name, specimen, rule, **replaced):
    """A descent with CUDA graphs and one without, and the recorder of the first."""
    parts = classification(nn.Dropout(0.4)) if specimen == "dropout" else SPECIMENS[specimen]()
    walks, problems = [], []
    for cuda_graphs in (True, False):
        problems.append(parts.problem(device=CUDA, cuda_graphs=cuda_graphs, **replaced))
        steps = descend(
            problems[-1],
            parts.hyperparameters,
            update_rule=RULES[rule],
            estimator=ESTIMATORS[name],
            horizon=4,
            n_outer_steps=6,
            evaluate_every=3,
            evaluate=Retrain(n_steps=24),
        )
        walks.append(list(steps))
    return *walks, problems[0].recorder


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("specimen", ["full-batch", "minibatches", "batchnorm", "dropout"])
@pytest.mark.parametrize("name", RECORDABLE)
def test_recorded_descents_are_the_same(name, specimen, rule):
    if (name, specimen) == ("forward", "dropout"):
        with pytest.raises(RuntimeError, match=r"must draw the same random numbers.*or on a GPU"):
            descents(name, specimen, rule)
        return
    again = specimen == "dropout" and name in REPLAYED
    with pytest.warns(UserWarning, match="made again") if again else nullcontext():
        recorded, plain, recorder = descents(name, specimen, rule)
    assert_same(recorded, plain, rtol=1e-6, atol=1e-9)
    assert recorder.n_recordings >= (1 if again else 2)  # of the evaluations, and of the descent


@pytest.mark.parametrize("what", ["a branch", "a number", "a tensor from the host"])
def test_what_waits_for_the_device_is_not_recorded(what):
    parts = SPECIMENS["full-batch"]()

    def train_loss(model, alpha, batch):
        loss = parts.train_loss(model, alpha, batch)
        if what == "a branch":
            return loss if bool(loss > 0) else 2 * loss
        if what == "a number":
            return loss * (1 + loss.item())
        return loss * torch.tensor([1.0, 2.0], dtype=loss.dtype, device="cpu").to(loss.device).sum()

    with pytest.warns(UserWarning, match="without CUDA graphs"):
        recorded, plain, _ = descents("greedy", "full-batch", "SGD", train_loss=train_loss)
    assert_same(recorded, plain, rtol=1e-6, atol=1e-9)
    horizon_of("greedy", parts, RULES["SGD"], CUDA)()  # the device is none the worse for it


def test_recordings_take_no_more_memory_than_two_horizons_beside():
    def peak(cuda_graphs):
        model = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), nn.Linear(1024, 10))
        images, labels = torch.randn(2048, 256), torch.randint(10, (2048,))
        problem = BilevelProblem(
            model=model,
            train_loss=lambda model, alpha, batch: F.cross_entropy(model(batch[0]), batch[1]) * alpha["scale"],
            val_loss=lambda model, alpha, batch: F.cross_entropy(model(batch[0]), batch[1]),
            train_batches=(images, labels),
            val_batches=(images, labels),
            device=CUDA,
            cuda_graphs=cuda_graphs,
        )
        alpha = {"scale": Hyperparameter(torch.ones(()))}
        settings = {"update_rule": RULES["Adam"], "estimator": ESTIMATORS["greedy"], "n_outer_steps": 6}
        return peak_bytes(lambda: list(descend(problem, alpha, evaluate=Online(), **settings)), CUDA)

    assert peak(True) <= 3 * peak(False)
