from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

import optuna_greedyhg as ghg
from tests.trials import problems

SAMPLERS: dict[str, Callable[[], BaseSampler]] = {
    "tpe": lambda: TPESampler(seed=0, n_startup_trials=3),
    "univariate tpe": lambda: TPESampler(seed=0, n_startup_trials=3, multivariate=False),
    "gp": lambda: GPSampler(seed=0, n_startup_trials=3),
    "cmaes": lambda: CmaEsSampler(seed=0, n_startup_trials=3),
    "random": lambda: RandomSampler(seed=0),
}


def plain_objective(trial: optuna.Trial) -> float:
    x, y, z = trial.suggest_float("x", -1, 1), trial.suggest_int("y", 0, 5), trial.suggest_categorical("z", [0.0, 1.0])
    return x**2 + y + z


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_parameters_that_are_not_refined_are_the_base_samplers_own(make: Callable[[], BaseSampler]) -> None:
    bare = optuna.create_study(sampler=make())
    wrapped = optuna.create_study(sampler=ghg.GreedyHGSampler(make()))
    for study in (bare, wrapped):
        study.optimize(plain_objective, n_trials=8)
    assert [t.params for t in wrapped.trials] == [t.params for t in bare.trials]


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_unrefined_seeds_are_the_base_samplers_suggestions(make: Callable[[], BaseSampler]) -> None:
    def with_trial(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", 1e-3, 1, log=True) + trial.suggest_int("y", 0, 5)

    def with_alpha(trial: optuna.Trial) -> float:
        return ghg.Alpha(trial).suggest_float("x", 1e-3, 1, log=True) + trial.suggest_int("y", 0, 5)

    bare = optuna.create_study(sampler=make())
    bare.optimize(with_trial, n_trials=8)
    seeded = optuna.create_study(sampler=ghg.GreedyHGSampler(make()))
    seeded.optimize(with_alpha, n_trials=8)
    assert [t.params for t in seeded.trials] == [t.params for t in bare.trials]
    assert [t.user_attrs["seed_x"] for t in seeded.trials] == [t.params["x"] for t in bare.trials]


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("storage", ["memory", "sqlite"])
def test_refined_values_are_the_trials_parameters(
    make: Callable[[], BaseSampler], storage: str, tmp_path: Path
) -> None:
    url = None if storage == "memory" else f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=url, sampler=ghg.GreedyHGSampler(make()))
    study.optimize(problems.refine, n_trials=6)
    for trial in study.trials:
        assert trial.params["lr"] == trial.user_attrs["refined_lr"]
        assert 1e-3 <= trial.params["lr"] <= 1.0
    assert any(t.params["lr"] != t.user_attrs["seed_lr"] for t in study.trials)
    assert study.best_params == study.best_trial.params


def test_the_base_sampler_learns_from_refined_values() -> None:
    """A base sampler that suggests the mean of what it has seen sees refined values, not seeds."""
    seen: list[list[float]] = []

    class Spy(RandomSampler):
        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            seen.append([t.params[param_name] for t in study.get_trials(states=(TrialState.COMPLETE,))])
            return super().sample_independent(study, trial, param_name, param_distribution)

    study = optuna.create_study(sampler=ghg.GreedyHGSampler(Spy(seed=0)))
    study.optimize(problems.refine, n_trials=3)
    refined = [t.user_attrs["refined_lr"] for t in study.trials]
    assert seen == [[], refined[:1], refined[:2]]


def test_equal_seeds_give_equal_studies() -> None:
    first, second = (optuna.create_study(sampler=ghg.GreedyHGSampler(seed=3)) for _ in range(2))
    for study in (first, second):
        study.optimize(problems.refine, n_trials=4)
    assert [(t.params, t.value) for t in first.trials] == [(t.params, t.value) for t in second.trials]


def test_seeds_are_committed_when_a_trial_was_never_refined() -> None:
    def objective(trial: optuna.Trial) -> float:
        return ghg.Alpha(trial).suggest_float("x", 0, 1)

    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.optimize(objective, n_trials=2)
    assert [t.params["x"] for t in study.trials] == [t.value for t in study.trials]


