"""Trials that are lost when a worker is killed between two steps of Optuna's own, and how they come back.

Heartbeats tell of a worker that dies in its objective, and not of one that dies

- when it has taken a trial, and not recorded its first heartbeat: a trial without any is never taken for dead;
- when it has ended a dead worker's trial as failed, and not queued the retry.

Either takes milliseconds. But in a fleet that is preempted all the time, some trials end so.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from optuna_greedyhg.trials.checkpoints import heartbeat_interval, is_unfinished, remove_checkpoints
from optuna_greedyhg.trials.records import ArtifactStore

_GIVEN_A_HEARTBEAT = "greedyhg:given_a_heartbeat"
_PATIENCE = timedelta(seconds=10)  # with workers on a busy machine, whose heartbeats are closer than their delays


def requeue_lost_trials(study: Study, artifact_store: ArtifactStore | None = None) -> None:
    """Brings back the trials of a study that Optuna has lost.

    A trial that has run for two heartbeat intervals, and ten seconds, is given one heartbeat, once: if its worker is
    dead, it is the last one, and the trial is soon retried as any other. A trial that has failed so long ago, was not
    queued again, and has left a checkpoint, goes to the storage's ``heartbeat_stale_trial_callback``, which may still
    decline. Others that fail are left alone: they have ended by an error.

    To be called now and then, in one process at a time: where workers are started, for example.

    Args:
        study: The study.
        artifact_store: Where checkpoints are. Those of trials that it declines to retry, having been retried often
            enough, are then removed.

    Raises:
        ValueError: If the study's storage has no heartbeats.
    """
    storage: Any = study._storage  # Optuna has no public name for it, nor for the class of those with heartbeats
    interval = heartbeat_interval(storage)
    if interval is None:
        raise ValueError(
            f"Without heartbeats nobody knows which trials of {study.study_name!r} are lost; make its storage with "
            "RDBStorage(url, heartbeat_interval=60, heartbeat_stale_trial_callback=...)."
        )
    # Those since then may be in the middle of it.
    settled = datetime.now() - max(timedelta(seconds=2 * interval), _PATIENCE)
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        if _is_before(trial.datetime_start, settled):
            _give_a_heartbeat(storage, trial)

    retry = storage.get_heartbeat_stale_trial_callback()
    for trial in _failed_on_the_way(study, settled):
        if retry is not None:
            retry(study, copy.deepcopy(trial))
    if artifact_store is not None:
        for trial in _failed_on_the_way(study, settled):
            remove_checkpoints(trial, artifact_store)


def _failed_on_the_way(study: Study, before: datetime) -> list[FrozenTrial]:
    """The trials that have failed before a time, left a checkpoint, and were not queued again."""
    trials = study.get_trials(deepcopy=False)
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    failed = [trial for trial in trials if trial.state == TrialState.FAIL and is_unfinished(trial)]
    return [t for t in failed if t.number not in retried and _is_before(t.datetime_complete, before)]


def _give_a_heartbeat(storage: Any, trial: FrozenTrial) -> None:
    if trial.system_attrs.get(_GIVEN_A_HEARTBEAT) != trial.number:  # a retry has the attributes of the trial before
        storage.record_heartbeat(trial._trial_id)
        with suppress(UpdateFinishedTrialError):
            storage.set_trial_system_attr(trial._trial_id, _GIVEN_A_HEARTBEAT, trial.number)


def _is_before(time: datetime | None, other: datetime) -> bool:
    return time is not None and time < other
