"""Every task: it trains, all of its hyperparameters have a gradient, and refinement makes it better."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FixedTrial

import optuna_greedyhg as ghg
from optuna_greedyhg.hypergrad import evaluation
from optuna_greedyhg.hypergrad.domains import to_coordinates
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.hypergrad.work import at_once
from optuna_greedyhg.tasks import FROM_FOLDER, TASKS, Task, make_objective, make_task
from tests.tasks.idx import write_folder

BUILT_IN = [name for name in TASKS if name not in FROM_FOLDER]


def defaults_of(task: Task) -> tuple[ghg.Alpha, FixedTrial]:
    trial = FixedTrial(dict(task.defaults))
    return ghg.Alpha(trial), trial


def descended(task: Task, **settings: Any) -> tuple[ghg.BilevelProblem | ghg.MetaProblem, ghg.Alpha, ghg.OuterStep]:
    """A task's problem and α at its defaults, and the last step of a descent on it."""
    alpha, trial = defaults_of(task)
    problem, rule = task.define(trial, alpha)
    *_, last = ghg.descend(
        problem, alpha.hyperparameters, update_rule=rule, estimator=ghg.Greedy(), horizon=3, **settings
    )
    return problem, alpha, last


def test_there_are_those_of_the_documentation() -> None:
    assert len(BUILT_IN) == 10
    assert {"fashion-cleaning", "fashion-weights"} == FROM_FOLDER


@pytest.mark.parametrize("name", BUILT_IN)
def test_defaults_name_all_that_is_suggested(name: str) -> None:
    task = make_task(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    task.define(trial := study.ask(), ghg.Alpha(trial))
    assert set(trial.params) == set(task.defaults)
    study.enqueue_trial(dict(task.defaults))  # warns of a value out of its range, which is an error here
    task.define(trial := study.ask(), ghg.Alpha(trial))
    assert trial.params == dict(task.defaults)


@pytest.mark.parametrize("name", BUILT_IN)
def test_seeds_decide_the_data_and_the_device_is_the_tasks(name: str) -> None:
    def first_batch(seed: int) -> torch.Tensor:
        alpha, trial = defaults_of(task := make_task(name, seed=seed))
        problem, _ = task.define(trial, alpha)
        (batch,) = problem.val_episodes[0].first_batches(1)
        images: torch.Tensor = batch[0]
        return images

    assert torch.equal(first_batch(1), first_batch(1))
    assert not torch.equal(first_batch(1), first_batch(2))


@pytest.mark.parametrize("name", BUILT_IN)
def test_trains_at_its_defaults(name: str) -> None:
    alpha, trial = defaults_of(task := make_task(name))
    problem, rule = task.define(trial, alpha)
    first = problem.val_episodes[0]
    products = Products(first, {key: h.domain for key, h in alpha.hyperparameters.items()}, rule)
    coordinates = to_coordinates(alpha.hyperparameters, first.device, first.dtype)
    losses = [
        evaluation.evaluate(products, coordinates, at_once(evaluation.train)(products, coordinates, n, 0), 0, 0).scores[
            "loss"
        ]
        for n in (0, 5 if problem.episodic else 60)
    ]
    assert losses[1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_hyperparameter_has_a_gradient(name: str) -> None:
    settings = {"n_outer_steps": 1, "evaluate": ghg.Retrain(1), "outer_optimizer": partial(torch.optim.SGD, lr=1e3)}
    _, alpha, last = descended(make_task(name), **settings)
    moved = {key: (last.values[key] != h.init.to(last.values[key])) for key, h in alpha.hyperparameters.items()}
    # The quadratic terms of some tables, and pixels that are empty in all images, are read by no gradient.
    assert all(m.double().mean() > 0.5 for m in moved.values()), {key: m.double().mean() for key, m in moved.items()}


@pytest.mark.parametrize("name", BUILT_IN)
def test_one_refined_trial_ends_better_than_its_seed(name: str) -> None:
    task = make_task(name)
    alpha, trial = defaults_of(task)
    task.define(trial, alpha)
    fixed = {key: x for key, x in task.defaults.items() if key not in alpha.scalars}
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.enqueue_trial(fixed, user_attrs={f"seed_{key}": task.defaults[key] for key in alpha.scalars})
    protocol = task.settings.evaluate if name == "digits-warp" else ghg.Retrain(100)
    # What helps against overfitting helps when it has begun.
    n, every = {"digits-heads": (20, 10), "digits-augment": (20, 20)}.get(name, (10, 5))
    settings = replace(task.settings, n_outer_steps=n, evaluate_every=every, evaluate=protocol, policy=ghg.Always())
    study.optimize(make_objective(task, estimator=ghg.Greedy(), settings=settings), n_trials=1)
    (done,) = study.trials
    assert done.value is not None
    assert done.value < done.intermediate_values[0]
    assert set(task.diagnostics) <= done.user_attrs.keys()
    assert "test_loss" in done.user_attrs


def test_fifty_thousand_weights_are_refined_in_minibatches(tmp_path: Path) -> None:
    """Of 1200 images here, of which a sixth validates."""
    write_folder(tmp_path, 1200, 30)
    task = make_task("fashion-weights", folder=tmp_path)
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.enqueue_trial(dict(task.defaults))
    settings = replace(task.settings, horizon=2, n_outer_steps=2, evaluate_every=1)
    moved: list[float] = []

    def observe(trial: object, step: ghg.OuterStep) -> None:
        moved.append(float((step.values["example_logits"] != 0).double().mean()))

    objective = make_objective(task, estimator=ghg.Greedy(), settings=settings, callbacks=[observe])
    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    # Two steps a horizon, on two different halves of the thousand examples.
    assert moved == [0.0, 1.0, 1.0]
    assert trial.user_attrs["cost_n_train_gradients"] == 4 * 500
    assert trial.user_attrs["cost_n_evaluations"] == 3 * 200
    assert set(task.diagnostics) <= trial.user_attrs.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", BUILT_IN)
def test_all_that_a_gpu_does_is_recorded(name: str) -> None:
    task = make_task(name, device="cuda")
    problem, _, last = descended(task, n_outer_steps=6, evaluate=ghg.Retrain(60))  # and no part warns of going without
    assert last.best.scores["loss"] < float("inf")
    recorder = problem.val_episodes[0].recorder
    assert recorder is not None
    assert recorder.n_recordings >= 2
