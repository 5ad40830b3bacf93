from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.trial import TrialState

import optuna_greedyhg as ghg
from optuna_greedyhg.trials import records
from tests.trials import problems

INIT = torch.tensor([2.0, 1.0])


@pytest.fixture
def store(tmp_path: Path) -> FileSystemArtifactStore:
    return FileSystemArtifactStore(tmp_path)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    optuna.logging.enable_propagation()
    yield caplog
    optuna.logging.disable_propagation()


def declare(trial: optuna.trial.BaseTrial, store: Any, init: torch.Tensor = INIT, **options: Any) -> ghg.Alpha:
    alpha = ghg.Alpha(trial, artifact_store=store)
    alpha.suggest_float("lr", 1e-3, 1.0, log=True)
    alpha.tensor("c", init, inherit=True, **options)
    return alpha


def objective(store: Any, **settings: Any) -> Callable[[optuna.Trial], float]:
    return lambda trial: problems.refine(trial, declare(trial, store), **settings)


def empty_study(**options: Any) -> optuna.Study:
    return optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0), pruner=optuna.pruners.NopPruner(), **options)


def make_study(n_trials: int, store: Any, direction: str = "minimize", **settings: Any) -> optuna.Study:
    study = empty_study(direction=direction)
    study.optimize(objective(store, **settings), n_trials=n_trials)
    return study


def start(study: optuna.Study, store: Any, **options: Any) -> tuple[torch.Tensor, Any]:
    """Where the next trial's tensor starts, and from which trial that is."""
    trial = study.ask()
    alpha = declare(trial, store, **options)
    return alpha.hyperparameters["c"].init, trial.user_attrs["inherited_from"]


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_a_tensor_starts_where_the_best_trial_has_ended(store: FileSystemArtifactStore, direction: str) -> None:
    metric = "loss" if direction == "minimize" else "score"
    study = make_study(5, store, direction, metric=metric)
    assert study.trials[0].user_attrs["inherited_from"] is None
    for k, trial in enumerate(study.trials[1:], start=1):
        values = [t.value for t in study.trials[:k]]
        best = values.index(min(values) if direction == "minimize" else max(values))
        assert trial.user_attrs["inherited_from"] == best
        seed = torch.load(Path(store._base_path) / trial.user_attrs["tensors_artifact"], weights_only=True)["seed"]["c"]
        assert torch.equal(seed, ghg.refined_params(study.trials[best], store)["c"])
    assert {t.user_attrs["inherited_from"] for t in study.trials} != {None, 0}


@pytest.mark.parametrize(
    ("of_alpha", "of_tensor", "inherits"),
    [(True, {}, True), (True, {"inherit": False}, False), (False, {}, False), (False, {"inherit": True}, True)],
)
def test_alpha_decides_for_tensors_that_do_not_say(
    of_alpha: bool, of_tensor: dict[str, bool], inherits: bool, store: FileSystemArtifactStore
) -> None:
    study = make_study(1, store)
    alpha = ghg.Alpha(study.ask(), artifact_store=store, inherit=of_alpha)
    expected = ghg.refined_params(study.trials[0], store)["c"] if inherits else INIT
    assert torch.equal(alpha.tensor("c", INIT, **of_tensor), expected)


def test_what_is_inherited_is_refined_further(store: FileSystemArtifactStore) -> None:
    study = make_study(6, store, n_outer_steps=2)
    norms = [float(ghg.refined_params(t, store)["c"].norm()) for t in study.trials]
    assert norms[-1] < norms[0] - 0.5


def test_the_store_of_alpha_is_where_refine_keeps_tensors(store: FileSystemArtifactStore, tmp_path: Path) -> None:
    study = make_study(1, store)
    assert "c" in ghg.refined_params(study.trials[0], store)
    (tmp_path / "other").mkdir()
    other = FileSystemArtifactStore(tmp_path / "other")
    study.optimize(objective(store, artifact_store=other), n_trials=1)
    assert "c" in ghg.refined_params(study.trials[1], other)


def test_only_complete_trials_of_finite_value_have_heirs(store: FileSystemArtifactStore) -> None:
    study = make_study(1, store)
    best = study.trials[0]
    for state, value in [(TrialState.PRUNED, -9.0), (TrialState.FAIL, None), (TrialState.RUNNING, None)]:
        study.add_trial(optuna.create_trial(state=state, value=value, user_attrs=best.user_attrs))
    assert start(study, store)[1] == 0
    diverged = empty_study()
    diverged.add_trial(optuna.create_trial(value=math.inf, user_attrs=best.user_attrs))
    assert start(diverged, store)[1] is None


def test_it_keeps_dtype_and_domain(store: FileSystemArtifactStore) -> None:
    study = make_study(1, store)
    tensor, number = start(study, store, init=INIT.double(), domain=ghg.Interval(-5, 5))
    assert (tensor.dtype, number) == (torch.float64, 0)
    assert torch.equal(tensor.float(), ghg.refined_params(study.trials[0], store)["c"])


