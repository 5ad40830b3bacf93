"""What the base sampler is told: a study that it cannot tell from one without refinement."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    BruteForceSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    NSGAIIISampler,
    NSGAIISampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import optuna_greedyhg as ghg
from optuna_greedyhg.trials.credit import Credit
from optuna_greedyhg.trials.views import ViewedStorage
from tests.trials import problems

SAMPLERS: dict[str, Callable[[], BaseSampler]] = {
    "tpe": lambda: TPESampler(seed=0, n_startup_trials=3),
    "univariate tpe": lambda: TPESampler(seed=0, n_startup_trials=3, multivariate=False),
    "tpe in groups": lambda: TPESampler(seed=0, n_startup_trials=3, group=True),
    "gp": lambda: GPSampler(seed=0, n_startup_trials=3),
    "cmaes": lambda: CmaEsSampler(seed=0, n_startup_trials=3),
    "qmc": lambda: QMCSampler(seed=0, scramble=True),
    "random": lambda: RandomSampler(seed=0),
    "nsgaii": lambda: NSGAIISampler(seed=0, population_size=4),
    "nsgaiii": lambda: NSGAIIISampler(seed=0, population_size=4),
    "partial fixed": lambda: PartialFixedSampler({"y": 0.25}, TPESampler(seed=0, n_startup_trials=3)),
}
CREDITS: tuple[Credit, ...] = ("refined", "seed")

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def value(params: dict[str, Any]) -> float:
    return float((params["x"] - 0.3) ** 2 + params["y"] + 0.1 * params["n"] + (params["kind"] == "b"))


def refined_objective(trial: optuna.Trial) -> float:
    """A refinement in a line: it takes x and y some way to their optimum."""
    alpha = ghg.Alpha(trial)
    n, kind = alpha.suggest_int("n", 0, 5), alpha.suggest_categorical("kind", ["a", "b"])
    x, y = alpha.suggest_float("x", -1, 1), alpha.suggest_float("y", 1e-3, 1, log=True)
    refined = {"x": 0.3 + 0.2 * (x - 0.3), "y": max(1e-3, y / 4)}
    alpha.commit({name: torch.tensor(v, dtype=torch.float64) for name, v in refined.items()})
    return value({"n": n, "kind": kind, **refined})


def refined_study(make: Callable[[], BaseSampler], credit: Credit, n_trials: int = 14, **options: Any) -> optuna.Study:
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(make(), credit=credit), **options)
    study.optimize(refined_objective, n_trials=n_trials)
    return study


def told(study: optuna.Study, make: Callable[[], BaseSampler], **options: Any) -> list[dict[str, Any]]:
    """What the bare sampler suggests when its suggestions earn the values of the study's trials."""
    values = [trial.value for trial in study.trials]

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_int("n", 0, 5)
        trial.suggest_categorical("kind", ["a", "b"])
        trial.suggest_float("x", -1, 1)
        trial.suggest_float("y", 1e-3, 1, log=True)
        return values[trial.number]

    bare = optuna.create_study(sampler=make(), **options)
    bare.optimize(objective, n_trials=len(values))
    return [trial.params for trial in bare.trials]


