"""What a refinement says of itself while it works, at which of Optuna's verbosities."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator

import optuna
import pytest

import optuna_greedyhg as ghg
from tests.trials import problems


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    optuna.logging.enable_propagation()
    yield caplog
    optuna.logging.disable_propagation()
    optuna.logging.set_verbosity(optuna.logging.INFO)


def lines(log: pytest.LogCaptureFixture, verbosity: int, **settings: object) -> tuple[list[str], optuna.Study]:
    """What is logged of one trial, and the study."""
    optuna.logging.set_verbosity(verbosity)
    made = optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"artifact_store": optuna.artifacts.FileSystemArtifactStore(folder), **settings}
        made.optimize(lambda trial: problems.refine(trial, **settings), n_trials=1)
    return [r.getMessage() for r in log.records if r.name == "optuna.greedyhg"], made


def test_nothing_is_said_below_info(log: pytest.LogCaptureFixture) -> None:
    assert lines(log, optuna.logging.WARNING)[0] == []


def test_tensors_that_are_not_kept_are_named_once_a_study(log: pytest.LogCaptureFixture) -> None:
    (said,), study = lines(log, optuna.logging.WARNING, artifact_store=None)
    assert re.fullmatch(r"Trial 0: what \['c'\] are refined to will not be kept, .* an artifact_store\.", said)
    study.optimize(problems.refine, n_trials=2)
    assert len(log.records) == 1


def test_a_validation_loss_that_is_nan_under_finite_weights_is_said_to_be(log: pytest.LogCaptureFixture) -> None:
    problem = problems.make_problem(val_loss=lambda model, alpha, batch: model().sum() * float("nan"))
    (said,), _ = lines(log, optuna.logging.WARNING, problem=problem)
    assert re.search(r"weights are finite, but its validation loss is nan; look for NaN .* in val_batches", said)


def test_by_default_a_trial_has_one_line(log: pytest.LogCaptureFixture) -> None:
    said, study = lines(log, optuna.logging.INFO)
    values = study.trials[0].intermediate_values
    assert said == [f"Trial 0: loss {values[0]:.6g} → {study.best_value:.6g} in 4 outer steps (finished)."]


def test_debugging_every_evaluation_has_one(log: pytest.LogCaptureFixture) -> None:
    scores: dict[int, float] = {}

    def note(trial: optuna.Trial, step: ghg.OuterStep) -> None:
        if step.evaluation is not None:
            scores[step.index] = step.evaluation.scores["loss"]

    *said, _ = lines(log, optuna.logging.DEBUG, n_outer_steps=5, callbacks=[note])[0]
    assert said == [
        f"Trial 0, outer step {k} of 5: loss {score:.6g}, best {min(v for j, v in scores.items() if j <= k):.6g}."
        for k, score in scores.items()
    ]
    assert len(said) == 4


def test_a_seed_that_was_left_as_it_is_has_none(log: pytest.LogCaptureFixture) -> None:
    assert lines(log, optuna.logging.INFO, policy=ghg.Never())[0] == []


def test_it_reaches_the_handler_of_optuna(capsys: pytest.CaptureFixture[str]) -> None:
    """Which has the level of the line in front, and which its progress bar takes care of."""
    optuna.create_study(sampler=ghg.GreedyHGSampler(seed=0)).optimize(
        problems.refine, n_trials=1, show_progress_bar=True
    )
    assert re.search(r"\[I [-:, 0-9]+\] Trial 0: loss .* in 4 outer steps \(finished\)\.\n", capsys.readouterr().out)