def lose(store: FileSystemArtifactStore, trial: optuna.trial.FrozenTrial) -> None:
    store.remove(trial.user_attrs["tensors_artifact"])


def tear(store: FileSystemArtifactStore, trial: optuna.trial.FrozenTrial) -> None:
    path = Path(store._base_path) / trial.user_attrs["tensors_artifact"]
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (lose, {}, "the tensors of trial 0 cannot be read: ArtifactNotFound"),
        (tear, {}, "the tensors of trial 0 cannot be read: RuntimeError"),
        (None, {"init": torch.zeros(3)}, r"trial 0 cannot be inherited: it has the shape \(2,\), and not \(3,\)"),
        (None, {"domain": ghg.Interval(1.0, 2.0)}, r"cannot be inherited: .*must be within \[1\.0, 2\.0\]"),
    ],
    ids=["lost", "torn", "shape", "domain"],
)
def test_what_cannot_be_inherited_starts_from_init(
    spoil: Any, options: Any, message: str, store: FileSystemArtifactStore, log: pytest.LogCaptureFixture
) -> None:
    study = make_study(1, store)
    if spoil is not None:
        spoil(store, study.trials[0])
    tensor, number = start(study, store, **options)
    assert tensor is options.get("init", INIT)
    assert number is None
    assert [r.name for r in log.records if r.levelname == "WARNING"] == ["optuna.greedyhg"] * (2 if spoil else 1)
    assert re.search(message, log.text)


def test_a_best_trial_without_tensors_has_no_heirs(
    store: FileSystemArtifactStore, log: pytest.LogCaptureFixture
) -> None:
    study = make_study(1, store)
    study.add_trial(optuna.create_trial(value=-9.0))
    tensor, number = start(study, store)
    assert (tensor is INIT, number) == (True, None)
    assert "c starts from its init, as that of trial 1 cannot be inherited: it has stored none" in log.text


def test_two_tensors_have_one_ancestor(store: FileSystemArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(1, store)
    read = records.read_tensors
    calls: list[int] = []
    monkeypatch.setattr(records, "read_tensors", lambda t, s: calls.append(t.number) or read(t, s))
    trial = study.ask()
    alpha = declare(trial, store)
    alpha.tensor("d", torch.zeros(2), inherit=True)  # which the ancestor did not have
    alpha.tensor("e", torch.zeros(2))
    assert calls == [0]
    assert trial.user_attrs["inherited_from"] == 0
    assert not torch.equal(alpha.hyperparameters["c"].init, INIT)
    assert torch.equal(alpha.hyperparameters["d"].init, torch.zeros(2))


def test_nothing_is_recorded_where_nothing_was_to_be_inherited() -> None:
    study = empty_study()
    study.optimize(problems.refine, n_trials=1)
    assert "inherited_from" not in study.trials[0].user_attrs


def test_without_a_store_it_is_refused() -> None:
    trial = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).ask()
    with pytest.raises(ValueError, match=r"'c' is inherited .* say Alpha\(trial, artifact_store=\.\.\.\)"):
        ghg.Alpha(trial).tensor("c", INIT, inherit=True)


def test_several_objectives_have_no_best_trial(store: FileSystemArtifactStore) -> None:
    study = optuna.create_study(directions=["minimize", "minimize"], study_name="pair")
    with pytest.raises(ValueError, match="'pair' has 2 objectives"):
        ghg.Alpha(study.ask(), artifact_store=store).tensor("c", INIT, inherit=True)


def test_a_bad_init_is_refused_also_where_it_is_not_used(store: FileSystemArtifactStore) -> None:
    study = make_study(1, store)
    with pytest.raises(ValueError, match="finite"):
        start(study, store, init=torch.tensor([math.nan, 1.0]))


def test_a_fixed_trial_starts_from_init(store: FileSystemArtifactStore) -> None:
    trial = optuna.trial.FixedTrial({"lr": 0.5})
    problems.refine(trial, declare(trial, store))
    assert trial.user_attrs["inherited_from"] is None


def test_another_process_inherits_from_a_database(store: FileSystemArtifactStore, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    workers = [
        optuna.create_study(
            study_name="x", storage=storage, load_if_exists=True, sampler=ghg.GreedyHGSampler(seed=seed)
        )
        for seed in (0, 1)
    ]
    workers[0].optimize(objective(store), n_trials=1)
    records._stores.clear()  # as in a process that has written nothing
    workers[1].optimize(objective(store), n_trials=1)
    assert workers[1].trials[1].user_attrs["inherited_from"] == 0


def test_threads_inherit(store: FileSystemArtifactStore) -> None:
    study = empty_study()
    study.optimize(objective(store), n_trials=8, n_jobs=3)
    for trial in study.trials:
        assert trial.state == TrialState.COMPLETE
        ancestor = trial.user_attrs["inherited_from"]
        assert ancestor is None or study.trials[ancestor].datetime_complete <= trial.datetime_complete
    assert any(t.user_attrs["inherited_from"] is not None for t in study.trials)
