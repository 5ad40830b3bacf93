from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import optuna_greedyhg as ghg
from optuna_greedyhg.trials import records
from tests.trials import problems


def study(**options: Any) -> optuna.Study:
    defaults = {"sampler": ghg.GreedyHGSampler(seed=0), "pruner": optuna.pruners.NopPruner()}
    return optuna.create_study(**defaults | options)


def run(policy: ghg.Policy, n_trials: int, made: optuna.Study | None = None, **settings: Any) -> optuna.Study:
    made = made or study()
    made.optimize(lambda trial: problems.refine(trial, policy=policy, **settings), n_trials=n_trials)
    return made


def refined(made: optuna.Study) -> list[bool]:
    return [trial.user_attrs["refined"] for trial in made.trials]


@dataclasses.dataclass(frozen=True)
class Some:
    """A policy of the user's own."""

    n: Any
    seen: list[float | None] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def n_outer_steps(
        self, trial: optuna.trial.BaseTrial, seed_value: float | None, options: ghg.DescentOptions
    ) -> int:
        self.seen.append(seed_value)
        return self.n


def test_refines_all_by_default() -> None:
    made = study()
    made.optimize(problems.refine, n_trials=2)
    for trial in made.trials:
        assert trial.user_attrs["policy"] == "Always()"
        assert trial.user_attrs["refined"] is True
        assert trial.user_attrs["n_outer_steps"] == 4
        assert trial.user_attrs["stopped"] == "finished"


def test_an_unrefined_trial_has_the_value_that_it_has_without_an_estimator() -> None:
    made = run(ghg.Never(), 2)
    without = study()
    without.optimize(lambda trial: problems.refine(trial, estimator=None), n_trials=2)
    for trial, other in zip(made.trials, without.trials, strict=True):
        assert trial.params == other.params == {"lr": trial.user_attrs["seed_lr"]}
        assert trial.value == other.value
        assert trial.intermediate_values == other.intermediate_values == {0: trial.value}
        assert trial.user_attrs["refined"] is other.user_attrs["refined"] is False
        assert trial.user_attrs["cost_n_train_gradients"] == other.user_attrs["cost_n_train_gradients"]
        assert trial.user_attrs["cost_n_products"] == trial.user_attrs["n_outer_steps"] == 0
        assert (trial.user_attrs["policy"], trial.user_attrs["stopped"]) == ("Never()", "policy")
        assert trial.user_attrs["protocol"] == other.user_attrs["protocol"] == "Retrain(n_steps=8)"


def test_online_an_unrefined_trial_trains_as_long_under_its_seed() -> None:
    made = run(ghg.Never(), 1, evaluate="online")
    without = study()
    without.optimize(lambda trial: problems.refine(trial, estimator=None, evaluate="online"), n_trials=1)
    (trial,), (other,) = made.trials, without.trials
    assert trial.params == {"lr": trial.user_attrs["seed_lr"]}
    assert trial.intermediate_values == other.intermediate_values
    assert list(trial.intermediate_values) == [0, 2, 4]
    assert trial.user_attrs["refined"] is False
    assert trial.user_attrs["cost_n_products"] == 0
    assert trial.user_attrs["cost_n_train_gradients"] == other.user_attrs["cost_n_train_gradients"]


def test_refined_and_unrefined_trials_compare() -> None:
    made = run(ghg.Fraction(0.5), 12, n_outer_steps=20, evaluate_every=10)
    assert set(refined(made)) == {True, False}
    for trial in made.trials:
        assert trial.user_attrs["protocol"] == "Retrain(n_steps=40)"
        assert list(trial.intermediate_values) == ([0, 10, 20] if trial.user_attrs["refined"] else [0])
        assert trial.value == min(trial.intermediate_values.values())
    assert made.best_value == min(trial.value for trial in made.trials)
    assert made.best_trial.user_attrs["refined"]


