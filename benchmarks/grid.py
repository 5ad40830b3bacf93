"""A grid of runs that can be stopped and resumed: each finished run is a row of one JSON file, written at once.

A row is ``{"cell": {...}, "result": {...}, "seconds": ..., "made_by": {...}}``. The cell (method, seed, sizes, whatever
decides the result) is the row's identity: a cell that has its row is not run again. Several processes may fill one
file, each with cells of its own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import environment
from filelock import FileLock

from optuna_greedyhg.report.files import write_whole
from optuna_greedyhg.report.statistics import mean_and_half_width

Cell = dict[str, Any]
Row = dict[str, Any]


def run(path: Path | None, cells: Iterable[Cell], run_cell: Callable[[Cell], dict[str, Any]]) -> list[Row]:
    """The rows of all the cells, in their order; runs those that the file does not have.

    Args:
        path: The JSON file; ``None`` keeps the rows in memory.
        cells: What to run.
        run_cell: Gives a run's result, numbers by name.
    """
    rows, wanted = _rows_in(path), list(cells)
    for i, cell in enumerate(wanted, start=1):
        if any(row["cell"] == cell for row in rows):
            continue
        start = time.perf_counter()
        result = run_cell(cell)
        seconds = round(time.perf_counter() - start, 1)
        rows = _added(
            path, rows, {"cell": cell, "result": result, "seconds": seconds, "made_by": environment.describe()}
        )
        shown = ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float))
        print(f"{i}/{len(wanted)} {' '.join(map(str, cell.values()))}: {shown} ({seconds:.0f} s)", flush=True)
    return [row for cell in wanted for row in rows if row["cell"] == cell]


def _rows_in(path: Path | None) -> list[Row]:
    return json.loads(path.read_text())["rows"] if path is not None and path.exists() else []


def _added(path: Path | None, rows: list[Row], row: Row) -> list[Row]:
    """All rows, those that other processes have written to the file meanwhile among them."""
    if path is None:
        return [*rows, row]
    with FileLock(path.with_suffix(".lock")):
        rows = [*_rows_in(path), row]
        write_whole(path, json.dumps({"rows": rows}, indent=1) + "\n")
    return rows


def plus_minus(values: list[float]) -> str:
    """The mean and its interval in words; the value alone where there is but one."""
    mean, half_width = mean_and_half_width(values)
    return f"{mean:.2f}" if math.isnan(half_width) else f"{mean:.2f} ± {half_width:.2f}"
