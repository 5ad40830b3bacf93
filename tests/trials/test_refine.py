from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

import optuna_greedyhg as ghg
from optuna_greedyhg.trials.records import read_trajectory
from tests.trials import problems
from tests.trials.problems import diverging_loss, retrained


def study(**options: Any) -> optuna.Study:
    return optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0), **options)


def test_the_value_is_that_of_a_fresh_training_with_the_refined_values(tmp_path: Path) -> None:
    store = optuna.artifacts.FileSystemArtifactStore(tmp_path)
    made = study()
    made.optimize(lambda trial: problems.refine(trial, artifact_store=store, n_outer_steps=20), n_trials=1)
    best = made.best_trial
    params = ghg.refined_params(best)
    assert best.value == pytest.approx(retrained(params["lr"], params["c"], n_steps=40), rel=1e-5)
    assert best.value < retrained(best.user_attrs["seed_lr"], torch.tensor([2.0, 1.0]), n_steps=40)
    assert params["c"].norm() < torch.tensor([2.0, 1.0]).norm()


def test_an_unrefined_trial_has_the_seeds_value_under_the_same_protocol() -> None:
    made = study()
    made.optimize(lambda trial: problems.refine(trial, estimator=None), n_trials=1)
    (trial,) = made.trials
    assert trial.value == pytest.approx(retrained(trial.params["lr"], torch.tensor([2.0, 1.0]), n_steps=8), rel=1e-5)
    assert trial.user_attrs["protocol"] == "Retrain(n_steps=8)"
    assert trial.user_attrs["n_outer_steps"] == 0
    assert trial.intermediate_values == {0: trial.value}


def test_an_unrefined_trial_of_the_online_protocol_trains_and_reports_as_a_refined_one() -> None:
    made = study()
    made.optimize(lambda trial: problems.refine(trial, estimator=None, evaluate="online"), n_trials=1)
    (trial,) = made.trials
    expected = {k: retrained(trial.params["lr"], torch.tensor([2.0, 1.0]), n_steps=2 * k) for k in (0, 2, 4)}
    best_so_far = {k: min(v for j, v in expected.items() if j <= k) for k in expected}
    assert trial.intermediate_values == pytest.approx(best_so_far, rel=1e-5)
    assert trial.user_attrs["cost_n_val_gradients"] == trial.user_attrs["cost_n_products"] == 0


def test_reports_the_best_so_far_on_the_grid() -> None:
    made = study()
    made.optimize(lambda trial: problems.refine(trial, n_outer_steps=7, evaluate_every=3), n_trials=1)
    (trial,) = made.trials
    values = trial.intermediate_values
    assert list(values) == [0, 3, 6, 7]
    assert list(values.values()) == sorted(values.values(), reverse=True)
    assert values[7] == trial.value


def test_costs_are_counted_in_examples() -> None:
    made = study()
    made.optimize(problems.refine, n_trials=1)
    attributes = made.trials[0].user_attrs
    # 4 outer steps of 2 inner steps, and 3 trainings of 8 steps, on batches of 4; validation batches have 2 examples
    assert attributes["cost_n_train_gradients"] == (4 * 2 + 3 * 8) * 4
    assert attributes["cost_n_val_gradients"] == 4 * 2 * 2
    assert attributes["cost_n_products"] == 4 * 2 * 4
    assert attributes["cost_n_evaluations"] == 3 * 2
    assert attributes["cost_seconds"] > 0


def test_all_splits_are_recorded_and_the_best_step_is_named() -> None:
    made = study()
    made.optimize(problems.refine, n_trials=1)
    trial = made.trials[0]
    attributes = trial.user_attrs
    assert attributes["val_loss"] == trial.value
    assert attributes["val_score"] == pytest.approx(-trial.value)
    assert attributes["test_loss"] == pytest.approx(trial.value)
    assert trial.intermediate_values[attributes["best_outer_step"]] == trial.value
    assert attributes["stopped"] == "finished"
    assert attributes["product_mode"] == "reverse"
    assert attributes["estimator"] == "Greedy(gamma=0.9)"


