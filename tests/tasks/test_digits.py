from __future__ import annotations

from dataclasses import replace

import optuna
import pytest
import torch

import optuna_greedyhg as ghg
from optuna_greedyhg.tasks import TASKS, DigitsCleaning, DigitsL2, make_objective, make_task
from optuna_greedyhg.tasks.base import Settings
from optuna_greedyhg.tasks.digits import load_splits

FAST = Settings(horizon=5, n_outer_steps=8, outer_lr=0.3, evaluate=ghg.Retrain(40), evaluate_every=4)
CPU = torch.device("cpu")


def test_splits_share_no_image_and_leave_none_out() -> None:
    splits = load_splits(300, 300, torch.Generator().manual_seed(0), CPU)
    assert [len(labels) for _, labels in splits] == [300, 300, 1197]
    marked = torch.cat([images for images, _ in splits])
    everything = load_splits(1, 1, torch.Generator().manual_seed(1), CPU)
    ordered = torch.cat([images for images, _ in everything])
    assert torch.equal(marked.sum(dim=0), ordered.sum(dim=0))
    assert marked.min() == 0
    assert marked.max() == 1


@pytest.mark.parametrize("make", [DigitsCleaning, DigitsL2])
def test_equal_seeds_give_equal_problems(make: type[DigitsCleaning | DigitsL2]) -> None:
    def losses(seed: int) -> list[float]:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        study.optimize(make_objective(make(seed), estimator=ghg.Greedy(), settings=FAST), n_trials=1)
        return list(study.trials[0].intermediate_values.values())

    assert losses(1) == losses(1) != losses(2)


def test_the_share_of_wrong_labels_is_what_was_asked_for() -> None:
    assert DigitsCleaning(share=0.0).is_wrong.sum() == 0
    # of the replaced half, a tenth is right by chance: 300·0.5·0.9 = 135, with a standard deviation of 9
    assert abs(int(DigitsCleaning().is_wrong.sum()) - 135) < 36


def test_refinement_tells_clean_from_corrupted_and_beats_the_defaults() -> None:
    task = DigitsCleaning()
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.enqueue_trial({}, user_attrs={f"seed_{name}": value for name, value in task.defaults.items()})
    settings = Settings(horizon=10, n_outer_steps=30, outer_lr=0.3, evaluate=ghg.Retrain(300), evaluate_every=10)
    study.optimize(make_objective(task, estimator=ghg.Greedy(), settings=settings), n_trials=1)
    (trial,) = study.trials
    seed_value = trial.intermediate_values[0]
    assert trial.user_attrs["weight_clean"] > 0.75
    assert trial.user_attrs["weight_corrupted"] < 0.35
    assert trial.value < 0.7 * seed_value
    assert trial.user_attrs["test_loss"] < 0.7 * seed_value


@pytest.mark.parametrize(("has_store", "ancestors"), [(True, [None, 0]), (False, ["nothing to say"] * 2)])
def test_example_weights_are_inherited_where_there_is_a_store(
    has_store: bool, ancestors: list[object], tmp_path: object
) -> None:
    store = optuna.artifacts.FileSystemArtifactStore(str(tmp_path)) if has_store else None
    settings = replace(FAST, inherit=DigitsCleaning.settings.inherit)
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    objective = make_objective(DigitsCleaning(), estimator=ghg.Greedy(), settings=settings, artifact_store=store)
    study.optimize(objective, n_trials=2)
    assert [trial.user_attrs.get("inherited_from", "nothing to say") for trial in study.trials] == ancestors


def test_l2_strengths_start_from_the_sampled_level_and_differ_by_pixel(tmp_path: object) -> None:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    store = optuna.artifacts.FileSystemArtifactStore(str(tmp_path))
    study.enqueue_trial({"strength": 1e-2})
    settings = Settings(horizon=10, n_outer_steps=20, outer_lr=0.3, evaluate=ghg.Retrain(200), evaluate_every=5)
    objective = make_objective(DigitsL2(), estimator=ghg.Greedy(), settings=settings, artifact_store=store)
    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    strengths = ghg.refined_params(trial)["strengths"]
    assert isinstance(strengths, torch.Tensor)
    assert strengths.shape == (64,)
    assert strengths.std() > 0
    assert ((strengths >= 1e-6) & (strengths <= 1)).all()
    assert trial.value < trial.intermediate_values[0]


def test_every_task_has_a_name_and_a_summary() -> None:
    assert make_task("digits-l2").summary == TASKS["digits-l2"]
    with pytest.raises(KeyError, match="No task 'digits'; there are digits-cleaning"):
        make_task("digits")
