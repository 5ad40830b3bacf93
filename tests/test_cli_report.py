"""greedyhg report as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import optuna
import pytest
from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

from optuna_greedyhg.cli import main
from optuna_greedyhg.cli.storages import shown
from optuna_greedyhg.report.dashboard import ARROWS, HISTORY
from tests.report.studies import finished, refined, study_of
from tests.trials.storages import database

URL = "sqlite:///study.db"


@pytest.fixture(scope="module")
def storage_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("studies") / "study.db"
    with database(f"sqlite:///{file}") as storage:
        for name, trial, direction in (
            ("demo-1/tpe", finished(0.6), "minimize"),
            ("demo-1/greedy", refined(0.4), "minimize"),
            ("other", finished(0.5), "maximize"),
        ):
            study = optuna.create_study(storage=storage, study_name=name, direction=direction)
            study.add_trials(study_of(trial, direction=direction).trials)
    return file


@pytest.fixture(autouse=True)
def _in_a_folder_with_studies(storage_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(storage_file, "study.db")
    Path("junk.db").write_text("junk")


def report(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["report", *arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def named(*names: str) -> list[str]:
    return ["--storage", URL, *(word for name in names for word in ("--study-name", name))]


def test_studies_are_compared_under_what_tells_their_names_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(*named("demo-1/greedy", "demo-1/tpe"), "--json", "out.json") == 0
    page = Path("greedyhg-report.html").read_text(encoding="utf-8")
    assert "<title>greedyhg report: demo-1</title>" in page
    assert page.index(">greedy</th>") < page.index(">tpe</th>")
    rows = json.loads(Path("out.json").read_text())["methods"]
    assert [(row["name"], row["val_loss"]) for row in rows] == [("greedy", 0.4), ("tpe", 0.6)]
    printed = capsys.readouterr().out
    assert "greedyhg-report.html" in printed
    assert "optuna-dashboard" not in printed


def test_one_study_keeps_its_name_and_all_are_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(*named("demo-1/greedy"), "--out", "one.html", "--quiet") == 0
    assert "<title>greedyhg report: demo-1/greedy</title>" in Path("one.html").read_text(encoding="utf-8")
    assert capsys.readouterr() == ("", "")
    assert report(*named()) == 2  # tpe and greedy minimize, other maximizes
    assert "'other': 'MAXIMIZE'" in capsys.readouterr().err


def test_it_is_shown_in_the_dashboard_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(*named("demo-1/greedy"), "--dashboard") == 0
    assert f"Dashboard: optuna-dashboard {URL}" in capsys.readouterr().out
    with database(URL) as storage:
        attributes = storage.get_study_system_attrs(storage.get_study_id_from_name("demo-1/greedy"))
    assert get_plotly_graph_objects(attributes).keys() == {HISTORY, ARROWS}


def test_a_picture_is_taken_by_the_browser_that_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Path("browser").absolute()
    fake.write_text(
        "#!/bin/sh\necho '<title>height in pixels: 7</title>'\n"
        'for word; do case $word in --screenshot=*) echo "$*" > "${word#*=}"; esac; done\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(fake))
    assert report(*named("demo-1/tpe"), "--png", "page.png") == 0
    assert "--window-size=1200,7 " in Path("page.png").read_text()
    assert "page.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--storage", "sqlite:///nowhere.db"), "there is no file nowhere.db"),
        (("--storage", "sqlite:///junk.db"), "file is not a database"),
        (("--storage", "nonsense"), "cannot use the storage 'nonsense'"),
        (named("nope"), "it has no study 'nope', only demo-1/tpe, demo-1/greedy, other"),
        ((*named("other"), "--out", "nowhere/x.html"), "cannot write nowhere/x.html"),
        ((*named("other"), "--png", "nowhere/x.png"), "cannot write nowhere/x.png"),
        ((*named("other"), "--png", "x.png"), "found no Chrome or Chromium; install one, or set BROWSER_PATH to it"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "nothing")
    before = {path.name for path in Path().iterdir()}
    assert report(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == before


def test_a_storage_without_studies_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with database("sqlite:///empty.db"):
        pass
    assert report("--storage", "sqlite:///empty.db") == 2
    assert "it has no study" in capsys.readouterr().err


def test_passwords_are_not_shown() -> None:
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
