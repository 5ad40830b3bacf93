"""One hypergradient, by this package and by others: does each give the right answer, how long does it take, how much?

Example weights, SGD with momentum 0.9; the paper's convolutional network and an MLP 784-256-256-10; T = 10 and 50, on
full batches of 100 images, and of 500 for T = 10. Every package runs what it offers on the same weights and data
(``methods/``):

- the answer is compared first with that of the same formula in float64, by this package, and with the exact one;
- the peak of memory is that in a process of the package's own;
- times are taken in turns; shown is the median of the ratios to T plain training steps.

Settings that are in the file are not measured again without ``--again``. `make bench-peers` builds an environment with
all of the packages. What is not installed, or fails, is reported so.

    python benchmarks/peers.py --out benchmarks/results/peers.json
    python benchmarks/performance_page.py    # writes its table into docs/performance.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import grid
import tables
import torch
from methods import PACKAGES, ours
from methods.alone import Answer, answers_of, methods_of, use_threads
from methods.problem import Setting, plain_training
from step_cost import MODELS, median_ratio, take_turns
from torch import Tensor

Row = dict[str, Any]

DISTRIBUTIONS = ("optuna-greedyhg", "higher", "torchopt", "betty-ml", "gradhpo", "jax")
SIZES = (10, 100), (10, 500), (50, 100)
TOLERANCE = 0.1  # in float32, kinks of ReLU and maxima that change sides make up to 0.06; central differences more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--sizes", nargs="+", type=_size, default=SIZES, metavar="TxN", help="steps, examples in a batch"
    )
    parser.add_argument("--packages", nargs="+", default=PACKAGES, choices=PACKAGES)
    parser.add_argument("--quick", action="store_true", help="T = 10 and 100 images, three repeats")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    if arguments.quick:
        arguments.sizes, arguments.repeats = SIZES[:1], 3
    if arguments.again and arguments.out is not None:
        arguments.out.unlink(missing_ok=True)

    def run(cell: grid.Cell) -> Row:
        setting = Setting(cell["model"], cell["horizon"], cell["n_examples"])
        return {
            "methods": measured(setting, cell["packages"], cell["threads"], cell["repeats"]),
            "versions": versions(),
        }

    common = {"packages": [*arguments.packages], "threads": arguments.threads, "repeats": arguments.repeats}
    cells = [
        {"model": model, "horizon": horizon, "n_examples": n_examples, **common}
        for model, (horizon, n_examples) in product(MODELS, arguments.sizes)
    ]
    for row in grid.run(arguments.out, cells, run):
        print(f"\n{tables.setting(row['cell'])}\n\n{tables.peers(row['result']['methods'])}")


def _size(text: str) -> tuple[int, int]:
    horizon, n_examples = text.split("x")
    return int(horizon), int(n_examples)


def measured(setting: Setting, packages: Sequence[str], n_threads: int, repeats: int) -> list[Row]:
    """One row for each method of each package, or for a package that does not work at all."""
    expected = {name: ours.hypergradient(setting, e, torch.float64)() for name, e in ours.ESTIMATORS.items()}
    rows: list[Row] = []
    work: dict[str, Callable[[], object]] = {"training": plain_training(setting)}
    for package in packages:
        try:
            methods, answers = methods_of(package), answers_of(package, setting, n_threads)
        except Exception as error:  # of any kind, in other people's code; the row says so
            rows.append({"method": f"{package}: any", "error": f"{type(error).__name__}: {error}"})
            continue
        for name, method in methods.items():
            row: Row = {"method": f"{package}: {name}", "estimator": method.estimator}
            rows.append(row)
            if answers[name].estimate is None:
                row["error"] = answers[name].error
            else:
                row |= judged(answers[name], expected[method.estimator], expected["reverse"])
                work[row["method"]] = method.prepare(setting)
    times = take_turns(work, repeats)
    return [row | timed(row, times) for row in rows]


def timed(row: Row, times: Mapping[str, list[float]]) -> Row:
    """Seconds, and the ratios to plain training and to this package's method of the same estimator."""
    if row["method"] not in times:
        return {}
    its, of_ours = times[row["method"]], times.get(f"ours: {row['estimator']}")
    return {
        "seconds": statistics.median(its),
        "ratio": median_ratio(its, times["training"]),
        "ratio_to_ours": None if of_ours is None else median_ratio(its, of_ours),
    }


def judged(answer: Answer, expected: Tensor, exact: Tensor) -> Row:
    """How far an answer is from that of its own formula, relative to its length, where it points, and its memory."""
    assert answer.estimate is not None
    assert answer.peak_bytes is not None
    estimate = answer.estimate.double()
    error = float((estimate - expected).norm() / expected.norm())
    cosine = float(torch.cosine_similarity(estimate, exact, dim=0))
    return {"cosine": cosine, "formula_error": error, "right": error < TOLERANCE, "peak_mb": answer.peak_bytes / 1e6}


def versions() -> Mapping[str, str | None]:
    """What is installed."""
    found = {}
    for distribution in DISTRIBUTIONS:
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = None
    return found


if __name__ == "__main__":
    main()
