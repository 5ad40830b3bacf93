"""The papers' meta-learning: few-shot tasks, for which every other layer of a network is a hyperparameter.

Each task is trained from the same start w_0, all but the layers 2, 4 and 6 of six convolutions of 32 channels: those
are α, shared by all tasks. Some classes are held out. Reported is the accuracy on tasks of theirs, at the best of a
run's evaluations, as in the papers; beside it stands the accuracy of that same α on other tasks of those classes, which
nothing was chosen by.

    omniglot   242 characters of 20 drawings, 28×28; 20% held out; 1 shot; T = 5; one task in an outer step
    cifar100   100 classes of colour images, 32×32; 50% held out; 10 shots; T = 10; weight decay 1e-4; 10 tasks

In both, 10 validation images a class, inner SGD with lr 0.1 and momentum 0.9, outer Adam with lr 1e-3. The papers do
not say the rest. Here: 3×3 convolutions, batch normalization by the batch's own statistics, leaky ReLU, a 2×2
max-pooling after each second layer, a linear head; PyTorch's initial weights; ink is 1 and paper 0, colours are
standardized by the training classes' mean and deviation; no augmentation. A seed decides the classes held out, w_0, and
the tasks. The default number of outer steps, 200, is a tenth of that on Omniglot in the paper.

    python benchmarks/paper_metalearning.py --setting omniglot --data FOLDER \\
        --out benchmarks/results/paper_metalearning_omniglot.json

The folder holds ``omniglot*.zip`` or one ``cifar100*.npz``, as ``tasks/omniglot.py`` and ``tasks/cifar.py`` read them.
Finished runs are kept in the file and not run again. ``--quick`` makes two outer steps of one seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import grid
import tables
import torch
from torch import Tensor

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.curvature import Neumann
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.episodes import MetaProblem
from optuna_greedyhg.hypergrad.estimators import DrMAD, Estimator, FirstOrder, Greedy, Implicit, Reverse
from optuna_greedyhg.hypergrad.update_rules import SGD
from optuna_greedyhg.tasks.base import accuracy
from optuna_greedyhg.tasks.cifar import read_classes
from optuna_greedyhg.tasks.cleaning import clean_loss
from optuna_greedyhg.tasks.few_shot import WARP_LAYERS, FewShot, make_warp_net
from optuna_greedyhg.tasks.idx import DataError
from optuna_greedyhg.tasks.omniglot import read_omniglot

N_VAL = 10


@dataclass(frozen=True)
class Setting:
    """What a paper says of its experiment."""

    held_out: float
    n_shot: int
    horizon: int
    weight_decay: float
    n_episodes: int
    ways: tuple[int, ...]
    methods: Mapping[str, Estimator[Any]]
    published: Mapping[str, tuple[str, ...]]
    """One cell for each of ``ways``."""


def _methods(gamma: float, n_terms: int) -> dict[str, Estimator[Any]]:
    return {
        "FO": FirstOrder(),
        "T1-T2": Greedy(gamma=0.0),
        f"IFT ({n_terms})": Implicit(Neumann(n_terms=n_terms, scale=0.1)),
        f"greedy {gamma}": Greedy(gamma=gamma),
        f"terminal greedy {gamma}": Greedy(gamma=gamma, terminal=True),
        "DrMAD": DrMAD(),
        "exact": Reverse(),
    }


SETTINGS = {
    "omniglot": Setting(
        held_out=0.2,
        n_shot=1,
        horizon=5,
        weight_decay=0.0,
        n_episodes=1,
        ways=(2, 3, 5, 10),
        methods=_methods(0.9, 2),
        published={
            "FO": ("87.31 ± 1.79", "78.22 ± 1.04", "69.71 ± 0.5", "62.41 ± 1.95"),
            "T1-T2": ("89.4 ± 0.36", "78.25 ± 1.03", "66.7 ± 3.09", "52.23 ± 1.63"),
            "IFT (2)": ("87.1 ± 2.52", "79.36 ± 2.31", "72.57 ± 2.14", "53.62 ± 5.92"),
            "greedy 0.9": ("93.5 ± 0.34", "86.83 ± 0.78", "80.46 ± 1.08", "66.92 ± 2.04"),
        },
    ),
    "cifar100": Setting(
        held_out=0.5,
        n_shot=10,
        horizon=10,
        weight_decay=1e-4,
        n_episodes=10,
        ways=(3, 4, 5),
        methods=_methods(0.99, 5),
        published={
            "FO": ("43.48 ± 0.69", "34.15 ± 0.53", "28.59 ± 0.47"),
            "T1-T2": ("42.96 ± 0.79", "33.95 ± 0.64", "27.59 ± 0.46"),
            "IFT (5)": ("40.14 ± 0.73", "33.23 ± 0.41", "27.20 ± 0.52"),
            "greedy 0.99": ("46.10 ± 0.82", "36.94 ± 1.07", "29.79 ± 0.62"),
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder with the setting's files")
    parser.add_argument("--ways", nargs="+", type=int, default=None, metavar="N", help="number of classes in a task")
    parser.add_argument("--methods", nargs="+", default=None, metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-outer-steps", type=int, default=200)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--n-episodes", type=int, default=None, help="number of tasks in an outer step")
    parser.add_argument("--n-eval-episodes", type=int, default=50, help="number of held-out tasks, twice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    setting = SETTINGS[arguments.setting]
    ways, methods = arguments.ways or setting.ways, arguments.methods or list(setting.methods)
    if not set(ways) <= set(setting.ways) or not set(methods) <= set(setting.methods):
        parser.error(f"{arguments.setting} has the ways {setting.ways} and the methods {list(setting.methods)}.")
    if arguments.quick:
        arguments.seeds, arguments.n_outer_steps, arguments.n_eval_episodes, ways = 1, 2, 2, ways[:1]
    torch.set_num_threads(1)

    cells = [
        {
            "setting": arguments.setting,
            "n_way": n_way,
            "method": method,
            "seed": seed,
            "n_outer_steps": arguments.n_outer_steps,
            "evaluate_every": arguments.evaluate_every,
            "n_episodes": arguments.n_episodes or setting.n_episodes,
            "n_eval_episodes": arguments.n_eval_episodes,
        }
        for seed in range(arguments.seeds)
        for n_way in ways
        for method in methods
    ]
    rows = grid.run(arguments.out, cells, partial(run, folder=arguments.data, device=arguments.device))
    for n_way in ways:
        print(f"\n{arguments.setting}, {n_way}-way {setting.n_shot}-shot, {arguments.seeds} seeds:\n")
        print(table([row for row in rows if row["cell"]["n_way"] == n_way], setting, n_way))


def run(cell: grid.Cell, folder: Path, device: str) -> dict[str, Any]:
    """One descent."""
    setting = SETTINGS[cell["setting"]]
    problem = make_problem(cell, setting, read(cell["setting"], folder).to(device))
    steps = list(
        descend(
            problem,
            {name: Hyperparameter(x) for name, x in problem.outer_parameters.items()},
            update_rule=SGD(lr=0.1, momentum=0.9, weight_decay=setting.weight_decay),
            estimator=setting.methods[cell["method"]],
            horizon=setting.horizon,
            n_outer_steps=cell["n_outer_steps"],
            outer_optimizer=partial(torch.optim.Adam, lr=1e-3),
            evaluate_every=cell["evaluate_every"],
            metric="accuracy",
            maximize=True,
            seed=_seed(cell),
        )
    )
    first, best = steps[0].best, steps[-1].best
    return {
        "val_accuracy": 100 * best.scores["accuracy"],
        "test_accuracy": 100 * best.test_scores["accuracy"],
        "val_accuracy_at_start": 100 * first.scores["accuracy"],
        "test_accuracy_at_start": 100 * first.test_scores["accuracy"],
        "best_outer_step": best.outer_step,
        "stopped": steps[-1].stopped,
        "cost_of_an_outer_step": steps[1].cost.total - steps[0].cost.total,
    }


def make_problem(cell: grid.Cell, setting: Setting, images: Tensor) -> MetaProblem:
    """The network and the tasks of one seed, on the images' device."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(cell["seed"]))
    n_held_out = round(setting.held_out * len(images))
    held_out, training = images[order[:n_held_out]], images[order[n_held_out:]]
    if images.shape[2] > 1:
        mean, deviation = training.mean((0, 1, 3, 4), keepdim=True), training.std((0, 1, 3, 4), keepdim=True)
        held_out, training = (held_out - mean) / deviation, (training - mean) / deviation
    sizes = {"n_way": cell["n_way"], "n_shot": setting.n_shot, "n_val": N_VAL}
    others = FewShot(held_out, **sizes)
    with randomness.seeded(cell["seed"], torch.device("cpu")):
        net = make_warp_net(images.shape[2], images.shape[3], cell["n_way"])
    return MetaProblem(
        model=net.to(images.device, memory_format=torch.channels_last),
        train_loss=clean_loss,
        val_loss=clean_loss,
        draw=FewShot(training, **sizes).draw,
        val_episodes=others.draw_many(cell["n_eval_episodes"], _seed(cell) + 500_000),
        test_episodes=others.draw_many(cell["n_eval_episodes"], _seed(cell) + 500_001),
        n_episodes=cell["n_episodes"],
        metrics={"accuracy": accuracy},
        outer_parameters=WARP_LAYERS,
        cuda_graphs=True,
    )