def seeds(study: optuna.Study) -> list[dict[str, Any]]:
    return [t.params | {name: t.user_attrs[f"seed_{name}"] for name in ("x", "y")} for t in study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_credit_to_the_seed_the_base_sampler_draws_as_if_nothing_was_refined(name: str) -> None:
    make, n_trials = SAMPLERS[name], 8 if name == "gp" else 14
    study = refined_study(make, "seed", n_trials)
    assert seeds(study) == told(study, make)
    learns = name not in ("qmc", "random")
    assert (seeds(refined_study(make, "refined", n_trials)) != seeds(study)) is learns
    for trial in study.trials:
        assert trial.params["x"] == pytest.approx(0.3 + 0.2 * (trial.user_attrs["seed_x"] - 0.3))
        assert trial.value == value(trial.params)


@pytest.mark.parametrize("name", ["tpe", "cmaes"])
def test_a_storage_on_disk_shows_the_seeds_too(name: str, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = refined_study(SAMPLERS[name], "seed", n_trials=8, storage=url, study_name="refined")
    assert seeds(study) == told(study, SAMPLERS[name], storage=url, study_name="bare")


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", ["tpe", "univariate tpe", "tpe in groups", "gp"])
def test_running_trials_are_seen_with_their_seeds(name: str, credit: Credit) -> None:
    """Trials that are asked for before others have ended are kept apart as those of the bare sampler are."""

    def ask_in_pairs(study: optuna.Study, declare: Callable[[optuna.Trial], Any]) -> None:
        for k in range(4):
            pair = [study.ask(), study.ask()]
            for trial in pair:
                declare(trial)
            for j, trial in enumerate(pair):
                study.tell(trial, (k - 1.5) ** 2 + j)

    bare = optuna.create_study(sampler=SAMPLERS[name]())
    ask_in_pairs(bare, lambda trial: trial.suggest_float("x", -1, 1))
    seeded = optuna.create_study(sampler=ghg.GreedyHGSampler(SAMPLERS[name](), credit=credit))
    ask_in_pairs(seeded, lambda trial: ghg.Alpha(trial).suggest_float("x", -1, 1))
    assert [t.params for t in seeded.trials] == [t.params for t in bare.trials]


class Spy(RandomSampler):
    """Notes the trials that it could learn from."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.seen: list[list[optuna.trial.FrozenTrial]] = []

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        self.seen.append(study.get_trials())
        return super().sample_independent(study, trial, param_name, param_distribution)


@pytest.mark.parametrize("credit", CREDITS)
def test_running_trials_of_other_processes_are_seen_with_their_seeds(credit: Credit, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    spies = [Spy(), Spy()]
    workers = [
        optuna.create_study(
            study_name="x", storage=url, load_if_exists=True, sampler=ghg.GreedyHGSampler(spy, credit=credit)
        )
        for spy in spies
    ]
    seed = ghg.Alpha(workers[0].ask()).suggest_float("x", -1, 1)
    ghg.Alpha(workers[1].ask()).suggest_float("x", -1, 1)
    ((first, second),) = spies[1].seen
    assert first.params == {"x": seed}
    assert first.distributions == {"x": FloatDistribution(-1, 1)}
    assert first.state == TrialState.RUNNING
    assert second.params == {}
    assert workers[0].trials[0].params == {}


@pytest.mark.parametrize("credit", CREDITS)
def test_all_trials_that_were_refined_are_seen_in_one_way(credit: Credit) -> None:
    spy = Spy()
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(spy, credit=credit))
    study.optimize(problems.refine, n_trials=3)
    prefix = "refined_" if credit == "refined" else "seed_"
    assert [[t.params for t in trials if t.state.is_finished()] for trials in spy.seen] == [
        [{"lr": t.user_attrs[f"{prefix}lr"]} for t in study.trials[:k]] for k in range(3)
    ]
    assert [t.params["lr"] for t in study.trials] == [t.user_attrs["refined_lr"] for t in study.trials]


@pytest.mark.parametrize("credit", CREDITS)
def test_what_is_committed_and_not_told_yet_is_seen_as_what_has_ended(credit: Credit) -> None:
    spy = Spy()
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(spy, credit=credit))
    alpha = ghg.Alpha(study.ask())
    seed = alpha.suggest_float("x", -1, 1)
    alpha.commit({"x": torch.tensor(0.5)})
    study.ask().suggest_float("x", -1, 1)
    assert spy.seen[1][0].params == {"x": seed if credit == "seed" else 0.5}


def test_a_view_shows_its_trials_in_one_way_only() -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage)
    study.add_trial(optuna.create_trial(params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}, value=1.0))

    def show(trial: optuna.trial.FrozenTrial) -> optuna.trial.FrozenTrial:
        shown = copy.copy(trial)
        shown.params = {"x": 0.25}
        return shown

    view = ViewedStorage(storage, show)
    (trial,) = study.trials
    seen = [
        view.get_trial(trial._trial_id),
        *view.get_all_trials(study._study_id),
        view.get_best_trial(study._study_id),
    ]
    assert [t.params for t in seen] == [{"x": 0.25}] * 3
    assert view.get_trial_params(trial._trial_id) == {"x": 0.25}
    assert view.get_trial_param(trial._trial_id, "x") == 0.25
    assert study.trials == [trial]


@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes"])
def test_a_trial_that_the_sampler_does_not_know_is_drawn_with_credit_to_the_seed(name: str) -> None:
    study = refined_study(SAMPLERS[name], "seed", n_trials=8)
    bare = optuna.create_study()
    for params, trial in zip(seeds(study), study.trials, strict=True):
        distributions = trial.distributions
        bare.add_trial(optuna.create_trial(params=params, distributions=distributions, value=trial.value))
    drawn = []
    for of, sampler in (
        (study, ghg.GreedyHGSampler(SAMPLERS[name](), credit="seed")),
        (bare, SAMPLERS[name]()),
    ):
        of.add_trial(optuna.create_trial(state=TrialState.RUNNING))
        space = sampler.infer_relative_search_space(of, of.trials[-1])
        drawn.append(sampler.sample_relative(of, of.trials[-1], space))
        drawn[-1]["z"] = sampler.sample_independent(of, of.trials[-1], "z", FloatDistribution(0, 1))
    assert drawn[0] == drawn[1]
    assert {"x", "y"} <= drawn[0].keys()


def test_what_has_ended_is_told_of_with_its_seed() -> None:
    ended: list[dict[str, Any]] = []

    class Ends(RandomSampler):
        def after_trial(self, study: Any, trial: Any, state: TrialState, values: Any) -> None:
            ended.append(trial.params)

    study = optuna.create_study(sampler=ghg.GreedyHGSampler(Ends(seed=0), credit="seed"))
    study.optimize(problems.refine, n_trials=1)
    assert ended == [{"lr": study.trials[0].user_attrs["seed_lr"]}]


@pytest.mark.parametrize("seed", [2.0, "high", True, None])
def test_an_attribute_of_the_users_own_is_no_seed(seed: Any) -> None:
    spy = Spy()
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(spy, credit="seed"))

    def objective(trial: optuna.Trial) -> float:
        for name in ("x", "n", "kind"):
            trial.set_user_attr(f"seed_{name}", seed)
        return trial.suggest_float("x", 0, 1) + trial.suggest_int("n", 0, 9) + trial.suggest_categorical("kind", [1, 2])

    study.optimize(objective, n_trials=2)
    assert spy.seen[-1][0].params == study.trials[0].params


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", ["tpe", "random"])
def test_a_conditional_space(name: str, credit: Credit) -> None:
    def with_alpha(trial: optuna.Trial) -> float:
        alpha = ghg.Alpha(trial)
        if alpha.suggest_categorical("kind", ["a", "b"]) == "a":
            x = alpha.suggest_float("x", -1, 1)
            alpha.commit({"x": torch.tensor(x / 2)})
            return x**2 / 4
        return alpha.suggest_float("y", 0, 1)

    study = optuna.create_study(sampler=ghg.GreedyHGSampler(SAMPLERS[name](), credit=credit))
    study.optimize(with_alpha, n_trials=12)
    assert {frozenset(t.params) for t in study.trials} == {frozenset({"kind", "x"}), frozenset({"kind", "y"})}
    if credit == "seed":
        bare = optuna.create_study(sampler=SAMPLERS[name]())
        bare.optimize(
            lambda t: [
                t.suggest_float("x", -1, 1)
                if t.suggest_categorical("kind", ["a", "b"]) == "a"
                else t.suggest_float("y", 0, 1),
                study.trials[t.number].value,
            ][1],
            n_trials=12,
        )
        drawn = [{k: t.user_attrs.get(f"seed_{k}", v) for k, v in t.params.items()} for t in study.trials]
        assert drawn == [t.params for t in bare.trials]


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", ["tpe", "gp", "cmaes", "random"])
def test_refinement_under_hyperband(name: str, credit: Credit) -> None:
    """With credit to the seed, brackets and all, as a bare sampler whose trials report and end as these did."""

    def make_study(sampler: BaseSampler) -> optuna.Study:
        pruner = optuna.pruners.HyperbandPruner(min_resource=2, max_resource=4, reduction_factor=2)
        return optuna.create_study(study_name="h", sampler=sampler, pruner=pruner)

    study = make_study(ghg.GreedyHGSampler(SAMPLERS[name](), credit=credit))
    study.optimize(problems.refine, n_trials=10)
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(t.params["lr"] == t.user_attrs["refined_lr"] for t in study.trials)
    if credit == "seed":
        bare = make_study(SAMPLERS[name]())
        for refined in study.trials:
            trial = bare.ask()
            trial.suggest_float("lr", 1e-3, 1.0, log=True)
            for step, reported in refined.intermediate_values.items():
                trial.report(reported, step)
            pruned = refined.state == TrialState.PRUNED
            bare.tell(trial, None if pruned else refined.value, state=refined.state)
        assert [t.user_attrs["seed_lr"] for t in study.trials] == [t.params["lr"] for t in bare.trials]


@pytest.mark.parametrize("credit", CREDITS)
def test_a_bracket_of_hyperband_sees_its_own_trials(credit: Credit) -> None:
    spy = Spy()
    pruner = optuna.pruners.HyperbandPruner(min_resource=2, max_resource=4, reduction_factor=2)
    study = optuna.create_study(study_name="h", sampler=ghg.GreedyHGSampler(spy, credit=credit), pruner=pruner)
    study.optimize(problems.refine, n_trials=8)
    brackets = {t.number: pruner._get_bracket_id(study, t) for t in study.trials}
    assert set(brackets.values()) == {0, 1}
    for number, trials in enumerate(spy.seen[1:], start=1):
        assert [t.number for t in trials] == [k for k in range(number + 1) if brackets[k] == brackets[number]]


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("pruner", [None, optuna.pruners.HyperbandPruner(max_resource=4)], ids=["", "hyperband"])
def test_the_base_sampler_can_stop_the_study(credit: Credit, pruner: optuna.pruners.BasePruner | None) -> None:
    class StopsAtTwo(RandomSampler):
        def after_trial(self, study: Any, trial: Any, state: TrialState, values: Any) -> None:
            if trial.number == 1:
                study.stop()

    study = optuna.create_study(sampler=ghg.GreedyHGSampler(StopsAtTwo(seed=0), credit=credit), pruner=pruner)
    study.optimize(lambda trial: ghg.Alpha(trial).suggest_float("x", 0, 1), n_trials=5)
    assert len(study.trials) == 2


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: CmaEsSampler(with_margin=True), "CmaEsSampler with with_margin=True learns from points that it has"),
        (lambda: GridSampler({"x": [0, 1]}), "GridSampler goes through a list of points"),
        (BruteForceSampler, "BruteForceSampler goes through a list of points"),
        (lambda: PartialFixedSampler({}, GridSampler({"x": [0]})), "GridSampler goes through"),
    ],
)
def test_samplers_that_cannot_learn_from_seeds_are_refused_by_name(
    base: Callable[[], BaseSampler], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*; use credit='refined'"):
        ghg.GreedyHGSampler(base(), credit="seed")
    ghg.GreedyHGSampler(base())


def test_an_unknown_credit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"credit must be one of \('refined', 'seed'\), but got 'baldwin'"):
        ghg.GreedyHGSampler(credit="baldwin")  # type: ignore[arg-type]


def test_the_name_says_so() -> None:
    assert str(ghg.GreedyHGSampler(RandomSampler(), credit="seed")) == "GreedyHGSampler(RandomSampler, credit='seed')"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_copies_give_credit_to_the_seed_as_well(duplicate: Callable[[BaseSampler], BaseSampler]) -> None:
    sampler = ghg.GreedyHGSampler(SAMPLERS["tpe"](), credit="seed")
    optuna.create_study(sampler=sampler).ask()  # a trial that is still running
    study = optuna.create_study(sampler=duplicate(sampler))
    study.optimize(refined_objective, n_trials=8)
    assert seeds(study) == told(study, SAMPLERS["tpe"])


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_equal_seeds_give_equal_studies(name: str, credit: Credit) -> None:
    studies = [refined_study(SAMPLERS[name], credit, n_trials=5 if name == "gp" else 8) for _ in range(2)]
    assert [(t.params, t.value) for t in studies[0].trials] == [(t.params, t.value) for t in studies[1].trials]
    assert seeds(studies[0]) == seeds(studies[1])


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", ["tpe", "cmaes", "nsgaii"])
def test_a_study_goes_on_elsewhere_with_its_pickled_sampler(name: str, credit: Credit, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    study = refined_study(SAMPLERS[name], credit, n_trials=5, storage=url, study_name="x")
    sampler = pickle.loads(pickle.dumps(study.sampler))
    elsewhere = optuna.load_study(study_name="x", storage=url, sampler=sampler)
    elsewhere.optimize(refined_objective, n_trials=4)
    assert seeds(elsewhere) == seeds(refined_study(SAMPLERS[name], credit, n_trials=9))


def test_an_enqueued_value_is_its_own_seed_and_an_enqueued_seed_is_refined() -> None:
    spy = Spy()
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(spy, credit="seed"))
    study.enqueue_trial({"lr": 0.5})
    study.enqueue_trial({}, user_attrs={"seed_lr": 0.25})
    study.optimize(problems.refine, n_trials=3)
    assert [t.params["lr"] for t in spy.seen[-1][:2]] == [0.5, 0.25]
    assert study.trials[0].params["lr"] == 0.5
    assert study.trials[1].params["lr"] == study.trials[1].user_attrs["refined_lr"] < 0.25


@pytest.mark.parametrize("credit", CREDITS)
def test_what_partial_fixed_fixes_inside_is_the_seed(credit: Credit) -> None:
    base = PartialFixedSampler({"lr": 0.5}, RandomSampler(seed=0))
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(base, credit=credit))
    study.optimize(problems.refine, n_trials=2)
    for trial in study.trials:
        assert trial.user_attrs["seed_lr"] == 0.5
        assert trial.params["lr"] == trial.user_attrs["refined_lr"] < 0.5


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("name", ["tpe", "univariate tpe", "gp", "cmaes", "random"])
def test_partial_fixed_around_fixes_what_it_names_and_the_rest_is_refined(name: str, credit: Credit) -> None:
    inner = ghg.GreedyHGSampler(SAMPLERS[name](), credit=credit)
    study = optuna.create_study(sampler=PartialFixedSampler({"n": 3, "x": 0.5}, inner))
    study.optimize(refined_objective, n_trials=5)
    for trial in study.trials:
        assert (trial.params["n"], trial.params["x"], trial.user_attrs["seed_x"]) == (3, 0.5, 0.5)
        assert trial.params["y"] == pytest.approx(max(1e-3, trial.user_attrs["seed_y"] / 4))
    assert len({trial.user_attrs["seed_y"] for trial in study.trials}) > 1


def test_what_partial_fixed_around_fixes_is_a_seed_that_stays(caplog: pytest.LogCaptureFixture) -> None:
    study = optuna.create_study(sampler=PartialFixedSampler({"lr": 0.5}, ghg.GreedyHGSampler(seed=0)))
    optuna.logging.enable_propagation()
    try:
        study.optimize(problems.refine, n_trials=1)
    finally:
        optuna.logging.disable_propagation()
    (trial,) = study.trials
    assert trial.params["lr"] == trial.user_attrs["seed_lr"] == 0.5
    assert trial.user_attrs["refined_lr"] < 0.5
    assert "lr stays at its enqueued value 0.5, or that of a PartialFixedSampler" in caplog.text


def test_fresh_randomness_for_another_worker() -> None:
    sampler = ghg.GreedyHGSampler(RandomSampler(seed=0), credit="seed")
    reseeded = copy.deepcopy(sampler)
    reseeded.reseed_rng()
    drawn = [ghg.Alpha(optuna.create_study(sampler=s).ask()).suggest_float("x", 0, 1) for s in (sampler, reseeded)]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("credit", CREDITS)
def test_threads_share_one_sampler(credit: Credit) -> None:
    sampler = ghg.GreedyHGSampler(TPESampler(seed=0, n_startup_trials=3), credit=credit)
    study = optuna.create_study(sampler=sampler)
    study.optimize(problems.refine, n_trials=12, n_jobs=3)
    assert len({t.params["lr"] for t in study.trials}) == 12
    assert all(t.params["lr"] == t.user_attrs["refined_lr"] for t in study.trials)


def work(storage: str, path: str, credit: Credit, seed: int) -> None:
    """What one process does."""
    place = f"sqlite:///{path}" if storage == "sqlite" else JournalStorage(JournalFileBackend(path))
    sampler = ghg.GreedyHGSampler(TPESampler(seed=seed, n_startup_trials=2), credit=credit)
    study = optuna.load_study(study_name="shared", storage=place, sampler=sampler)
    study.optimize(refined_objective, n_trials=3)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of other tests' threads, which do nothing by now
def test_processes_share_one_study(storage: str, credit: Credit, tmp_path: Path) -> None:
    path = str(tmp_path / "study")
    place = f"sqlite:///{path}" if storage == "sqlite" else JournalStorage(JournalFileBackend(path))
    study = optuna.create_study(study_name="shared", storage=place)
    processes = [
        multiprocessing.get_context("fork").Process(target=work, args=(storage, path, credit, k)) for k in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(study.trials) == len({t.params["x"] for t in study.trials}) == 6
    for trial in study.trials:
        assert trial.state == TrialState.COMPLETE
        assert trial.params["x"] == pytest.approx(0.3 + 0.2 * (trial.user_attrs["seed_x"] - 0.3))
        assert trial.value == value(trial.params)


def test_a_view_is_not_told_of_what_it_has_shown() -> None:
    """Trials are shared with the storage, which must not get to know how they were shown."""
    study = refined_study(SAMPLERS["random"], "seed", n_trials=3)
    before = copy.deepcopy(study.trials)
    study.optimize(refined_objective, n_trials=1)
    assert study.trials[:3] == before


def test_margin_is_refused_and_nothing_else_of_cmaes() -> None:
    with pytest.warns(ExperimentalWarning):
        ghg.GreedyHGSampler(CmaEsSampler(lr_adapt=True), credit="seed")
