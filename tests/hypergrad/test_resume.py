"""A descent that is interrupted, written to a file and resumed in another process is as if it had not been."""

import io
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.episodes import Episode, MetaProblem
from optuna_greedyhg.hypergrad.estimators import Greedy, HyperDistill
from optuna_greedyhg.hypergrad.estimators.named import ESTIMATORS
from optuna_greedyhg.hypergrad.evaluation import Retrain
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests.problems import SPECIMENS, UPDATE_RULES, Case, classification, cliff, float64

CUTS = (0, 1, 4)


def descent(case, make_problem=None, **settings):
    problem = (make_problem or case.specimen.problem)()
    settings = {"horizon": 3, "n_outer_steps": 6, "evaluate_every": 2, "estimator": Greedy(), **settings}
    return descend(problem, case.hyperparameters, update_rule=case.rule, **settings)


def through_a_file(point):
    file = io.BytesIO()
    torch.save(point, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_resumes(case, make_problem=None, **settings):
    """From each of some steps, with everything made anew, to the same bits."""
    whole = list(descent(case, make_problem, **settings))
    assert len(whole) == 7
    torch.rand(3)  # what else the process draws is no matter
    for cut in CUTS:
        point = through_a_file(whole[cut].resume_point)
        rest = list(descent(case, make_problem, resume_from=point, **settings))
        assert [step.index for step in rest] == [step.index for step in whole[cut + 1 :]]
        for found, expected in zip(rest, whole[cut + 1 :], strict=True):
            assert_equal(found, expected)
    return whole


def assert_equal(found, expected):
    same = partial(torch.testing.assert_close, rtol=0.0, atol=0.0, equal_nan=True)
    same(found.values, expected.values)
    same((found.val_loss, found.hypergradient_norm), (expected.val_loss, expected.hypergradient_norm))
    assert (found.cost, found.stopped) == (expected.cost, expected.stopped)
    assert (found.evaluation is None) == (expected.evaluation is None)
    same(dict(found.best.scores), dict(expected.best.scores))
    same(dict(found.best.values), dict(expected.best.values))
    same(found.best.state.parameters, expected.best.state.parameters)


@pytest.mark.filterwarnings("ignore:.*sees no effect")  # of the update rule's own hyperparameters, or at all
@pytest.mark.parametrize("evaluate", ["retrain", "online"])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_every_estimator(estimator, evaluate):
    rule = UPDATE_RULES["Adam" if evaluate == "online" else "momentum-decay"]
    assert_resumes(Case(SPECIMENS["minibatches"](), rule), estimator=estimator, evaluate=evaluate)


@pytest.mark.parametrize(
    "estimator", [Greedy(propagator=Spectral(3)), HyperDistill(fit_every=3), None], ids=["spectral", "distill", "none"]
)
@pytest.mark.parametrize("specimen", SPECIMENS.values(), ids=SPECIMENS.keys())
def test_every_kind_of_problem_with_what_is_carried(specimen, estimator):
    assert_resumes(Case(specimen(), UPDATE_RULES["nesterov"]), estimator=estimator, evaluate="online")


def loaders(make_train):
    """A problem whose training batches are made by ``make_train(x, y, index)``."""
    specimen = classification()
    ((x, y, index),) = specimen.train_batches
    return lambda: replace(specimen, train_batches=make_train(x, y, index)).problem()


def shuffled(own_generator):
    def make(x, y, index):
        generator = torch.Generator() if own_generator else None
        return DataLoader(TensorDataset(x, y, index), batch_size=5, shuffle=True, generator=generator)

    return make


def endless(x, y, index):
    return ((x[i::5], y[i::5], index[i::5]) for i in itertools.cycle(range(4)))


@pytest.mark.parametrize("evaluate", ["retrain", "online"])
@pytest.mark.parametrize(
    "make_train", [shuffled(False), shuffled(True), endless], ids=["shuffled", "own-generator", "one-shot"]
)
def test_every_kind_of_stream(make_train, evaluate):
    case = Case(classification(), UPDATE_RULES["SGD"])
    assert_resumes(case, loaders(make_train), evaluate=evaluate, estimator=Greedy(propagator=Spectral(2)))


def test_restarts_patience_and_an_outer_optimizer_with_momentum():
    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["SGD"])
    assert_resumes(case, estimator=Greedy(0.0), restart=True, outer_optimizer=momentum)


