"""Half of the labels are wrong: let gradients find out which, while Optuna looks for the rest.

One weight a training example, the learning rate and the weight decay are refined by gradients inside each trial; the
width of the network stays with TPE. Run it, then look at it:

    python examples/example_weights.py
    optuna-dashboard sqlite:///greedyhg.db --artifact-dir artifacts
"""

from __future__ import annotations

import os

import optuna
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import optuna_greedyhg as ghg

torch.set_num_threads(1)  # such small matrices gain nothing from more

# Clean digits, of which half of the 300 training labels are then replaced by random ones.
images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
noisy = labels[:300].clone()
wrong = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.5
noisy[wrong] = torch.randint(10, (int(wrong.sum()),), generator=torch.Generator().manual_seed(1))

train = (images[:300], noisy, torch.arange(300))
val = (images[300:600], labels[300:600])
test = (images[600:], labels[600:])


def make_model(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


def train_loss(model, alpha, batch):
    x, y, index = batch
    weights = torch.sigmoid(alpha["example_logits"][index])
    return (weights * F.cross_entropy(model(x), y, reduction="none")).mean()


def val_loss(model, alpha, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def accuracy(model, alpha, batch):
    x, y = batch
    return (model(x).argmax(dim=1) == y).float().mean()


os.makedirs("artifacts", exist_ok=True)
store = optuna.artifacts.FileSystemArtifactStore("artifacts")


def objective(trial: optuna.Trial) -> float:
    width = trial.suggest_int("width", 16, 64)  # stays black-box
    alpha = ghg.Alpha(trial)  # seeded by the sampler, refined by gradients
    alpha.suggest_float("lr", 1e-3, 1.0, log=True)
    alpha.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
    alpha.tensor("example_logits", torch.zeros(300))  # one per training example

    problem = ghg.BilevelProblem(
        model=make_model(width),
        train_loss=train_loss,
        val_loss=val_loss,
        train_batches=train,
        val_batches=val,
        test_batches=test,  # recorded, never optimized
        metrics={"accuracy": accuracy},
    )
    return ghg.refine(
        trial,
        problem,
        alpha,
        update_rule=ghg.SGD(lr="lr", momentum=0.9, weight_decay="weight_decay"),
        estimator=ghg.Greedy(gamma=0.9),
        horizon=10,
        n_outer_steps=50,
        artifact_store=store,
    )


study = optuna.create_study(
    sampler=ghg.GreedyHGSampler(optuna.samplers.TPESampler(seed=0)),
    pruner=optuna.pruners.MedianPruner(),
    storage="sqlite:///greedyhg.db",
)
study.optimize(objective, n_trials=10)

best = study.best_trial
weights = torch.sigmoid(ghg.refined_params(best)["example_logits"])
is_wrong = noisy != labels[:300]
print(f"validation loss {best.value:.3f}, test accuracy {best.user_attrs['test_accuracy']:.1%}")
print(f"mean weight of clean examples {weights[~is_wrong].mean():.2f}, of wrong ones {weights[is_wrong].mean():.2f}")
