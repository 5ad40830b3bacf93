"""Thirty-two trials at a time in one computation: every lane has its own weights, hyperparameters and seed.

Small models are trained by many small operations, whose overhead lanes share. Each is a trial by itself: it is asked,
reports, is pruned and told when its time has come, and the next trial takes its lane.

    python examples/many_trials_at_once.py
"""

from __future__ import annotations

import time

import optuna
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import optuna_greedyhg as ghg

torch.set_num_threads(1)
optuna.logging.set_verbosity(optuna.logging.WARNING)

images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
train = list(zip(images[:256].split(64), labels[:256].split(64), strict=True))  # minibatches
val = (images[256:512], labels[256:512])
test = (images[512:], labels[512:])


# Losses and metrics stand outside of make_problem: they are the same for all lanes.
def train_loss(model, alpha, batch):
    x, y = batch
    return F.cross_entropy(model(x), y) + alpha["l2"] * sum(w.square().sum() for w in model.parameters())


def val_loss(model, alpha, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def accuracy(model, alpha, batch):
    x, y = batch
    return (model(x).argmax(dim=1) == y).float().mean()


def make_problem(trial: optuna.Trial, alpha: ghg.Alpha) -> ghg.BilevelProblem:
    alpha.suggest_float("lr", 1e-2, 1.0, log=True)
    alpha.suggest_float("l2", 1e-5, 1e-1, log=True)
    torch.manual_seed(trial.number)  # initial weights of its own
    return ghg.BilevelProblem(
        model=nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
        train_loss=train_loss,
        val_loss=val_loss,
        train_batches=train,
        val_batches=val,
        test_batches=test,
        metrics={"accuracy": accuracy},
    )


study = optuna.create_study(
    sampler=ghg.GreedyHGSampler(optuna.samplers.RandomSampler(seed=0)),
    pruner=optuna.pruners.MedianPruner(n_startup_trials=16),
)
start = time.perf_counter()
ghg.optimize_batched(
    study,
    make_problem,
    n_trials=48,
    n_lanes=32,
    update_rule=ghg.SGD(lr="lr", momentum=0.9),
    estimator=ghg.Greedy(gamma=0.9),
    horizon=10,
    n_outer_steps=6,
    evaluate_every=3,
)
print(f"{len(study.trials)} trials in {time.perf_counter() - start:.1f} s")

best = study.best_trial
print(f"validation loss {best.value:.3f}, test accuracy {best.user_attrs['test_accuracy']:.1%}")
