"""Refinements that are killed and retried, and what they are to be equal to in the end.

The problem has all that a process can lose: an order of batches, dropout, momentum, a tensor and a number to refine.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import optuna_greedyhg as ghg
from optuna_greedyhg.trials import checkpoints, records

ESTIMATORS = {"greedy": ghg.Greedy(), "spectral": ghg.Greedy(propagator=ghg.Spectral(rank=2))}
STUDY = "retried"
Process = multiprocessing.process.BaseProcess
N_OUTER_STEPS = 8


class Killed(BaseException):
    """In place of SIGKILL where a process is to live: nobody but the test catches it."""


def make_problem() -> ghg.BilevelProblem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator)
    y = x @ torch.tensor([1.0, -1.0, 0.5])
    train = TensorDataset(x[:20], y[:20] + torch.randn(20, generator=generator), torch.arange(20))
    torch.manual_seed(0)
    return ghg.BilevelProblem(
        model=nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1)),
        train_loss=train_loss,
        val_loss=val_loss,
        train_batches=DataLoader(train, batch_size=6, shuffle=True),
        val_batches=(x[20:30], y[20:30]),
        test_batches=(x[30:], y[30:]),
    )


def train_loss(model: Any, alpha: Any, batch: Any) -> torch.Tensor:
    x, y, index = batch
    return (torch.sigmoid(alpha["logits"][index]) * (model(x)[:, 0] - y).square()).mean()


def val_loss(model: Any, alpha: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return (model(x)[:, 0] - y).square().mean()


def refine(trial: optuna.trial.BaseTrial, **settings: Any) -> float:
    alpha = ghg.Alpha(trial)
    alpha.suggest_float("lr", 1e-3, 0.3, log=True)
    alpha.tensor("logits", torch.zeros(20))
    settings = {"n_outer_steps": N_OUTER_STEPS, "evaluate_every": 4, "horizon": 3} | settings
    return ghg.refine(trial, make_problem(), alpha, update_rule=ghg.SGD(lr="lr", momentum=0.9), **settings)


def kill_after(outer_step: int, kill: Callable[[], object]) -> Callable[[Trial, ghg.OuterStep], None]:
    """A callback."""

    def callback(trial: Trial, step: ghg.OuterStep) -> None:
        if step.index == outer_step:
            kill()

    return callback


def raise_killed() -> None:
    raise Killed


def kill_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def open_storage(place: Path | str, **options: Any) -> RDBStorage:
    """A database with heartbeats: in a file, or wherever a URL says."""
    options = {
        "heartbeat_interval": 1,
        "grace_period": 2,
        "heartbeat_stale_trial_callback": RetryHeartbeatStaleTrialCallback(),
    } | options
    if isinstance(place, str):
        return RDBStorage(place, **options)
    storage = RDBStorage(f"sqlite:///{place}", engine_kwargs={"creator": partial(connect, place)}, **options)
    # Optuna reads a trial's state before it changes it, and sqlite does not lock what is read.
    sqlalchemy.event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


@contextmanager
def opened(place: Path | str, **options: Any) -> Iterator[RDBStorage]:
    """The same, and closed again."""
    storage = open_storage(place, **options)
    try:
        yield storage
    finally:
        storage.engine.dispose()


def connect(path: Path) -> sqlite3.Connection:
    # On a busy machine others take longer than the usual five seconds, and so does the disk, which has to be waited for
    # where the machine may lose its power, and not where a process dies.
    connection = sqlite3.connect(path, timeout=60, check_same_thread=False)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def study_on(storage: Any, seed: int = 0) -> optuna.Study:
    """The study that all processes share."""
    return optuna.create_study(
        study_name=STUDY,
        storage=storage,
        sampler=ghg.GreedyHGSampler(RandomSampler(seed=seed)),
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
    )


def in_a_process(target: Callable[..., None], *arguments: Any) -> Process:
    """Starts one, in some hundredths of a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trials.warm"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def die(path: Path, folder: Path, outer_step: int, settings: dict[str, Any]) -> None:
    """A process that is killed in the middle of its first trial."""
    torch.set_num_threads(1)
    store, callbacks = FileSystemArtifactStore(folder), [kill_after(outer_step, kill_process)]
    study = study_on(open_storage(path))
    study.optimize(lambda trial: refine(trial, artifact_store=store, callbacks=callbacks, **settings), n_trials=1)


def find_dead_and_go_on(path: Path, folder: Path, settings: dict[str, Any]) -> None:
    """A process that works until a trial is complete, and refines none of its own.

    Where another took the waiting trial in the meantime, Optuna begins a new one, which is pruned at once.
    """
    torch.set_num_threads(1)
    store, study = FileSystemArtifactStore(folder), study_on(open_storage(path))

    def objective(trial: Trial) -> float:
        if RetryHeartbeatStaleTrialCallback.retried_trial_number(study.trials[trial.number]) is None:
            raise optuna.TrialPruned
        return refine(trial, artifact_store=store, **settings)

    while not study.get_trials(states=[TrialState.COMPLETE]):
        optuna.storages.fail_stale_trials(study)
        time.sleep(0.2)
        if study.get_trials(states=[TrialState.WAITING]):
            study.optimize(objective, n_trials=1)


def requeue(study: optuna.Study, **options: Any) -> None:
    """What a worker does with a trial that has no heartbeat any more, without waiting for that."""
    dead = study.trials[-1]
    assert study._storage.set_trial_state_values(dead._trial_id, TrialState.FAIL)
    RetryHeartbeatStaleTrialCallback(**options)(study, study.trials[-1])


def undisturbed(
    seed: float, store: Any = None, objective: Callable[..., float] = refine, **settings: Any
) -> FrozenTrial:
    study = study_on(None)
    study.enqueue_trial({}, user_attrs={"seed_lr": seed})
    study.optimize(lambda trial: objective(trial, artifact_store=store, **settings), n_trials=1)
    (trial,) = study.trials
    assert trial.user_attrs["seed_lr"] == seed
    return trial


def assert_same(trial: FrozenTrial, other: FrozenTrial, store: Any = None) -> None:
    """To the last bit, in all but in time, and in what has to be different."""
    different = {"cost_seconds", "tensors_artifact", "resumed_from"}
    assert (trial.state, trial.value, trial.params) == (other.state, other.value, other.params)
    assert trial.intermediate_values == other.intermediate_values
    kept, expected = ({k: v for k, v in t.user_attrs.items() if k not in different} for t in (trial, other))
    assert kept == expected
    assert records.read_trajectory(trial) == records.read_trajectory(other)
    if store is not None:
        readers = [ghg.refined_params] + ([ghg.refined_weights] if trial.user_attrs["protocol"][0] == "O" else [])
        for read in readers:
            torch.testing.assert_close(read(trial, store), read(other, store), rtol=0.0, atol=0.0)


def left(folder: Path) -> list[str]:
    """The checkpoints in an artifact store."""
    return [path.name for path in folder.iterdir() if path.name.startswith(checkpoints.PREFIX)]
