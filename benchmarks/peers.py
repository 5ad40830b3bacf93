"""One hypergradient, by this package and by others: does each give the right answer, how long does it take, how much?

Example weights, full batches of 1000 images, SGD with momentum 0.9; the paper's convolutional network and an MLP
784-256-256-10; T = 10 and 50. Every package runs what it offers on the same weights and data (``methods/``):

- the answer is compared first with that of the same formula in float64, by this package, and with the exact one;
- the peak of memory is that of a process of its own;
- times are taken in turns; shown is the median of the ratios to T plain training steps.

`make bench-peers` builds an environment with all of the packages. What is not installed, or fails, is reported so.

    python benchmarks/peers.py --out benchmarks/results/peers.json --table benchmarks/results/peers.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import environment
import torch
from methods import PACKAGES, ours
from methods.alone import methods_of, run_alone, use_threads
from methods.problem import Setting, plain_training
from step_cost import MODELS, median_ratio, take_turns
from torch import Tensor

Row = dict[str, Any]

DISTRIBUTIONS = {
    "ours": "optuna-greedyhg", "higher": "higher", "torchopt": "torchopt", "betty": "betty-ml", "gradhpo": "gradhpo",
    "jax_greedy": "jax",
}  # fmt: skip
TOLERANCE = 0.02  # for DARTS's differences, and float32
COLUMNS = {
    "method": str,
    "computes": str,
    "ratio": "{:.2f}".format,
    "to_ours": "{:.2f}".format,
    "seconds": "{:.3f}".format,
    "peak_mb": "{:.0f}".format,
    "cosine": "{:.3f}".format,
    "formula_error": "{:.0e}".format,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--packages", nargs="+", default=PACKAGES, choices=PACKAGES)
    parser.add_argument("--quick", action="store_true", help="T = 10 and 200 images, three repeats; under two minutes.")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--table", type=Path, default=None)
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    horizons, n_examples, repeats = ([10], 200, 3) if arguments.quick else ([10, 50], 1000, arguments.repeats)
    settings = [Setting(model, horizon, n_examples) for model in MODELS for horizon in horizons]
    rows: list[Row] = []
    for setting in settings:
        rows += measured(setting, arguments.packages, arguments.threads, repeats)
        print(table(rows[-1:]) if rows[-1].get("error") else table([r for r in rows if is_of(r, setting)]), flush=True)
    described = {**environment.describe(), "packages": versions(), "repeats": repeats, "n_examples": n_examples}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({**described, "rows": rows}, indent=1) + "\n")
    if arguments.table is not None:
        parts = [f"{title(s)}\n\n{table([r for r in rows if is_of(r, s)])}\n" for s in settings]
        arguments.table.write_text("\n".join(parts))


def measured(setting: Setting, packages: list[str], n_threads: int, repeats: int) -> list[Row]:
    """One row for each method of each package."""
    exact = ours.hypergradient(setting, ours.ESTIMATORS["reverse"], torch.float64)()
    rows: list[Row] = []
    work: dict[str, Callable[[], object]] = {"training": plain_training(setting)}
    for package in packages:
        try:
            methods = methods_of(package)
        except Exception as error:
            rows.append({**described(package, "import", setting), "error": f"{type(error).__name__}: {error}"})
            continue
        for name, method in methods.items():
            row = described(package, name, setting) | {"computes": method.estimator}
            rows.append(row)
            try:
                estimate, peak = run_alone(package, name, setting, n_threads)
                expected = ours.hypergradient(setting, ours.ESTIMATORS[method.estimator], torch.float64)()
                row |= judged(estimate.double(), expected, exact) | {"peak_mb": peak / 1e6}
                work[row["method"]] = method.prepare(setting)
            except Exception as error:  # of any kind, in other people's code; a row says so
                row["error"] = str(error)
    times = take_turns(work, repeats)
    for row in rows:
        if row["method"] in times:
            of_this, of_ours = times[row["method"]], times.get(f"ours: {row['computes']}")
            row["seconds"] = statistics.median(of_this)
            row["ratio"] = median_ratio(of_this, times["training"])
            row["to_ours"] = None if of_ours is None else median_ratio(of_this, of_ours)
    return rows


def described(package: str, method: str, setting: Setting) -> Row:
    return {"model": setting.model, "horizon": setting.horizon, "method": f"{package}: {method}"}


def judged(estimate: Tensor, expected: Tensor, exact: Tensor) -> Row:
    """How far an answer is from that of its own formula, relative to its length, and where it points."""
    error = float((estimate - expected).norm() / expected.norm())
    cosine = float(torch.nn.functional.cosine_similarity(estimate, exact, dim=0))
    return {"cosine": cosine, "formula_error": error, "right": error < TOLERANCE}


def versions() -> Mapping[str, str | None]:
    """What is installed."""
    found = {}
    for distribution in DISTRIBUTIONS.values():
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = None
    return found


def is_of(row: Row, setting: Setting) -> bool:
    return (row["model"], row["horizon"]) == (setting.model, setting.horizon)


def title(setting: Setting) -> str:
    return f"**{setting.model}, T = {setting.horizon}**"


def table(rows: list[Row]) -> str:
    """The rows in Markdown, each package's errors in place of its numbers."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in rows:
        cells = [show(row[key]) if row.get(key) is not None else "" for key, show in COLUMNS.items()]
        if "error" in row:
            cells[2] = f"fails: {row['error']}"
        elif not row["right"]:
            cells[-1] += " (wrong)"
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    main()