def test_a_pruned_trial_keeps_the_refined_values_that_its_value_belongs_to(tmp_path: Path) -> None:
    class AtTwo(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.last_step == 2

    made = study(pruner=AtTwo(), storage=f"sqlite:///{tmp_path}/study.db")
    store = optuna.artifacts.FileSystemArtifactStore(tmp_path)
    made.optimize(lambda trial: problems.refine(trial, artifact_store=store), n_trials=1)
    (trial,) = made.trials
    assert trial.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [0, 2]
    params = ghg.refined_params(trial)
    assert trial.params["lr"] == params["lr"] != trial.user_attrs["seed_lr"]
    assert trial.value == pytest.approx(retrained(params["lr"], params["c"], n_steps=8), rel=1e-5)
    assert trial.user_attrs["stopped"] == "pruned"


def test_a_maximizing_study_gets_the_largest_metric() -> None:
    made = study(direction="maximize")
    made.optimize(lambda trial: problems.refine(trial, metric="score", n_outer_steps=20), n_trials=2)
    for trial in made.trials:
        assert trial.value == trial.user_attrs["val_score"] == pytest.approx(-trial.user_attrs["val_loss"])
        assert list(trial.intermediate_values.values()) == sorted(trial.intermediate_values.values())
    assert made.best_value == max(t.value for t in made.trials)


def test_a_maximizing_study_of_a_loss_is_refused_at_the_door() -> None:
    made = study(direction="maximize")
    with pytest.raises(ValueError, match="direction='minimize'"):
        made.optimize(problems.refine, n_trials=1)
    assert made.trials[0].intermediate_values == {}


def test_a_study_that_minimizes_an_accuracy_is_warned_of_it_once(caplog: pytest.LogCaptureFixture) -> None:
    problem = problems.make_problem(metrics={"top_1_accuracy": lambda model, alpha, batch: 0.5})
    for direction in ("minimize", "maximize"):
        made = study(direction=direction, study_name=f"to_{direction}")
        made.optimize(lambda trial: problems.refine(trial, problem=problem, metric="top_1_accuracy"), n_trials=2)
    (said,) = (record.getMessage() for record in caplog.records if "more is better" in record.getMessage())
    assert "'to_minimize' minimizes 'top_1_accuracy'" in said


@pytest.mark.parametrize("metric", ["neg_accuracy", "one_minus_auc", "accuracy_gap", "loss", "score"])
def test_a_study_may_minimize_what_is_to_be_minimized(metric: str, caplog: pytest.LogCaptureFixture) -> None:
    problem = problems.make_problem(metrics={metric: lambda model, alpha, batch: 0.5} if metric != "loss" else {})
    study().optimize(lambda trial: problems.refine(trial, problem=problem, metric=metric), n_trials=1)
    assert "more is better" not in caplog.text


def test_several_objectives_are_refused_at_the_door() -> None:
    with pytest.raises(ValueError, match="single objective, but 'pair' has 2"):
        study(directions=["minimize", "minimize"], study_name="pair").optimize(problems.refine, n_trials=1)


def test_a_seed_that_diverges_is_the_worst_of_all_and_not_a_failure(tmp_path: Path) -> None:
    made = study(storage=f"sqlite:///{tmp_path}/study.db")
    made.optimize(
        lambda trial: problems.refine(trial, problem=problems.make_problem(train_loss=diverging_loss)), n_trials=1
    )
    (trial,) = made.trials
    assert trial.state == TrialState.COMPLETE
    assert trial.value == math.inf
    assert trial.params["lr"] == trial.user_attrs["seed_lr"]
    assert trial.user_attrs["val_loss"] is None
    assert trial.user_attrs["stopped"] == "diverged"
    made.optimize(problems.refine, n_trials=1)  # the sampler can go on from there
    assert made.best_trial.number == 1


def test_the_worst_value_of_a_maximizing_study_is_minus_infinity() -> None:
    made = study(direction="maximize")
    problem = problems.make_problem(train_loss=diverging_loss)
    made.optimize(lambda trial: problems.refine(trial, problem=problem, metric="score"), n_trials=1)
    assert made.trials[0].value == -math.inf


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_trial_that_fails_on_the_way_keeps_what_it_has_found(error: BaseException) -> None:
    def fail_at_three(trial: optuna.trial.BaseTrial, step: ghg.OuterStep) -> None:
        if step.index == 3:
            raise error

    made = study()
    with pytest.raises(type(error)):
        made.optimize(lambda trial: problems.refine(trial, callbacks=[fail_at_three]), n_trials=1)
    (trial,) = made.trials
    assert trial.state == TrialState.FAIL
    assert trial.params["lr"] == trial.user_attrs["refined_lr"] != trial.user_attrs["seed_lr"]
    assert trial.user_attrs["stopped"] == "failed"
    assert list(trial.intermediate_values) == [0, 2]


def test_a_failing_trial_does_not_take_the_study_with_it() -> None:
    def objective(trial: optuna.Trial) -> float:
        batches = [torch.zeros(4)] if trial.number != 1 else (torch.zeros(4) for _ in range(3))
        return problems.refine(trial, problem=problems.make_problem(train_batches=batches))

    made = study()
    made.optimize(objective, n_trials=3, catch=(RuntimeError,))
    assert [t.state for t in made.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]


def test_callbacks_see_every_outer_step() -> None:
    seen: list[tuple[int, bool]] = []
    made = study()
    made.optimize(
        lambda trial: problems.refine(trial, callbacks=[lambda t, s: seen.append((s.index, s.evaluation is not None))]),
        n_trials=1,
    )
    assert seen == [(0, True), (1, False), (2, True), (3, False), (4, True)]


def test_a_fixed_trial_is_refined_without_a_study() -> None:
    value = problems.refine(optuna.trial.FixedTrial({"lr": 0.5}))
    assert value < retrained(0.5, torch.tensor([2.0, 1.0]), n_steps=8)


def test_bad_settings_are_refused_before_any_work() -> None:
    made = study()
    with pytest.raises(ValueError, match="horizon must be an integer of at least 1, but got 0"):
        made.optimize(lambda trial: problems.refine(trial, horizon=0), n_trials=1)
    assert "protocol" not in made.trials[0].user_attrs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update_rule": "sgd"}, r"update_rule must be an object such as SGD\(lr=0\.1\), but got 'sgd'"),
        ({"update_rule": torch.optim.SGD}, r"update_rule must be an object such as SGD\(lr=0\.1\), but got <class"),
        ({"policy": "always"}, r"policy must be an object such as Always\(\), but got 'always'"),
        ({"policy": ghg.Never}, r"policy must be an object such as Always\(\), but got <class .*Never'>"),
        ({"policy": None}, r"policy must be an object such as Always\(\), but got None"),
        ({"estimator": "greedy"}, r"estimator must be an object such as Greedy\(\), or None, but got 'greedy'"),
        ({"estimator": ghg.Greedy}, r"estimator must be an object such as Greedy\(\), or None, but got <class"),
        (
            {"artifact_store": "folder"},
            r"artifact_store must be .*FileSystemArtifactStore.*, or None, but got 'folder'",
        ),
        ({"callbacks": print}, "not iterable"),
    ],
)
def test_names_and_classes_in_place_of_objects_are_refused_before_any_work(
    settings: dict[str, Any], message: str
) -> None:
    made = study()
    with pytest.raises(TypeError, match=message):
        made.optimize(lambda trial: problems.refine(trial, **settings), n_trials=1)
    assert made.trials[0].intermediate_values == {}


def test_the_hyperparameters_of_another_trial_are_refused() -> None:
    made = study()
    alpha = problems.declare(made.ask())
    with pytest.raises(ValueError, match="hyperparameters of trial 0 cannot be refined in trial 1"):
        problems.refine(made.ask(), alpha)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n_outer_steps", [2, 24])
def test_what_is_declared_on_the_cpu_is_refined_on_a_gpu(n_outer_steps: int) -> None:
    made = study()
    problem = problems.make_problem(device="cuda")
    made.optimize(lambda trial: problems.refine(trial, problem=problem, n_outer_steps=n_outer_steps), n_trials=1)
    (trial,) = made.trials
    assert trial.value == pytest.approx(trial.user_attrs["val_loss"])
    assert len(read_trajectory(trial)["c.q50"]) == n_outer_steps + 1
