"""Writes the table of docs/estimators.md anew, from what the estimators say of themselves.

python benchmarks/estimators_page.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import tables

from optuna_greedyhg.hypergrad.estimators import ESTIMATORS

PAGE = Path(__file__).parent.parent / "docs" / "estimators.md"
HEADER = (
    "estimator",
    "online",
    "long horizon",
    "products",
    "validation gradients",
    "more training gradients",
    "memory",
    "optimizer's own hyperparameters",
    "needs convergence",
    "may restart",
)


def rows() -> Iterator[Sequence[str]]:
    """The table's cells, one row for each estimator."""
    for name, estimator in ESTIMATORS.items():
        traits = estimator.traits
        yield (
            f"[{name}](#{name})",
            _yes(traits.online),
            _yes(traits.long_horizon),
            traits.products,
            traits.val_gradients,
            traits.train_gradients,
            traits.memory,
            _yes(traits.own_hyperparameters),
            _yes(traits.needs_convergence),
            _yes(not estimator.biased_in_restart_mode),
        )


def updated(page: str) -> str:
    """The page with its table written anew."""
    return tables.updated(page, "estimators", tables.table(HEADER, rows()))


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
