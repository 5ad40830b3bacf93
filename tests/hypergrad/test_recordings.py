"""Recorded horizons and trainings are what they are step by step, whatever a graph of a device can and cannot do.

The graphs here do the recorded work again in Python, on the memory that was recorded; see test_gpu.py for CUDA's own.
"""

import random
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from optuna_greedyhg.hypergrad import batches, recordings
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.episodes import Episode, MetaProblem
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, FirstOrder, Forward, Greedy, Reverse
from optuna_greedyhg.hypergrad.evaluation import Online
from optuna_greedyhg.hypergrad.recordings import Recorder, Result
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests.problems import CPU, SPECIMENS, UPDATE_RULES, Case, classification, cliff

pytestmark = pytest.mark.filterwarnings("ignore:.*sees no effect of the hyperparameters")
RECORDABLE = sorted(ESTIMATORS.keys() - {"distill", "spectral", "ift-cg"})  # which look at numbers, or carry some


class Emulated:
    """Does the work again at each replay; results are there from the first replay on, as on a device."""

    n_recorded = n_replayed = 0

    def record(self, work):
        Emulated.n_recorded += 1
        self._work = work
        result = work()
        self._results = [x.clone() for x in batches.tensors_of(result.tensors)]
        for x in self._results:
            x.fill_(-77)
        return result._replace(tensors=batches.with_tensors(result.tensors, iter(self._results)))

    def replay(self):
        Emulated.n_replayed += 1
        for mine, its in zip(self._results, batches.tensors_of(self._work().tensors), strict=True):
            mine.copy_(its)


@pytest.fixture(autouse=True)
def count_from_zero():
    Emulated.n_recorded = Emulated.n_replayed = 0


@contextmanager
def unwatched():
    yield []


def recorded(problem, graph=Emulated, watched=unwatched):
    first = problem if hasattr(problem, "recorder") else problem.val_episodes[0]
    for each in {first, *problem.val_episodes}:
        each.recorder = Recorder(graph, CPU, watched) if each is first else first.recorder
    return problem


SETTINGS = {"horizon": 4, "n_outer_steps": 6, "evaluate_every": 3}


def walk(case, estimator, problem=None, **settings):
    settings = {**SETTINGS, **settings}
    problem = problem or case.specimen.problem()
    return list(descend(problem, case.hyperparameters, update_rule=case.rule, estimator=estimator, seed=5, **settings))


def assert_same(steps, others, *, rtol=1e-9):
    assert len(steps) == len(others)
    for step, other in zip(steps, others, strict=True):
        assert step.cost == other.cost
        assert step.val_loss == pytest.approx(other.val_loss, rel=rtol, nan_ok=True)
        assert step.best.scores == pytest.approx(other.best.scores, rel=rtol)
        for name, x in step.values.items():
            torch.testing.assert_close(x, other.values[name], rtol=rtol, atol=1e-12)
    states = [walked[-1].best.state for walked in (steps, others)]
    assert states[0].n_steps == states[1].n_steps
    for x, y in zip(*(state.tensors for state in states), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("specimen", ["full-batch", "minibatches", "batchnorm"])
@pytest.mark.parametrize("name", RECORDABLE)
def test_descents_are_the_same(name, specimen):
    case = Case(SPECIMENS[specimen](), UPDATE_RULES["momentum-decay"])
    settings = {"max_hypergradient_norm": 1.0}
    recordedly = walk(case, ESTIMATORS[name], recorded(case.specimen.problem()), **settings)
    assert_same(recordedly, walk(case, ESTIMATORS[name], **settings))
    assert Emulated.n_replayed > Emulated.n_recorded > 0


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("estimator", [Greedy(0.9), Greedy(0.9, terminal=True), Reverse()], ids=repr)
def test_every_update_rule_counts_its_steps(estimator, rule):
    case = Case(classification(), UPDATE_RULES[rule])
    assert_same(walk(case, estimator, recorded(case.specimen.problem()), horizon=5), walk(case, estimator, horizon=5))
    assert Emulated.n_replayed > 0


@pytest.mark.parametrize("estimator", [Greedy(0.9, stride=3), Forward(), None], ids=repr)
def test_online_and_from_a_loader(estimator):
    case = Case(classification(), UPDATE_RULES["Adam"])
    inputs = case.specimen.train_batches[0]

    def problem():
        dataset = torch.utils.data.TensorDataset(*inputs)
        return case.specimen.problem(train_batches=torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True))

    settings = {"evaluate": Online(), "n_outer_steps": 30, "evaluate_every": 5}
    assert_same(walk(case, estimator, recorded(problem()), **settings), walk(case, estimator, problem(), **settings))
    assert Emulated.n_replayed > 0


def test_resumed_in_another_process():
    case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["Adam"])
    whole = walk(case, Greedy(0.9), recorded(case.specimen.problem()))
    rest = walk(case, Greedy(0.9), recorded(case.specimen.problem()), resume_from=whole[3].resume_point)
    assert_same(rest, whole[4:], rtol=0)


def test_episodes_share_their_recordings():
    case = Case(classification(), UPDATE_RULES["momentum"])
    x, y, index = case.specimen.train_batches[0]

    def episode():
        chosen = torch.randperm(len(x))[:6]
        return Episode((x[chosen], y[chosen], index[chosen]), (x[chosen], y[chosen]))

    def problem():
        torch.manual_seed(0)
        return MetaProblem(
            model=case.specimen.module,
            train_loss=case.specimen.train_loss,
            val_loss=case.specimen.val_loss,
            draw=episode,
            val_episodes=[episode() for _ in range(5)],
            n_episodes=3,
        )

    assert_same(walk(case, Greedy(0.9), recorded(problem())), walk(case, Greedy(0.9), problem()))
    assert Emulated.n_recorded <= 4 < Emulated.n_replayed


