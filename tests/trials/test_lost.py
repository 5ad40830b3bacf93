"""Trials that Optuna loses when a worker dies between two of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

import optuna_greedyhg as ghg
from optuna_greedyhg.trials import lost
from tests.trials import retries

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),  # of heartbeats
    pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with:UserWarning"),
]


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[RDBStorage]:
    with retries.opened(tmp_path / "study.db", heartbeat_interval=60, grace_period=120) as storage:
        yield storage


@pytest.fixture
def heartbeats(storage: RDBStorage, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The trials that were given one, by their numbers."""
    given: list[int] = []
    monkeypatch.setattr(storage, "record_heartbeat", lambda trial_id: given.append(trial_id - 1))
    return given


def pass_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=seconds)

    monkeypatch.setattr(lost, "datetime", Later)


def dead(study: optuna.Study, folder: Path) -> None:
    """One that was killed in the middle of its refinement, and has been found out."""
    with pytest.raises(retries.Killed):
        study.optimize(
            lambda trial: retries.refine(
                trial,
                artifact_store=FileSystemArtifactStore(folder),
                callbacks=[retries.kill_after(5, retries.raise_killed)],
            ),
            n_trials=1,
        )
    study._storage.set_trial_state_values(study.trials[-1]._trial_id, TrialState.FAIL)


def test_one_without_a_heartbeat_is_given_one_once(
    storage: RDBStorage, heartbeats: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = retries.study_on(storage)
    study.tell(study.ask(), 1.0)
    running = study.ask()
    study.enqueue_trial({})
    ghg.requeue_lost_trials(study)
    pass_time(monkeypatch, 119)
    ghg.requeue_lost_trials(study)
    assert heartbeats == []  # its worker may be about to give one itself
    pass_time(monkeypatch, 121)
    ghg.requeue_lost_trials(study)
    ghg.requeue_lost_trials(study)
    assert heartbeats == [1]

    storage.set_trial_state_values(running._trial_id, TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback()(study, study.trials[1])
    study.ask()  # which was enqueued
    study.ask()  # which is the retry
    ghg.requeue_lost_trials(study)
    assert heartbeats == [1, 2, 3]
    assert [trial.state for trial in study.trials[2:]] == [TrialState.RUNNING] * 2


def test_it_is_then_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with retries.opened(tmp_path / "study.db", heartbeat_interval=1, grace_period=1) as storage:
        study = retries.study_on(storage)
        study.ask()
        pass_time(monkeypatch, 10)
        ghg.requeue_lost_trials(study)
        with storage.engine.begin() as connection:  # in place of waiting
            connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
        optuna.storages.fail_stale_trials(study)
        assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_one_that_is_ended_in_between_stays_so(storage: RDBStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    study = retries.study_on(storage)
    trial = study.ask()
    pass_time(monkeypatch, 121)
    monkeypatch.setattr(storage, "record_heartbeat", lambda _: study.tell(trial, 1.0))
    ghg.requeue_lost_trials(study)
    assert study.trials[0].state == TrialState.COMPLETE


def test_one_that_has_failed_and_left_a_checkpoint_is_retried_once(
    storage: RDBStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = retries.study_on(storage)
    dead(study, tmp_path)
    pass_time(monkeypatch, 119)
    ghg.requeue_lost_trials(study)
    assert len(study.trials) == 1  # another worker may be about to retry it
    pass_time(monkeypatch, 121)
    ghg.requeue_lost_trials(study)
    ghg.requeue_lost_trials(study)
    (_, waiting) = study.trials
    assert waiting.state == TrialState.WAITING
    study.optimize(lambda trial: retries.refine(trial, artifact_store=FileSystemArtifactStore(tmp_path)), n_trials=1)
    retries.assert_same(study.trials[1], retries.undisturbed(waiting.user_attrs["seed_lr"]))
    assert study.trials[1].user_attrs["resumed_from"] == 4
    ghg.requeue_lost_trials(study)
    assert len(study.trials) == 2


def test_one_that_was_queued_for_a_trial_that_had_all_but_ended_is_retried(
    storage: RDBStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one is killed between its end and Optuna's note of it, and the other before it has begun."""
    study, store = retries.study_on(storage), FileSystemArtifactStore(tmp_path)

    def dies_at_its_end(trial: optuna.Trial) -> float:
        retries.refine(trial, artifact_store=store)
        raise retries.Killed

    for objective in (dies_at_its_end, lambda _: retries.raise_killed()):
        with pytest.raises(retries.Killed):
            study.optimize(objective, n_trials=1)
        if study.trials[-1].number == 0:
            retries.requeue(study)
    storage.set_trial_state_values(study.trials[1]._trial_id, TrialState.FAIL)
    pass_time(monkeypatch, 121)
    ghg.requeue_lost_trials(study)
    study.optimize(lambda trial: retries.refine(trial, artifact_store=store), n_trials=1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
    retries.assert_same(study.trials[2], retries.undisturbed(study.trials[0].user_attrs["seed_lr"]))
    ghg.requeue_lost_trials(study)
    assert len(study.trials) == 3


def test_one_that_has_failed_by_an_error_is_not(
    storage: RDBStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = retries.study_on(storage)

    def broken() -> None:
        raise RuntimeError

    def objective(trial: optuna.Trial) -> float:
        store, callbacks = FileSystemArtifactStore(tmp_path), [retries.kill_after(5, broken)]
        return retries.refine(trial, artifact_store=store, callbacks=callbacks)

    study.optimize(objective, n_trials=1, catch=(RuntimeError,))
    study.tell(study.ask(), state=TrialState.FAIL)
    pass_time(monkeypatch, 121)
    ghg.requeue_lost_trials(study)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2


@pytest.mark.parametrize("max_retry", [None, 0])
def test_the_storage_may_decline(max_retry: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    retry = None if max_retry is None else RetryHeartbeatStaleTrialCallback(max_retry=max_retry)
    with retries.opened(tmp_path / "study.db", heartbeat_stale_trial_callback=retry) as storage:
        study = retries.study_on(storage)
        dead(study, tmp_path)
        pass_time(monkeypatch, 121)
        ghg.requeue_lost_trials(study)
        assert len(study.trials) == 1
        assert len(retries.left(tmp_path)) == 1
        for _ in range(2):  # the second time there is nothing any more
            ghg.requeue_lost_trials(study, FileSystemArtifactStore(tmp_path))
            assert retries.left(tmp_path) == []


def test_what_will_be_retried_or_may_be_keeps_its_checkpoint(
    storage: RDBStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, store = retries.study_on(storage), FileSystemArtifactStore(tmp_path)
    dead(study, tmp_path)
    for seconds, n_trials in ((119, 1), (121, 2)):
        pass_time(monkeypatch, seconds)
        ghg.requeue_lost_trials(study, store)
        assert (len(study.trials), len(retries.left(tmp_path))) == (n_trials, 1)
    study.optimize(lambda trial: retries.refine(trial, artifact_store=store), n_trials=1)
    assert study.trials[1].user_attrs["resumed_from"] == 4


def test_without_heartbeats_nobody_knows() -> None:
    with pytest.raises(ValueError, match="Without heartbeats nobody knows which trials of 'retried' are lost"):
        ghg.requeue_lost_trials(retries.study_on(None))
