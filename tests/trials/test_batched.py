"""Trials as lanes against the same trials one by one, and what begins and ends a lane."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.pruners import BasePruner, NopPruner
from optuna.study import Study
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState
from torch import Tensor, nn

import optuna_greedyhg as ghg
from tests.trials.problems import Weights

SETTINGS: dict[str, Any] = {
    "update_rule": ghg.SGD(lr="lr", momentum=0.9),
    "horizon": 2,
    "n_outer_steps": 4,
    "evaluate": ghg.Retrain(5),
    "evaluate_every": 2,
    "outer_optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.3),
}

MakeProblem = Callable[[Trial, ghg.Alpha], ghg.BilevelProblem]


def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    strength = alpha["strength"] + 0.1 * alpha["beta"]  # which some of the update rules do not read
    return ((model(x).squeeze(1) - y) ** 2).mean() + strength * (model(x) ** 2).mean()


def val_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return ((model(x).squeeze(1) - y) ** 2).mean()


def regression(trial: Trial, alpha: ghg.Alpha, **replaced: Any) -> ghg.BilevelProblem:
    """Noisy least squares with a tanh layer: data in ragged batches, and weights of the trial's own."""
    alpha.suggest_float("lr", 1e-2, 0.3, log=True)
    alpha.suggest_float("beta", 0.5, 0.95)
    alpha.tensor("strength", torch.tensor(0.1).double())
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(11, k, generator=generator, dtype=torch.float64) for k in (3, 1))
    y = x.sum(dim=1) + noise.squeeze(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.number)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    parts: dict[str, Any] = {
        "model": model,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "train_batches": list(zip(x[:7].split(3), y[:7].split(3), strict=True)),
        "val_batches": (x[7:9], y[7:9]),
        "test_batches": (x[9:], y[9:]),
    }
    return ghg.BilevelProblem(**{**parts, **replaced})


def study(pruner: BasePruner | None = None, **options: Any) -> Study:
    sampler = ghg.GreedyHGSampler(optuna.samplers.RandomSampler(seed=0))
    return optuna.create_study(sampler=sampler, pruner=pruner or NopPruner(), **options)


def batched(
    make_problem: MakeProblem, n_trials: int | None, n_lanes: int, *, of: Study | None = None, **settings: Any
) -> Study:
    made = of or study()
    ghg.optimize_batched(made, make_problem, n_trials, n_lanes, **{**SETTINGS, **settings})
    return made


def one_by_one(make_problem: MakeProblem, n_trials: int, *, of: Study | None = None, **settings: Any) -> Study:
    made = of or study()

    def objective(trial: Trial) -> float:
        alpha = ghg.Alpha(trial)
        return ghg.refine(trial, make_problem(trial, alpha), alpha, **{**SETTINGS, **settings})

    made.optimize(objective, n_trials=n_trials)
    return made


def assert_same(lanes: Study, alone: Study) -> None:
    """All that is written to the trials, but for the time it took."""
    assert len(lanes.trials) == len(alone.trials)
    for ours, theirs in zip(lanes.trials, alone.trials, strict=True):
        assert ours.state == theirs.state
        assert ours.value == pytest.approx(theirs.value, rel=1e-9)
        assert ours.params == pytest.approx(theirs.params, rel=1e-7)
        assert ours.distributions == theirs.distributions
        assert ours.intermediate_values == pytest.approx(theirs.intermediate_values, rel=1e-9)
        assert ours.user_attrs.keys() == theirs.user_attrs.keys()
        for key in ours.user_attrs.keys() - {"cost_seconds"}:
            expected = theirs.user_attrs[key]
            number = isinstance(expected, float)
            assert ours.user_attrs[key] == (pytest.approx(expected, rel=1e-7) if number else expected), key
        trajectory, expected = (trial.system_attrs["greedyhg:trajectory"] for trial in (ours, theirs))
        assert trajectory.keys() == expected.keys()
        for column, numbers in trajectory.items():
            written = [[math.nan if x is None else x for x in column] for column in (numbers, expected[column])]
            assert written[0] == pytest.approx(written[1], rel=1e-5, abs=1e-12, nan_ok=True)


