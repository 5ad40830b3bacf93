"""Storages that are away for a while, in the middle of a refinement."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import fakeredis
import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DataError, InterfaceError, OperationalError

import optuna_greedyhg as ghg
from optuna_greedyhg.trials import outages, records
from optuna_greedyhg.trials.outages import outlast
from tests import postgres
from tests.trials import problems
from tests.trials.storages import database, free_port, redis_journal, serve

IMPROVEMENTS = "greedyhg:improvements"  # which say when they were made


def of_a_database(cause: type[OperationalError | InterfaceError | DataError]) -> StorageInternalError:
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = cause("UPDATE trials", {}, Exception("server closed the connection unexpectedly"))
    return error


class Clock:
    """A second hand that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(outages, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(
    "error",
    [of_a_database(OperationalError), of_a_database(InterfaceError), ConnectionResetError(), TimeoutError()],
    ids=lambda error: repr(error.__cause__ or error)[:20],
)
def test_an_outage_of_five_seconds_is_waited_for(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def call(a: int, *, b: int) -> int:
        if clock.now < 1005.0:
            raise error
        return a + b

    assert outlast(call, 1, b=2) == 3
    assert 1005.0 <= clock.now < 1010.0


def test_an_outage_of_more_than_a_minute_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, error, n_calls = Clock(monkeypatch), ConnectionError("gone for good"), 0

    def call() -> None:
        nonlocal n_calls
        n_calls += 1
        raise error

    with pytest.raises(ConnectionError) as raised:
        outlast(call)
    assert raised.value is error
    assert clock.now == 1060.0
    assert 10 < n_calls < 30


@pytest.mark.parametrize(
    "error",
    [
        of_a_database(DataError),
        StorageInternalError("no cause"),
        UpdateFinishedTrialError("finished"),
        KeyError("no such trial"),
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_what_is_no_outage_is_raised_at_once(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def call() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        outlast(call)
    assert raised.value is error
    assert clock.now == 1000.0


def study(storage: BaseStorage) -> optuna.Study:
    return optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0), storage=storage)


@pytest.fixture(scope="module")
def undisturbed() -> FrozenTrial:
    made = study(InMemoryStorage())
    made.optimize(problems.refine, n_trials=1)
    return made.trials[0]


def assert_alike(trial: FrozenTrial, other: FrozenTrial) -> None:
    assert (trial.state, trial.values, trial.params) == (other.state, other.values, other.params)
    assert trial.intermediate_values == other.intermediate_values
    assert trial.user_attrs | {"cost_seconds": 0} == other.user_attrs | {"cost_seconds": 0}
    improvements, others = (
        [row | {"seconds": 0} for row in records.read_improvements(found)] for found in (trial, other)
    )
    assert improvements == others != []
    assert trial.system_attrs | {IMPROVEMENTS: []} == other.system_attrs | {IMPROVEMENTS: []}


def failing(method: Callable[..., Any], *, done: bool = False) -> tuple[Callable[..., Any], Iterator[int]]:
    """The method, which raises an error three times at first, whether it has done its work or not; and those left."""
    failures = iter(range(3))

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        if next(failures, None) is None:
            return method(*args, **kwargs)
        if done:
            method(*args, **kwargs)
        raise of_a_database(OperationalError)

    return unreachable, failures


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done, and the answer lost"])
@pytest.mark.parametrize(
    "method",
    [
        "set_trial_intermediate_value",
        "get_all_trials",
        "set_trial_param",
        "set_trial_user_attr",
        "set_trial_system_attr",
    ],
)
def test_whatever_the_storage_is_asked_when_it_goes_away_the_trial_is_whole(
    method: str, done: bool, undisturbed: FrozenTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "_FIRST_PAUSE", 0.0)
    storage = InMemoryStorage()
    unreachable, failures = failing(getattr(storage, method), done=done)

    def cut(trial: Any, step: ghg.OuterStep) -> None:
        if step.index == 1:
            monkeypatch.setattr(storage, method, unreachable)

    made = study(storage)
    made.optimize(lambda trial: problems.refine(trial, callbacks=[cut]), n_trials=1)
    assert next(failures, None) is None
    assert_alike(made.trials[0], undisturbed)


@pytest.mark.parametrize("method", ["set_trial_user_attr", "set_trial_system_attr"])
def test_a_storage_that_goes_away_while_seeds_are_drawn(
    method: str, undisturbed: FrozenTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "_FIRST_PAUSE", 0.0)
    storage = InMemoryStorage()
    unreachable, failures = failing(getattr(storage, method))

    made = study(storage)
    monkeypatch.setattr(storage, method, unreachable)
    made.optimize(problems.refine, n_trials=1)
    assert next(failures, None) is None
    assert_alike(made.trials[0], undisturbed)


def test_a_policy_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "_FIRST_PAUSE", 0.0)
    storage, errors = InMemoryStorage(), iter([of_a_database(OperationalError)] * 3)

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        if (error := next(errors, None)) is not None:
            raise error
        return InMemoryStorage.get_all_trials(storage, *args, **kwargs)

    def objective(trial: optuna.Trial) -> float:
        alpha = problems.declare(trial)
        monkeypatch.setattr(storage, "get_all_trials", unreachable)
        return problems.refine(trial, alpha, policy=ghg.Budget(total_cost=10**9))

    made = study(storage)
    made.optimize(objective, n_trials=1)
    assert next(errors, None) is None
    assert made.trials[0].state == TrialState.COMPLETE


def test_tensors_reach_a_store_that_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "_FIRST_PAUSE", 0.0)
    errors = iter([ConnectionResetError()] * 3)

    class Away(FileSystemArtifactStore):
        def write(self, artifact_id: str, content_body: BinaryIO) -> None:
            if (error := next(errors, None)) is not None:
                raise error
            super().write(artifact_id, content_body)

    store, made = Away(tmp_path), study(InMemoryStorage())
    made.optimize(lambda trial: problems.refine(trial, artifact_store=store), n_trials=1)
    assert next(errors, None) is None
    assert ghg.refined_params(made.best_trial, store).keys() == {"lr", "c"}


def test_a_storage_that_stays_away_ends_the_trial_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, storage, accept = Clock(monkeypatch), InMemoryStorage(), InMemoryStorage.set_trial_user_attr

    def unreachable(trial_id: int, key: str, value: Any) -> None:
        if key.startswith("val_"):
            raise of_a_database(OperationalError)
        accept(storage, trial_id, key, value)

    monkeypatch.setattr(storage, "set_trial_user_attr", unreachable)
    made = study(storage)
    made.optimize(problems.refine, n_trials=1, catch=(StorageInternalError,))
    (trial,) = made.trials
    assert clock.now == 1060.0
    assert trial.state == TrialState.FAIL
    assert trial.params["lr"] == trial.user_attrs["refined_lr"]  # what could be written is there


Cut = Callable[[], None]


@contextmanager
def restarting_postgresql(request: pytest.FixtureRequest) -> Iterator[tuple[BaseStorage, Cut, Cut]]:
    server: postgres.Server = request.getfixturevalue("postgres_server")
    with database(server.create_database(str(uuid.uuid4()))) as storage:
        yield storage, server.stop, server.start


@contextmanager
def restarting_proxy(request: pytest.FixtureRequest) -> Iterator[tuple[BaseStorage, Cut, Cut]]:
    behind, port = InMemoryStorage(), free_port()
    servers = [serve(behind, port)]

    def stop() -> None:
        servers.pop().stop(grace=None).wait()

    client = GrpcStorageProxy(host="localhost", port=port)
    client.wait_server_ready(timeout=10)
    try:
        yield client, stop, lambda: servers.append(serve(behind, port))
    finally:
        client.close()
        stop()


@contextmanager
def unplugged_redis(request: pytest.FixtureRequest) -> Iterator[tuple[BaseStorage, Cut, Cut]]:
    server = fakeredis.FakeServer()
    yield (
        redis_journal(server),
        lambda: setattr(server, "connected", False),
        lambda: setattr(server, "connected", True),
    )


@pytest.mark.filterwarnings(f"ignore::{ExperimentalWarning.__module__}.ExperimentalWarning")  # Redis
@pytest.mark.parametrize("opened", [restarting_postgresql, restarting_proxy, unplugged_redis])
def test_a_server_that_restarts_costs_its_absence_and_nothing_else(
    opened: Any, undisturbed: FrozenTrial, request: pytest.FixtureRequest
) -> None:
    with opened(request) as (storage, cut, restore):
        timer = threading.Timer(0.5, restore)

        def outage(trial: Any, step: ghg.OuterStep) -> None:
            if step.index == 1:
                cut()
                timer.start()

        made = study(storage)
        try:
            made.optimize(lambda trial: problems.refine(trial, callbacks=[outage]), n_trials=1)
        finally:
            timer.join()
        made.optimize(problems.refine, n_trials=1)
        trials = made.trials
    assert_alike(trials[0], undisturbed)
    assert trials[1].state == TrialState.COMPLETE
