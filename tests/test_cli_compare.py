"""greedyhg compare as a user meets it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from optuna_greedyhg.cli import main
from optuna_greedyhg.tasks import base
from optuna_greedyhg.tasks.digits import DigitsL2
from optuna_greedyhg.trials.policies import Always
from tests.tasks.idx import write_folder

URL = "sqlite:///s.db"
L2 = ("--task", "digits-l2", "--storage", URL)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compare(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def rows(file: str = "c.json") -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["method"], row["seed"]): row for row in json.loads(Path(file).read_text())["rows"]}


def trials(method: str, seed: int = 0) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=f"digits-l2/{method}/{seed}", storage=URL).trials


def test_methods_get_equal_budgets_on_the_same_seeds_and_are_carried_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chromium")
    monkeypatch.setattr(DigitsL2, "settings", replace(DigitsL2.settings, policy=Always()))  # its own wants ten seeds
    common = (*L2, "--methods", "defaults,random,tpe+greedy", "--seeds", "2", "--json", "c.json")
    assert compare(*common, "--budget", "2", "--out", "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Against defaults, seed by seed" in printed
    assert "cannot go below 0.5 with 2 seeds" in printed
    assert "when the end of defaults was reached" in printed
    assert "Picture: none, as no Chrome or Chromium was found" in printed
    assert "greedyhg compare: digits-l2" in Path("out/comparison.html").read_text(encoding="utf-8")

    content, first = json.loads(Path("c.json").read_text()), rows()
    prices, full = content["prices"], content["full_training"]
    assert content["budget"] == pytest.approx(2 * full)
    # 200 steps of 150 images, and one evaluation of 300
    assert full == pytest.approx(200 * 150 + 300 * prices["evaluation"])
    assert len(first) == 6
    for (method, seed), row in first.items():
        counts = (row[f"n_{kind}"] for kind in ("train_gradients", "val_gradients", "products", "evaluations"))
        weights = (1.0, prices["val_gradient"], prices["product"], prices["evaluation"])
        assert row["cost"] == pytest.approx(sum(n * x for n, x in zip(counts, weights, strict=True)))
        assert (row["n_products"] > 0) == (method == "tpe+greedy")
        assert row["n_trials"] == {"defaults": 1, "random": 2, "tpe+greedy": 1}[method]
        assert all(cost <= content["budget"] * (1 + 1e-9) for cost, *_ in row["best_value_curve"])
        assert row["best_value_curve"][-1][2:] == [row["val_loss"], row["test_loss"]]
        # The refined trial's first evaluation after its seed's comes too late.
        assert min(trial.intermediate_values[0] for trial in trials(method, seed)) == row["val_loss"]
    # The refined one stops with the outer step that reaches the budget: 5 steps of 10 batches, or an evaluation.
    over = first["tpe+greedy", 0]["cost"] - content["budget"]
    assert 0 <= over < 1.2 * full
    # What a seed decides is the same for all methods, and not for all seeds.
    assert {row["best_value_curve"][0][2] for (_, seed), row in first.items() if seed == 0} >= {
        first["defaults", 0]["val_loss"]
    }
    assert first["defaults", 0]["val_loss"] != first["defaults", 1]["val_loss"]

    assert compare(*common, "--budget", "2", "--quiet") == 0
    assert rows() == first
    assert compare(*common, "--budget", "3", "--quiet") == 0
    assert rows()["random", 0]["n_trials"] == 3
    assert rows()["random", 0]["best_value_curve"][0] == first["random", 0]["best_value_curve"][0]
    assert len({trial.params["strength"] for trial in trials("random")}) == 3
    assert json.loads(Path("c.json").read_text())["prices"] == prices


@pytest.mark.filterwarnings("ignore:FirstOrder.. sees no effect")  # which is so in this task
@pytest.mark.parametrize("method", ["gp", "cmaes", "qmc", "qmc+first-order"])
def test_knows_other_samplers_and_estimators(method: str) -> None:
    assert compare(*L2, "--methods", method, "--seeds", "1", "--budget", "3", "--json", "c.json", "--quiet") == 0
    assert rows()[method, 0]["val_loss"] > 0


def test_ctrl_c_keeps_what_is_finished_and_the_next_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = base.refine, []

    def interrupted(*arguments: Any, **settings: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(base, "refine", interrupted)
    common = (*L2, "--methods", "random", "--seeds", "1", "--budget", "3", "--json", "c.json", "--quiet")
    assert compare(*common) == 130
    assert capsys.readouterr().err.splitlines() == ["greedyhg: error: interrupted; finished trials are in the storage"]
    assert not Path("c.json").exists()
    assert compare(*common) == 0
    states = [trial.state for trial in trials("random")]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert rows()["random", 0]["cost"] == pytest.approx(json.loads(Path("c.json").read_text())["budget"])


def test_defaults_that_were_interrupted_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    common = (*L2, "--methods", "defaults", "--seeds", "1", "--budget", "1", "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr(base, "refine", interrupt)
        assert compare(*common) == 130
    assert compare(*common) == 0
    assert [trial.params for trial in trials("defaults")] == [{"strength": 1e-3}] * 2
    assert compare(*common, "--json", "c.json") == 0
    assert rows()["defaults", 0]["n_trials"] == 2


def test_a_method_whose_trials_fail_is_given_up_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(base, "refine", fail)
    assert compare(*L2, "--methods", "random", "--seeds", "1", "--budget", "2", "--json", "c.json") == 1
    assert "random, seed 0: given up after three failed trials" in " ".join(capsys.readouterr().out.split())
    assert [trial.state for trial in trials("random")] == [TrialState.FAIL] * 3
    assert rows()["random", 0]["val_loss"] is None


def test_a_study_that_was_run_otherwise_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    other = optuna.create_study(storage=URL, study_name="digits-l2/random/1")
    other.add_trial(optuna.trial.create_trial(value=0.0))
    assert compare(*L2, "--methods", "tpe,random", "--seeds", "2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "digits-l2/random/1" in line
    assert "is another one" in line
    assert optuna.study.get_all_study_names(URL) == ["digits-l2/random/1"]


def test_a_task_with_a_folder_of_data_is_compared_online() -> None:
    write_folder(Path(), 1010, 10)
    common = ("--task", "fashion-cleaning", "--storage", URL, "--seeds", "1", "--methods", "random", "--quiet")
    assert compare(*common) == 2
    assert not Path("s.db").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--task'"),
        (("--task", "digits-l2", "--methods", "tpe,nope"), "got 'nope'"),
        (("--task", "digits-l2", "--methods", "tpe+nope"), "no estimator 'nope' in 'tpe+nope'"),
        (("--task", "digits-l2", "--methods", "defaults+greedy"), "got 'defaults+greedy'"),
        (("--task", "digits-l2", "--methods", ""), "got ''"),
        (("--task", "digits-l2", "--budget", "0"), "at least one full training, but got 0"),
        (("--task", "digits-l2", "--budget", "nan"), "at least one full training, but got nan"),
        (("--task", "digits-l2", "--seeds", "0"), "--seeds"),
        (("--task", "digits-l2", "--json", "nowhere/x.json"), "cannot write nowhere/x.json"),
        (("--task", "digits-l2", "--out", "junk.db/x"), "cannot make the folder"),
        (("--task", "digits-l2", "--storage", "sqlite:///nowhere/s.db"), "unable to open database file"),
        (("--task", "digits-l2", "--storage", "sqlite:///junk.db"), "file is not a database"),
        (("--task", "digits-l2", "--data", "."), "brings its own data"),
        (("--task", "fashion-cleaning"), "needs a data folder"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("junk.db").write_text("no database")
    assert compare(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("greedyhg: error: ")
    assert message in line
    assert [path.name for path in Path().iterdir()] == ["junk.db"]