class TestEqualToOneByOne:
    @pytest.mark.parametrize(
        "rule",
        [
            ghg.SGD(lr="lr", momentum="beta"),
            ghg.SGD(lr="lr", momentum="beta", weight_decay=0.1, nesterov=True),
            ghg.Adam(lr="lr", betas=("beta", 0.99)),
            ghg.AdamW(lr="lr", betas=(0.8, "beta")),
        ],
        ids=str,
    )
    def test_more_trials_than_lanes_under_any_update_rule(self, rule: ghg.UpdateRule) -> None:
        assert_same(
            batched(regression, 3, 2, update_rule=rule),
            one_by_one(regression, 3, update_rule=rule),
        )

    @pytest.mark.parametrize(
        "settings",
        [
            {"evaluate": "online"},
            {"evaluate": ghg.Retrain(7), "restart": True, "estimator": ghg.Greedy(0.0)},
            {"policy": ghg.Fraction(0.5)},
            {"policy": ghg.Fraction(0.5), "evaluate": "online"},
            {"estimator": None},
            {"patience": 1, "max_hypergradient_norm": 0.01},
        ],
        ids=str,
    )
    def test_more_lanes_than_trials_with_any_settings_of_refine(self, settings: dict[str, Any]) -> None:
        assert_same(batched(regression, 3, 8, **settings), one_by_one(regression, 3, **settings))

    def test_pruned_lanes_are_filled_again(self) -> None:
        lanes, alone = (run(regression, 5, of=study(PruneOdd())) for run in (in_three_lanes, one_by_one))
        assert_same(lanes, alone)
        assert [trial.state for trial in lanes.trials] == 2 * [TrialState.COMPLETE, TrialState.PRUNED] + [
            TrialState.COMPLETE
        ]

    def test_a_lane_goes_back_from_nan_and_halves_its_step_as_it_would_alone(self) -> None:
        settings = {
            "update_rule": ghg.SGD(lr=0.5),
            "estimator": ghg.Greedy(0.0),
            "horizon": 1,
            "n_outer_steps": 6,
            "evaluate": "online",
            "outer_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=2.0),
        }
        lanes, alone = batched(cliff, 3, 3, **settings), one_by_one(cliff, 3, **settings)
        assert_same(lanes, alone)
        reached = [trial.system_attrs["greedyhg:trajectory"]["c.q50"][-1] for trial in lanes.trials]
        assert reached[0] == reached[2] == pytest.approx(6.0)  # they never came to their cliffs
        assert 1.0 < reached[1] < 2.0

    def test_a_lane_whose_seed_diverges_has_the_worst_value(self) -> None:
        def make_problem(trial: Trial, alpha: ghg.Alpha) -> ghg.BilevelProblem:
            problem = regression(trial, alpha)
            if trial.number == 1:
                batches = [(x, 1e200 * y) for x, y in problem.first_batches(2)]
                problem = problem.with_batches(batches, batches)
            return problem

        lanes = batched(make_problem, 3, 3)
        assert lanes.trials[1].value == math.inf
        assert [math.isfinite(trial.value or 0.0) for trial in lanes.trials] == [True, False, True]


class PruneOdd(BasePruner):
    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return trial.number % 2 == 1


def in_three_lanes(make_problem: MakeProblem, n_trials: int, **settings: Any) -> Study:
    return batched(make_problem, n_trials, 3, **settings)


def cliff(trial: Trial, alpha: ghg.Alpha) -> ghg.BilevelProblem:
    """The validation loss drives c upwards from 0; beyond a limit, which only trial 1 meets, training is NaN."""
    alpha.tensor("c", torch.zeros(2))

    def train_loss(model: Any, alpha: Mapping[str, Tensor], limit: Tensor) -> Tensor:
        beyond = torch.where(alpha["c"][0] > limit, torch.nan, 0.0)
        return 0.5 * (model() - alpha["c"]).square().sum() + (beyond * model()).sum()

    return ghg.BilevelProblem(
        model=Weights(),
        train_loss=train_loss,
        val_loss=lambda model, alpha, _: -model().sum(),
        train_batches=torch.tensor(1.9 if trial.number == 1 else 100.0),
        val_batches=torch.zeros(1),
    )


