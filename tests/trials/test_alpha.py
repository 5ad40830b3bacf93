from __future__ import annotations

import logging
import re

import optuna
import pytest
import torch
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage

import optuna_greedyhg as ghg
from tests.trials import problems


def test_suggests_what_the_trial_would() -> None:
    fixed = optuna.trial.FixedTrial({"lr": 0.2, "momentum": 0.7})
    alpha = ghg.Alpha(fixed)
    assert alpha.suggest_float("lr", 1e-3, 1.0, log=True) == 0.2
    assert alpha.suggest_float("momentum", 0, 1) == 0.7
    assert alpha.hyperparameters["lr"].domain == ghg.Interval(1e-3, 1.0, log=True, slowness=3.0)
    assert alpha.hyperparameters["momentum"].domain == ghg.Interval(0, 1, slowness=3.0)
    assert alpha.scalars == ("lr", "momentum")


def test_a_tensor_starts_where_it_was_told_and_in_its_domain() -> None:
    alpha = ghg.Alpha(optuna.trial.FixedTrial({}))
    init = torch.full((2, 3), 0.5)
    assert alpha.tensor("t", init, ghg.Positive()) is init
    assert alpha.hyperparameters["t"].domain == ghg.Positive()
    assert alpha.scalars == ()


def test_with_another_sampler_the_seed_is_the_parameter() -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.optimize(problems.refine, n_trials=1)
    (trial,) = study.trials
    assert trial.params["lr"] == trial.user_attrs["seed_lr"]
    assert trial.user_attrs["refined_lr"] != trial.params["lr"]


def test_committed_values_are_clipped_to_the_range() -> None:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    trial = study.ask()
    alpha = problems.declare(trial)
    assert alpha.commit({"lr": torch.tensor(1.0000001, dtype=torch.float64)}) == {"lr": 1.0}
    study.tell(trial, 0.0)
    assert study.trials[0].params["lr"] == 1.0


def test_a_value_that_is_not_finite_is_never_committed() -> None:
    trial = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).ask()
    alpha = problems.declare(trial)
    with pytest.raises(ValueError, match="'lr' must be finite, but got nan"):
        alpha.commit({"lr": torch.tensor(float("nan"))})
    assert trial.params == {}


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda a: a.suggest_float("x", 0, 1, step=0.1), "cannot be refined in steps of 0.1"),
        (lambda a: a.suggest_float("taken", 0, 1), "'taken' is taken"),
        (lambda a: a.suggest_float("width", 0, 1), "'width' is taken"),
        (lambda a: a.tensor("taken", torch.zeros(2)), "'taken' is taken"),
        (lambda a: a.tensor("value", torch.zeros(2)), "must not be called any of"),
        (lambda a: a.suggest_float("x", 1, 1), "low < high"),
        (lambda a: a.suggest_float("x", 0, 1, log=True), "positive low"),
        (lambda a: a.tensor("x", torch.zeros(2), ghg.Positive()), "finite and positive"),
    ],
)
def test_bad_declarations_are_refused_by_name(declare: object, message: str) -> None:
    trial = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).ask()
    trial.suggest_int("width", 1, 2)
    alpha = ghg.Alpha(trial)
    alpha.suggest_float("taken", 0, 1)
    with pytest.raises(ValueError, match=re.escape(message)):
        declare(alpha)  # type: ignore[operator]
    assert set(trial.user_attrs) == {"seed_taken"}


@pytest.mark.parametrize("sampler", [ghg.GreedyHGSampler(seed=0), RandomSampler(seed=0)], ids=str)
def test_what_has_no_gradient_is_suggested_as_on_the_trial(sampler: optuna.samplers.BaseSampler) -> None:
    trial = optuna.create_study(sampler=sampler).ask()
    alpha = ghg.Alpha(trial)
    width = alpha.suggest_int("width", 4, 64, step=4)
    depth = alpha.suggest_int("depth", 1, 8, log=True)
    kind = alpha.suggest_categorical("kind", ["a", "b"])
    assert trial.params == {"width": width, "depth": depth, "kind": kind}
    assert trial.distributions == {
        "width": optuna.distributions.IntDistribution(4, 64, step=4),
        "depth": optuna.distributions.IntDistribution(1, 8, log=True),
        "kind": optuna.distributions.CategoricalDistribution(["a", "b"]),
    }
    assert alpha.suggest_int("width", 4, 64, step=4) == trial.suggest_int("width", 4, 64, step=4) == width
    assert (dict(alpha.hyperparameters), alpha.scalars, trial.user_attrs) == ({}, (), {})