def test_nan_is_seen_and_gone_back_from():
    case = Case(cliff(0.5), SGD(lr=0.5))
    outer = {"outer_optimizer": lambda tensors: torch.optim.SGD(tensors, lr=0.3), "n_outer_steps": 12, "horizon": 2}
    steps = walk(case, Greedy(0.9), recorded(case.specimen.problem()), **outer)
    assert_same(steps, walk(case, Greedy(0.9), **outer))
    assert steps[-1].stopped == "diverged"
    assert Emulated.n_replayed > 0


def given_up(make_problem, case, estimator, watched=unwatched):
    """The steps of a descent that warns of what it cannot record, and what it says."""
    with pytest.warns(UserWarning, match="without CUDA graphs") as caught:
        steps = walk(case, estimator, recorded(make_problem(), watched=watched))
    return steps, " ".join(str(warning.message) for warning in caught)


def test_random_numbers_of_another_generator_are_noticed():
    case = Case(SPECIMENS["dropout"](), UPDATE_RULES["SGD"])
    steps, said = given_up(case.specimen.problem, case, Greedy(0.9))
    assert "another generator than the GPU's own" in said
    assert_same(steps, walk(case, Greedy(0.9)))


def test_random_numbers_of_python_are_noticed():
    case = Case(classification(), UPDATE_RULES["SGD"])

    def moody_problem():
        def train_loss(model, alpha, batch):
            return case.specimen.train_loss(model, alpha, batch) * random.choice([0.5, 1.5])

        return case.specimen.problem(train_loss=train_loss)

    assert "another generator than the GPU's own" in given_up(moody_problem, case, Greedy(0.9))[1]


def test_an_estimator_that_carries_is_noticed():
    case = Case(classification(), UPDATE_RULES["SGD"])
    steps, said = given_up(case.specimen.problem, case, ESTIMATORS["spectral"])
    assert "takes along" in said
    assert_same(steps, walk(case, ESTIMATORS["spectral"]))


def test_what_is_no_tensor_in_a_batch_is_noticed():
    class Box:
        def __init__(self, content):
            self.content = content

    case = Case(classification(), UPDATE_RULES["SGD"])

    def boxed_problem():
        return case.specimen.problem(
            train_loss=lambda model, alpha, box: case.specimen.train_loss(model, alpha, box.content),
            train_batches=[Box(case.specimen.train_batches[0])],
        )

    steps, said = given_up(boxed_problem, case, Greedy(0.9))
    assert "batches hold a Box" in said
    assert_same(steps, walk(case, Greedy(0.9), boxed_problem()))


def test_what_waits_for_the_device_is_noticed():
    @contextmanager
    def waiting():
        yield ["loss.py, line 7"]

    case = Case(classification(), UPDATE_RULES["SGD"])
    steps, said = given_up(case.specimen.problem, case, FirstOrder(), waiting)
    assert "it waits for the GPU: loss.py, line 7." in said
    assert Emulated.n_recorded == 0
    assert_same(steps, walk(case, FirstOrder()))


def test_random_numbers_that_a_step_needs_again_are_noticed(monkeypatch):
    def of_a_gpu(device, generators=()):  # whose generator is another than the host's
        return torch.zeros(1), torch.get_rng_state()

    @contextmanager
    def restored(state, device, generators=()):
        present = torch.get_rng_state()
        torch.set_rng_state(state[1])
        yield
        torch.set_rng_state(present)

    monkeypatch.setattr(recordings.randomness, "capture", of_a_gpu)
    monkeypatch.setattr(recordings.randomness, "restored", restored)
    parts = classification(nn.Dropout(0.4))
    recorder = Recorder(Emulated, CPU, unwatched)

    def function(arguments):
        state = recorder.capture()
        total = parts.module(arguments[0]).sum().detach()
        with recorder.restored(state):
            return Result([total - parts.module(arguments[0]).sum().detach()], Cost())

    inputs = [parts.train_batches[0][0]]
    with pytest.warns(UserWarning, match="made again from the same"):
        assert float(recorder.call("settings", function, inputs).tensors[0]) == 0
    assert recorder.has_given_up("settings")


def test_what_fails_when_it_is_recorded_is_an_error():
    class Refusing(Emulated):
        def record(self, work):
            raise RuntimeError("out of memory.")

    case = Case(classification(), UPDATE_RULES["SGD"])
    with pytest.raises(RuntimeError, match=r"recording has failed: out of memory\. Start a new process without"):
        walk(case, FirstOrder(), recorded(case.specimen.problem(), Refusing))


def test_the_number_of_recordings_is_bounded():
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 12, (40,), generator=generator).tolist()
    case = Case(classification(), UPDATE_RULES["SGD"])
    x, y, index = case.specimen.train_batches[0]
    varied = [(x[:n], y[:n], index[:n]) for n in sizes]
    problem = recorded(case.specimen.problem(train_batches=varied))
    settings = {"horizon": 1, "n_outer_steps": 80, "evaluate": Online()}
    steps = walk(case, Greedy(0.9), problem, **settings)
    assert_same(steps, walk(case, Greedy(0.9), case.specimen.problem(train_batches=varied), **settings))
    assert Emulated.n_recorded == 8


def test_without_a_gpu_nothing_is_recorded():
    assert classification().problem(cuda_graphs=True, device="cpu").recorder is None