class TestLanes:
    def test_a_lane_is_filled_the_moment_its_trial_ends(self) -> None:
        seen: list[tuple[int, int]] = []

        def note(trial: BaseTrial, step: ghg.OuterStep) -> None:
            seen.append((trial.number, step.index))

        batched(regression, 4, 2, of=study(PruneOdd()), evaluate_every=1, on_outer_step=[note])
        # 1 is pruned at its seed, and 2 does not wait for 0, nor 3 for 2.
        assert seen.index((2, 0)) < seen.index((0, 2))
        assert seen.index((1, 0)) < seen.index((2, 0))
        assert [step for step in seen if step[0] == 0] == [(0, k) for k in range(5)]

    def test_never_more_trials_run_than_there_are_lanes(self) -> None:
        made, running = study(), []

        def note(trial: BaseTrial, step: ghg.OuterStep) -> None:
            running.append(len(made.get_trials(deepcopy=False, states=(TrialState.RUNNING,))))

        batched(regression, 7, 3, of=made, on_outer_step=[note])
        assert max(running) == 3
        assert len(made.trials) == 7

    def test_a_study_that_is_stopped_ends_its_lanes_with_what_they_have(self) -> None:
        told: list[int] = []

        def stop(study: Study, trial: FrozenTrial) -> None:
            assert trial.state == TrialState.PRUNED
            told.append(trial.number)
            study.stop()

        made = study(PruneOdd())
        batched(regression, None, 3, of=made, callbacks=[lambda study, trial: trial.number == 1 and stop(study, trial)])
        assert told == [1]
        assert [trial.state.name for trial in made.trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
        assert {trial.user_attrs["stopped"] for trial in made.trials} == {"study_stop", "pruned"}
        batched(regression, 2, 1, of=made)  # the flag is not left behind
        assert made.trials[-1].user_attrs["stopped"] == "finished"

    def test_no_trial_begins_after_the_timeout(self) -> None:
        assert batched(regression, 5, 2, timeout=0.0).trials == []

    def test_a_trial_ends_at_its_own_timeout(self) -> None:
        (trial,) = batched(regression, 1, 2, trial_timeout=0.0).trials
        assert trial.state == TrialState.COMPLETE
        assert trial.user_attrs["stopped"] == "timeout"

    def test_signs_of_life_are_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.warns(optuna.exceptions.ExperimentalWarning):
            storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'db'}", heartbeat_interval=60)
        beats: list[int] = []
        monkeypatch.setattr(storage, "record_heartbeat", beats.append)
        made = study(storage=storage)
        batched(regression, 3, 2, of=made)
        assert beats == [trial._trial_id for trial in made.trials]
        storage.engine.dispose()