def test_patience_goes_on_counting():
    uphill = partial(torch.optim.SGD, lr=1.0, maximize=True)
    case, settings = Case(SPECIMENS["minibatches"](), UPDATE_RULES["SGD"]), {"patience": 3, "evaluate_every": 1}
    whole = list(descent(case, outer_optimizer=uphill, **settings))
    assert [whole[-1].index, whole[-1].stopped] == [3, "patience"]
    point = through_a_file(whole[-2].resume_point)
    (last,) = descent(case, outer_optimizer=uphill, resume_from=point, **settings)
    assert_equal(last, whole[-1])


def test_after_a_failure_too():
    """The point that a failing descent goes back to, and its shortened steps, are part of it."""
    case = Case(cliff(1.2), SGD(lr=0.5))
    settings = {"horizon": 1, "outer_optimizer": partial(torch.optim.SGD, lr=1.0), "evaluate": "online"}
    assert_resumes(case, **settings, estimator=Greedy(0.0))
    values = [float(step.values["target"]) for step in descent(case, **settings, estimator=Greedy(0.0))]
    assert len(set(values)) < len(values) or max(values) > 1.2  # a step was indeed taken back


def test_after_a_failure_of_weights_that_an_evaluation_has_trained():
    case = Case(cliff(1.2), SGD(lr=0.5))
    settings = {"horizon": 1, "outer_optimizer": partial(torch.optim.SGD, lr=1.0), "evaluate": Retrain(2)}
    whole = assert_resumes(case, **settings, evaluate_every=1, estimator=Greedy(0.0))
    targets = [float(step.values["target"]) for step in whole]
    assert any(x > 1.2 for x in targets[:-1])  # which the next step has found out, and gone back


def test_episodes():
    def draw():
        x = torch.randn(6, 2, dtype=torch.float64)
        return Episode((x[:3], x[:3, 0]), (x[3:], x[3:, 0]))

    def problem():
        model = torch.nn.Linear(2, 1).double()
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        held_out = Episode((x[:3], x[:3, 0]), (x[3:], x[3:, 0]))
        return MetaProblem(
            model=model,
            train_loss=lambda model, alpha, batch: ((model(batch[0])[:, 0] - alpha["shift"] - batch[1]) ** 2).mean(),
            val_loss=lambda model, alpha, batch: ((model(batch[0])[:, 0] - batch[1]) ** 2).mean(),
            draw=draw,
            n_episodes=2,
            val_episodes=[held_out],
        )

    def steps(**settings):
        hyperparameters = {"shift": Hyperparameter(float64(1.0))}
        return descend(
            problem(), hyperparameters, update_rule=SGD(lr=0.1), estimator=Greedy(), n_outer_steps=6, **settings
        )

    whole = list(steps())
    for cut in CUTS:
        rest = list(steps(resume_from=through_a_file(whole[cut].resume_point)))
        for found, expected in zip(rest, whole[cut + 1 :], strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize("what", ["hyperparameters", "weights"])
def test_a_point_of_something_else_is_refused(what):
    case, other = Case(SPECIMENS["full-batch"](), SGD(lr=0.1)), Case(cliff(1.0), SGD(lr=0.1))
    point = dict(next(descent(other)).resume_point)
    if what == "weights":
        point["alpha"] = next(descent(case)).resume_point["alpha"]
    with pytest.raises(ValueError, match=f"resume_from must be of a descent with the same {what}"):
        next(descent(case, resume_from=point))
