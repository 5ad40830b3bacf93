"""Recorded horizons and trainings are what they are step by step, whatever a graph of a device can and cannot do.

The graphs here are tapes of operations; see test_gpu.py for CUDA's own.
"""

import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optuna_greedyhg.hypergrad import recordings
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.episodes import Episode, MetaProblem
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, FirstOrder, Greedy, Reverse
from optuna_greedyhg.hypergrad.evaluation import Online
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.recordings import MAX_RECORDINGS, Recorder, Result, Settings, cuda_recorder
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam
from tests.hypergrad.descents import UNRECORDABLE, assert_same
from tests.hypergrad.tape import Tape
from tests.problems import CPU, SPECIMENS, UPDATE_RULES, Case, classification, cliff

pytestmark = pytest.mark.filterwarnings("ignore:.*sees no effect of the hyperparameters")
RECORDABLE = sorted(ESTIMATORS.keys() - UNRECORDABLE - {"forward"})  # whose tangents of zero a tape cannot write to


@pytest.fixture(autouse=True)
def count_from_zero():
    Tape.n_recorded = Tape.n_replayed = 0


def recorded(problem, graph=Tape):
    first = problem if hasattr(problem, "recorder") else problem.val_episodes[0]
    for each in {first, *problem.val_episodes}:
        each.recorder = Recorder(graph, CPU) if each is first else first.recorder
    return problem


SETTINGS = {"horizon": 4, "n_outer_steps": 6, "evaluate_every": 3}


def walk(case, estimator, problem=None, **settings):
    settings = {**SETTINGS, **settings}
    problem = problem or case.specimen.problem()
    return list(descend(problem, case.hyperparameters, update_rule=case.rule, estimator=estimator, seed=5, **settings))


@pytest.mark.parametrize("specimen", ["full-batch", "minibatches", "batchnorm"])
@pytest.mark.parametrize("name", RECORDABLE)
def test_descents_are_the_same(name, specimen):
    case = Case(SPECIMENS[specimen](), UPDATE_RULES["momentum-decay"])
    settings = {"max_hypergradient_norm": 1.0}
    recordedly = walk(case, ESTIMATORS[name], recorded(case.specimen.problem()), **settings)
    assert_same(recordedly, walk(case, ESTIMATORS[name], **settings))
    assert Tape.n_replayed > Tape.n_recorded > 0


@pytest.mark.parametrize("rule", UPDATE_RULES)
@pytest.mark.parametrize("estimator", [Greedy(0.9), Greedy(0.9, terminal=True), Reverse()], ids=repr)
def test_every_update_rule_counts_its_steps(estimator, rule):
    case = Case(classification(), UPDATE_RULES[rule])
    assert_same(walk(case, estimator, recorded(case.specimen.problem()), horizon=5), walk(case, estimator, horizon=5))
    assert Tape.n_replayed > 0


@pytest.mark.parametrize("estimator", [Greedy(0.9, stride=3), Greedy(0.9, terminal=True), None], ids=repr)
def test_online_and_from_a_loader(estimator):
    case = Case(classification(), UPDATE_RULES["Adam"])
    inputs = case.specimen.train_batches[0]

    def problem():
        dataset = torch.utils.data.TensorDataset(*inputs)
        return case.specimen.problem(train_batches=torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True))

    settings = {"evaluate": Online(), "n_outer_steps": 30, "evaluate_every": 5}
    assert_same(walk(case, estimator, recorded(problem()), **settings), walk(case, estimator, problem(), **settings))
    assert Tape.n_replayed > 0


def test_resumed_in_another_process():
    case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["Adam"])
    whole = walk(case, Greedy(0.9), recorded(case.specimen.problem()))
    rest = walk(case, Greedy(0.9), recorded(case.specimen.problem()), resume_from=whole[3].resume_point)
    assert_same(rest, whole[4:], rtol=1e-12)


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
    assert Tape.n_recorded <= 4 < Tape.n_replayed