class TestFailures:
    def failing(self, trial: Trial, alpha: ghg.Alpha) -> ghg.BilevelProblem:
        if trial.number == 1:
            alpha.suggest_float("lr", 1e-2, 0.3, log=True)
            raise OSError("no data for this one")
        return regression(trial, alpha)

    def states(self, made: Study) -> list[str]:
        return [trial.state.name for trial in made.trials]

    def test_an_error_that_is_caught_fails_its_trial_alone(self) -> None:
        made = batched(self.failing, 4, 2, catch=OSError)
        assert self.states(made) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
        assert_same_trial(made.trials[0], one_by_one(regression, 1).trials[0])
        assert made.trials[1].params.keys() == {"lr"}  # its seed is settled

    def test_after_any_other_no_trial_begins_those_that_run_end_and_it_is_raised(self) -> None:
        made = study()
        with pytest.raises(OSError, match="no data for this one"):
            batched(self.failing, 9, 3, of=made)
        assert self.states(made) == ["COMPLETE", "FAIL"]

    def test_data_that_fail_in_the_middle_fail_their_trial_which_keeps_what_it_has_found(self) -> None:
        def make_problem(trial: Trial, alpha: ghg.Alpha) -> ghg.BilevelProblem:
            problem = regression(trial, alpha)

            def source() -> Any:
                for i in range(10**6):
                    if trial.number == 1 and i == 9:
                        raise OSError("the disk is gone")
                    yield from problem.first_batches(1)

            return regression(trial, alpha=Undeclared(), train_batches=source(), n_eval_batches=1)

        made = batched(make_problem, 3, 3, catch=(OSError,))
        assert self.states(made) == ["COMPLETE", "FAIL", "COMPLETE"]
        failed = made.trials[1]
        assert failed.user_attrs["stopped"] == "failed"
        assert failed.user_attrs["n_outer_steps"] >= 0
        assert failed.params.keys() == {"lr", "beta"}

    def test_another_architecture_fails_its_trial_and_says_which(self, caplog: pytest.LogCaptureFixture) -> None:
        def make_problem(trial: Trial, alpha: ghg.Alpha) -> ghg.BilevelProblem:
            width = 5 if trial.number == 1 else 4
            model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double()
            return regression(trial, alpha, model=model)

        made = batched(make_problem, 3, 3, catch=ValueError)
        assert self.states(made) == ["COMPLETE", "FAIL", "COMPLETE"]
        assert re.search(r"its parameters are .*0\.weight.*\[5, 3\].*, and not .*\[4, 3\]", caplog.text)

    def test_a_loss_that_cannot_be_vectorized_fails_all_that_were_in_it(self) -> None:
        def branching(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = val_loss(model, alpha, batch)
            return loss if bool(loss > 0) else -loss

        made = study()
        with pytest.raises(RuntimeError, match="data-dependent control flow"):
            batched(lambda trial, alpha: regression(trial, alpha, train_loss=branching), 4, 2, of=made)
        assert self.states(made) == ["FAIL", "FAIL"]

    def test_an_interrupt_fails_all_that_run_and_they_keep_what_they_have_found(self) -> None:
        def interrupt(trial: BaseTrial, step: ghg.OuterStep) -> None:
            if trial.number == 1 and step.index == 3:
                raise KeyboardInterrupt

        made = study()
        with pytest.raises(KeyboardInterrupt):
            batched(regression, 9, 3, of=made, on_outer_step=[interrupt])
        assert self.states(made) == 3 * ["FAIL"]
        for trial in made.trials:
            assert trial.params.keys() == {"lr", "beta"}
            assert trial.user_attrs["stopped"] == "failed"
            assert trial.user_attrs["n_outer_steps"] >= 2

    def test_a_trial_that_somebody_else_has_ended_is_left_to_them(self) -> None:
        made = study()

        def steal(trial: BaseTrial, step: ghg.OuterStep) -> None:
            if trial.number == 1 and step.index == 1:
                made.tell(1, 123.0)

        batched(regression, 4, 2, of=made, on_outer_step=[steal])
        assert self.states(made) == 4 * ["COMPLETE"]
        assert made.trials[1].value == 123.0

    def test_what_is_wrong_with_the_call_is_said_before_any_trial(self) -> None:
        made = study()
        spectral = ghg.Greedy(propagator=ghg.Spectral())
        with pytest.raises(ValueError, match=r"Spectral.* use Greedy\(gamma\), or refine trials one by one"):
            batched(regression, 2, 2, of=made, estimator=spectral)
        with pytest.raises(TypeError, match="horizn"):
            batched(regression, 2, 2, of=made, horizn=3)
        with pytest.raises(ValueError, match="n_lanes must be at least 1, but got 0"):
            batched(regression, 2, 0, of=made)
        assert made.trials == []

    def test_a_problem_of_another_kind_is_refused(self) -> None:
        with pytest.raises(TypeError, match="make_problem must return a BilevelProblem, but got NoneType"):
            batched(lambda trial, alpha: None, 1, 1)  # type: ignore[arg-type, return-value]

    def test_it_is_not_called_within_an_optimization(self) -> None:
        made = study()
        with pytest.raises(RuntimeError, match="while the same study is optimized"):
            made.optimize(lambda trial: batched(regression, 1, 1, of=made) and 0.0, n_trials=1)


class Undeclared(ghg.Alpha):
    """Takes declarations that have been made already."""

    def __init__(self) -> None:
        pass

    def suggest_float(self, name: str, low: float, high: float, *, step: Any = None, log: bool = False) -> float:
        return low

    def tensor(self, name: str, init: Tensor, domain: Any = None, *, inherit: bool | None = None) -> Tensor:
        return init


def assert_same_trial(ours: FrozenTrial, theirs: FrozenTrial) -> None:
    assert ours.value == pytest.approx(theirs.value, rel=1e-9)
    assert ours.params == pytest.approx(theirs.params, rel=1e-7)