def test_a_fraction_is_chosen_by_number_and_seed_alone() -> None:
    def chosen(fraction: ghg.Fraction, n: int = 1000) -> list[bool]:
        options = ghg.DescentOptions()
        trials = (optuna.trial.FixedTrial({}, number=k) for k in range(n))
        return [fraction.n_outer_steps(trial, None, options) > 0 for trial in trials]

    half = chosen(ghg.Fraction(0.5))
    assert half == chosen(ghg.Fraction(0.5))
    assert half != chosen(ghg.Fraction(0.5, seed=1))
    assert 450 < sum(half) < 550
    few = chosen(ghg.Fraction(0.1))
    assert 70 < sum(few) < 130
    assert not any(a and not b for a, b in zip(few, half, strict=True))
    assert (sum(chosen(ghg.Fraction(0))), sum(chosen(ghg.Fraction(1)))) == (0, 1000)
    assert refined(run(ghg.Fraction(0.5), 4)) == half[:4]


def seeded(values: list[float], direction: str = "minimize", **states: TrialState) -> optuna.Study:
    """A study of trials that have reported these values at step 0, and have ended elsewhere."""
    made = study(direction=direction)
    for k, value in enumerate(values):
        state = states.get(f"t{k}", TrialState.COMPLETE)
        ended = None if state == TrialState.FAIL else -1000.0
        made.add_trial(optuna.create_trial(state=state, value=ended, intermediate_values={0: value, 9: -1000.0}))
    return made


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize(
    ("quantile", "seed_value", "expected"),
    [
        (0.5, 1.5, True),  # rank 2 of 5
        (0.5, 2.5, False),  # rank 3 of 5
        (0.2, 0.5, True),
        (0.2, 1.5, False),
        (1.0, 9.0, True),
        (0.5, math.inf, False),
    ],
)
def test_a_seed_among_the_best_is_promising(quantile: float, seed_value: float, expected: bool, direction: str) -> None:
    sign = 1 if direction == "minimize" else -1
    made = seeded([sign * v for v in (1.0, 2.0, 3.0, 4.0)], direction)
    options = ghg.DescentOptions(maximize=direction == "maximize")
    policy = ghg.Promising(quantile, n_startup_trials=4)
    assert policy.n_outer_steps(made.ask(), sign * seed_value, options) == (50 if expected else 0)


def test_seeds_are_compared_with_those_of_complete_trials() -> None:
    policy, options = ghg.Promising(0.5, n_startup_trials=2), ghg.DescentOptions()
    made = seeded([1.0, 2.0, 0.1, 0.1, 0.1], t2=TrialState.PRUNED, t3=TrialState.PRUNED, t4=TrialState.FAIL)
    made.add_trial(optuna.create_trial(value=0.1))  # has reported nothing
    assert policy.n_outer_steps(made.ask(), 0.5, options) == 50
    assert policy.n_outer_steps(made.ask(), 1.5, options) == 0
    assert policy.n_outer_steps(seeded([0.1]).ask(), 0.5, options) == 50  # too few to compare with


def test_promising_trials_are_refined() -> None:
    made = run(ghg.Promising(0.5, n_startup_trials=2), 8)
    seeds = [trial.intermediate_values[0] for trial in made.trials]
    expected = [k < 2 or sum(s < seed for s in seeds[:k]) + 1 <= (k + 1) / 2 for k, seed in enumerate(seeds)]
    assert refined(made) == expected
    assert set(expected[2:]) == {True, False}
    assert made.trials[0].user_attrs["policy"] == "Promising(quantile=0.5, n_startup_trials=2, share=1.0)"


def test_promise_of_a_metric_that_is_maximized() -> None:
    made = run(ghg.Promising(0.5, n_startup_trials=1), 8, study(direction="maximize"), metric="score")
    seeds = [trial.intermediate_values[0] for trial in made.trials]
    expected = [k < 1 or sum(s > seed for s in seeds[:k]) + 1 <= (k + 1) / 2 for k, seed in enumerate(seeds)]
    assert refined(made) == expected
    assert set(expected[1:]) == {True, False}


