"""What goes wrong in a trial, one by one: the error it ends with, what it keeps, and that the study goes on."""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

import optuna_greedyhg as ghg
import optuna_greedyhg.trials.refine as refine_module
from tests.trials import problems
from tests.trials.storages import opened


def study(**options: Any) -> optuna.Study:
    return optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0), **options)


def at(outer_step: int, act: Callable[[optuna.Trial], None]) -> Callable[[Any, ghg.OuterStep], None]:
    """A callback that acts once, after the given outer step."""

    def callback(trial: optuna.Trial, step: ghg.OuterStep) -> None:
        if step.index == outer_step:
            act(trial)

    return callback


def raising(error: BaseException) -> Callable[..., Any]:
    def act(*args: Any) -> Any:
        raise error

    return act


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    optuna.logging.enable_propagation()
    yield caplog
    optuna.logging.disable_propagation()


def assert_kept(trial: FrozenTrial, stopped: str) -> None:
    """The trial's parameters are the best α that it has found, which is not its seed."""
    assert trial.params["lr"] == trial.user_attrs["refined_lr"] != trial.user_attrs["seed_lr"]
    assert trial.user_attrs["stopped"] == stopped
    assert trial.user_attrs["val_loss"] == trial.intermediate_values[trial.last_step]
    assert trial.system_attrs["greedyhg:trajectory"]["outer_step"][-1] == trial.user_attrs["n_outer_steps"]


