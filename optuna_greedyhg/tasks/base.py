"""What a ready-made task is: a problem on real data, with its hyperparameters and the settings that suit it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from optuna.trial import BaseTrial
from torch import Tensor

from optuna_greedyhg.hypergrad.descent import OuterStep
from optuna_greedyhg.hypergrad.episodes import Problem
from optuna_greedyhg.hypergrad.estimators import Estimator
from optuna_greedyhg.hypergrad.evaluation import Online, Retrain
from optuna_greedyhg.hypergrad.outer import Decaying, OuterOptimizer, TrustRegion
from optuna_greedyhg.hypergrad.problem import Model
from optuna_greedyhg.hypergrad.update_rules import UpdateRule
from optuna_greedyhg.trials import records
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.policies import Always, Policy
from optuna_greedyhg.trials.records import ArtifactStore
from optuna_greedyhg.trials.refine import Callback, refine


@dataclass(frozen=True)
class Settings:
    """How a task's hyperparameters are refined, and the protocol of a trial's value; see :func:`refine`.

    Attributes:
        outer_lr: That of Adam, which moves α.
        outer_decay: What it is multiplied with after every outer step.
        trust_radius: How far a coordinate may go from its seed; ``None`` is as far as it likes.
        policy: Which trials are refined, where a budget is to be shared with seeds.
        inherit: Whether tensors start where the best trial of the study has ended, where there is a store of artifacts;
            not for those whose start the sampler draws.
    """

    horizon: int
    n_outer_steps: int
    outer_lr: float
    evaluate: Retrain | Online
    evaluate_every: int
    outer_decay: float = 1.0
    trust_radius: float | None = None
    patience: int | None = None
    rebase: bool = True
    policy: Policy = Always()
    inherit: bool = False

    @property
    def outer_optimizer(self) -> OuterOptimizer:
        """What moves α."""
        optimizer: OuterOptimizer = partial(torch.optim.Adam, lr=self.outer_lr)
        if self.outer_decay < 1.0:
            optimizer = Decaying(self.outer_decay, optimizer)
        return optimizer if self.trust_radius is None else TrustRegion(self.trust_radius, optimizer)

    def inherits_from(self, artifact_store: ArtifactStore | None) -> bool:
        """Whether tensors are inherited: asked for, and there is where to find them."""
        return self.inherit and artifact_store is not None


class Task(Protocol):
    """A problem with train, validation and test splits. Equal seeds of its constructor give equal data and weights."""

    name: ClassVar[str]
    summary: ClassVar[str]
    settings: ClassVar[Settings]
    defaults: ClassVar[Mapping[str, Any]]
    """What a user who does not tune would take, for the parameters that a sampler suggests."""
    diagnostics: ClassVar[tuple[str, ...]]
    """The names of what ``diagnose`` gives."""

    def define(self, trial: BaseTrial, alpha: Alpha) -> tuple[Problem, UpdateRule]:
        """Suggests the trial's parameters, declares those in α, and builds the problem."""

    def diagnose(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Further numbers about refined hyperparameters, which the data's makers know how to judge."""


def make_objective(
    task: Task,
    *,
    estimator: Estimator[Any] | None,
    settings: Settings | None = None,
    artifact_store: ArtifactStore | None = None,
    callbacks: Sequence[Callback] = (),
) -> Callable[[BaseTrial], float]:
    """The objective of a study of one task.

    Args:
        task: The task.
        estimator: The hypergradient's estimator; ``None`` makes a trial that evaluates its seed.
        settings: Instead of the task's own.
        artifact_store: Keeps the tensors of α; without it none are inherited.
        callbacks: Called after every outer step.
    """
    chosen = settings or task.settings

    def objective(trial: BaseTrial) -> float:
        def diagnose(trial: BaseTrial, step: OuterStep) -> None:
            if step.evaluation is step.best:
                records.write(trial, task.diagnose(step.best.values))

        alpha = Alpha(trial, artifact_store=artifact_store, inherit=chosen.inherits_from(artifact_store))
        problem, update_rule = task.define(trial, alpha)
        return refine(
            trial,
            problem,
            alpha,
            update_rule=update_rule,
            estimator=estimator,
            horizon=chosen.horizon,
            n_outer_steps=chosen.n_outer_steps,
            policy=chosen.policy,
            outer_optimizer=chosen.outer_optimizer,
            evaluate=chosen.evaluate,
            evaluate_every=chosen.evaluate_every,
            patience=chosen.patience,
            rebase=chosen.rebase,
            artifact_store=artifact_store,
            callbacks=[diagnose, *callbacks],
        )

    return objective


def accuracy(model: Model, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    """The share of examples whose largest logit is that of their class."""
    images, labels, *_ = batch
    predictions: Tensor = model(images).argmax(dim=1)
    return (predictions == labels).double().mean()
