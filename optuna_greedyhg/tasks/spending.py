"""Studies that are run until they have cost a budget, and carried on where they stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FrozenTrial, Trial, TrialState

from optuna_greedyhg.hypergrad.cost import Cost, Prices
from optuna_greedyhg.hypergrad.descent import OuterStep
from optuna_greedyhg.report.runs import ROUNDING
from optuna_greedyhg.tasks.base import Settings, Task, make_objective
from optuna_greedyhg.tasks.methods import Method
from optuna_greedyhg.trials.records import ArtifactStore, cost_of
from optuna_greedyhg.trials.sampler import GreedyHGSampler

OnSpent = Callable[[float, BaseTrial, OuterStep], None]

_MAX_FAILURES = 3


class OtherStudyError(ValueError):
    """A study of this name exists, and its values do not compare."""


def require_same(study: optuna.Study, identity: Mapping[str, Any]) -> None:
    """Refuses a study of other directions, or one that has trials of another identity.

    Raises:
        OtherStudyError: If it is another study.
    """
    recorded = {key: study.user_attrs.get(key) for key in identity}
    n_trials = len(study.get_trials(deepcopy=False))
    if study.directions != [StudyDirection.MINIMIZE] or (n_trials > 0 and recorded != identity):
        directions = [direction.name.lower() for direction in study.directions]
        raise OtherStudyError(
            f"the study {study.study_name!r} is another one ({directions}, {recorded}), whose values do not compare "
            f"with those of {dict(identity)}; choose another name"
        )


def open_study(
    storage: BaseStorage,
    name: str | None,
    make_sampler: Callable[[int], BaseSampler],
    identity: Mapping[str, Any],
    seed: int,
) -> optuna.Study:
    """Creates a study, or loads it, if it is the same.

    Args:
        storage: Where it is.
        name: Its name; ``None`` creates one of a new name.
        make_sampler: What draws its seeds, from a random seed.
        identity: Attributes without which values do not compare; they are written to the study.
        seed: Of the sampler. A study that has trials goes on with another, which would not draw the same seeds again.

    Raises:
        OtherStudyError: If there is a study of this name with another identity.
    """
    study = optuna.create_study(
        storage=storage, study_name=name, load_if_exists=True, pruner=optuna.pruners.MedianPruner()
    )
    require_same(study, identity)
    for key, value in identity.items():
        study.set_user_attr(key, value)
    n_trials = len(study.get_trials(deepcopy=False))
    study.sampler = GreedyHGSampler(make_sampler((seed + n_trials) % 2**32))
    return study


def spent_by(study: optuna.Study, prices: Prices) -> float:
    """What a study's finished trials have cost, in training gradients of one example."""
    return prices.of(sum((cost_of(trial) for trial in study.get_trials(deepcopy=False)), Cost()))


def spend(
    study: optuna.Study,
    task: Task,
    method: Method,
    *,
    budget: float,
    prices: Prices,
    settings: Settings | None = None,
    artifact_store: ArtifactStore | None = None,
    on_spent: OnSpent | None = None,
) -> None:
    """Adds trials to a study until it has cost the budget; the last one ends with the outer step that reaches it.

    The study of the defaults gets a single trial. A study whose trials fail three times in a row is left where it is.

    Args:
        study: Of this task and method; what it has cost already counts.
        task: The task.
        method: How trials are made.
        budget: In training gradients of one example.
        prices: What other passes cost.
        settings: Instead of the task's own.
        artifact_store: Keeps refined tensors.
        on_spent: Called after every outer step, with the share of the budget that is spent, the trial and the step.
    """
    spent, n_failures = spent_by(study, prices), 0
    enough = budget * (1 - ROUNDING)
    states = {trial.state for trial in study.get_trials(deepcopy=False)}
    if spent >= enough or (method.is_defaults and TrialState.COMPLETE in states):
        return

    def observe(trial: BaseTrial, step: OuterStep) -> None:
        so_far = spent + prices.of(step.cost)
        if on_spent is not None:
            on_spent(1.0 if method.is_defaults else so_far / budget, trial, step)
        if so_far >= enough and isinstance(trial, Trial):
            trial.study.stop()

    def account(study: optuna.Study, trial: FrozenTrial) -> None:
        nonlocal spent, n_failures
        spent += prices.of(cost_of(trial))
        n_failures = n_failures + 1 if trial.state == TrialState.FAIL else 0
        if spent >= enough or n_failures == _MAX_FAILURES:
            study.stop()

    if method.is_defaults and TrialState.WAITING not in states:
        study.enqueue_trial(dict(task.defaults))
    study.optimize(
        make_objective(
            task,
            estimator=method.estimator,
            settings=settings,
            artifact_store=artifact_store,
            callbacks=[observe],
        ),
        n_trials=1 if method.is_defaults else None,
        callbacks=[account],
        catch=(Exception,),
    )
