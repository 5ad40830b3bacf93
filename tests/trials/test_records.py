from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import optuna_greedyhg as ghg
from optuna_greedyhg.trials import records
from tests.trials import problems


class Full:
    """An artifact store on a full disk."""

    def open_reader(self, artifact_id: str) -> Any:
        raise FileNotFoundError(artifact_id)

    def write(self, artifact_id: str, content_body: Any) -> None:
        raise OSError(28, "No space left on device")

    def remove(self, artifact_id: str) -> None:
        raise FileNotFoundError(artifact_id)


def refined(store: Any, **settings: Any) -> optuna.trial.FrozenTrial:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    study.optimize(lambda trial: problems.refine(trial, artifact_store=store, **settings), n_trials=1)
    return study.best_trial


@pytest.fixture
def store(tmp_path: Path) -> optuna.artifacts.FileSystemArtifactStore:
    return optuna.artifacts.FileSystemArtifactStore(tmp_path)


def test_refined_values_come_back_from_another_process(
    store: optuna.artifacts.FileSystemArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.Tensor] = []
    trial = refined(store, callbacks=[lambda t, s: found.append(s.best.values["c"])])
    monkeypatch.setattr(records, "_stores", {})  # as in a process that has written nothing
    with pytest.raises(ValueError, match="artifact_store"):
        ghg.refined_params(trial)
    params = ghg.refined_params(trial, store)
    assert params["lr"] == trial.params["lr"]
    assert torch.equal(params["c"], found[-1])


def test_the_process_that_wrote_tensors_finds_them(store: optuna.artifacts.FileSystemArtifactStore) -> None:
    assert ghg.refined_params(refined(store)).keys() == {"lr", "c"}


def test_improvements_say_what_had_been_found_at_what_cost(store: optuna.artifacts.FileSystemArtifactStore) -> None:
    spent: dict[int, int] = {}
    trial = refined(store, callbacks=[lambda t, s: spent.update({s.index: s.cost.n_train_gradients})])
    rows = records.read_improvements(trial)
    bests = dict(trial.intermediate_values)
    improving = [k for k in bests if k == 0 or bests[k] < min(bests[i] for i in bests if i < k)]
    assert len(improving) > 1
    assert [(row["outer_step"], row["val_loss"]) for row in rows] == [(k, bests[k]) for k in improving]
    assert [row["n_train_gradients"] for row in rows] == [spent[k] for k in improving]
    seconds = [row["seconds"] or 0.0 for row in rows]
    assert 0 < seconds[0] < seconds[-1] <= trial.user_attrs["cost_seconds"]


@pytest.mark.parametrize("settings", [{"evaluate": "online"}, {"keep_weights": True}], ids=["online", "asked for"])
def test_weights_are_kept_where_they_are_the_result_or_asked_for(
    settings: dict[str, Any], store: optuna.artifacts.FileSystemArtifactStore
) -> None:
    trial = refined(store, **settings)
    model = problems.Weights()
    model.load_state_dict(ghg.refined_weights(trial, store))
    lr = torch.tensor(ghg.refined_params(trial)["lr"])
    loss = problems.val_loss(model, {"lr": lr}, None).detach()
    assert float(loss) == pytest.approx(trial.value, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"evaluate": "online", "keep_weights": False}], ids=["retrain", "not wanted"])
def test_there_are_no_weights_where_they_are_not(
    settings: dict[str, Any], store: optuna.artifacts.FileSystemArtifactStore
) -> None:
    with pytest.raises(ValueError, match="keep_weights=True or evaluate='online'"):
        ghg.refined_weights(refined(store, **settings), store)


def test_weights_are_not_promised_without_a_store() -> None:
    with pytest.raises(ValueError, match="keep_weights=True needs a place for the weights; give refine"):
        problems.refine(optuna.create_study().ask(), keep_weights=True)


def test_without_a_store_the_scalars_come_back_and_the_rest_is_said() -> None:
    trial = refined(None)
    with pytest.warns(UserWarning, match=r"\['c'\] of trial 0 were not stored"):
        assert ghg.refined_params(trial) == {"lr": trial.params["lr"]}


def test_a_store_that_fails_costs_the_tensors_and_not_the_trial() -> None:
    trial = refined(Full())
    assert trial.state == optuna.trial.TrialState.COMPLETE
    with pytest.warns(UserWarning, match="were not stored"):
        assert ghg.refined_params(trial) == {"lr": trial.params["lr"]}