def test_nan_is_seen_and_gone_back_from():
    case = Case(cliff(0.5), SGD(lr=0.5))

    def problem():
        def train_loss(model, alpha, batch):
            beyond = torch.where(alpha["target"] > 0.5, float("nan"), 0.0)
            return 0.5 * (model() - alpha["target"]) ** 2 + beyond * model()

        return case.specimen.problem(train_loss=train_loss)

    outer = {"outer_optimizer": lambda tensors: torch.optim.SGD(tensors, lr=0.3), "n_outer_steps": 12, "horizon": 2}
    steps = walk(case, Greedy(0.9), recorded(problem()), **outer)
    assert_same(steps, walk(case, Greedy(0.9), problem(), **outer))
    assert steps[-1].stopped == "diverged"
    assert Tape.n_replayed > 0


def given_up(make_problem, case, estimator):
    """The steps of a descent that warns of what it cannot record, and what it says."""
    with pytest.warns(UserWarning, match="without CUDA graphs") as caught:
        steps = walk(case, estimator, recorded(make_problem()))
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


@pytest.mark.parametrize("name", sorted(UNRECORDABLE))
def test_estimators_that_cannot_be_recorded(name):
    case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["Adam"])
    steps, said = given_up(case.specimen.problem, case, ESTIMATORS[name])
    assert ("waits for the GPU" if name == "ift-cg" else "takes along") in said
    assert_same(steps, walk(case, ESTIMATORS[name]))
    assert Tape.n_recorded > 0  # of the evaluations


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


def with_loss(case, change):
    """A function that makes the case's problem with the training loss changed."""

    def train_loss(model, alpha, batch):
        return change(case.specimen.train_loss(model, alpha, batch), batch)

    return lambda **settings: case.specimen.problem(train_loss=train_loss, **settings)


def test_what_waits_for_the_device_is_noticed():
    case = Case(classification(), UPDATE_RULES["SGD"])
    make_problem = with_loss(case, lambda loss, batch: loss if bool(loss > 0) else 2 * loss)
    steps, said = given_up(make_problem, case, Greedy(0.9))
    assert "it waits for the GPU, in aten._local_scalar_dense.default" in said
    assert_same(steps, walk(case, Greedy(0.9), make_problem()))
    assert Tape.n_recorded == 0


def test_what_changes_from_step_to_step_is_noticed():
    case, counter = Case(classification(), UPDATE_RULES["SGD"]), count()
    said = given_up(with_loss(case, lambda loss, batch: loss / (1 + next(counter))), case, Greedy(0.9))[1]
    assert "a replay comes to other numbers" in said


def test_generators_of_a_losss_own_are_noticed():
    case, own = Case(classification(), UPDATE_RULES["SGD"]), random.Random(0)
    said = given_up(with_loss(case, lambda loss, batch: loss * own.random()), case, Greedy(0.9))[1]
    assert "a replay comes to other numbers" in said


def test_what_is_written_into_batches_is_noticed():
    case = Case(classification(), UPDATE_RULES["SGD"])

    def problem():
        def train_loss(model, alpha, batch):
            batch[0].mul_(0.9)
            return case.specimen.train_loss(model, alpha, batch)

        batches = [tuple(x.clone() for x in batch) for batch in case.specimen.train_batches]
        return case.specimen.problem(train_loss=train_loss, train_batches=batches)

    steps, said = given_up(problem, case, Greedy(0.9))
    assert "it writes into its batches" in said or "written into after" in said
    assert_same(steps, walk(case, Greedy(0.9), problem()))


