"""How do the seconds and the bytes of a hypergradient grow, and do they follow the lines that they should?

An MLP 64-width-10 on random images, with an L2 strength for each of H groups of its weights; SGD with momentum 0.9. One
number at a time is varied: the horizon T, the number P of weights, the number H of hyperparameters, the batch, and the
number of lanes, which are as many of these problems done as one computation. Every series has the line that theory
gives it,

    y = a + b·x  (in proportion, but for what a call costs by itself)      or      y = a  (flat)

fitted by least squares on relative errors, and the largest relative distance of a measurement from it.

    python benchmarks/growth.py --out benchmarks/results/growth.json      # four minutes
    python benchmarks/performance_page.py                               # its tables and its picture
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import environment
import tables
import torch
import torch.nn.functional as F
from step_cost import take_turns
from torch import nn

from optuna_greedyhg.hypergrad.domains import Unbounded
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.hypergrad.replicas import Replicas
from optuna_greedyhg.hypergrad.update_rules import SGD
from optuna_greedyhg.hypergrad.work import Horizon

Axis = Literal["horizon", "width", "n_hyperparameters", "batch", "n_lanes"]
Line = Literal["proportional", "flat"]
Row = dict[str, Any]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Size:
    """A problem's size: T, the MLP's width, H and the batch; and how many of them there are."""

    horizon: int = 10
    width: int = 128
    n_hyperparameters: int = 8
    batch: int = 128
    n_lanes: int = 1

    def of(self, axis: Axis) -> int:
        """What the axis counts: P for the width."""
        if axis == "width":
            return sum(p.numel() for p in make_mlp(self.width).parameters())
        size: int = getattr(self, axis)
        return size


@dataclass(frozen=True)
class Series:
    """One estimator along one axis, and the lines that its seconds and its bytes should follow."""

    axis: Axis
    estimator: str
    seconds: Line
    bytes: Line


SIZES: dict[Axis, tuple[int, ...]] = {
    "horizon": (20, 40, 80, 160),
    "width": (64, 128, 256, 512),
    "n_hyperparameters": (4, 8, 16, 32, 64),
    "batch": (64, 128, 256, 512, 1024),
    "n_lanes": (4, 16, 64, 256),
}
SERIES = (
    Series("horizon", "t1t2", "proportional", "flat"),
    Series("horizon", "greedy", "proportional", "flat"),
    Series("horizon", "spectral", "proportional", "flat"),
    Series("horizon", "reverse", "proportional", "proportional"),
    Series("width", "greedy", "proportional", "proportional"),
    Series("width", "reverse", "proportional", "proportional"),
    Series("n_hyperparameters", "greedy", "flat", "flat"),
    Series("n_hyperparameters", "forward", "proportional", "proportional"),
    Series("batch", "greedy", "proportional", "proportional"),
    Series("batch", "reverse", "proportional", "proportional"),
    Series("n_lanes", "greedy", "proportional", "proportional"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for series in SERIES for row in measured(series, arguments.repeats)]
    print(tables.growth(rows))
    if arguments.out is not None:
        result = {**environment.describe(), "repeats": arguments.repeats, "default": asdict(Size()), "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measured(series: Series, repeats: int) -> list[Row]:
    """The two rows of a series."""
    sizes = [replace(Size(), **{series.axis: n}) for n in SIZES[series.axis]]
    work = {size.of(series.axis): hypergradient(series.estimator, size) for size in sizes}
    return followed(series, work, repeats)


def followed(series: Series, work: dict[int, Callable[[], object]], repeats: int) -> list[Row]:
    """Seconds and bytes of work of several sizes, each with the line that it should follow."""
    x = list(work)
    times = take_turns({str(n): run for n, run in work.items()}, repeats)
    seconds = [statistics.median(times[str(n)]) for n in x]
    n_bytes = [float(peak_bytes(run, CPU)) for run in work.values()]
    rows = []
    for quantity, line, y in (("seconds", series.seconds, seconds), ("bytes", series.bytes, n_bytes)):
        expected = fitted(line, x, y)
        distance = max(abs(a / b - 1) for a, b in zip(y, expected, strict=True))
        which = {"axis": series.axis, "estimator": series.estimator, "quantity": quantity, "line": line}
        rows.append({**which, "x": x, "y": y, "expected": expected, "distance": distance})
    return rows


def fitted(line: Line, x: list[int], y: list[float]) -> list[float]:
    """The line's values, with the least sum of squared relative errors."""
    positions = torch.tensor(x, dtype=torch.float64)
    columns = [torch.ones_like(positions)] + ([positions] if line == "proportional" else [])
    target = torch.tensor(y, dtype=torch.float64)
    matrix = torch.stack(columns, dim=1)
    coefficients = torch.linalg.lstsq(matrix / target[:, None], torch.ones(len(x), 1, dtype=torch.float64)).solution
    values: list[float] = (matrix @ coefficients)[:, 0].tolist()
    return values


def hypergradient(estimator: str, size: Size) -> Callable[[], object]:
    """The work of one estimator, T training steps and its estimate; of all lanes together where there are several."""
    lanes = [_horizon(estimator, size, seed) for seed in range(size.n_lanes)]
    return partial(Replicas(n_steps=size.horizon).perform, lanes) if size.n_lanes > 1 else lanes[0].perform


def _horizon(estimator: str, size: Size, seed: int) -> Horizon:
    torch.manual_seed(seed)
    data = torch.randn(size.batch, 64), torch.randint(10, (size.batch,))

    def train_loss(model, alpha, batch):
        """Cross-entropy, and H strengths in turns over the rows of the first layer."""
        w = next(model.parameters())
        group = torch.arange(len(w)) % size.n_hyperparameters
        return val_loss(model, alpha, batch) + (alpha["strengths"][group].exp() * w.square().sum(dim=1)).sum()

    def val_loss(model, alpha, batch):
        x, y = batch
        return F.cross_entropy(model(x), y)

    problem = BilevelProblem(
        model=make_mlp(size.width), train_loss=train_loss, val_loss=val_loss, train_batches=data, val_batches=data
    )
    products = Products(problem, {"strengths": Unbounded()}, SGD(lr=0.01, momentum=0.9))
    alpha = {"strengths": torch.full((size.n_hyperparameters,), -5.0)}
    state = products.initial_state()
    return Horizon(problem, products, ESTIMATORS[estimator], None, alpha, state, size.horizon, seed)


def make_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


if __name__ == "__main__":
    main()
