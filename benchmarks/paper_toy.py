"""The paper's toy experiment: how close each method's estimate is to the hypergradient, and where its descent ends.

    w ∈ R²,   L_val = ‖w‖² + 10‖sin w‖²,   L_train = ½(w − α)ᵀ diag(1, ½) (w − α)

SGD with lr 0.1 trains T steps at a time, from w_0 = (2, 2) and α_0 = (1, 1); α descends by SGD, *online* (weights are
carried on) or with a *restart* from w_0 in every outer step. The best loss is 0, at w = 0. Seed 0 is the paper's point;
the others add standard normal noise to w_0 and α_0, and some of them begin beyond a local minimum, for every method.

At every outer step, the estimate is compared with the exact d over that horizon from the same (w, α), which is known
here because the training loss is quadratic:  d = v_T·(I − (I − lr·diag(1, ½))^T). A cosine counts while both are longer
than 1e-9. All seeds, outer learning rates and modes run at once, as replicas whose losses add up: nothing couples them,
so that each has the derivatives that it would have alone. The spectral methods, whose eigenpairs are those of all the
weights, would couple them and have them one by one.

    python benchmarks/paper_toy.py --out benchmarks/results/paper_toy.json

Finished methods are kept in the file and not run again. ``--quick`` makes ten outer steps of two seeds.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import grid
import tables
import torch
from torch import Tensor, nn

from optuna_greedyhg.hypergrad.curvature import Neumann
from optuna_greedyhg.hypergrad.domains import Unbounded
from optuna_greedyhg.hypergrad.estimators import (
    DrMAD,
    Estimator,
    FirstOrder,
    Forward,
    Greedy,
    Implicit,
    Reverse,
    fold,
)
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.products import InnerStep, Products, TrainState
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import SGD
from optuna_greedyhg.report.statistics import mean_and_half_width

LR = 0.1
CURVATURES = (1.0, 0.5)
MODES = ("online", "restart")
OUTER_LRS = (0.1, 0.01)
REACHED = 0.1
"""The validation loss, 0 at best, that counts as the optimum."""
N_CURVE = 20
"""The number of points, evenly on a log axis, that a curve is thinned to."""

METHODS: Mapping[str, Estimator[Any]] = {
    "FO": FirstOrder(),
    "T1-T2": Greedy(gamma=0.0),
    "IFT (5)": Implicit(Neumann(n_terms=5, scale=LR)),
    "DrMAD": DrMAD(),
    "RMD": Reverse(),
    "FMD": Forward(),
    "greedy .5": Greedy(gamma=0.5),
    "greedy .9": Greedy(gamma=0.9),
    "greedy .99": Greedy(gamma=0.99),
    "terminal .9": Greedy(gamma=0.9, terminal=True),
    "spectral 1": Greedy(propagator=Spectral(rank=1)),
    "spectral 2": Greedy(propagator=Spectral(rank=2)),
}
COUPLING = ("spectral 1", "spectral 2")
LIMITS = {"FMD": 100, "spectral 1": 100, "spectral 2": 100}
"""The number of outer steps, for methods that are slow here: replicas one by one, or a tangent for each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--horizons", nargs="+", type=int, default=[5, 10, 20], metavar="T")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-outer-steps", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.n_outer_steps = 2, 10
    torch.set_num_threads(1)

    cells = [
        {
            "method": method,
            "horizon": horizon,
            "n_seeds": arguments.seeds,
            "n_outer_steps": min(arguments.n_outer_steps, LIMITS.get(method, arguments.n_outer_steps)),
        }
        for horizon in arguments.horizons
        for method in arguments.methods
    ]
    rows = grid.run(arguments.out, cells, partial(run, device=arguments.device))
    for mode, lr in product(MODES, OUTER_LRS):
        print(f"\n{mode}, outer lr {lr}, {arguments.seeds} seeds:\n")
        print(table(rows, name(mode, lr), arguments.horizons))