def test_batches_that_are_written_into_by_their_source_are_not_drawn_ahead():
    case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["SGD"])

    def one_buffer():
        batches = [(x[:3], y[:3], index[:3]) for x, y, index in case.specimen.train_batches]
        buffer = [x.clone() for x in batches[0]]
        while True:
            for batch in batches:
                for mine, its in zip(buffer, batch, strict=True):
                    mine.copy_(its)
                yield tuple(buffer)

    settings = {"evaluate": Online(), "n_outer_steps": 9}
    with pytest.warns(UserWarning, match="written into after they were handed out"):
        steps = walk(case, Greedy(0.9), recorded(case.specimen.problem(train_batches=one_buffer())), **settings)
    assert_same(steps, walk(case, Greedy(0.9), case.specimen.problem(train_batches=one_buffer()), **settings))


def test_long_horizons_are_not_recorded():
    case = Case(classification(), UPDATE_RULES["SGD"])
    with pytest.warns(UserWarning, match="a horizon of 101 steps is longer than the 100"):
        walk(case, Greedy(0.9), recorded(case.specimen.problem()), horizon=101, n_outer_steps=1)


def test_only_the_main_thread_records():
    case = Case(classification(), UPDATE_RULES["SGD"])
    with ThreadPoolExecutor(1) as pool:
        steps, said = pool.submit(given_up, case.specimen.problem, case, Greedy(0.9)).result()
    assert "only the main thread" in said
    assert_same(steps, walk(case, Greedy(0.9)))
    assert Tape.n_recorded == 0


@pytest.mark.parametrize("rule", [Adam(lr=0.1), SGD(lr=0.1, momentum=0.9)], ids=str)
def test_weights_keep_their_dtype(rule):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, x):
            return self.scale * self.linear(x)

    parts = classification()
    inputs = [tuple(x.float() if x.is_floating_point() else x for x in batch) for batch in parts.train_batches]

    def loss(model, alpha, batch):
        return F.cross_entropy(model(batch[0]), batch[1]) + alpha["penalty"] * model.scale**2

    def problem():
        torch.manual_seed(0)
        return BilevelProblem(model=Scaled(), train_loss=loss, val_loss=loss, train_batches=inputs, val_batches=inputs)

    alpha = {"penalty": Hyperparameter(torch.tensor(0.1))}
    settings = {"update_rule": rule, "estimator": Reverse(), "horizon": 4, "n_outer_steps": 6}
    steps, plain = (list(descend(its, alpha, **settings)) for its in (recorded(problem()), problem()))
    assert_same(steps, plain, rtol=1e-4)
    assert {x.dtype for x in steps[-1].best.state.tensors} == {torch.float32}
    assert Tape.n_replayed > 0


def test_a_second_descent_replays_what_the_first_has_recorded():
    case = Case(classification(), UPDATE_RULES["momentum"])
    problem, estimator = recorded(case.specimen.problem()), Greedy(0.9)
    walk(case, estimator, problem)
    n_recorded = Tape.n_recorded
    assert_same(walk(case, estimator, problem), walk(case, estimator))
    assert Tape.n_recorded == n_recorded


def test_a_problem_with_recordings_can_be_pickled():
    recorder = cuda_recorder(torch.device("cuda"))
    assert pickle.loads(pickle.dumps(recorder)).n_recordings == 0


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
    recorder = Recorder(Tape, CPU)

    def function(arguments):
        state = recorder.capture()
        total = parts.module(arguments[0]).sum().detach()
        with recorder.restored(state):
            return Result((total - parts.module(arguments[0]).sum().detach(),), Cost(), None)

    inputs, family = [parts.train_batches[0][0]], recorder.family(Settings(None, None, None, {}, None))
    with pytest.warns(UserWarning, match="made again from the same"):
        assert float(recorder.call(family, function, inputs).tensors[0]) == 0
    assert family.given_up


def test_what_fails_when_it_is_recorded_is_an_error():
    class Refusing(Tape):
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
    assert Tape.n_recorded == MAX_RECORDINGS


def test_without_a_gpu_nothing_is_recorded():
    assert classification().problem(cuda_graphs=True, device="cpu").recorder is None
