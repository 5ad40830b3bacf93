"""A refinement that is killed, at any moment, goes on elsewhere, and ends as if nothing had happened."""

from __future__ import annotations

import functools
import hashlib
import io
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

import optuna_greedyhg as ghg
import optuna_greedyhg.trials.refine as refine_module
from optuna_greedyhg.trials import checkpoints, signatures
from tests.trials import problems, retries
from tests.trials.retries import (
    Killed,
    assert_same,
    in_a_process,
    kill_after,
    left,
    raise_killed,
    requeue,
    study_on,
    undisturbed,
)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # of heartbeats

ATTRIBUTE = "greedyhg:checkpoint"
EVERY_STEP = {"checkpoint_every": 1}


@pytest.fixture
def store(tmp_path: Path) -> FileSystemArtifactStore:
    (tmp_path / "artifacts").mkdir()
    return FileSystemArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def folder(store: FileSystemArtifactStore, tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    optuna.logging.enable_propagation()
    yield caplog
    optuna.logging.disable_propagation()


def run(
    study: optuna.Study, store: Any, *callbacks: Any, objective: Any = retries.refine, **settings: Any
) -> FrozenTrial:
    study.optimize(
        lambda trial: objective(trial, artifact_store=store, callbacks=callbacks, **EVERY_STEP | settings), n_trials=1
    )
    return study.trials[-1]


def killed_after(outer_step: int, store: Any, storage: Any = None, **settings: Any) -> optuna.Study:
    """A study whose trial was killed, and queued again."""
    study = study_on(storage)
    with pytest.raises(Killed):
        run(study, store, kill_after(outer_step, raise_killed), **settings)
    requeue(study)
    return study


class TestProcesses:
    """Killed by SIGKILL, and resumed by others from what is in the database and in the folder."""

    @pytest.mark.parametrize("estimator", retries.ESTIMATORS)
    @pytest.mark.parametrize("evaluate", ["retrain", "online"])
    def test_another_goes_on_to_the_same_bits(
        self, evaluate: str, estimator: str, store: FileSystemArtifactStore, folder: Path, tmp_path: Path
    ) -> None:
        path, settings = (
            tmp_path / "study.db",
            {"evaluate": evaluate, "estimator": retries.ESTIMATORS[estimator]},
        )
        outer_step = random.Random(f"{evaluate} {estimator}").randrange(1, retries.N_OUTER_STEPS)
        process = in_a_process(retries.die, path, folder, outer_step, settings | {"checkpoint_every": 2})
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with retries.opened(path) as storage:
            study = study_on(storage)
            assert study.trials[0].state == TrialState.RUNNING
            assert len(left(folder)) == 1
            requeue(study)
            trial = run(study, store, **settings)
        assert trial.user_attrs["resumed_from"] == (outer_step - 1) // 2 * 2
        assert_same(trial, undisturbed(trial.user_attrs["seed_lr"], store, **settings), store)
        assert left(folder) == []

    def test_others_find_out_by_themselves(self, store: FileSystemArtifactStore, folder: Path, tmp_path: Path) -> None:
        path = tmp_path / "study.db"
        dead = in_a_process(retries.die, path, folder, 6, {})
        dead.join()
        others = [in_a_process(retries.find_dead_and_go_on, path, folder, {}) for _ in range(2)]
        for other in others:
            other.join()
        # On a busy machine the retry may be taken for dead as well, and be retried in its turn.
        with retries.opened(path) as storage:
            *earlier, trial = study_on(storage).get_trials(states=[s for s in TrialState if s != TrialState.PRUNED])
        assert {killed.state for killed in earlier} == {TrialState.FAIL}
        assert trial.user_attrs["resumed_from"] == 4
        assert_same(trial, undisturbed(trial.user_attrs["seed_lr"], store), store)
        assert left(folder) == []


class Fuse:
    """A storage and a store in which a kill comes after so many of the operations that a resumption depends on.

    Those are on checkpoints, and the commit of the refined value; a write of a file has a middle.
    """

    def __init__(self, folder: Path) -> None:
        self.left = 10**9
        self.killed_after: str | None = None
        self.storage = InMemoryStorage()
        self.store = FileSystemArtifactStore(folder)
        for part, method in (
            (self.storage, "set_trial_system_attr"),
            (self.storage, "set_trial_param"),
            (self.store, "remove"),
        ):
            setattr(part, method, functools.partial(self._around, getattr(part, method)))
        self._write, self.store.write = self.store.write, self._write_in_parts  # type: ignore[method-assign]

    def burn(self, operation: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.killed_after = operation
            raise Killed

    def _around(self, operation: Callable[..., None], *arguments: Any) -> None:
        operation(*arguments)
        if ATTRIBUTE in arguments or "lr" in arguments or str(arguments[0]).startswith(checkpoints.PREFIX):
            self.burn(operation.__name__)

    def _write_in_parts(self, name: str, content: Any) -> None:
        whole = content.read()
        if name.startswith(checkpoints.PREFIX):
            self._write(name, io.BytesIO(whole[: len(whole) // 2]))
            self.burn("half a write")
        self._around(self._write, name, io.BytesIO(whole))


OPERATIONS = {"set_trial_system_attr", "set_trial_param", "half a write", "write", "remove"}
SMALL = {"n_outer_steps": 3, "evaluate_every": 3, "horizon": 1}


class TestKillsAtAnyMoment:
    def test_nothing_is_lost_and_nothing_left(self, folder: Path) -> None:
        """At every single operation, the last ones of the trial among them, and once more while it is going on."""
        expected = undisturbed(0.1, objective=problems.refine, **SMALL)
        survived: list[int | None] = []
        killed_after: list[str | None] = []
        for n in range(1, 10**9):
            fuse = Fuse(folder)
            study = study_on(fuse.storage)
            study.enqueue_trial({}, user_attrs={"seed_lr": 0.1})
            fuse.left = n
            try:
                run(study, fuse.store, objective=problems.refine, **SMALL)
                break
            except Killed:
                survived.append(self.checkpoint(study, folder))
                killed_after.append(fuse.killed_after)
            requeue(study)
            fuse.left = 1 + 7 * n % 13
            try:
                trial = run(study, fuse.store, objective=problems.refine, **SMALL)
            except Killed:
                self.checkpoint(study, folder)
                fuse.left = 10**9
                requeue(study)
                trial = run(study, fuse.store, objective=problems.refine, **SMALL)
            assert_same(trial, expected)
            assert left(folder) == []
            assert trial.system_attrs[ATTRIBUTE] == {"ended": trial.number}
        assert len(killed_after) > 15
        assert set(killed_after) == OPERATIONS
        made = [outer_step for outer_step in survived if outer_step is not None]
        assert made == sorted(made)
        assert set(survived) == {None, 0, 1, 2}

    @staticmethod
    def checkpoint(study: optuna.Study, folder: Path) -> int | None:
        """The outer step of the checkpoint that there is, which is whole; no file is unknown to the trial."""
        attribute = {"artifact": None, "leftovers": []} | study.trials[-1].system_attrs.get(ATTRIBUTE, {})
        current = attribute["artifact"]
        assert set(left(folder)) <= {current, *attribute["leftovers"]}
        if current is None:
            return None
        made: int = torch.load(folder / current, weights_only=True)["content"]["resume_point"]["made"]
        return made


class TestRefusal:
    """What is not the trial's own checkpoint, whole and of this release, is not gone on with."""

    @pytest.fixture
    def killed(self, store: FileSystemArtifactStore) -> optuna.Study:
        return killed_after(5, store)

    @staticmethod
    def assert_starts_over(study: optuna.Study, store: Any, folder: Path, **settings: Any) -> FrozenTrial:
        seen: list[int] = []
        trial = run(study, store, lambda _, step: seen.append(step.index), **settings)
        assert seen == list(range(retries.N_OUTER_STEPS + 1))
        assert "resumed_from" not in trial.user_attrs
        assert_same(trial, undisturbed(trial.user_attrs["seed_lr"], **settings))
        assert left(folder) == []
        return trial

    @pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "gone", "another's"])
    def test_of_a_file_that_is_not_what_was_written(
        self,
        damage: str,
        killed: optuna.Study,
        store: FileSystemArtifactStore,
        folder: Path,
        log: pytest.LogCaptureFixture,
    ) -> None:
        (name,) = left(folder)
        content = bytearray((folder / name).read_bytes())
        if damage == "gone":
            (folder / name).unlink()
        elif damage == "another's":
            assert killed_after(6, store).study_name
            (other,) = set(left(folder)) - {name}
            (folder / other).rename(folder / name)
        else:
            content[len(content) // 2] ^= 1
            kept = {"truncated": len(content) // 2, "empty": 0, "one bit": len(content)}[damage]
            (folder / name).write_bytes(content[:kept])
        self.assert_starts_over(killed, store, folder)
        assert "Trial 1: its checkpoint is refused, and it starts over: it cannot be read" in log.text
        assert ("not found" if damage == "gone" else "it is not what was written") in log.text

    def test_of_another_version(
        self, killed: optuna.Study, store: FileSystemArtifactStore, folder: Path, log: pytest.LogCaptureFixture
    ) -> None:
        content = torch.load(folder / left(folder)[0], weights_only=True)
        self.forge(killed, folder, {**content, "version": 2})
        self.assert_starts_over(killed, store, folder)
        assert "it has format version 2, and this release reads 1" in log.text

    def test_of_what_would_run_code(
        self, killed: optuna.Study, store: FileSystemArtifactStore, folder: Path, log: pytest.LogCaptureFixture
    ) -> None:
        self.forge(killed, folder, RunsCode(folder / "ran"))
        self.assert_starts_over(killed, store, folder)
        assert "it cannot be read: UnpicklingError" in log.text
        assert not (folder / "ran").exists()

    @staticmethod
    def forge(study: optuna.Study, folder: Path, content: Any) -> None:
        (name,), waiting = left(folder), study.trials[-1]
        torch.save(content, folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        attribute = waiting.system_attrs[ATTRIBUTE] | {"sha256": digest}
        study._storage.set_trial_system_attr(waiting._trial_id, ATTRIBUTE, attribute)

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"estimator": ghg.Greedy(0.5)}, "its estimator was Greedy(gamma=0.9), and is Greedy(gamma=0.5)"),
            ({"n_outer_steps": 9}, "its n_outer_steps was 8, and is 9; its evaluate was Retrain(n_steps=24)"),
            ({"horizon": 2, "evaluate": ghg.Retrain(24)}, "its horizon was 3, and is 2."),
            ({"evaluate": "online"}, "and is Online()"),
            ({"seed": 1}, "its seed was 0, and is 1."),
            ({"outer_optimizer": functools.partial(torch.optim.SGD, lr=0.1)}, "and is functools.partial(<class 'torch"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_of_other_settings(
        self,
        changed: dict[str, Any],
        told: str,
        killed: optuna.Study,
        store: FileSystemArtifactStore,
        folder: Path,
        log: pytest.LogCaptureFixture,
    ) -> None:
        run(killed, store, **changed)
        assert "Trial 1: its checkpoint is refused, and it starts over: its" in log.text
        assert told in log.text
        assert left(folder) == []

    def test_where_there_is_no_store(
        self, killed: optuna.Study, store: FileSystemArtifactStore, folder: Path, log: pytest.LogCaptureFixture
    ) -> None:
        trial = run(killed, None, checkpoint_every=0)
        assert "it is in an artifact store, and none was given" in log.text
        assert_same(trial, undisturbed(trial.user_attrs["seed_lr"]))
        assert len(left(folder)) == 1  # nobody has been able to remove it

    def test_after_having_been_resumed_once(
        self, killed: optuna.Study, store: FileSystemArtifactStore, folder: Path
    ) -> None:
        with pytest.raises(Killed):
            run(killed, store, kill_after(7, raise_killed))
        assert killed.trials[-1].user_attrs["resumed_from"] == 4
        requeue(killed)
        for name in left(folder):
            (folder / name).unlink()
        assert run(killed, store).user_attrs["resumed_from"] is None


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class TestSignature:
    def test_it_is_the_same_in_another_process_also_of_functions(self) -> None:
        def optimizer() -> Callable[..., torch.optim.Optimizer]:
            return lambda tensors: torch.optim.SGD(tensors, lr=0.1)

        first, second = optimizer(), optimizer()
        assert repr(first) != repr(second)
        assert self.signature(outer_optimizer=first) == self.signature(outer_optimizer=second)

    @pytest.mark.parametrize(
        ("changed", "names"),
        [
            ({"hyperparameters": {"c": torch.tensor([2.0, 1.5])}}, {"hyperparameters' initial values"}),
            ({"hyperparameters": {"c": torch.zeros(3)}}, {"hyperparameters", "hyperparameters' initial values"}),
            ({"domain": ghg.Interval(-9.0, 9.0)}, {"hyperparameters"}),
            ({"update_rule": ghg.SGD(lr=0.1, momentum=0.9)}, {"update_rule"}),
            ({"product_mode": ghg.ProductMode.FORWARD}, {"product mode"}),
            ({"initial": [1.0, 2.0]}, {"model's initial state"}),
            ({"initial": [1.0, 2.0], "evaluate": "online"}, set()),
            ({"initial": [1.0, 2.0], "evaluate": "online", "restart": True}, {"model's initial state"}),
            ({"initial": [1.0], "evaluate": "online"}, {"weights"}),
        ],
    )
    def test_of_what_decides_the_path(self, changed: dict[str, Any], names: set[str]) -> None:
        settings = {key: changed[key] for key in ("evaluate", "restart") if key in changed}
        found, expected = self.signature(**changed), self.signature(**settings)
        assert {name for name in found if found[name] != expected[name]} == names
        told = signatures.difference(found, expected)
        assert all(f"its {name} was {found[name]}, and is {expected[name]}" in told for name in names)
        assert bool(told) == bool(names)

    def test_the_order_of_hyperparameters_is_part_of_it(self) -> None:
        one, two = torch.zeros(2), torch.ones(2)
        assert self.signature(hyperparameters={"a": one, "b": two}) != self.signature(
            hyperparameters={"b": two, "a": one}
        )

    @staticmethod
    def signature(**changed: Any) -> dict[str, str]:
        model = problems.Weights()
        model.w = torch.nn.Parameter(torch.tensor(changed.pop("initial", [1.0, -1.0])))
        tensors = changed.pop("hyperparameters", {"c": torch.tensor([2.0, 1.0])})
        domain, rule = changed.pop("domain", ghg.Unbounded()), changed.pop("update_rule", ghg.SGD(lr=0.1))
        hyperparameters = {name: ghg.Hyperparameter(x, domain) for name, x in tensors.items()}
        problem = problems.make_problem(model=model, product_mode=changed.pop("product_mode", None))
        options = ghg.DescentOptions(**changed)
        return signatures.signature_of(problem, hyperparameters, rule, ghg.Greedy(), options)


class TestWhatTheStudySees:
    @pytest.mark.parametrize("inherit", [False, True])
    def test_earlier_reports_are_there_for_the_pruner(self, inherit: bool, store: FileSystemArtifactStore) -> None:
        seen: list[set[int]] = []

        class Watching(optuna.pruners.BasePruner):
            def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
                seen.append(set(trial.intermediate_values))
                return False

        study = study_on(None)
        with pytest.raises(Killed):  # when more has been reported than the checkpoint knows of
            run(study, store, kill_after(6, raise_killed), evaluate_every=2, checkpoint_every=4)
        requeue(study, inherit_intermediate_values=inherit)
        assert sorted(study.trials[-1].intermediate_values) == ([0, 2, 4, 6] if inherit else [])
        study.pruner = Watching()
        trial = run(study, store, evaluate_every=2)
        assert_same(trial, undisturbed(trial.user_attrs["seed_lr"], evaluate_every=2))
        assert seen == [{0, 2, 4, 6}]

    def test_callbacks_are_called_for_new_steps_only(self, store: FileSystemArtifactStore) -> None:
        study, seen = killed_after(5, store), []
        run(study, store, lambda _, step: seen.append(step.index))
        assert seen == [5, 6, 7, 8]

    def test_time_adds_up(self, store: FileSystemArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = SimpleNamespace(now=0.0)
        monkeypatch.setattr(refine_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        tick = lambda *_: setattr(clock, "now", clock.now + 1.0)  # noqa: E731
        study = study_on(None)
        with pytest.raises(Killed):
            run(study, store, tick, kill_after(3, raise_killed), timeout=6.5)
        requeue(study)
        clock.now = 1000.0
        trial = run(study, store, tick, timeout=6.5)
        # Three seconds until the checkpoint of step 2, and four steps more; what has been lost is not counted.
        assert (trial.user_attrs["stopped"], trial.user_attrs["n_outer_steps"]) == ("timeout", 6)
        assert trial.user_attrs["cost_seconds"] == 7.0

    @pytest.mark.parametrize(
        ("evaluate", "n_outer_steps", "refined", "stopped"),
        [
            ("retrain", 8, True, "finished"),
            ("retrain", 3, True, "policy"),
            ("online", 8, True, "finished"),
            ("online", 0, False, "finished"),
        ],
    )
    def test_what_a_policy_has_decided_stays(
        self, evaluate: str, n_outer_steps: int, refined: bool, stopped: str, store: FileSystemArtifactStore
    ) -> None:
        @dataclass(frozen=True)
        class Decided:
            def n_outer_steps(self, *_: Any) -> int:
                return n_outer_steps

        first, then = Decided(), ghg.Never() if refined else ghg.Always()
        trial = run(killed_after(2, store, evaluate=evaluate, policy=first), store, evaluate=evaluate, policy=then)
        assert trial.user_attrs["resumed_from"] == 1
        assert trial.user_attrs["policy"] == str(first)
        assert trial.user_attrs["refined"] is refined
        assert (trial.user_attrs["cost_n_products"] > 0) is refined
        assert (trial.user_attrs["n_outer_steps"], trial.user_attrs["stopped"]) == (
            4 if stopped == "policy" else 8,
            stopped,
        )

    def test_it_inherits_from_whom_it_did_the_first_time(self, store: FileSystemArtifactStore) -> None:
        def objective(trial: optuna.Trial, **settings: Any) -> float:
            alpha = ghg.Alpha(trial, artifact_store=store)
            alpha.suggest_float("lr", 1e-3, 1.0, log=True)
            alpha.tensor("c", torch.tensor([2.0, 1.0]), inherit=True)
            return problems.refine(trial, alpha, **settings)

        study = study_on(None)
        run(study, store, objective=objective, n_outer_steps=2)
        with pytest.raises(Killed):
            run(study, store, kill_after(3, raise_killed), objective=objective)
        dead = study.trials[-1]
        study.add_trial(optuna.create_trial(value=-1.0))
        assert study.best_trial.number == 2
        study._storage.set_trial_state_values(dead._trial_id, TrialState.FAIL)
        optuna.storages.RetryHeartbeatStaleTrialCallback()(study, study.trials[1])
        trial = run(study, store, objective=objective)
        assert (trial.user_attrs["inherited_from"], trial.user_attrs["resumed_from"]) == (0, 2)

    def test_it_inherits_from_nobody_if_it_did_so_the_first_time(self, store: FileSystemArtifactStore) -> None:
        study = study_on(None)
        study.enqueue_trial({}, user_attrs={"inherited_from": None})
        study.add_trial(optuna.create_trial(value=0.0))
        alpha = ghg.Alpha(study.ask(), artifact_store=store)
        init = torch.tensor([2.0, 1.0])
        assert alpha.tensor("c", init, inherit=True) is init


class TestTheEndOfATrial:
    @pytest.mark.parametrize("killed_first", [False, True])
    @pytest.mark.parametrize(
        ("error", "state"),
        [
            (None, TrialState.COMPLETE),
            (optuna.TrialPruned(), TrialState.PRUNED),
            (RuntimeError("of the data"), TrialState.FAIL),
            (KeyboardInterrupt(), TrialState.FAIL),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
    )
    def test_its_checkpoint_is_removed(
        self,
        error: BaseException | None,
        state: TrialState,
        killed_first: bool,
        store: FileSystemArtifactStore,
        folder: Path,
    ) -> None:
        def end() -> None:
            assert len(left(folder)) == 1
            if error is not None:
                raise error

        study = killed_after(3, store) if killed_first else study_on(None)
        # The first new step of a trial that was resumed from step 2 is too early for it to have found anything itself.
        outer_step = 3 if killed_first else 6
        if state == TrialState.FAIL:
            with pytest.raises(type(error)):  # type: ignore[arg-type]
                run(study, store, kill_after(outer_step, end))
        else:
            run(study, store, kill_after(outer_step, end))
        trial = study.trials[-1]
        assert trial.state == state
        assert trial.params["lr"] == trial.user_attrs["refined_lr"]
        assert left(folder) == []
        assert trial.system_attrs[ATTRIBUTE] == {"ended": trial.number}

    def test_one_that_fails_before_it_has_gone_on_keeps_what_was_found(
        self, store: FileSystemArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = killed_after(6, store)

        def broken(*_: Any) -> torch.Tensor:
            raise RuntimeError("of the loss")

        monkeypatch.setattr(retries, "train_loss", broken)
        with pytest.raises(RuntimeError, match="of the loss"):
            run(study, store)
        trial = study.trials[-1]
        assert trial.user_attrs["n_outer_steps"] == 5
        assert trial.params["lr"] == trial.user_attrs["refined_lr"]
        assert trial.user_attrs["val_loss"] == min(trial.intermediate_values.values())
        assert left(folder) == []

    def test_a_process_that_is_asked_to_exit_leaves_all_to_its_successor(
        self, store: FileSystemArtifactStore, folder: Path
    ) -> None:
        """A handler of SIGTERM may raise SystemExit, after which Optuna does not end the trial."""
        study = study_on(None)
        with pytest.raises(SystemExit):
            run(study, store, kill_after(5, lambda: sys.exit(1)))
        assert study.trials[-1].state == TrialState.RUNNING
        requeue(study)
        trial = run(study, store)
        assert trial.user_attrs["resumed_from"] == 4
        assert_same(trial, undisturbed(trial.user_attrs["seed_lr"]))

    def test_a_worker_that_was_taken_for_dead_touches_nothing_of_its_successor(
        self, store: FileSystemArtifactStore, folder: Path
    ) -> None:
        study = study_on(None)
        while_it_hangs: list[str] = []

        def hang(*_: Any) -> None:
            requeue(study)
            while_it_hangs.extend(left(folder))

        with pytest.raises(ValueError, match="Cannot tell a FAIL trial"):
            run(study, store, kill_after(5, hang), n_outer_steps=7)
        assert left(folder) == while_it_hangs
        assert len(while_it_hangs) == 1
        trial = run(study, store, n_outer_steps=7)
        assert trial.user_attrs["resumed_from"] == 4
        assert_same(trial, undisturbed(trial.user_attrs["seed_lr"], n_outer_steps=7))
        assert left(folder) == []


class TestStores:
    def test_one_that_cannot_be_written_to_costs_the_checkpoint_only(
        self, store: FileSystemArtifactStore, folder: Path, log: pytest.LogCaptureFixture
    ) -> None:
        class Full(FileSystemArtifactStore):
            n_written = 0

            def write(self, artifact_id: str, content_body: Any) -> None:
                self.n_written += 1
                if self.n_written > 2:
                    super().write(artifact_id, io.BytesIO(content_body.read(100)))
                    raise OSError("No space left on device")
                super().write(artifact_id, content_body)

        study = study_on(None)
        with pytest.raises(Killed):
            run(study, Full(folder), kill_after(5, raise_killed))
        assert log.text.count("a checkpoint could not be stored, and is lost: OSError('No space left on device')") == 3
        requeue(study)
        trial = run(study, store)
        assert trial.user_attrs["resumed_from"] == 1
        assert_same(trial, undisturbed(trial.user_attrs["seed_lr"]))
        assert left(folder) == []

    def test_one_that_is_away_for_a_moment_is_waited_for(
        self, store: FileSystemArtifactStore, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("time.sleep", lambda _: None)

        class Away(FileSystemArtifactStore):
            n_read = 0

            def open_reader(self, artifact_id: str) -> Any:
                self.n_read += 1
                if self.n_read < 3:
                    raise ConnectionError
                return super().open_reader(artifact_id)

        assert run(killed_after(5, store), Away(folder)).user_attrs["resumed_from"] == 4

    def test_one_that_keeps_what_it_should_remove_is_told_of(self, folder: Path, log: pytest.LogCaptureFixture) -> None:
        class Keeping(FileSystemArtifactStore):
            def remove(self, artifact_id: str) -> None:
                raise PermissionError

        trial = run(study_on(None), Keeping(folder), n_outer_steps=2, evaluate_every=2)
        assert trial.state == TrialState.COMPLETE
        assert all(f"Trial 0: {name} is of no use, but stays: PermissionError()" in log.text for name in left(folder))

    def test_of_a_slice_of_the_data_not_all_data_are_written(
        self, store: FileSystemArtifactStore, folder: Path
    ) -> None:
        """The spectral propagator keeps batches, which may be views."""
        data = torch.zeros(100_000, 1)
        problem = problems.make_problem(train_batches=[data[:10], data[10:20]])
        sizes: list[int] = []
        run(
            study_on(None),
            store,
            lambda *_: sizes.extend((folder / name).stat().st_size for name in left(folder)),
            objective=problems.refine,
            problem=problem,
            estimator=ghg.Greedy(propagator=ghg.Spectral(rank=1)),
        )
        assert 0 < max(sizes) < data.nbytes / 4


class TestWhen:
    @pytest.mark.parametrize(
        ("interval", "asked", "expected"),
        [(60, None, [0, 4]), (None, None, []), (60, 0, []), (None, 3, [0, 3, 6]), (60, 1, [*range(8)])],
    )
    def test_checkpoints_are_made(
        self, interval: int | None, asked: int | None, expected: list[int], folder: Path, tmp_path: Path
    ) -> None:
        """By default where they can be of use; never after the last step."""
        steps: list[int] = []

        class Watched(FileSystemArtifactStore):
            def write(self, artifact_id: str, content_body: Any) -> None:
                if artifact_id.startswith(checkpoints.PREFIX):
                    steps.append(torch.load(content_body, weights_only=True)["content"]["resume_point"]["made"])
                    content_body.seek(0)
                super().write(artifact_id, content_body)

        with retries.opened(tmp_path / "study.db", heartbeat_interval=interval) as storage:
            trial = run(study_on(storage), Watched(folder), checkpoint_every=asked)
        assert steps == expected
        assert (ATTRIBUTE in trial.system_attrs) == bool(expected)

    def test_a_fixed_trial_has_none(self, store: FileSystemArtifactStore, folder: Path) -> None:
        retries.refine(optuna.trial.FixedTrial({"lr": 0.1}), artifact_store=store, checkpoint_every=1)
        assert left(folder) == []

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"checkpoint_every": -1}, "must be an integer of at least 0, or None, but got -1"),
            ({"checkpoint_every": 1.5}, "must be an integer of at least 0, or None, but got 1.5"),
            ({"checkpoint_every": 5}, "checkpoint_every=5 needs a place for checkpoints; give refine"),
        ],
    )
    def test_bad_settings_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            retries.refine(study_on(None).ask(), **settings)
