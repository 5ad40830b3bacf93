"""Gradient-based refinement of hyperparameters inside Optuna trials, by greedy hypergradient descent."""

from optuna_greedyhg.hypergrad.audit import AuditRow, DivergedError, HypergradientAudit
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.curvature import ConjugateGradients, Neumann
from optuna_greedyhg.hypergrad.descent import DescentOptions, OuterStep, descend
from optuna_greedyhg.hypergrad.domains import Domain, Hyperparameter, Interval, Positive, Unbounded
from optuna_greedyhg.hypergrad.episodes import Episode, MetaProblem
from optuna_greedyhg.hypergrad.estimators import (
    DrMAD,
    Estimator,
    FirstOrder,
    Forward,
    Greedy,
    HyperDistill,
    Implicit,
    Reverse,
)
from optuna_greedyhg.hypergrad.evaluation import Evaluation, Online, Retrain
from optuna_greedyhg.hypergrad.outer import Decaying, TrustRegion
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.product_modes import ProductMode, UnsupportedOperatorError
from optuna_greedyhg.hypergrad.propagators import Decay, LastStep
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, AdamW, UpdateRule
from optuna_greedyhg.report.dashboard import publish
from optuna_greedyhg.trials.alpha import Alpha
from optuna_greedyhg.trials.batched import optimize_batched
from optuna_greedyhg.trials.lost import requeue_lost_trials
from optuna_greedyhg.trials.policies import Always, Budget, Fraction, Never, Policy, Promising
from optuna_greedyhg.trials.records import refined_params, refined_weights
from optuna_greedyhg.trials.refine import refine
from optuna_greedyhg.trials.sampler import GreedyHGSampler

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Alpha",
    "Always",
    "AuditRow",
    "BilevelProblem",
    "Budget",
    "ConjugateGradients",
    "Cost",
    "Decay",
    "Decaying",
    "DescentOptions",
    "DivergedError",
    "Domain",
    "DrMAD",
    "Episode",
    "Estimator",
    "Evaluation",
    "FirstOrder",
    "Forward",
    "Fraction",
    "Greedy",
    "GreedyHGSampler",
    "HyperDistill",
    "HypergradientAudit",
    "Hyperparameter",
    "Implicit",
    "Interval",
    "LastStep",
    "MetaProblem",
    "Neumann",
    "Never",
    "Online",
    "OuterStep",
    "Policy",
    "Positive",
    "ProductMode",
    "Promising",
    "Retrain",
    "Reverse",
    "Spectral",
    "TrustRegion",
    "Unbounded",
    "UnsupportedOperatorError",
    "UpdateRule",
    "descend",
    "optimize_batched",
    "publish",
    "refine",
    "refined_params",
    "refined_weights",
    "requeue_lost_trials",
]
