"""On a GPU: what does a greedy outer step cost beside plain gradients, and how much memory?

The problem of ``peers.py``, T = 10; in float32, and with the losses in bfloat16. The floor of the running variant is
1.33 times T training and T validation gradients, if kernels and not their launches take the time. *Recorded* is what a
descent does with CUDA graphs: one call for the whole horizon.

    python benchmarks/gpu.py --n-examples 100 1000 --out benchmarks/results/gpu.json     # two minutes
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import environment
import torch
from methods.ours import ESTIMATORS, hypergradient, in_parts
from methods.problem import LR, MOMENTUM, Setting, train_loss, val_loss
from step_cost import MODELS, median_ratio, take_turns

from optuna_greedyhg.hypergrad.batches import to_device
from optuna_greedyhg.hypergrad.devices import as_device
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes
from optuna_greedyhg.hypergrad.work import Horizon

HORIZON = 10
PEAKS = (
    ("greedy", HORIZON),
    ("greedy", 10 * HORIZON),
    ("reverse, replayed", HORIZON),
    ("reverse, replayed", 10 * HORIZON),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=as_device, default="cuda")
    parser.add_argument("--n-examples", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    result = {**environment.describe(), "horizon": HORIZON}
    for model, n_examples in product(MODELS, arguments.n_examples):
        setting = Setting(model, HORIZON, n_examples)
        for autocast in (None, torch.bfloat16):
            name = f"{model}, batches of {n_examples}, {'float32' if autocast is None else 'bfloat16'}"
            result[name] = measured(setting, arguments.device, autocast, arguments.repeats)
            print(name, json.dumps(result[name]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measured(setting: Setting, device: torch.device, autocast: torch.dtype | None, repeats: int) -> dict[str, Any]:
    """Times of an inner step, ratios, and peaks of memory."""

    def ours(estimator: str, horizon: int = HORIZON) -> Callable[[], object]:
        its = replace(setting, horizon=horizon)
        return hypergradient(its, ESTIMATORS[estimator], device=device, autocast=autocast)

    work: dict[str, Callable[[], object]] = {
        "training": plain_gradients(setting, device, autocast, validate=False),
        "both gradients": plain_gradients(setting, device, autocast, validate=True),
        **{name: ours(name) for name in ("greedy", "terminal", "t1t2", "reverse")},
        **{f"{name}, recorded": in_a_descent(setting, name, device, autocast) for name in ("greedy", "terminal")},
    }
    times = take_turns({name: awaited(run, device) for name, run in work.items()}, repeats)
    return {
        "milliseconds_of_a_step": {name: 1e3 * statistics.median(its) / HORIZON for name, its in times.items()},
        "greedy / both gradients": median_ratio(times["greedy"], times["both gradients"]),
        "greedy, recorded / both gradients": median_ratio(times["greedy, recorded"], times["both gradients"]),
        "greedy / greedy, recorded": median_ratio(times["greedy"], times["greedy, recorded"]),
        "terminal / training": median_ratio(times["terminal"], times["training"]),
        "peak_mb": {f"{name}, T = {horizon}": peak_bytes(ours(name, horizon), device) / 1e6 for name, horizon in PEAKS},
    }


def in_a_descent(
    setting: Setting, name: str, device: torch.device, autocast: torch.dtype | None
) -> Callable[[], object]:
    """A horizon as a descent asks for it, with CUDA graphs; recorded already."""
    problem, products, alpha = in_parts(setting, device=device, autocast=autocast, cuda_graphs=True)
    work = Horizon(problem, products, ESTIMATORS[name], None, alpha, products.initial_state(), setting.horizon, seed=0)
    for _ in range(3):
        work.perform()
    return work.perform


def plain_gradients(
    setting: Setting, device: torch.device, autocast: torch.dtype | None, *, validate: bool
) -> Callable[[], object]:
    """T training steps as anybody would write them, each followed by a gradient of the validation loss if so wanted."""
    net = setting.net().to(device)
    train, val = to_device((setting.train, setting.val), device)
    logits, parameters = torch.zeros(setting.n_examples, device=device), list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)

    def precision() -> AbstractContextManager[object]:
        return nullcontext() if autocast is None else torch.autocast(device.type, autocast)

    def run() -> None:
        for _ in range(setting.horizon):
            optimizer.zero_grad()
            with precision():
                loss = train_loss(net, logits, train)
            loss.backward()
            optimizer.step()
            if validate:
                with precision():
                    loss = val_loss(net, val)
                torch.autograd.grad(loss, parameters)

    return run


def awaited(run: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The work until it is done, and not only asked for."""

    def run_and_wait() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run_and_wait


if __name__ == "__main__":
    main()
