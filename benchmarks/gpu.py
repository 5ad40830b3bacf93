"""On a GPU: what does a greedy outer step cost beside plain gradients, how much memory, and does anybody wait for it?

The problem of ``peers.py``, T = 10; in float32, and with the losses in bfloat16. The floor of the running variant is
1.33 times T training and T validation gradients, if kernels and not their launches take the time.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json     # one or two minutes
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import environment
import torch
from methods.ours import ESTIMATORS, hypergradient
from methods.problem import LR, MOMENTUM, Setting, train_loss, val_loss
from step_cost import MODELS, median_ratio, take_turns

from optuna_greedyhg.hypergrad.batches import to_device
from optuna_greedyhg.hypergrad.devices import as_device
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes

HORIZON = 10
PEAKS = (("greedy", HORIZON), ("greedy", 1000), ("reverse, replayed", HORIZON), ("reverse, replayed", 10 * HORIZON))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=as_device, default="cuda")
    parser.add_argument("--n-examples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    result = {**environment.describe(), "horizon": HORIZON, "n_examples": arguments.n_examples}
    for model in MODELS:
        setting = Setting(model, HORIZON, arguments.n_examples)
        for autocast in (None, torch.bfloat16):
            name = f"{model}, {'float32' if autocast is None else 'bfloat16'}"
            result[name] = measured(setting, arguments.device, autocast, arguments.repeats)
            print(name, json.dumps(result[name]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measured(setting: Setting, device: torch.device, autocast: torch.dtype | None, repeats: int) -> dict[str, Any]:
    """Times of an inner step, ratios, peaks of memory, and the number of waits within a horizon."""

    def ours(estimator: str, horizon: int = HORIZON) -> Callable[[], object]:
        its = replace(setting, horizon=horizon)
        return hypergradient(its, ESTIMATORS[estimator], device=device, autocast=autocast)

    work: dict[str, Callable[[], object]] = {
        "training": plain_gradients(setting, device, autocast, validate=False),
        "both gradients": plain_gradients(setting, device, autocast, validate=True),
        **{name: ours(name) for name in ("greedy", "terminal", "t1t2", "reverse")},
    }
    times = take_turns({name: awaited(run, device) for name, run in work.items()}, repeats)
    return {
        "milliseconds_of_a_step": {name: 1e3 * statistics.median(its) / HORIZON for name, its in times.items()},
        "greedy / both gradients": median_ratio(times["greedy"], times["both gradients"]),
        "terminal / training": median_ratio(times["terminal"], times["training"]),
        "peak_mb": {f"{name}, T = {horizon}": peak_bytes(ours(name, horizon), device) / 1e6 for name, horizon in PEAKS},
        "waits_within_a_horizon": waits_of(work["greedy"]) if device.type == "cuda" else None,
    }


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


def waits_of(run: Callable[[], object]) -> int:
    """How often the program waits for the device, as PyTorch's own debugging mode sees it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


if __name__ == "__main__":
    main()