def test_seeds_are_committed_when_the_objective_fails_before_refining() -> None:
    def objective(trial: optuna.Trial) -> float:
        problems.declare(trial)
        raise RuntimeError("no model")

    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.optimize(objective, n_trials=1, catch=(RuntimeError,))
    (trial,) = study.trials
    assert trial.state == TrialState.FAIL
    assert trial.params["lr"] == trial.user_attrs["seed_lr"]


def test_an_enqueued_parameter_stays_and_its_refined_value_is_an_attribute(caplog: pytest.LogCaptureFixture) -> None:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.enqueue_trial({"lr": 0.5})
    optuna.logging.enable_propagation()
    try:
        study.optimize(problems.refine, n_trials=1)
    finally:
        optuna.logging.disable_propagation()
    (trial,) = study.trials
    assert trial.params["lr"] == trial.user_attrs["seed_lr"] == 0.5
    assert trial.user_attrs["refined_lr"] < 0.5
    assert "stays at its enqueued value 0.5" in caplog.text


def test_an_enqueued_seed_is_refined() -> None:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.enqueue_trial({}, user_attrs={"seed_lr": 0.5})
    study.optimize(problems.refine, n_trials=1)
    (trial,) = study.trials
    assert trial.user_attrs["seed_lr"] == 0.5
    assert trial.params["lr"] == trial.user_attrs["refined_lr"] < 0.5


@pytest.mark.parametrize("seed", [7.0, "0.1", None, float("nan")])
def test_an_enqueued_seed_that_is_none_is_replaced_and_named(seed: Any, caplog: pytest.LogCaptureFixture) -> None:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.enqueue_trial({}, user_attrs={"seed_lr": seed})
    optuna.logging.enable_propagation()
    try:
        study.optimize(problems.refine, n_trials=1)
    finally:
        optuna.logging.disable_propagation()
    assert 1e-3 <= study.trials[0].user_attrs["seed_lr"] <= 1.0
    assert f"Trial 0: its seed lr={seed!r} is no number in FloatDistribution" in caplog.text


def test_a_seed_that_is_enqueued_for_another_sampler_is_named(caplog: pytest.LogCaptureFixture) -> None:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    study.enqueue_trial({}, user_attrs={"seed_lr": 0.5})
    study.enqueue_trial({"lr": 0.5}, user_attrs={"seed_lr": 0.5})  # as in a retry
    optuna.logging.enable_propagation()
    try:
        study.optimize(problems.refine, n_trials=2)
    finally:
        optuna.logging.disable_propagation()
    assert study.trials[0].user_attrs["seed_lr"] == study.trials[0].params["lr"] != 0.5
    assert "Trial 0: its enqueued seed lr=0.5 is not used" in caplog.text
    assert "enqueue_trial({'lr': 0.5})" in caplog.text
    warned = [r.getMessage() for r in caplog.records if r.name == "optuna.greedyhg" and r.levelname == "WARNING"]
    assert not any("Trial 1" in message for message in warned)


def test_under_hyperband_a_bracket_sees_its_own_trials() -> None:
    study = optuna.create_study(
        sampler=ghg.GreedyHGSampler(seed=0), pruner=optuna.pruners.HyperbandPruner(max_resource=4)
    )
    study.optimize(problems.refine, n_trials=8)
    assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in study.trials)
    assert all(t.params["lr"] == t.user_attrs["refined_lr"] for t in study.trials)


def test_threads_do_not_mix_their_trials_up() -> None:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(RandomSampler(seed=0)))
    study.optimize(problems.refine, n_trials=12, n_jobs=3)
    assert len({t.params["lr"] for t in study.trials}) == 12
    assert all(t.params["lr"] == t.user_attrs["refined_lr"] for t in study.trials)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_copies_draw_the_same_seeds(duplicate: Callable[[BaseSampler], BaseSampler]) -> None:
    sampler = ghg.GreedyHGSampler(seed=5)
    optuna.create_study(sampler=sampler).ask()  # a trial that is still running
    studies = [optuna.create_study(sampler=s) for s in (duplicate(sampler), sampler)]
    for study in studies:
        study.optimize(problems.refine, n_trials=3)
    assert [t.params for t in studies[0].trials] == [t.params for t in studies[1].trials]


