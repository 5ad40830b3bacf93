"""How near does each estimator come to the exact hypergradient, and at what price?

Digits, a tanh network 64-32-10, 300 training images half of which are mislabelled, a weight for every example; windows
of T training steps that begin after 20, 200 and 1000 steps, in float64. Medians over the seeds.

    python benchmarks/agreement.py --out benchmarks/results/agreement.json

Finished windows are kept in the file and not audited again. ``--quick`` audits one; ``--page FILE`` writes the tables
into docs/choosing-an-estimator.md, too.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import grid
import tables
import torch

from optuna_greedyhg.hypergrad.audit import HypergradientAudit
from optuna_greedyhg.hypergrad.curvature import ConjugateGradients, Neumann
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.estimators import DrMAD, Estimator, Greedy, HyperDistill, Implicit, Reverse
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, UpdateRule
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.digits import load_splits

N_TRAIN = N_VAL = 300
STARTS = (20, 200, 1000)
RULES: Mapping[str, UpdateRule] = {
    "SGD": SGD(lr=0.5),
    "momentum .9": SGD(lr=0.1, momentum=0.9),
    "nesterov .9": SGD(lr=0.1, momentum=0.9, nesterov=True),
    "Adam": Adam(lr=0.01),
}
SETTINGS = (
    *((rule, horizon, N_TRAIN) for rule, horizon in product(("SGD", "momentum .9"), (10, 50))),
    ("nesterov .9", 50, N_TRAIN),
    ("Adam", 50, N_TRAIN),
    *((rule, 50, 50) for rule in ("SGD", "momentum .9")),
)
"""Update rule, horizon and size of the training batches."""


def spectral(rank: int = 10, **settings: Any) -> Greedy:
    return Greedy(propagator=Spectral(rank, **settings))


ESTIMATORS: Mapping[str, Estimator[Any]] = {
    "T1-T2": Greedy(gamma=0.0),
    "greedy .9": Greedy(gamma=0.9),
    "terminal .9": Greedy(gamma=0.9, terminal=True),
    "IFT, Neumann 5": Implicit(Neumann(n_terms=5, scale=0.5)),
    "IFT, CG 10": Implicit(ConjugateGradients(max_steps=10)),
    "HyperDistill": HyperDistill(),
    "DrMAD": DrMAD(),
    "spectral 5": spectral(5),
    "spectral 10": spectral(10),
    "spectral 20": spectral(20),
    "spectral 0: Rayleigh quotient": spectral(0),
    "spectral 10, bulk 1": spectral(10, bulk=1.0),
    "spectral 10, at the start only": spectral(10, refresh_every=10_000),
    "spectral 20, at the start only": spectral(20, refresh_every=10_000),
    "spectral 10, every 5 steps": spectral(10, refresh_every=5),
    "spectral 10, one batch": spectral(10, n_batches=1),
    "reverse": Reverse(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--page", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    settings, seeds, starts = SETTINGS, range(arguments.seeds), STARTS
    if arguments.quick:
        settings, seeds, starts = settings[:1], range(1), starts[:1]
    cells = [
        {"rule": rule, "horizon": horizon, "batch": batch, "at_step": start, "seed": seed}
        for (rule, horizon, batch), start, seed in product(settings, starts, seeds)
    ]
    rows = grid.run(arguments.out, cells, run)
    shown = sections(rows)
    print(shown)
    if arguments.page is not None:
        page = arguments.page.read_text(encoding="utf-8")
        arguments.page.write_text(tables.updated(page, "agreement", shown), encoding="utf-8")


def sections(rows: list[grid.Row]) -> str:
    """A table for every setting, in the order in which they were run."""
    by_setting: dict[tuple[str, int, int], list[grid.Row]] = {}
    for row in rows:
        cell = row["cell"]
        by_setting.setdefault((cell["rule"], cell["horizon"], cell["batch"]), []).append(row)
    return "\n\n".join(
        f"**{rule}, T = {horizon}, batches of {batch}**\n\n{table(its)}"
        for (rule, horizon, batch), its in by_setting.items()
    )


def run(cell: grid.Cell) -> dict[str, Any]:
    """All estimators on one window. With minibatches, they have seen the two horizons before it where there are any."""
    n_warm_up = 0 if cell["batch"] == N_TRAIN else min(2, cell["at_step"] // cell["horizon"])
    audit = HypergradientAudit(
        problem(cell["seed"], cell["batch"]),
        {cleaning.LOGITS: Hyperparameter(torch.zeros(N_TRAIN, dtype=torch.float64))},
        update_rule=RULES[cell["rule"]],
        horizon=cell["horizon"],
        at_step=cell["at_step"],
        n_warm_up=n_warm_up,
        seed=cell["seed"],
    )
    kept = ("cosine", "length_ratio", "relative_seconds", "peak_bytes", "cost")
    return {row.name: {key: row.as_json()[key] for key in kept} for row in audit.run(ESTIMATORS)}


def problem(seed: int, batch: int) -> BilevelProblem:
    """300 images with half of the labels replaced, 300 clean ones, all different with the seed."""
    generator = torch.Generator().manual_seed(seed)
    (images, labels), (val_images, val_labels), _ = load_splits(N_TRAIN, N_VAL, generator, torch.device("cpu"))
    noisy, _ = cleaning.corrupt(labels, 0.5, 10, generator)
    torch.manual_seed(seed)
    layers = (torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    indices = torch.arange(N_TRAIN).split(batch)  # in random order already
    return BilevelProblem(
        model=torch.nn.Sequential(*layers).double(),
        train_loss=cleaning.weighted_loss,
        val_loss=cleaning.clean_loss,
        train_batches=[(images[i].double(), noisy[i], i) for i in indices],
        val_batches=(val_images.double(), val_labels),
    )


def table(rows: list[grid.Row]) -> str:
    """One line an estimator: cosines by the window's start, and what it costs in all of them."""
    starts = list(dict.fromkeys(row["cell"]["at_step"] for row in rows))
    lines = []
    for name in ESTIMATORS:
        audited = [(row["cell"]["at_step"], row["result"][name]) for row in rows]
        cosines = (median([x["cosine"] for start, x in audited if start == at]) for at in starts)
        length = median([x["length_ratio"] for _, x in audited])
        seconds = median([x["relative_seconds"] for _, x in audited])
        kilobytes = median([x["peak_bytes"] for _, x in audited]) / 1000
        shown = [f"{cosine:.3f}" for cosine in cosines]
        lines.append([name, *shown, f"{length:.2f}", f"{seconds:.1f}", f"{kilobytes:.0f}"])
    return tables.table(["", *(f"after {at}" for at in starts), "length", "time", "kB"], lines)


def median(values: list[float | None]) -> float:
    """Of what is a number."""
    return statistics.median([value for value in values if value is not None] or [float("nan")])


if __name__ == "__main__":
    main()
