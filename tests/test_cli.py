"""The command line as a user meets it: what it writes, what it says, how it exits."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from optuna_greedyhg.cli import main
from optuna_greedyhg.tasks import TASKS
from tests.tasks.idx import write_folder

FAST = ["--outer-steps", "3", "--horizon", "3"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def greedyhg(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_demo_leaves_three_studies_a_page_and_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """It does so beside the studies of an earlier demo, which it leaves alone."""
    optuna.create_study(study_name="demo-digits-cleaning-1/tpe", storage="sqlite:///greedyhg.db")
    assert greedyhg("demo", "--n-trials", "1", "--artifacts", "kept", "--json", "demo.json", "--seed", "1") == 0
    printed = capsys.readouterr().out
    assert "optuna-dashboard sqlite:///greedyhg.db --artifact-dir kept" in printed
    assert "greedyhg-report.html" in printed

    methods = {row["name"]: row for row in json.loads(Path("demo.json").read_text())["methods"]}
    assert list(methods) == ["defaults", "tpe", "tpe+greedy"]
    for row in methods.values():
        assert {"val_loss", "test_loss", "test_accuracy", "n_train_gradients", "n_val_gradients", "n_products"} < set(
            row
        )
        assert row["seconds"] > 0
    assert methods["tpe"]["cost"] >= methods["tpe+greedy"]["cost"]
    assert methods["tpe"]["cost"] - methods["tpe+greedy"]["cost"] <= methods["defaults"]["cost"]  # at most a trial over
    assert methods["tpe"]["n_products"] == 0 < methods["tpe+greedy"]["n_products"]

    for name, row in methods.items():
        study = optuna.load_study(study_name=f"demo-digits-cleaning-2/{name}", storage="sqlite:///greedyhg.db")
        assert study.best_value == row["val_loss"]
        assert len(study.trials) == row["n_trials"]
    page = Path("greedyhg-report.html").read_text()
    assert "demo: digits-cleaning" in page
    assert page.count("<svg") + page.count("plotly-graph-div") >= 3
    assert list(Path("kept").iterdir())


@pytest.mark.filterwarnings("ignore:FirstOrder.. sees no effect")  # which is so in this task
@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "cmaes", "qmc"])
@pytest.mark.parametrize("estimator", ["greedy", "spectral", "first-order", "reverse", "none"])
def test_run_knows_every_sampler_and_estimator(
    sampler: str, estimator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--task", "digits-l2", "--sampler", sampler, "--estimator", estimator, "--n-trials", "1", *FAST]
    assert greedyhg("run", *arguments, "--json", "run.json") == 0
    (row,) = json.loads(Path("run.json").read_text())["methods"]
    assert row["name"] == f"{sampler}+{estimator}"
    assert (row["n_products"] > 0) == (estimator in ("greedy", "spectral", "reverse"))
    assert (row["n_val_gradients"] > 0) == (estimator != "none")
    assert f"{sampler}+{estimator}" in capsys.readouterr().out


def test_a_second_run_carries_on() -> None:
    common = ["run", "--task", "digits-l2", "--storage", "sqlite:///s.db", "--study-name", "s", "--sampler", "random"]
    assert greedyhg(*common, "--n-trials", "2", *FAST, "--quiet") == 0
    assert greedyhg(*common, "--n-trials", "1", "--estimator", "none", *FAST, "--quiet") == 0
    study = optuna.load_study(study_name="s", storage="sqlite:///s.db")
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3
    assert len({t.params["strength"] for t in study.trials}) == 3  # and does not repeat the seeds it has had
    assert [t.user_attrs["estimator"] for t in study.trials] == ["Greedy(gamma=0.9)"] * 2 + ["None"]


def test_run_takes_gamma_and_a_folder_of_data() -> None:
    write_folder(Path(), 1010, 10)
    options = ["--data", ".", "--gamma", "0.5", "--n-trials", "1", "--horizon", "1", "--outer-steps", "1"]
    storage = ["--storage", "sqlite:///s.db", "--study-name", "s", "--device", "cpu", "--quiet"]
    assert greedyhg("run", "--task", "fashion-cleaning", *options, *storage) == 0
    study = optuna.load_study(study_name="s", storage="sqlite:///s.db")
    assert study.trials[0].user_attrs["estimator"] == "Greedy(gamma=0.5)"
    assert study.trials[0].user_attrs["cost_n_products"] == 1000


def test_a_timeout_starts_no_further_trial() -> None:
    arguments = ["--task", "digits-l2", "--n-trials", "1000", "--timeout", "0.5", *FAST]
    assert greedyhg("run", *arguments, "--json", "run.json", "--quiet") == 0
    assert 1 <= json.loads(Path("run.json").read_text())["methods"][0]["n_trials"] < 1000


def test_a_timeout_ends_the_trial_in_progress_which_is_complete() -> None:
    arguments = ["--task", "digits-l2", "--n-trials", "2", "--timeout", "0.5", "--outer-steps", "1000000"]
    assert greedyhg("run", *arguments, "--storage", "sqlite:///run.db", "--study-name", "s", "--quiet") == 0
    (trial,) = optuna.load_study(study_name="s", storage="sqlite:///run.db").trials
    assert trial.state == optuna.trial.TrialState.COMPLETE
    assert trial.user_attrs["stopped"] == "study_stop"


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert greedyhg("run", "--task", "digits-l2", "--n-trials", "1", *FAST, "--quiet") == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert greedyhg("--version") == 0
    assert capsys.readouterr().out == f"{version('optuna-greedyhg')}\n"


def test_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert greedyhg("tasks") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(TASKS)


RUN = ("run", "--task", "digits-l2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bogus",), "No such command 'bogus'"),
        (("run",), "Missing option '--task'"),
        (("run", "--task", "nope"), "'nope' is not one of 'digits-cleaning'"),
        ((*RUN, "--bogus"), "No such option: --bogus"),
        ((*RUN, "--sampler", "nope"), "'nope' is not one of 'tpe'"),
        ((*RUN, "--n-trials", "0"), "--n-trials"),
        ((*RUN, "--gamma", "1.5"), "--gamma"),
        ((*RUN, "--estimator", "t1t2", "--gamma", "0.1"), "t1t2 has no γ"),
        ((*RUN, "--study-name", "s"), "a study in memory is gone at the end; give a --storage"),
        ((*RUN, "--storage", "postgresql://u:secret@localhost:1/x"), "cannot use the storage 'postgresql://u:***@"),
        ((*RUN, "--storage", "postgresql://u:secret@h:port/x"), "cannot use the storage 'postgresql://u:***@h:port/x'"),
        ((*RUN, "--storage", "postgresql:/u:secret@h/x"), "cannot use the storage 'postgresql:/u:***@h/x'"),
        (
            (*RUN, "--storage", "nosql://h/x?user=u&password=secret"),
            "cannot use the storage 'nosql://h/x?password=***&user=u'",
        ),
        ((*RUN, "--horizon", "x"), "--horizon"),
        ((*RUN, "--storage", "nonsense"), "cannot use the storage 'nonsense'"),
        ((*RUN, "--storage", "sqlite:///nowhere/s.db"), "unable to open database file"),
        ((*RUN, "--storage", "sqlite:///junk.db"), "file is not a database"),
        ((*RUN, "--json", "nowhere/x.json"), "cannot write nowhere/x.json"),
        ((*RUN, "--json", "."), "name a file"),
        ((*RUN, "--artifacts", "junk.db/x"), "cannot make the folder"),
        (("run", "--task", "fashion-cleaning"), "needs a data folder"),
        (("run", "--task", "fashion-cleaning", "--data", "nowhere"), "nowhere does not exist"),
        (("run", "--task", "fashion-cleaning", "--data", "junk.db"), "junk.db does not exist, or is no folder"),
        ((*RUN, "--data", "."), "brings its own data"),
        ((*RUN, "--seed", str(2**32)), "--seed"),
        ((*RUN, "--artifacts", "kept", "--storage", "sqlite:///nowhere/s.db"), "unable to open database file"),
        (("demo", "--artifacts", "kept", "--storage", "sqlite:///nowhere/s.db"), "unable to open database file"),
        (("demo", "--report", "nowhere/x.html"), "cannot write nowhere/x.html"),
        (("demo", "--storage", "nonsense"), "cannot use the storage"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("junk.db").write_text("no database")
    assert greedyhg(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("greedyhg: error: ")
    assert message in line
    assert "secret" not in line
    assert [path.name for path in Path().iterdir()] == ["junk.db"]
    assert Path("junk.db").read_text() == "no database"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert greedyhg(*RUN, "--device", "cuda") == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_study_of_another_task_is_not_carried_on(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--storage", "sqlite:///s.db", "--study-name", "s", "--n-trials", "1", *FAST, "--quiet"]
    assert greedyhg("run", "--task", "digits-l2", *common) == 0
    for other in (["--task", "digits-cleaning"], ["--task", "digits-l2", "--seed", "1"]):
        assert greedyhg("run", *other, *common) == 2
        assert "choose another name" in capsys.readouterr().err
    assert len(optuna.load_study(study_name="s", storage="sqlite:///s.db").trials) == 1


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"]])
def test_a_study_of_other_directions_is_left_alone(directions: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    optuna.create_study(study_name="s", storage="sqlite:///s.db", directions=directions)
    assert greedyhg(*RUN, "--storage", "sqlite:///s.db", "--study-name", "s") == 2
    assert "is another one" in capsys.readouterr().err
    study = optuna.load_study(study_name="s", storage="sqlite:///s.db")
    assert (study.trials, study.user_attrs) == ([], {})


def test_online_values_of_other_lengths_of_training_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(Path(), 1010, 10)
    common = ["--task", "fashion-cleaning", "--data", ".", "--n-trials", "1", "--estimator", "none", "--horizon", "1"]
    storage = ["--storage", "sqlite:///s.db", "--study-name", "s", "--quiet"]
    assert greedyhg("run", *common, *storage, "--outer-steps", "1") == 0
    assert greedyhg("run", *common, *storage, "--outer-steps", "2") == 2
    assert "n_training_steps" in capsys.readouterr().err


def test_a_foreign_database_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect("foreign.db")) as connection:
        connection.execute("CREATE TABLE studies (title TEXT)")
    assert greedyhg(*RUN, "--storage", "sqlite:///foreign.db") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot use the storage" in line


def test_a_timeout_that_is_over_at_once_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert greedyhg(*RUN, "--timeout", "0") == 1
    assert "no trial was started within 0.0 seconds" in capsys.readouterr().err


def test_json_is_written_behind_a_link_and_readable_by_others() -> None:
    Path("real.json").write_text("old")
    Path("link.json").symlink_to("real.json")
    assert greedyhg(*RUN, "--n-trials", "1", *FAST, "--quiet", "--json", "link.json") == 0
    assert Path("link.json").is_symlink()
    assert json.loads(Path("real.json").read_text())["task"] == "digits-l2"
    Path("plain").write_text("")
    assert Path("real.json").stat().st_mode == Path("plain").stat().st_mode


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr("optuna_greedyhg.tasks.base.refine", interrupt)
    assert greedyhg(*RUN, "--storage", "sqlite:///s.db", "--study-name", "s") == 130
    assert capsys.readouterr().err.splitlines() == ["greedyhg: error: interrupted; finished trials are in the storage"]


def test_trials_that_all_fail_are_an_error_and_stay_in_the_storage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("optuna_greedyhg.tasks.base.refine", fail)
    common = ["--task", "digits-l2", "--n-trials", "2", "--storage", "sqlite:///s.db", "--study-name", "s"]
    assert greedyhg("run", *common) == 1
    assert "no trial of the study has completed" in capsys.readouterr().err
    states = [t.state for t in optuna.load_study(study_name="s", storage="sqlite:///s.db").trials]
    assert states == [TrialState.FAIL] * 2


def test_the_installed_command_works() -> None:
    command = Path(sys.executable).with_name("greedyhg")
    done = subprocess.run([command, "tasks"], capture_output=True, text=True, check=True)
    assert "digits-cleaning" in done.stdout