def test_a_trial_that_the_sampler_does_not_know_is_sampled_as_by_the_base() -> None:
    distribution = {"x": optuna.distributions.FloatDistribution(0, 1)}
    study = optuna.create_study()
    study.add_trials(
        [optuna.create_trial(params={"x": x}, distributions=distribution, value=x) for x in (0.1, 0.2, 0.9)]
    )
    study.add_trial(optuna.create_trial(state=TrialState.RUNNING))
    frozen = study.trials[-1]
    drawn = []
    for sampler in (
        TPESampler(seed=1, n_startup_trials=1),
        ghg.GreedyHGSampler(TPESampler(seed=1, n_startup_trials=1)),
    ):
        space = sampler.infer_relative_search_space(study, frozen)
        drawn.append((space, sampler.sample_relative(study, frozen, space)))
    assert drawn[0] == drawn[1]
    assert drawn[0][1].keys() == {"x"}


def test_says_what_it_wraps() -> None:
    assert str(ghg.GreedyHGSampler(RandomSampler())) == "GreedyHGSampler(RandomSampler)"


def test_a_seed_beside_a_base_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="give it to the base sampler"):
        ghg.GreedyHGSampler(RandomSampler(), seed=1)


def test_two_alphas_on_one_trial_both_become_parameters() -> None:
    def objective(trial: optuna.Trial) -> float:
        return ghg.Alpha(trial).suggest_float("x", 0, 1) + ghg.Alpha(trial).suggest_float("y", 0, 1)

    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert trial.params == {"x": trial.user_attrs["seed_x"], "y": trial.user_attrs["seed_y"]}


def test_a_name_is_taken_by_a_seed_in_another_alpha_too() -> None:
    trial = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).ask()
    ghg.Alpha(trial).suggest_float("x", 0, 1)
    with pytest.raises(ValueError, match="'x' is taken"):
        ghg.Alpha(trial).suggest_float("x", 0, 1)


def test_a_seeded_parameter_is_not_drawn_again_on_the_trial() -> None:
    trial = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).ask()
    ghg.Alpha(trial).suggest_float("x", 0, 1)
    with pytest.raises(ValueError, match="'x' is declared on Alpha"):
        trial.suggest_float("x", 0, 1)


def test_an_enqueued_value_out_of_range_fails_the_trial_by_name() -> None:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.enqueue_trial({"lr": 5.0})
    with pytest.raises(ValueError, match=r"enqueued lr=5\.0 is outside of FloatDistribution"):
        study.optimize(problems.refine, n_trials=1)


def test_one_sampler_serves_two_storages_with_studies_of_one_name() -> None:
    sampler = ghg.GreedyHGSampler(RandomSampler(seed=0))
    studies = [optuna.create_study(study_name="same", sampler=sampler) for _ in range(2)]
    trials = [study.ask() for study in studies]
    for study, trial in zip(studies, trials, strict=True):
        study.tell(trial, problems.refine(trial))
    for study in studies:
        assert study.trials[0].params["lr"] == study.trials[0].user_attrs["refined_lr"]


def test_a_grid_seeds_its_points() -> None:
    """This sampler keeps its place in the trial's attributes, which it must be given as they are now."""
    grid = optuna.samplers.GridSampler({"lr": [0.01, 0.1, 0.5]}, seed=0)
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(grid))
    study.optimize(problems.refine, n_trials=3)
    assert sorted(t.user_attrs["seed_lr"] for t in study.trials) == [0.01, 0.1, 0.5]


def test_hyperparameters_are_refined_once() -> None:
    trial = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).ask()
    alpha = problems.declare(trial)
    problems.refine(trial, alpha)
    with pytest.raises(RuntimeError, match="refined already"):
        problems.refine(trial, alpha)
