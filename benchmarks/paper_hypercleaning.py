"""The paper's data hyper-cleaning: 1000 training images with corrupted labels, one weight an example.

Full batches of a small convolutional network, SGD with lr 0.1 and momentum 0.9, horizon 10, outer Adam with lr 0.1, 200
outer steps, online; the clean validation set is the 10 000 images of the test file, and reported is the accuracy on it
at the best evaluation of a run, as in the paper. Beside it stand the accuracy at the end of the run, as the best of an
early evaluation hides what is memorised later, and the accuracies, at the same evaluations, on 10 000 images that
nothing has seen. *Unlike* in the paper, a hypergradient term sees ``--val-batch`` validation images, which
go round all 10 000, because on a CPU the whole set would cost ten times the training.

    python benchmarks/paper_hypercleaning.py --data FOLDER --out benchmarks/results/paper_hypercleaning_fashion.json

Finished runs are kept in the file and not run again. ``--quick`` makes two outer steps of one seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grid
import tables
import torch

from optuna_greedyhg.hypergrad.curvature import Neumann
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.estimators import DrMAD, Estimator, Greedy, Implicit
from optuna_greedyhg.hypergrad.evaluation import Online
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.update_rules import SGD
from optuna_greedyhg.report.statistics import mean_and_half_width
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.fashion import N_TRAIN, FashionCleaning

METHODS: Mapping[str, Estimator[Any] | None] = {
    "no HPO": None,
    "T1-T2": Greedy(gamma=0.0),
    "IFT (5)": Implicit(Neumann(n_terms=5, scale=0.1)),
    "greedy .9": Greedy(gamma=0.9),
    "spectral 10": Greedy(propagator=Spectral(rank=10)),
    "DrMAD": DrMAD(),
}
GUESSING = 10.0
"""The accuracy of weights that are NaN, in percent."""
PUBLISHED = {
    ("mnist", 0.3): ("70.46 ± 5.47", "66.93 ± 1.2", "71.97 ± 4.54", "87.06 ± 0.77"),
    ("mnist", 0.5): ("51.52 ± 1.61", "51.86 ± 2.77", "54.14 ± 6.66", "77.73 ± 1.70"),
    ("fashion", 0.3): ("59.46 ± 4.12", "62.07 ± 4.41", "60.63 ± 5.03", "72.57 ± 1.09"),
    ("fashion", 0.5): ("53.99 ± 6.88", "51.40 ± 5.53", "47.68 ± 1.51", "66.21 ± 1.50"),
}
"""The paper's table, in the order of the first four methods."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with the four idx files")
    parser.add_argument("--dataset", choices=["fashion", "mnist"], default="fashion", help="what the folder holds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--shares", nargs="+", type=float, choices=[0.3, 0.5], default=[0.5, 0.3], metavar="P")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--n-outer-steps", type=int, default=200)
    parser.add_argument("--val-batch", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.n_outer_steps, arguments.shares = 1, 2, arguments.shares[:1]
    torch.set_num_threads(1)

    cells = [
        {
            "dataset": arguments.dataset,
            "share": share,
            "method": method,
            "seed": seed,
            "n_outer_steps": arguments.n_outer_steps,
            "val_batch": arguments.val_batch,
        }
        for share in arguments.shares
        for seed in range(arguments.seeds)
        for method in arguments.methods
    ]
    rows = grid.run(arguments.out, cells, partial(run, folder=arguments.data, device=arguments.device))
    for share in arguments.shares:
        print(f"\n{arguments.dataset}, labels replaced with probability {share}, {arguments.seeds} seeds:\n")
        print(table([row for row in rows if row["cell"]["share"] == share], arguments.dataset, share))


def run(cell: grid.Cell, folder: Path, device: str) -> dict[str, Any]:
    """One descent, from all weights ½."""
    task = FashionCleaning(folder, cell["seed"], device, cell["share"], cell["val_batch"])
    steps = descend(
        task.problem(),
        {cleaning.LOGITS: Hyperparameter(torch.zeros(N_TRAIN))},
        update_rule=SGD(lr=0.1, momentum=0.9),
        estimator=METHODS[cell["method"]],
        horizon=10,
        n_outer_steps=cell["n_outer_steps"],
        outer_optimizer=partial(torch.optim.Adam, lr=0.1),
        evaluate=Online(),
        evaluate_every=min(10, cell["n_outer_steps"]),
        metric="accuracy",
        maximize=True,
        seed=cell["seed"],
    )
    *_, last = steps
    best, end = last.best, last.evaluation
    at_end = {"val": GUESSING, "test": GUESSING}  # where training has diverged
    if end is not None:
        at_end = {"val": 100 * end.scores["accuracy"], "test": 100 * end.test_scores["accuracy"]}
    return {
        "val_accuracy": 100 * best.scores["accuracy"],
        "test_accuracy": 100 * best.test_scores["accuracy"],
        "best_outer_step": best.outer_step,
        "val_accuracy_at_end": at_end["val"],
        "test_accuracy_at_end": at_end["test"],
        "cost_in_train_gradients": last.cost.total / N_TRAIN,
        "stopped": last.stopped,
        **task.diagnose((end or best).values),
    }


def table(rows: list[grid.Row], dataset: str, share: float) -> str:
    """One line a method: mean ± 95% confidence interval, beside what the paper has; weights are those of the end."""
    lines = []
    published = dict(zip(METHODS, PUBLISHED[dataset, share], strict=False))
    for method in METHODS:
        results = [row["result"] for row in rows if row["cell"]["method"] == method]
        if results:
            accuracies = (
                grid.plus_minus([result[key] for result in results])
                for key in ("val_accuracy", "test_accuracy", "val_accuracy_at_end", "test_accuracy_at_end")
            )
            weights = (mean_and_half_width([result[key] for result in results])[0] for key in cleaning.DIAGNOSTICS)
            cost = mean_and_half_width([result["cost_in_train_gradients"] for result in results])[0]
            shown = (" / ".join(f"{w:.2f}" for w in weights), f"{cost:.0f}", str(len(results)))
            lines.append([method, published.get(method, ""), *accuracies, *shown])
    header = ["", "published", "best", "unseen", "at the end", "unseen", "weights clean / wrong", "cost", "seeds"]
    return tables.table(header, lines)


if __name__ == "__main__":
    main()