@dataclass(frozen=True)
class Replicas:
    """Independent copies of the experiment, one a row: every mode with every outer learning rate, all seeds of each."""

    start: Tensor
    alpha: Tensor
    restarts: Tensor
    outer_lr: Tensor

    @classmethod
    def make(cls, n_seeds: int, device: str) -> Replicas:
        noise = torch.randn(n_seeds, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise[0] = 0.0
        settings = list(product(MODES, OUTER_LRS, range(n_seeds)))
        points = noise[[seed for _, _, seed in settings]]
        restarts = torch.tensor([[mode == "restart"] for mode, _, _ in settings], device=device)
        outer_lr = torch.tensor([[lr] for _, lr, _ in settings], device=device, dtype=torch.float64)
        return cls((2.0 + points[:, 0]).to(device), (1.0 + points[:, 1]).to(device), restarts, outer_lr)

    def one_by_one(self) -> list[Replicas]:
        columns = (self.start, self.alpha, self.restarts, self.outer_lr)
        return [Replicas(*(column[i : i + 1] for column in columns)) for i in range(len(self.start))]

    def problem(self) -> BilevelProblem:
        curvatures = self.start.new_tensor(CURVATURES)
        return BilevelProblem(
            model=Weights(self.start),
            train_loss=lambda model, alpha, _: 0.5 * (curvatures * (model() - alpha["target"]) ** 2).sum(),
            val_loss=lambda model, alpha, _: losses(model()).sum(),
            train_batches=[torch.zeros(1)],
            val_batches=[torch.zeros(1)],
        )


class Weights(nn.Module):
    """A model that is its weights: calling it gives them."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start.clone())

    def forward(self) -> Tensor:
        return self.w


def losses(w: Tensor) -> Tensor:
    """L_val of each row."""
    return (w**2 + 10 * w.sin() ** 2).sum(dim=1)


def run(cell: grid.Cell, device: str) -> dict[str, Any]:
    """All the descents by one method with one horizon; by mode and outer learning rate, a list over the seeds."""
    replicas, method = Replicas.make(cell["n_seeds"], device), cell["method"]
    parts = replicas.one_by_one() if method in COUPLING else [replicas]
    traces = [trace(part, METHODS[method], cell["horizon"], cell["n_outer_steps"]) for part in parts]
    val_loss, cosines = torch.cat(traces, dim=2).cpu().reshape(2, cell["n_outer_steps"], -1, cell["n_seeds"])
    settings = enumerate(product(MODES, OUTER_LRS))
    return {name(mode, lr): summary(val_loss[:, i], cosines[:, i], lr == OUTER_LRS[0]) for i, (mode, lr) in settings}


def trace(replicas: Replicas, estimator: Estimator[Any], horizon: int, n_outer_steps: int) -> Tensor:
    """L_val and the cosine at each outer step of each replica, shape (2, n_outer_steps, n_replicas)."""
    products = Products(replicas.problem(), {"target": Unbounded()}, SGD(lr=LR))
    response = 1 - (1 - LR * replicas.start.new_tensor(CURVATURES)) ** horizon
    batch, alpha, state, carried = torch.zeros(1), {"target": replicas.alpha}, products.initial_state(), None
    points: list[Tensor] = []
    for _ in range(n_outer_steps):

        def make_step(before: TrainState, t: int, keep_graph: bool, alpha: Tensors = alpha) -> InnerStep:
            return products.step(before, alpha, batch, keep_graph=keep_graph, remaining=horizon - t)

        estimate, end, carried = fold(estimator, carried, alpha, state, horizon, make_step)
        w, exact = end.after.parameters["w"], end.validation().gradient["w"] * response
        points.append(torch.stack([losses(w), cosine(estimate["target"], exact)]))
        alpha = {"target": alpha["target"] - replicas.outer_lr * estimate["target"]}
        state = replace(end.after, parameters={"w": torch.where(replicas.restarts, replicas.start, w)})
    return torch.stack(points, dim=1)


def name(mode: str, lr: float) -> str:
    return f"{mode}, outer lr {lr}"


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of each pair of rows; NaN where one of them is next to zero."""
    lengths = torch.stack([a.norm(dim=1), b.norm(dim=1)])
    return torch.where(lengths.amin(dim=0) > 1e-9, (a * b).sum(dim=1) / lengths.prod(dim=0), torch.nan)


def summary(val_loss: Tensor, cosines: Tensor, with_curve: bool) -> dict[str, Any]:
    """Of validation losses and cosines of shape (n_outer_steps, n_seeds); ``None`` where there is no number."""
    n = len(val_loss)
    below = val_loss <= REACHED
    result: dict[str, Any] = {
        "final_loss": rounded(val_loss[-1]),
        "loss_at_100": rounded(val_loss[min(100, n) - 1]),
        "best_loss": rounded(val_loss.nan_to_num(torch.inf).amin(dim=0)),
        "steps_to_reach": [int(c.int().argmax()) + 1 if bool(c.any()) else None for c in below.T],
        "mean_cosine": rounded(cosines.nanmean(dim=0)),
        "min_cosine": rounded(torch.where(cosines.isnan(), torch.inf, cosines).amin(dim=0)),
    }
    if with_curve:
        shown = sorted({round(n ** (i / (N_CURVE - 1))) for i in range(N_CURVE)})
        at = [k - 1 for k in shown]
        curve = {"outer_step": shown, "val_loss": rounded(val_loss[at, 0]), "cosine": rounded(cosines[at, 0])}
        result["curve_of_seed_0"] = curve
    return result


def rounded(x: Tensor) -> list[float | None]:
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in x.tolist()]


def table(rows: list[grid.Row], setting: str, horizons: list[int]) -> str:
    """One line a method; for each horizon, the final loss with its 95% confidence interval, that of the paper's point,
    how many seeds have reached the optimum and in how many outer steps (the median), and the cosine's mean and minimum.
    """
    lines = []
    for method in METHODS:
        of_method = {row["cell"]["horizon"]: row for row in rows if row["cell"]["method"] == method}
        if of_method:
            n_outer_steps = next(iter(of_method.values()))["cell"]["n_outer_steps"]
            label = f"{method} ({n_outer_steps} steps)" if method in LIMITS else method
            lines.append([label, *(part for t in horizons for part in columns(of_method[t]["result"][setting]))])
    parts = ("final loss", "at the paper's point", "reached", "cosine")
    return tables.table(["", *(f"T={horizon}: {part}" for horizon in horizons for part in parts)], lines)


def columns(result: dict[str, Any]) -> list[str]:
    final = [math.nan if loss is None else loss for loss in result["final_loss"]]
    reached = [k for k in result["steps_to_reach"] if k is not None]
    means, minima = ([c for c in result[key] if c is not None] for key in ("mean_cosine", "min_cosine"))
    return [
        "{:.3f} ± {:.3f}".format(*mean_and_half_width(final)),
        f"{final[0]:.3f}",
        f"{len(reached)}/{len(final)}" + (f" in {median(reached):.0f}" if reached else ""),
        f"{fmean(means):.3f}, ≥ {min(minima):.3f}" if means else "–",
    ]


if __name__ == "__main__":
    main()
