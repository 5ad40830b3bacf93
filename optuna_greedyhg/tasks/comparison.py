"""Methods compared on a task at equal cost, under one protocol of a trial's value.

:func:`compare` gives every method the same budget on the same seeds; :func:`compare_with_refined` lets a number of
refined trials say what the budget is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import optuna
import torch
from optuna.storages import BaseStorage
from optuna.trial import BaseTrial, FixedTrial

from optuna_greedyhg.hypergrad import batches, evaluation
from optuna_greedyhg.hypergrad.cost import Cost, Prices
from optuna_greedyhg.hypergrad.descent import OuterStep
from optuna_greedyhg.hypergrad.domains import to_coordinates
from optuna_greedyhg.hypergrad.evaluation import Online, Retrain
from optuna_greedyhg.hypergrad.prices import measured_prices
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.report.runs import Run, run_of
from optuna_greedyhg.report.summary import MethodSummary, summarize
from optuna_greedyhg.tasks.base import Settings, Task, make_objective
from optuna_greedyhg.tasks.methods import DEFAULTS, SAMPLERS, Method, method_named
from optuna_greedyhg.tasks.spending import OnSpent, open_study, require_same, spend, spent_by
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.records import ArtifactStore

OnStep = Callable[[str, float, BaseTrial, OuterStep], None]

TPE, TPE_GREEDY = "tpe", "tpe+greedy"
_PRICES = "prices"


@dataclass(frozen=True)
class Yardstick:
    """What the cost of a task's runs is measured in.

    Attributes:
        full_training: What a trial without refinement costs, in training gradients of one example.
        prices: What the other passes cost beside them.
    """

    full_training: float
    prices: Prices

    def as_json(self) -> dict[str, float]:
        """Its numbers by name."""
        return {"full_training": self.full_training, **asdict(self.prices)}


class Comparison(NamedTuple):
    """The studies of the three methods by name, in the order of the table, and their rows."""

    studies: dict[str, optuna.Study]
    summaries: list[MethodSummary]


def study_name(task: str, method: str, seed: int) -> str:
    """Where the runs of :func:`compare` are kept."""
    return f"{task}/{method}/{seed}"


def measure(task: Task, settings: Settings | None = None) -> Yardstick:
    """Measures the costs of a task at its defaults; takes as long as some hundred training steps."""
    alpha = Alpha(trial := FixedTrial(dict(task.defaults)))
    problem, update_rule = task.define(trial, alpha)
    prices = measured_prices(problem.val_episodes[0], alpha.hyperparameters, update_rule)
    return Yardstick(prices.of(full_training(task, settings)), prices)


def full_training(task: Task, settings: Settings | None = None) -> Cost:
    """What a trial of a task costs that is not refined."""
    alpha = Alpha(trial := FixedTrial(dict(task.defaults)))
    its_problem, update_rule = task.define(trial, alpha)
    problem = its_problem.val_episodes[0]
    products = Products(problem, {name: h.domain for name, h in alpha.hyperparameters.items()}, update_rule)
    values = to_coordinates(alpha.hyperparameters, problem.device, problem.dtype)
    evaluation.evaluate(products, values, products.initial_state(), 0, 0)
    (batch,) = problem.first_batches(1)
    protocol = (chosen := settings or task.settings).evaluate
    declared = protocol.n_steps if isinstance(protocol, Retrain) else None
    n_steps = declared or chosen.horizon * chosen.n_outer_steps
    n_evaluations = 1 + math.ceil(chosen.n_outer_steps / chosen.evaluate_every) if isinstance(protocol, Online) else 1
    n_episodes = len(its_problem.val_episodes)  # each of them as large as the first
    return Cost(
        n_train_gradients=n_episodes * n_steps * batches.n_examples(batch),
        n_evaluations=n_episodes * n_evaluations * products.cost.n_evaluations,
    )


def recorded_yardstick(storage: BaseStorage, task: str) -> Yardstick | None:
    """What the runs of a task that a storage has were measured by, so that others are, too; ``None`` if it has none."""
    for name in optuna.study.get_all_study_names(storage):
        if name.startswith(f"{task}/"):
            recorded = optuna.load_study(study_name=name, storage=storage).user_attrs.get(_PRICES)
            if recorded is not None:
                known = dict(recorded)
                return Yardstick(known.pop("full_training"), Prices(**known))
    return None


def identity_of(task: str, method: Method, seed: int, *, device: torch.device, settings: Settings) -> dict[str, Any]:
    """What must be the same for a run to be carried on; how α moves is nothing to one that does not refine."""
    return {
        "task": task,
        "task_seed": seed,
        "method": method.name,
        "estimator": str(method.estimator),
        "settings": str(settings if method.estimator is not None else settings.evaluate),
        "device": device.type,
    }


def compare(
    make_task: Callable[[int], Task],
    methods: Sequence[Method],
    seeds: Sequence[int],
    *,
    storage: BaseStorage,
    budget: float,
    yardstick: Yardstick,
    device: torch.device,
    settings: Settings | None = None,
    artifact_store: ArtifactStore | None = None,
    on_step: OnStep | None = None,
) -> list[Run]:
    """Runs every method on every seed until it has cost the budget, or carries it on until then.

    A seed's data, initial weights and corruption are the same for all methods. Every run is a study,
    ``<task>/<method>/<seed>``; one that has cost the budget is left as it is.

    Args:
        make_task: Makes the task of a seed.
        methods: What to compare.
        seeds: Those of the task, and of the samplers.
        storage: Where the studies are, or are created.
        budget: In training gradients of one example.
        yardstick: What the other passes cost; it is recorded in every study.
        device: That of the task.
        settings: Instead of the task's own.
        artifact_store: Keeps refined tensors. A run that is carried on finds there what its trials may inherit.
        on_step: Called after every outer step, with the method, the share of its runs that is done, the trial and the
            step.

    Raises:
        OtherStudyError: If a study exists that was run otherwise, before anything is run.
    """
    first = make_task(seeds[0])
    settings = settings or first.settings
    settings = replace(settings, inherit=settings.inherits_from(artifact_store))
    runs = [(seed, method) for seed in seeds for method in methods]
    names = {(seed, method): study_name(first.name, method.name, seed) for seed, method in runs}
    identities = {
        (seed, method): identity_of(first.name, method, seed, device=device, settings=settings) for seed, method in runs
    }
    known = set(optuna.study.get_all_study_names(storage))
    for run in runs:
        if names[run] in known:
            require_same(optuna.load_study(study_name=names[run], storage=storage), identities[run])
    done: list[Run] = []
    for k, seed in enumerate(seeds):
        task = first if k == 0 else make_task(seed)
        for method in methods:
            run = seed, method
            study = open_study(storage, names[run], SAMPLERS[method.sampler], identities[run], seed)
            study.set_user_attr(_PRICES, yardstick.as_json())
            shown = _shown(on_step, method.name, k, len(seeds))
            prices = yardstick.prices
            spend(
                study,
                task,
                method,
                budget=budget,
                prices=prices,
                settings=settings,
                artifact_store=artifact_store,
                on_spent=shown,
            )
            done.append(run_of(study, method=method.name, seed=seed, prices=prices, budget=budget))
    return done


def _shown(on_step: OnStep | None, method: str, n_done: int, n_seeds: int) -> OnSpent | None:
    if on_step is None:
        return None
    return lambda share, trial, step: on_step(method, (n_done + min(share, 1.0)) / n_seeds, trial, step)


def compare_with_refined(
    task: Task,
    *,
    storage: BaseStorage,
    prefix: str,
    seed: int,
    n_trials: int,
    artifact_store: ArtifactStore | None = None,
    on_step: OnStep | None = None,
) -> Comparison:
    """Defaults, TPE, and TPE with refinement; the sampler alone may cost what refinement has cost, in ``Cost.total``.

    Args:
        task: The task.
        storage: Where the three studies are created.
        prefix: Begins their names; no study of these names may exist.
        seed: Seeds the samplers.
        n_trials: Number of refined trials.
        artifact_store: Keeps refined tensors.
        on_step: Called after every outer step, with the method, the share of its study that is done, the trial and the
            step.
    """
    methods = {name: method_named(name) for name in (DEFAULTS, TPE, TPE_GREEDY)}
    studies = {
        name: open_study(storage, f"{prefix}{name}", SAMPLERS[method.sampler], {}, seed)
        for name, method in methods.items()
    }

    def spend_on(name: str, budget: float) -> None:
        spend(
            studies[name],
            task,
            methods[name],
            budget=budget,
            prices=Prices(),
            artifact_store=artifact_store,
            on_spent=_shown(on_step, name, 0, 1),
        )

    def show_refined(trial: BaseTrial, step: OuterStep) -> None:
        if on_step is not None:
            share = (trial.number + step.index / task.settings.n_outer_steps) / n_trials
            on_step(TPE_GREEDY, share, trial, step)

    spend_on(DEFAULTS, math.inf)
    estimator = methods[TPE_GREEDY].estimator
    objective = make_objective(task, estimator=estimator, artifact_store=artifact_store, callbacks=[show_refined])
    studies[TPE_GREEDY].optimize(objective, n_trials=n_trials)
    spend_on(TPE, spent_by(studies[TPE_GREEDY], Prices()))
    return Comparison(studies, [summarize(name, study, task.diagnostics) for name, study in studies.items()])
