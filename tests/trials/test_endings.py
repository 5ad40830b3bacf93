"""The programs of the page on how trials end."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import optuna_greedyhg as ghg
from optuna_greedyhg.report import notes
from tests.trials import problems

PAGE = Path(__file__).parent.parent.parent / "docs" / "endings.md"


def program(of: str) -> dict[str, Any]:
    """Runs the one of the page's programs that contains some text, and returns its names."""
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (found,) = [text for text in programs if of in text]
    names: dict[str, Any] = {}
    exec(compile(found, PAGE, "exec"), names)
    return names


@pytest.fixture
def handler_of_ctrl_c() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handler_of_ctrl_c")
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_ctrl_c_completes_the_trials_of_all_threads(n_jobs: int) -> None:
    stop_if_interrupted = program(of="signal.SIGINT")["stop_if_interrupted"]

    def interrupt(trial: optuna.Trial, step: ghg.OuterStep) -> None:
        if trial.number == 0 and step.index == 3:
            os.kill(os.getpid(), signal.SIGINT)

    settings = {"evaluate": ghg.Retrain(2), "evaluate_every": 1, "n_outer_steps": 10**6}
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0), pruner=optuna.pruners.NopPruner())
    study.optimize(
        lambda trial: problems.refine(trial, callbacks=[interrupt, stop_if_interrupted], **settings),
        n_trials=n_jobs + 2,
        n_jobs=n_jobs,
    )
    assert len(study.trials) == n_jobs
    for trial in study.trials:
        assert (trial.state, trial.user_attrs["stopped"]) == (TrialState.COMPLETE, "study_stop")
        assert trial.params["lr"] == trial.user_attrs["refined_lr"]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # of heartbeats
def test_the_study_that_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = program(of="RetryHeartbeatStaleTrialCallback")
    names["storage"].engine.dispose()
    trials = names["study"].trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert all(trial.system_attrs["greedyhg:checkpoint"] == {"ended": trial.number} for trial in trials)
    assert not [path for path in (tmp_path / "artifacts").iterdir() if path.name.startswith("greedyhg-checkpoint")]


def test_every_reason_is_on_the_page() -> None:
    assert all(f"`{reason}`" in PAGE.read_text(encoding="utf-8") for reason in notes._ENDINGS)