class TestLossesAndData:
    """Each breaks after the seed was evaluated, by two steps of training, and two outer steps have been good."""

    SETTINGS: Mapping[str, Any] = {"evaluate": ghg.Retrain(2), "evaluate_every": 1, "n_outer_steps": 10}

    def failed(self, error: type[BaseException], message: str, **parts: Any) -> FrozenTrial:
        """The trial with which a study has failed, and after which it goes on if it was told to."""
        made = study()
        with pytest.raises(error, match=message):
            made.optimize(self.refine(parts), n_trials=1)
        made.optimize(self.refine(parts), n_trials=1, catch=(error,))
        made.optimize(problems.refine, n_trials=1)
        assert [trial.state for trial in made.trials] == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
        assert made.best_trial.number == 2
        return made.trials[0]

    def refine(self, parts: Mapping[str, Any]) -> Callable[[optuna.Trial], float]:
        def objective(trial: optuna.Trial) -> float:
            made = {name: make() for name, make in parts.items()}
            return problems.refine(trial, problem=problems.make_problem(**made), **self.SETTINGS)

        return objective

    def test_a_loss_that_becomes_nan_and_stays_it(self, tmp_path: Path) -> None:
        def loss(model: Any, alpha: Mapping[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
            return problems.train_loss(model, alpha, batch) * (1 + batch.sum())

        made = study(storage=f"sqlite:///{tmp_path}/study.db")
        batches = [torch.zeros(4)] * 5 + [torch.full((4,), float("nan"))] * 100
        problem = problems.make_problem(train_loss=loss, train_batches=batches)
        made.optimize(lambda trial: problems.refine(trial, problem=problem, **self.SETTINGS), n_trials=1)
        (trial,) = made.trials
        assert trial.state == TrialState.COMPLETE
        assert list(trial.intermediate_values) == [0, 1, 2]
        assert_kept(trial, "diverged")
        assert trial.value == trial.user_attrs["val_loss"]

    def test_out_of_memory(self) -> None:
        trial = self.failed(torch.OutOfMemoryError, "20.00 GiB", train_loss=out_of_memory)
        assert_kept(trial, "failed")

    def test_a_trial_that_was_out_of_memory_lets_go_of_what_it_has(self) -> None:
        models: list[weakref.ref[torch.nn.Module]] = []

        def objective(trial: optuna.Trial) -> float:
            model = problems.Weights()
            models.append(weakref.ref(model))
            problem = problems.make_problem(model=model, train_loss=out_of_memory())
            return problems.refine(trial, problem=problem, **self.SETTINGS)

        optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # pytest keeps what is logged, tracebacks and all
        try:
            study().optimize(objective, n_trials=1, catch=(torch.OutOfMemoryError,))
        finally:
            optuna.logging.set_verbosity(optuna.logging.INFO)
        gc.collect()
        assert [reference() for reference in models] == [None]

    @pytest.mark.parametrize("stream", ["train_batches", "val_batches"])
    def test_data_that_end(self, stream: str) -> None:
        def one_shot() -> Iterator[torch.Tensor]:
            return iter([torch.zeros(4)] * 6)

        trial = self.failed(RuntimeError, f"{stream} ended", n_eval_batches=lambda: 1, **{stream: one_shot})
        assert_kept(trial, "failed")

    def test_a_batch_of_another_shape(self) -> None:
        def loss(model: Any, alpha: Mapping[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
            return problems.train_loss(model, alpha, batch) + (model() * batch).sum()

        batches = [torch.zeros(2)] * 5 + [torch.zeros(3)]
        trial = self.failed(RuntimeError, r"size of tensor", train_loss=lambda: loss, train_batches=lambda: batches)
        assert_kept(trial, "failed")

    def test_a_last_batch_that_is_smaller_is_no_fault(self) -> None:
        made = study()
        problem = problems.make_problem(train_batches=[torch.zeros(4), torch.zeros(4), torch.zeros(1)])
        made.optimize(lambda trial: problems.refine(trial, problem=problem, n_outer_steps=3), n_trials=1)
        (trial,) = made.trials
        assert_kept(trial, "finished")
        n_evaluations = len(trial.intermediate_values)
        assert (
            trial.user_attrs["cost_n_train_gradients"] == (1 + n_evaluations) * 6 * 3
        )  # six steps, by three on average

    @pytest.mark.parametrize("idle", [["c"], ["c", "lr"]], ids=["one", "all"])
    def test_hyperparameters_without_an_effect_are_named_and_stay(self, idle: list[str]) -> None:
        def loss(model: Any, alpha: Mapping[str, torch.Tensor], batch: Any) -> torch.Tensor:
            effect = 0.0 if "lr" in idle else (alpha["lr"].log10() + 1).square()
            return 0.5 * (model() - 1).square().sum() + effect

        made = study()
        problem = problems.make_problem(train_loss=loss, val_loss=loss, metrics={})

        def objective(trial: optuna.Trial) -> float:
            return ghg.refine(trial, problem, problems.declare(trial), update_rule=ghg.SGD(lr=0.1), n_outer_steps=2)

        with pytest.warns(UserWarning, match=f"no effect of the hyperparameters {idle}".replace("[", r"\[")):
            made.optimize(objective, n_trials=1)
        (trial,) = made.trials
        assert trial.state == TrialState.COMPLETE
        assert (trial.params["lr"] == trial.user_attrs["seed_lr"]) == ("lr" in idle)
        columns = trial.system_attrs["greedyhg:trajectory"]
        assert columns["c.q50"] == [1.5] * len(columns["outer_step"])


def after(n_calls: int, broken: Callable[..., Any]) -> Callable[..., Any]:
    """The training loss, which breaks after some calls."""
    calls = iter(range(n_calls))

    def loss(*args: Any) -> torch.Tensor:
        return broken() if next(calls, None) is None else problems.train_loss(*args)

    return loss


def out_of_memory() -> Callable[..., Any]:
    return after(9, raising(torch.OutOfMemoryError("Tried to allocate 20.00 GiB")))


class TestArtifacts:
    @staticmethod
    def full(folder: Path) -> FileSystemArtifactStore:
        class Full(FileSystemArtifactStore):
            def write(self, artifact_id: str, content_body: Any) -> None:
                with open("/dev/full", "wb") as device:
                    shutil.copyfileobj(content_body, device)

        return Full(folder)

    @staticmethod
    def gone(folder: Path) -> FileSystemArtifactStore:
        store = FileSystemArtifactStore(folder / "store")
        (folder / "store").rmdir()
        return store

    @staticmethod
    def read_only(folder: Path) -> FileSystemArtifactStore:
        if os.getuid() != 0:
            folder.chmod(0o500)
            return FileSystemArtifactStore(folder)
        if not Path("/sys").is_mount():
            pytest.skip("root may write everywhere")
        return FileSystemArtifactStore("/sys")  # where nobody can make a file

    @pytest.mark.parametrize(
        ("make", "error"),
        [
            ("full", "No space left on device"),
            ("gone", "No such file"),
            ("read_only", "Permission denied|Read-only file system"),
        ],
    )
    @pytest.mark.parametrize("evaluate", ["retrain", "online"])
    def test_a_store_that_cannot_be_written_to_costs_what_it_would_have_held(
        self, make: str, error: str, evaluate: str, tmp_path: Path, log: pytest.LogCaptureFixture
    ) -> None:
        if make == "full" and not Path("/dev/full").exists():
            pytest.skip("this system has no device that is always full")
        (tmp_path / "store").mkdir()
        store = getattr(self, make)(tmp_path)
        made = study()
        made.optimize(lambda trial: problems.refine(trial, artifact_store=store, evaluate=evaluate), n_trials=1)
        (trial,) = made.trials
        assert trial.state == TrialState.COMPLETE
        assert_kept(trial, "finished")
        assert "could not be stored, and are lost" in log.text
        assert re.search(error, log.text)
        assert "tensors_artifact" not in trial.user_attrs
        with pytest.warns(UserWarning, match="were not stored"):
            assert ghg.refined_params(trial) == {"lr": trial.params["lr"]}


class TestTrialsThatEndEarly:
    def test_ctrl_c_in_the_middle_of_an_outer_step(self, tmp_path: Path) -> None:
        def interrupted() -> torch.Tensor:
            handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.signal(signal.SIGINT, handler)
            raise AssertionError("the signal was ignored")

        made = study(storage=f"sqlite:///{tmp_path}/study.db")
        problem = problems.make_problem(train_loss=after(11, interrupted))
        with pytest.raises(KeyboardInterrupt):
            made.optimize(
                lambda trial: problems.refine(trial, problem=problem, **TestLossesAndData.SETTINGS), n_trials=5
            )
        (trial,) = made.trials
        assert trial.state == TrialState.FAIL
        assert_kept(trial, "failed")
        assert trial.user_attrs["n_outer_steps"] == trial.last_step >= 1

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("locked")], ids=["ctrl-c", "error"])
    def test_a_commit_that_is_interrupted_is_made_when_the_trial_ends(self, error: BaseException) -> None:
        storage = InMemoryStorage()
        break_at_the_end = at(4, lambda _: breaks(storage, "set_trial_param", error, 1))
        disturbed, undisturbed = study(storage=storage), study()
        with pytest.raises(type(error)):
            disturbed.optimize(lambda trial: problems.refine(trial, callbacks=[break_at_the_end]), n_trials=1)
        undisturbed.optimize(problems.refine, n_trials=1)
        assert disturbed.trials[0].state == TrialState.FAIL
        assert disturbed.trials[0].params == undisturbed.trials[0].params

    def test_a_range_that_a_study_does_not_take_fails_the_trial_and_not_the_study(self, tmp_path: Path) -> None:
        made = study(storage=f"sqlite:///{tmp_path}/study.db")
        made.add_trial(
            optuna.create_trial(
                params={"lr": 1}, distributions={"lr": optuna.distributions.IntDistribution(0, 3)}, value=1.0
            )
        )
        made.optimize(problems.refine, n_trials=2, catch=(ValueError,))
        assert [trial.state for trial in made.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.FAIL]

    def test_an_error_is_not_hidden_by_a_storage_that_fails_as_well(self, log: pytest.LogCaptureFixture) -> None:
        storage, error = InMemoryStorage(), RuntimeError("of the objective")

        def fail(trial: optuna.Trial) -> None:
            breaks(storage, "set_trial_user_attr", RuntimeError("of the storage"))
            raise error

        made = study(storage=storage)
        with pytest.raises(RuntimeError) as raised:
            made.optimize(lambda trial: problems.refine(trial, callbacks=[at(3, fail)]), n_trials=1)
        assert raised.value is error
        assert made.trials[0].state == TrialState.FAIL
        assert "what it had found before it failed could not be written" in log.text

    def test_a_callback_may_prune(self) -> None:
        made = study()
        made.optimize(
            lambda trial: problems.refine(trial, callbacks=[at(3, raising(optuna.TrialPruned()))]), n_trials=1
        )
        (trial,) = made.trials
        assert trial.state == TrialState.PRUNED
        assert_kept(trial, "pruned")
        assert trial.value == trial.user_attrs["val_loss"]

    @pytest.mark.parametrize("outer_step", [2, 3], ids=["evaluated", "between"])
    def test_stopping_the_study_ends_the_trial_with_what_it_has(self, outer_step: int) -> None:
        seen = []
        made = study()
        made.optimize(
            lambda trial: problems.refine(
                trial,
                n_outer_steps=10,
                callbacks=[lambda _, step: seen.append(step.index), at(outer_step, lambda t: t.study.stop())],
            ),
            n_trials=5,
        )
        (trial,) = made.trials
        assert trial.state == TrialState.COMPLETE
        assert seen[-1] == outer_step == trial.user_attrs["n_outer_steps"]
        assert_kept(trial, "study_stop")
        assert trial.value == trial.user_attrs["val_loss"] == trial.intermediate_values[2]

    def test_a_study_that_another_thread_stops_ends_the_trials_of_this_one(self) -> None:
        refining = threading.Event()

        def objective(trial: optuna.Trial) -> float:
            if trial.number == 0:
                assert refining.wait(timeout=60)
                return 0.0  # and then stops the study
            settings = {**TestLossesAndData.SETTINGS, "n_outer_steps": 10**6}
            return problems.refine(trial, **settings, callbacks=[at(2, lambda _: refining.set())])

        made = study()
        made.optimize(objective, n_trials=2, n_jobs=2, callbacks=[lambda made, _: made.stop()])
        assert [trial.state for trial in made.trials] == [TrialState.COMPLETE] * 2
        assert_kept(made.trials[1], "study_stop")

    def test_a_stop_of_an_earlier_run_is_over(self) -> None:
        made = study()
        made.optimize(lambda trial: float(made.stop() or 0), n_trials=2)
        trial = made.ask()
        problems.refine(trial)
        assert trial.user_attrs["stopped"] == "finished"

    @pytest.mark.parametrize(("timeout", "outer_step"), [(-1.0, 0), (0.0, 0), (5.0, 3), (1e9, 4), (None, 4)])
    def test_a_timeout_ends_the_trial_with_the_outer_step_in_progress(
        self, timeout: float | None, outer_step: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(refine_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        made = study()
        pass_time = at(3, lambda _: setattr(clock, "now", 105.0))
        made.optimize(lambda trial: problems.refine(trial, timeout=timeout, callbacks=[pass_time]), n_trials=1)
        (trial,) = made.trials
        assert trial.state == TrialState.COMPLETE
        assert trial.user_attrs["n_outer_steps"] == outer_step
        assert trial.user_attrs["stopped"] == ("finished" if outer_step == 4 else "timeout")
        assert trial.value == min(trial.intermediate_values.values()) == trial.user_attrs["val_loss"]


def breaks(storage: InMemoryStorage, method: str, error: BaseException, n_times: int = 10**9) -> None:
    """Lets a method of a storage fail a number of times."""
    whole, times = getattr(storage, method), iter(range(n_times))

    def broken(*args: Any, **kwargs: Any) -> Any:
        if next(times, None) is not None:
            raise error
        return whole(*args, **kwargs)

    setattr(storage, method, broken)


class TestTrialsEndedBySomebodyElse:
    @pytest.mark.parametrize("outer_step", [1, 4], ids=["before a report", "before the end"])
    @pytest.mark.parametrize(
        ("storage", "state"),
        [
            ("sqlite", TrialState.FAIL),  # as by a worker that sees no heartbeat
            ("in memory", TrialState.COMPLETE),
            ("in memory", TrialState.PRUNED),
        ],
    )
    def test_it_is_left_as_it_is_and_the_worker_goes_on(
        self,
        storage: str,
        state: TrialState,
        outer_step: int,
        request: pytest.FixtureRequest,
        log: pytest.LogCaptureFixture,
    ) -> None:
        seen: list[int] = []
        with opened(storage, request) as shared:
            made = study(storage=shared, study_name="shared")

            def end(trial: optuna.Trial) -> None:
                colleague = optuna.load_study(study_name="shared", storage=shared)
                colleague.tell(trial.number, 7.0 if state == TrialState.COMPLETE else None, state)

            def objective(trial: optuna.Trial) -> float:
                callbacks = [lambda _, step: seen.append(step.index), at(outer_step, end)] if trial.number == 0 else []
                return problems.refine(trial, callbacks=callbacks)

            with pytest.raises(ValueError, match=f"Cannot tell a {state.name} trial"):
                made.optimize(objective, n_trials=2)  # this is how Optuna ends after any such trial
            made.optimize(objective, n_trials=1)
            ended, after_it = made.trials
        assert ended.state == state
        assert not {"refined_lr", "stopped"} & ended.user_attrs.keys()
        assert "Trial 0 was ended by somebody else, and is left as it is" in log.text
        assert "could not be written" not in log.text
        assert seen[-1] == outer_step  # it notices at the next report, or at the end
        assert after_it.state == TrialState.COMPLETE
        assert_kept(after_it, "finished")

    def test_with_ask_and_tell_the_worker_needs_no_help(self) -> None:
        made = study()
        trial = made.ask()
        with pytest.raises(UpdateFinishedTrialError):
            problems.refine(trial, callbacks=[at(1, lambda t: made.tell(t.number, state=TrialState.FAIL))])
        assert made.tell(trial, state=TrialState.FAIL, skip_if_finished=True).state == TrialState.FAIL