def test_a_name_is_either_refined_or_not() -> None:
    trial = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).ask()
    alpha = ghg.Alpha(trial)
    alpha.tensor("t", torch.zeros(2))
    alpha.suggest_float("x", 0, 1)
    alpha.suggest_int("n", 0, 1)
    for declare in (
        lambda: alpha.suggest_int("t", 0, 1),
        lambda: alpha.suggest_categorical("x", [1, 2]),
        lambda: ghg.Alpha(trial).suggest_int("x", 0, 1),
        lambda: alpha.suggest_float("n", 0, 1),
        lambda: alpha.tensor("n", torch.zeros(1)),
    ):
        with pytest.raises(ValueError, match="is taken"):
            declare()


@pytest.mark.parametrize("sampler", [ghg.GreedyHGSampler(seed=0), RandomSampler(seed=0)], ids=str)
def test_a_trial_that_died_when_its_parameters_were_written_can_be_retried(
    sampler: optuna.samplers.BaseSampler,
) -> None:
    """The retry comes with the parameters and the attributes of the trial, as from RetryHeartbeatStaleTrialCallback."""
    study = optuna.create_study(sampler=sampler)
    died = study.ask()
    alpha = problems.declare(died)
    alpha.commit({"lr": torch.tensor(0.125)})
    (frozen,) = study.trials
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=frozen.params,
            distributions=frozen.distributions,
            user_attrs=frozen.user_attrs,
            system_attrs=frozen.system_attrs,
        )
    )
    study.optimize(problems.refine, n_trials=1)
    assert study.trials[1].state == optuna.trial.TrialState.COMPLETE
    assert study.trials[1].user_attrs["seed_lr"] == died.user_attrs["seed_lr"]


def test_what_has_not_moved_keeps_its_seed_to_the_last_digit() -> None:
    trial = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).ask()
    alpha = problems.declare(trial)
    seed = alpha.hyperparameters["lr"].init
    assert float(seed.float()) != float(seed)
    assert alpha.commit({"lr": seed.float()}) == trial.params == {"lr": float(seed)}


def test_a_start_that_cannot_be_is_refused_by_its_name() -> None:
    alpha = ghg.Alpha(optuna.trial.FixedTrial({}))
    with pytest.raises(TypeError, match=r"'t': .* floating point tensor, but got torch\.int64; .* x\.float\(\)"):
        alpha.tensor("t", torch.arange(3))
    with pytest.raises(ValueError, match=r"'t': .* within \[0, 1\]"):
        alpha.tensor("t", torch.tensor(2.0), ghg.Interval(0, 1))


class Flaky(InMemoryStorage):
    """Fails once, when the seed of wd is written."""

    failed = False

    def set_trial_user_attr(self, trial_id: int, key: str, value: object) -> None:
        if key == "seed_wd" and not self.failed:
            self.failed = True
            raise ArithmeticError("interrupted")
        super().set_trial_user_attr(trial_id, key, value)


def test_a_declaration_that_was_interrupted_leaves_the_others_whole(caplog: pytest.LogCaptureFixture) -> None:
    def objective(trial: optuna.Trial) -> float:
        alpha = ghg.Alpha(trial)
        with pytest.raises(ArithmeticError):
            alpha.suggest_float("wd", 1e-6, 1.0, log=True)
        alpha.suggest_float("lr", 1e-3, 1.0)
        return 1.0

    study = optuna.create_study(storage=Flaky(), sampler=ghg.GreedyHGSampler(seed=0))
    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert trial.params.keys() == {"wd", "lr"}
    assert trial.params["lr"] == trial.user_attrs["seed_lr"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_study_that_is_loaded_without_its_sampler_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage, sampler=ghg.GreedyHGSampler(seed=0))
    study.optimize(problems.refine, n_trials=1)
    caplog.clear()
    loaded = optuna.load_study(study_name=study.study_name, storage=storage)
    loaded.optimize(problems.refine, n_trials=2)
    (said,) = (record.getMessage() for record in caplog.records if "sampler" in record.getMessage())
    assert re.search(r"sampler is a TPESampler, under which .* trials such as 0 .* with sampler=GreedyHGSampler", said)


def test_a_study_that_never_had_the_sampler_is_left_in_peace(caplog: pytest.LogCaptureFixture) -> None:
    optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0)).optimize(problems.refine, n_trials=3)
    assert not [record for record in caplog.records if "sampler" in record.getMessage()]
