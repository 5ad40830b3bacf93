"""How many trials a second are lanes of one computation, beside the same trials one by one?

An MLP 64-32-10 on digits, minibatches of 64, SGD with momentum; α is the learning rate, the weight decay and a weight
for every example. A trial refines it for 10 outer steps of 10 training steps, and evaluates it by a fresh training of
100 steps three times. One by one is ``study.optimize`` with ``refine``, and the rest ``optimize_batched``; both are
timed in turns within one run, and what is shown are the medians of the ratios.

    python benchmarks/lanes.py --out benchmarks/results/lanes.json
    python benchmarks/lanes.py --device cuda --lanes 64 256 1024

With ``pruned``, every other trial is pruned at one of its evaluations, so that lanes do not go in step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import environment
import optuna
import torch
import torch.nn.functional as F
from optuna.pruners import BasePruner, NopPruner
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from torch import Tensor, nn

import optuna_greedyhg as ghg
from optuna_greedyhg.tasks.digits import load_splits

N_TRAIN, N_VAL, BATCH = 1024, 320, 64
SETTINGS: dict[str, Any] = {
    "update_rule": ghg.SGD(lr="lr", momentum=0.9, weight_decay="weight_decay"),
    "estimator": ghg.Greedy(gamma=0.9),
    "horizon": 10,
    "n_outer_steps": 10,
    "evaluate_every": 5,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=4, help="how many make the time of one by one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--quick", action="store_true", help="64 lanes, and three repeats")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lanes, arguments.repeats = [64], 3
    torch.set_num_threads(arguments.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    device = torch.device(arguments.device)
    result = {**environment.describe(), "device": str(device), "threads": arguments.threads}
    for name in arguments.kinds:
        result[name] = measure(Digits(device), KINDS[name], arguments.lanes, arguments.trials, arguments.repeats)
        print(name, json.dumps(result[name]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


class PruneHalf(BasePruner):
    """Prunes every other trial, at one of the evaluations that it may be pruned at."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        drawn = random.Random(trial.number)
        return drawn.random() < 0.5 and trial.last_step == drawn.choice([0, 5])


KINDS = {"alike": NopPruner(), "pruned": PruneHalf()}


class Digits:
    """Makes a trial's problem: the data are the same for all, initial weights are the trial's own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        splits = load_splits(N_TRAIN, N_VAL, torch.Generator().manual_seed(0), device)
        index = torch.arange(N_TRAIN, device=device)
        self._train = list(zip(*(x.split(BATCH) for x in (*splits.train, index)), strict=True))
        self._val = list(zip(*(x.split(BATCH) for x in splits.val), strict=True))

    def __call__(self, trial: Trial, alpha: ghg.Alpha) -> ghg.BilevelProblem:
        alpha.suggest_float("lr", 1e-2, 1.0, log=True)
        alpha.suggest_float("weight_decay", 1e-6, 1e-2, log=True)
        alpha.tensor("example_logits", torch.zeros(N_TRAIN))
        torch.manual_seed(trial.number)
        return ghg.BilevelProblem(
            model=nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(self._device),
            train_loss=train_loss,
            val_loss=val_loss,
            train_batches=self._train,
            val_batches=self._val,
            cuda_graphs=True,
        )


def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels, index = batch
    losses = F.cross_entropy(model(images), labels, reduction="none")
    return (torch.sigmoid(alpha["example_logits"][index]) * losses).mean()


def val_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def measure(
    make_problem: Digits, pruner: BasePruner, lane_counts: list[int], n_alone: int, repeats: int
) -> dict[str, Any]:
    """Medians of the time of a trial in seconds, and of how much more trials a second lanes are than one by one."""

    def objective(trial: Trial) -> float:
        alpha = ghg.Alpha(trial)
        return ghg.refine(trial, make_problem(trial, alpha), alpha, **SETTINGS)

    def alone() -> float:
        return seconds_of(lambda study: study.optimize(objective, n_trials=n_alone), pruner) / n_alone

    def lanes(n: int) -> float:
        # With pruning, twice as many trials as lanes, which are filled again at different times.
        n_trials = n if isinstance(pruner, NopPruner) else 2 * n
        return (
            seconds_of(lambda study: ghg.optimize_batched(study, make_problem, n_trials, n, **SETTINGS), pruner)
            / n_trials
        )

    alone(), lanes(2)  # warm up
    rounds = [(alone(), {n: lanes(n) for n in lane_counts}) for _ in range(repeats)]
    return {
        "seconds one by one": statistics.median(one for one, _ in rounds),
        "seconds in lanes": {n: statistics.median(many[n] for _, many in rounds) for n in lane_counts},
        "speedup": {n: statistics.median(one / many[n] for one, many in rounds) for n in lane_counts},
    }


def seconds_of(run: Callable[[Study], object], pruner: BasePruner) -> float:
    """The time that a new study takes."""
    study = optuna.create_study(sampler=ghg.GreedyHGSampler(optuna.samplers.RandomSampler(seed=0)), pruner=pruner)
    start = time.perf_counter()
    run(study)  # ends with numbers read from the device
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
