"""``greedyhg audit`` as a user meets it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

import optuna_greedyhg as ghg
from optuna_greedyhg.cli.audit import DEFAULT_ESTIMATORS
from optuna_greedyhg.cli.console import audit_table
from optuna_greedyhg.hypergrad.audit import AuditRow
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, Fixed
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.tasks import make_task
from tests.problems import bowl
from tests.tasks.idx import write_folder
from tests.test_cli import greedyhg

AUDIT = ("audit", "--task", "digits-l2", "--device", "cpu")
FAST = ("--horizon", "3", "--at-step", "2")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def written() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("audit.json").read_text())
    return content


def stand_in(monkeypatch: pytest.MonkeyPatch, rule: ghg.UpdateRule) -> None:
    """Makes the task one of a single number, trained by a rule."""
    specimen = bowl()

    def define(trial: optuna.trial.BaseTrial, alpha: ghg.Alpha) -> tuple[ghg.BilevelProblem, ghg.UpdateRule]:
        alpha.tensor("curvature", specimen.hyperparameters["curvature"].init)
        return specimen.problem(), rule

    task = SimpleNamespace(defaults={}, define=define)
    monkeypatch.setattr("optuna_greedyhg.cli.audit.load_task", lambda *_, **__: task)


def test_the_numbers_are_those_of_the_audit_at_the_tasks_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--estimators", "greedy, ift-cg,reverse,greedy", "--momentum", "0.5", "--seed", "3", "--warm-up", "1")
    arguments = ("--horizon", "4", "--at-step", "6", *chosen, "--json", "audit.json")
    assert greedyhg("audit", "--task", "digits-cleaning", "--device", "cpu", *arguments) == 0

    task = make_task("digits-cleaning", seed=3)
    trial = optuna.trial.FixedTrial({"lr": 0.1, "weight_decay": 1e-4})
    alpha = ghg.Alpha(trial)
    problem, rule = task.define(trial, alpha)
    assert isinstance(rule, ghg.SGD)
    rule = replace(rule, momentum=0.5)
    auditor = ghg.HypergradientAudit(
        problem, alpha.hyperparameters, update_rule=rule, horizon=4, at_step=6, n_warm_up=1, seed=3
    )
    content = written()
    rows = content.pop("estimators")
    assert content == {
        "task": "digits-cleaning",
        "seed": 3,
        "horizon": 4,
        "at_step": 6,
        "n_warm_up": 1,
        "update_rule": str(rule),
        "device": "cpu",
    }
    assert [row["name"] for row in rows] == ["greedy", "ift-cg", "reverse"]
    for row, expected in zip(rows, auditor.run({row["name"]: ESTIMATORS[row["name"]] for row in rows}), strict=True):
        same = expected.as_json()
        for measured in ("seconds", "relative_seconds"):
            assert row.pop(measured) > 0
            del same[measured]
        assert row == same
    assert rows[1]["cosine_by_group"]["lr"] is None  # to which implicit differentiation is blind
    assert rows[1]["sign_agreement"]["lr"] == 0
    assert rows[2]["cosine"] == pytest.approx(1)

    lines = capsys.readouterr().out.splitlines()
    assert "training steps 7 to 10" in lines[0]
    assert [line.split()[0] for line in lines if line.split()[1:] and line.split()[0] in ESTIMATORS] == [
        "greedy",
        "ift-cg",
        "reverse",
    ]


def test_without_options_the_task_keeps_its_rule_and_the_usual_estimators_are_compared() -> None:
    assert greedyhg(*AUDIT, *FAST, "--json", "audit.json", "--quiet") == 0
    assert [row["name"] for row in written()["estimators"]] == DEFAULT_ESTIMATORS.split(",")
    assert "momentum=0.9" in written()["update_rule"]


def test_the_table_of_all_estimators_is_whole_at_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ",".join(name for name in ESTIMATORS if name != "forward")  # which has 302 columns to push
    assert greedyhg("audit", "--task", "digits-cleaning", "--device", "cpu", *FAST, "--estimators", chosen) == 0
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


def test_a_folder_of_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optuna_greedyhg.tasks.fashion.N_TRAIN", 20)
    write_folder(Path(), 30, 10)
    options = ("--estimators", "t1t2", "--horizon", "1", "--at-step", "0", "--device", "cpu", "--json", "audit.json")
    assert greedyhg("audit", "--task", "fashion-cleaning", "--data", ".", *options, "--quiet") == 0
    (row,) = written()["estimators"]
    assert row["cosine"] == pytest.approx(1, rel=1e-4)  # the horizon is the last step


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert greedyhg(*AUDIT, *FAST, "--estimators", "t1t2", "--quiet") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_an_estimator_that_fails_is_said_below_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Broken(Fixed):
        def estimate(self, memory: Tensors, end: Any) -> Tensors:
            raise RuntimeError("no [memory]\nleft")

    monkeypatch.setattr("optuna_greedyhg.cli.audit.ESTIMATORS", {"broken": Broken(), "t1t2": ESTIMATORS["t1t2"]})
    assert greedyhg(*AUDIT, *FAST, "--estimators", "broken,t1t2", "--json", "audit.json") == 0
    assert "broken: RuntimeError: no [memory] left" in capsys.readouterr().out.splitlines()
    broken, other = written()["estimators"]
    assert broken["error"] == "RuntimeError: no [memory]\nleft"
    assert (broken["cosine"], broken["cost"]) == (None, None)
    assert other["cosine"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("audit",), "Missing option '--task'"),
        ((*AUDIT, "--estimators", "greedy,nope"), "there is no 'nope', only first-order, t1t2, greedy"),
        ((*AUDIT, "--estimators", ""), "there is no ''"),
        ((*AUDIT, "--momentum", "1.0"), "momentum must be in [0, 1)"),
        ((*AUDIT, "--warm-up", "5"), "5 horizons of 50 steps do not fit"),
        ((*AUDIT, "--horizon", "0"), "--horizon"),
        ((*AUDIT, "--json", "nowhere/x.json"), "cannot write nowhere/x.json"),
        ((*AUDIT, "--data", "."), "brings its own data"),
        (("audit", "--task", "fashion-cleaning"), "needs a data folder"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert greedyhg(*arguments) == 2
    assert_one_line(capsys, message)
    assert list(Path().iterdir()) == []


def test_training_that_diverges_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, ghg.SGD(lr=1e30))
    assert greedyhg(*AUDIT, "--json", "audit.json") == 2
    assert_one_line(capsys, "after step 11 of 250; lower the learning rate")
    assert list(Path().iterdir()) == []


def test_a_rule_without_momentum_is_given_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, ghg.Adam(lr=0.1))
    assert greedyhg(*AUDIT, "--momentum", "0.9") == 2
    assert_one_line(capsys, "the task trains with Adam(")


def assert_one_line(capsys: pytest.CaptureFixture[str], message: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("greedyhg: error: ")
    assert message in line


def test_of_many_groups_only_the_lowest_agreement_is_shown() -> None:
    groups = {f"g{k}": 0.5 + k / 100 for k in range(9)}
    (column,) = [c for c in audit_table([AuditRow("mine", sign_agreement=groups)]).columns if "signs" in str(c.header)]
    assert (str(column.header), list(column.cells)) == ("lowest\nsigns", ["50%"])
    few = {"a": 0.25, "b": 0.75}
    columns = [c for c in audit_table([AuditRow("mine", sign_agreement=few)]).columns if "signs" in str(c.header)]
    assert [list(c.cells) for c in columns] == [["25%"], ["75%"]]
