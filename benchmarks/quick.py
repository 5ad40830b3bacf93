"""The numbers on speed and memory that must not get worse, in less than five minutes on two cores.

    make bench-quick

It has glibc keep freed memory (docs/performance.md, "On a CPU"). The last line is one JSON object:

    step_ratio_conv, step_ratio_mlp   a greedy outer step / T training and T validation gradients (``step_cost``)
    spectral_over_decay               an outer step with spectral propagation, its refresh included / one with decay
    memory_ratio_t1000                peak memory of a horizon of 1000 steps / of 10, the worse of decay and spectral
    lanes_speedup_64                  trials per second in 64 lanes / one by one (``lanes``)
"""

from __future__ import annotations

import importlib
import importlib.util
import json

import optuna
import step_cost
import torch

from optuna_greedyhg.hypergrad.estimators import Greedy
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes
from optuna_greedyhg.hypergrad.spectral import Spectral

THREADS = 2
REPEATS = {"conv": 7, "mlp": 15}
N_SMALL = 20  # images, where a thousand steps are to be followed operation by operation


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(THREADS)
    result = {}
    for model, repeats in REPEATS.items():
        result |= step_ratios(model, repeats)
        print(json.dumps(result), flush=True)
    result["memory_ratio_t1000"] = max(memory_ratio(Greedy(0.9)), memory_ratio(Greedy(propagator=Spectral())))
    print(json.dumps(result), flush=True)
    result |= lanes_speedup()
    print(json.dumps(result))


def step_ratios(model: str, repeats: int) -> dict[str, float]:
    """Medians over rounds in which everything is timed in turns."""
    pieces = step_cost.pieces(model)
    timed = ("both gradients", "greedy") if model == "conv" else ("both gradients", "greedy", "spectral")
    times = step_cost.take_turns({name: pieces[name] for name in timed}, repeats)
    result = {f"step_ratio_{model}": step_cost.median_ratio(times["greedy"], times["both gradients"])}
    if "spectral" in times:
        result["spectral_over_decay"] = step_cost.median_ratio(times["spectral"], times["greedy"])
    return result


def memory_ratio(estimator: Greedy) -> float:
    """Of the convolutional network on a few images."""
    net, logits, data = step_cost.MODELS["conv"](), torch.zeros(N_SMALL), step_cost.Data(N_SMALL)
    short, long = (
        peak_bytes(step_cost.outer_step(net, logits, data, data, estimator, horizon=n), torch.device("cpu"))
        for n in (10, 1000)
    )
    return long / short


def lanes_speedup() -> dict[str, float]:
    """Nothing where there is no benchmark of lanes."""
    if importlib.util.find_spec("lanes") is None:
        return {}
    lanes = importlib.import_module("lanes")
    torch.set_num_threads(1)  # as many as serve 64 lanes best
    measured = lanes.measure(lanes.Digits(torch.device("cpu")), lanes.NopPruner(), [64], n_alone=4, repeats=3)
    return {"lanes_speedup_64": measured["speedup"][64]}


if __name__ == "__main__":
    main()