def test_online_the_promise_of_a_seed_is_not_known() -> None:
    made = study()
    with pytest.raises(ValueError, match=r"Promising\(.*use evaluate='retrain', or Fraction\(p\)"):
        run(ghg.Promising(), 1, made, evaluate="online")
    assert made.trials[0].intermediate_values == {}


def costing(costs: list[tuple[int, bool]]) -> optuna.Study:
    """A study of trials that have cost so much, and were refined or not; their seeds are worse and worse."""
    made = study()
    for k, (cost, was_refined) in enumerate(costs):
        attributes = {"cost_n_train_gradients": cost, "refined": was_refined}
        made.add_trial(optuna.create_trial(value=k, intermediate_values={0: k}, user_attrs=attributes))
    return made


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([], True),
        ([(10, False)], True),
        ([(10, False), (10, True)], True),
        ([(10, False), (11, True)], False),
        ([(11, True)], False),
    ],
)
def test_promising_trials_are_refined_for_a_share_of_the_cost(costs: list[tuple[int, bool]], expected: bool) -> None:
    made, options = costing(costs), ghg.DescentOptions()
    assert ghg.Promising(1, share=0.5).n_outer_steps(made.ask(), -1.0, options) == (50 if expected else 0)
    assert ghg.Promising(1).n_outer_steps(made.ask(), -1.0, options) == 50


def test_pruned_and_failed_trials_count_in_the_share_and_running_ones_do_not() -> None:
    for state in (TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING):
        made, options = costing([(10, False)]), ghg.DescentOptions()
        attributes = {"cost_n_train_gradients": 11, "refined": True}
        made.add_trial(optuna.create_trial(state=state, intermediate_values={0: 1.0}, user_attrs=attributes))
        expected = 50 if state == TrialState.RUNNING else 0
        assert ghg.Promising(1, share=0.5).n_outer_steps(made.ask(), -1.0, options) == expected


def test_a_study_keeps_the_share() -> None:
    made = run(ghg.Promising(1, share=0.6), 12)
    spent = spent_refined = 0.0
    for trial in made.trials:
        its = records.cost_of(trial).total
        assert trial.user_attrs["refined"] == (spent_refined <= 0.6 * spent)
        spent, spent_refined = spent + its, spent_refined + its * trial.user_attrs["refined"]
    assert 2 <= sum(refined(made)) <= 10


def test_a_budget_ends_refinement_and_not_the_study() -> None:
    refined_cost = records.cost_of(run(ghg.Always(), 1).trials[0]).total
    made = run(ghg.Budget(1.5 * refined_cost), 4)
    assert refined(made) == [True, True, False, False]
    assert refined(run(ghg.Budget(0), 1)) == [False]


def test_pruned_and_failed_trials_have_cost_too() -> None:
    made = study()
    for state in (TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE, TrialState.RUNNING):
        made.add_trial(
            optuna.create_trial(
                state=state,
                value=1.0 if state == TrialState.COMPLETE else None,
                user_attrs={"cost_n_products": 10, "cost_n_evaluations": 30, "cost_seconds": 1e9},
            )
        )
    options = ghg.DescentOptions()
    assert ghg.Budget(60.5).n_outer_steps(made.ask(), None, options) == 50
    assert ghg.Budget(60).n_outer_steps(made.ask(), None, options) == 0


@pytest.mark.parametrize(("asked", "made_steps"), [(0, 0), (1, 2), (2, 2), (3, 4), (4, 4), (5, 5)])
def test_a_policy_of_ones_own_says_how_far(asked: int, made_steps: int) -> None:
    policy = Some(asked)
    (trial,) = run(policy, 1, n_outer_steps=5).trials
    assert policy.seen == [trial.intermediate_values[0]]
    assert trial.user_attrs["n_outer_steps"] == trial.last_step == made_steps
    assert trial.user_attrs["refined"] is (asked > 0)
    assert trial.user_attrs["stopped"] == ("finished" if made_steps == 5 else "policy")
    assert trial.user_attrs["protocol"] == "Retrain(n_steps=10)"  # the value is still that of the whole training
    assert trial.user_attrs["policy"] == f"Some(n={asked})"


