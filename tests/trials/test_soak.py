"""A fleet whose workers are killed all the time, at any moment: in the end nothing is lost, and nothing is different.

``make soak`` kills fifty on each storage; otherwise a few are killed on one.
"""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import FrozenTrial, TrialState

import optuna_greedyhg as ghg
from optuna_greedyhg.trials.checkpoints import is_unfinished
from tests import postgres
from tests.trials import retries

N_KILLS = int(os.environ.get("GREEDYHG_SOAK_KILLS", "8"))
N_WORKERS = 3
SEEDS = (0.003, 0.01, 0.03, 0.1)
SECONDS_OF_AN_OUTER_STEP = 0.1
SECONDS_BETWEEN_KILLS = 0.2, 1.0
SECONDS_TO_SETTLE = 120
PART_THAT_IS_KILLED_AT_ONCE = 0.2

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # of heartbeats


def work(place: Path | str, folder: Path) -> None:
    """What a worker does until it is killed; when all are told to end, only what has been begun."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    store, study = FileSystemArtifactStore(folder), retries.study_on(retries.open_storage(place))

    def objective(trial: optuna.Trial) -> float:
        if "seed_lr" not in trial.user_attrs:
            trial.set_user_attr("seed_lr", SEEDS[trial.number % len(SEEDS)])
        return retries.refine(trial, artifact_store=store, checkpoint_every=1, callbacks=[slowly])

    def slowly(trial: optuna.Trial, step: ghg.OuterStep) -> None:
        at_work(folder, os.getpid()).touch()
        time.sleep(SECONDS_OF_AN_OUTER_STEP)

    while True:
        if told_to_end(folder).exists():
            optuna.storages.fail_stale_trials(study)
            states = Counter(trial.state for trial in study.get_trials(deepcopy=False))
            if not states[TrialState.RUNNING] + states[TrialState.WAITING]:
                return
            if not states[TrialState.WAITING]:
                time.sleep(0.2)
                continue
        study.optimize(objective, n_trials=1)


def told_to_end(folder: Path) -> Path:
    return folder / "end"  # a lock between processes would be held for ever by one that is killed


def at_work(folder: Path, pid: int | None) -> Path:
    """Is there when a process has made an outer step."""
    return folder / f"at work {pid}"


def start(place: Path | str, folder: Path) -> retries.Process:
    return retries.in_a_process(work, place, folder)


def kill_some(study: optuna.Study, place: Path | str, folder: Path) -> list[retries.Process]:
    """A fleet in which any is killed at any moment, and replaced; returns those that live."""
    chance = random.Random(0)
    workers = [start(place, folder) for _ in range(N_WORKERS)]
    while len(study.trials) < N_WORKERS:
        time.sleep(0.1)
    killed = 0
    while killed < N_KILLS:
        time.sleep(chance.uniform(*SECONDS_BETWEEN_KILLS))
        # On a busy machine none would live to see its first outer step, if any could be killed at any time.
        anyone = chance.random() < PART_THAT_IS_KILLED_AT_ONCE
        while not (candidates := [k for k in range(N_WORKERS) if anyone or has_worked(workers[k], folder)]):
            time.sleep(0.05)
        victim = chance.choice(candidates)
        workers[victim].kill()
        workers[victim].join()
        killed += workers[victim].exitcode == -signal.SIGKILL
        workers[victim] = start(place, folder)
    return workers


def has_worked(worker: retries.Process, folder: Path) -> bool:
    return at_work(folder, worker.pid).exists() or not worker.is_alive()


def settle(study: optuna.Study, workers: list[retries.Process], place: Path | str, folder: Path) -> None:
    """Until all that was begun has come to an end."""
    told_to_end(folder).touch()
    deadline = time.monotonic() + SECONDS_TO_SETTLE
    while any(worker.is_alive() for worker in workers) or not is_settled(study):
        assert time.monotonic() < deadline, Counter(trial.state for trial in study.trials)
        if not any(worker.is_alive() for worker in workers):
            workers = [start(place, folder)]
        ghg.requeue_lost_trials(study)
        time.sleep(0.5)


def is_settled(study: optuna.Study) -> bool:
    trials = study.trials
    retried = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    lost = [t for t in trials if t.state == TrialState.FAIL and is_unfinished(t) and t.number not in retried]
    return not lost and {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}


def lineages(trials: list[FrozenTrial]) -> list[list[FrozenTrial]]:
    """Each trial with its retries, in their order."""
    found: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        found.setdefault(trial.system_attrs.get("failed_trial", trial.number), []).append(trial)
    return list(found.values())


@pytest.mark.parametrize("storage", ["sqlite", "postgresql"][: 1 if N_KILLS < 50 else 2])
def test_kills_at_random(
    storage: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    place: Path | str = tmp_path / "study.db"
    if storage == "postgresql":
        server: postgres.Server = request.getfixturevalue("postgres_server")
        place = server.create_database("soak")
    folder = tmp_path / "artifacts"
    folder.mkdir()
    begin = time.monotonic()
    with retries.opened(place) as shared:
        study = retries.study_on(shared)
        settle(study, kill_some(study, place, folder), place, folder)
        trials = study.trials
    seconds = time.monotonic() - begin

    expected = {seed: retries.undisturbed(seed) for seed in SEEDS}
    retried = 0
    for lineage in lineages(trials):
        *killed, last = lineage
        assert {trial.state for trial in killed} <= {TrialState.FAIL}
        if last.state == TrialState.FAIL:
            assert not any(is_unfinished(trial) for trial in lineage)  # was killed before anything was begun
            continue
        retries.assert_same(last, expected[last.user_attrs["seed_lr"]])
        retried += len(killed)
    # Those that were killed before they had begun have the attribute of the trial before them.
    resumed = [t.user_attrs.get("resumed_from") for t in trials if t.intermediate_values]
    resumed = [outer_step for outer_step in resumed if outer_step is not None]
    assert retries.left(folder) == []
    assert len(resumed) > N_KILLS / 10
    complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
    outer_steps = ", ".join(f"{outer_step} ({n})" for outer_step, n in sorted(Counter(resumed).items()))
    with capsys.disabled():
        request.config.get_terminal_writer().line(
            f"\n{storage}: {N_KILLS} kills in {seconds:.0f} s; {complete} trials complete, {retried} others retried; "
            f"resumed from outer step: {outer_steps}"
        )