def test_a_trial_that_was_never_refined_has_none() -> None:
    with pytest.raises(ValueError, match="has no refined hyperparameters"):
        ghg.refined_params(optuna.create_trial(value=1.0))


def test_another_format_is_refused(store: optuna.artifacts.FileSystemArtifactStore, tmp_path: Path) -> None:
    trial = refined(store)
    torch.save({"version": 99}, tmp_path / trial.user_attrs["tensors_artifact"])
    with pytest.raises(ValueError, match="format version 99, but this release reads version 1"):
        ghg.refined_params(trial, store)


def test_attributes_are_plain_json_of_finite_numbers(tmp_path: Path) -> None:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0), storage=f"sqlite:///{tmp_path}/study.db")
    study.optimize(problems.refine, n_trials=1)
    attributes = study.trials[0].user_attrs
    assert json.loads(json.dumps(attributes, allow_nan=False)) == attributes


def test_the_trajectory_tells_every_step() -> None:
    trial = refined(None)
    columns = records.read_trajectory(trial)
    assert columns["outer_step"] == [0, 1, 2, 3, 4]
    assert [value is not None for value in columns["value"]] == [True, False, True, False, True]
    assert min(v for v in columns["value"] if v is not None) == pytest.approx(trial.value, rel=1e-5)
    assert columns["lr"][0] == pytest.approx(trial.user_attrs["seed_lr"], rel=1e-5)
    assert (columns["c.q10"][0], columns["c.q50"][0], columns["c.q90"][0]) == pytest.approx((1.1, 1.5, 1.9))
    assert columns["val_loss"][0] is None


def test_a_long_trajectory_is_thinned_to_what_fits_into_an_attribute() -> None:
    trajectory = records.Trajectory()
    for k in range(5001):
        value = float(k) if k % 7 == 0 else None
        trajectory.append(k, value, {"x": torch.tensor(1.0 / 3)}, val_loss=0.0, hypergradient_norm=0.0)
    columns = trajectory.columns()
    assert len(columns["outer_step"]) <= 200
    assert columns["outer_step"] == sorted(columns["outer_step"])
    assert (columns["outer_step"][0], columns["outer_step"][-1]) == (0, 5000)
    assert sum(value is not None for value in columns["value"]) >= 100
    assert columns["x"][0] == 0.333333


def test_a_short_trajectory_is_kept_whole() -> None:
    trajectory = records.Trajectory()
    for k in range(100):
        trajectory.append(k, None, {}, val_loss=float(k), hypergradient_norm=0.0)
    assert trajectory.columns()["val_loss"] == list(range(100))


def test_every_row_has_the_numbers_of_its_own_outer_step() -> None:
    trajectory, steps = records.Trajectory(), torch.rand(23, 50, generator=torch.Generator().manual_seed(0))
    for k, x in enumerate(steps):
        alpha = {"first": x[0], "all": x}
        trajectory.append(k, None, alpha, val_loss=0.0, hypergradient_norm=0.0)
        if k == 4:  # read in between, as for a checkpoint
            trajectory = records.Trajectory(trajectory.rows)
        if k == 7:
            assert trajectory.rows[6].keys() == trajectory.rows[0].keys()
    columns = trajectory.columns()
    assert columns["outer_step"] == list(range(23))
    assert columns["first"] == pytest.approx(steps[:, 0].tolist(), rel=1e-5)
    assert columns["all.q90"] == pytest.approx(steps.double().quantile(0.9, dim=1).tolist(), rel=1e-5)


@pytest.mark.parametrize("n", [0, 17_000_000])
def test_tensors_of_any_size_have_a_trajectory(n: int) -> None:
    trajectory = records.Trajectory()
    trajectory.append(0, 1.0, {"x": torch.linspace(0, 1, n)}, val_loss=0.0, hypergradient_norm=0.0)
    columns = trajectory.columns()
    if n == 0:
        assert "x.q50" not in columns
    else:
        assert columns["x.q50"] == pytest.approx([0.5], abs=1e-3)


def test_a_trajectory_that_a_storage_refuses_costs_the_trajectory_and_not_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accept = optuna.storages.InMemoryStorage.set_trial_system_attr

    def refuse(self: Any, trial_id: int, key: str, value: Any) -> None:
        if "trajectory" in key:
            raise RuntimeError("Data too long for column")
        accept(self, trial_id, key, value)

    monkeypatch.setattr(optuna.storages.InMemoryStorage, "set_trial_system_attr", refuse)
    trial = refined(None)
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert records.read_trajectory(trial) is None