@pytest.mark.parametrize("n", [-1, 6, 2.0, None])
def test_an_answer_out_of_range_is_refused(n: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"from 0 to n_outer_steps=5, but Some(n={n}) returns {n!r}")):
        run(Some(n), 1, n_outer_steps=5)


def test_online_a_trial_is_refined_to_the_end_or_not_at_all() -> None:
    with pytest.raises(ValueError, match=r"Some\(n=2\) returns 2 of 4 outer steps; use evaluate='retrain'"):
        run(Some(2), 1, evaluate="online")
    for n in (0, 4):
        policy = Some(n)
        assert refined(run(policy, 1, evaluate="online")) == [n > 0]
        assert policy.seen == [None]


def test_without_an_estimator_there_is_nothing_to_decide() -> None:
    policy = Some(4)
    assert refined(run(policy, 1, estimator=None)) == [False]
    assert refined(run(policy, 1, estimator=None, evaluate="online")) == [False]
    assert policy.seen == []


def test_an_unrefined_trial_is_not_pruned_at_its_end() -> None:
    class AtOnce(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return True

    assert run(ghg.Never(), 1, study(pruner=AtOnce())).trials[0].state == TrialState.COMPLETE
    pruned = run(ghg.Always(), 1, study(pruner=AtOnce())).trials[0]
    assert pruned.state == TrialState.PRUNED
    assert pruned.user_attrs["refined"] is True


def test_a_seed_that_diverges_is_not_promising() -> None:
    made = seeded([1.0, 2.0])
    problem = problems.make_problem(train_loss=lambda *args: problems.train_loss(*args) * math.nan)
    run(ghg.Promising(0.5, n_startup_trials=2), 1, made, problem=problem)
    assert made.trials[-1].value == math.inf
    assert made.trials[-1].user_attrs["refined"] is False


@pytest.mark.parametrize(
    "policy", [ghg.Always(), ghg.Promising(), ghg.Budget(1), ghg.Fraction(1), ghg.Never()], ids=str
)
def test_a_fixed_trial(policy: ghg.Policy) -> None:
    trial = optuna.trial.FixedTrial({"lr": 0.5})
    problems.refine(trial, policy=policy)
    assert trial.user_attrs["refined"] is (policy != ghg.Never())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ghg.Fraction(1.5), "p must be from 0 to 1, but got 1.5"),
        (lambda: ghg.Fraction(math.nan), "p must be from 0 to 1, but got nan"),
        (lambda: ghg.Promising(0), "quantile must be above 0 and up to 1, but got 0"),
        (lambda: ghg.Promising(0.5, share=0), "share must be above 0 and up to 1, but got 0"),
        (lambda: ghg.Promising(0.5, share=math.nan), "share must be above 0 and up to 1, but got nan"),
        (lambda: ghg.Promising(0.5, n_startup_trials=-1), "n_startup_trials must not be negative, but got -1"),
        (lambda: ghg.Budget(-1), "total_cost must not be negative, but got -1"),
        (lambda: ghg.Budget(math.nan), "total_cost must not be negative, but got nan"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_threads_and_a_database(tmp_path: Path) -> None:
    made = study(storage=f"sqlite:///{tmp_path}/study.db")
    made.optimize(lambda trial: problems.refine(trial, policy=ghg.Fraction(0.5)), n_trials=6, n_jobs=2)
    again = run(ghg.Fraction(0.5), 6)
    assert refined(made) == refined(again)
    assert all(trial.user_attrs["policy"] == "Fraction(p=0.5, seed=0)" for trial in made.trials)
