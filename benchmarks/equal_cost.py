"""Does refinement beat the sampler alone at equal cost?

For each seed (data, initial weights and samplers all differ), TPE + greedy runs a number of refined trials,
and TPE alone as many trials as cost the same. Compared is the best trial by *validation* loss, on the *test* split.

    python benchmarks/equal_cost.py --task digits-cleaning --out benchmarks/results/digits_cleaning.json
    python benchmarks/equal_cost.py --task digits-l2 --out benchmarks/results/digits_l2.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import environment
import optuna
import torch

from optuna_greedyhg.tasks import make_task
from optuna_greedyhg.tasks.comparison import TPE, TPE_GREEDY, compare_with_refined
from optuna_greedyhg.tasks.methods import DEFAULTS

SCORES = ("val_loss", "test_loss", "test_accuracy", "cost", "seconds", "weight_clean", "weight_corrupted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["digits-cleaning", "digits-l2"], default="digits-cleaning")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-trials", type=int, default=8, help="number of refined trials")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)

    runs = [run(arguments.task, seed, arguments.n_trials) for seed in range(arguments.seeds)]
    result = {**environment.describe(), "summary": summarize(runs), "runs": runs}
    print(json.dumps(result["summary"], indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def run(task: str, seed: int, n_trials: int) -> dict[str, Any]:
    """One seed's rows, by method."""
    start = time.perf_counter()
    storage = optuna.storages.InMemoryStorage()
    task_of_seed = make_task(task, seed=seed)
    comparison = compare_with_refined(task_of_seed, storage=storage, prefix="", seed=seed, n_trials=n_trials)
    rows = {summary.name: summary.as_json() for summary in comparison.summaries}
    shown = ", ".join(f"{name} {row['test_accuracy']:.3f}" for name, row in rows.items())
    print(f"seed {seed}: test accuracy {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
    return {"seed": seed, **rows}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of every score, and how often refinement wins."""
    methods = {
        method: {
            score: {"mean": statistics.mean(values), "stdev": statistics.stdev(values) if len(values) > 1 else 0.0}
            for score in SCORES
            if (values := [run[method][score] for run in runs if score in run[method]])
        }
        for method in (DEFAULTS, TPE, TPE_GREEDY)
    }
    wins = {
        score: sum(run[TPE_GREEDY][score] > run[TPE][score] for run in runs)
        if score == "test_accuracy"
        else sum(run[TPE_GREEDY][score] < run[TPE][score] for run in runs)
        for score in ("val_loss", "test_loss", "test_accuracy")
    }
    return {"n_seeds": len(runs), "wins_of_greedy": wins, "methods": methods}


if __name__ == "__main__":
    main()