def _seed(cell: grid.Cell) -> int:
    return 1_000_000 * cell["seed"]  # outer step k draws from this + k


@cache
def read(name: str, folder: Path) -> Tensor:
    """All images, of shape (classes, images of each, channels, height, width)."""
    if name == "omniglot":
        return read_omniglot(folder)
    found = sorted(folder.glob("cifar100*.npz"))
    if not found:
        raise DataError(f"The data folder {folder} holds no cifar100*.npz; name the one that does.")
    return read_classes(found[0])


def table(rows: list[grid.Row], setting: Setting, n_way: int) -> str:
    """One line a method: mean ± 95% confidence interval, beside what the paper has."""
    at_start = _cells([*{row["cell"]["seed"]: row["result"] for row in rows}.values()], "_at_start")
    lines = [["α at its start", at_start[0], "", at_start[1], ""]]
    for method in setting.methods:
        results = [row["result"] for row in rows if row["cell"]["method"] == method]
        if results:
            published = setting.published.get(method, ("",) * len(setting.ways))[setting.ways.index(n_way)]
            val, test = _cells(results)
            lines.append([method, val, published, test, f"{results[0]['cost_of_an_outer_step']:.0f}"])
    return tables.table(["", "held-out tasks", "published", "other held-out tasks", "cost of an outer step"], lines)


def _cells(results: list[dict[str, Any]], suffix: str = "") -> list[str]:
    keys = (f"{split}_accuracy{suffix}" for split in ("val", "test"))
    return [grid.plus_minus([result[key] for result in results]) for key in keys]


if __name__ == "__main__":
    main()
