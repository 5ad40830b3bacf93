"""Writes the tables of docs/paper-experiments.md anew, from the results in benchmarks/results and from nothing else.

python benchmarks/papers_page.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grid
import paper_hypercleaning
import paper_metalearning
import paper_toy
import tables

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).parent.parent / "docs" / "paper-experiments.md"
NOTHING = "No run has been committed yet."


def updated(page: str) -> str:
    """The page with the tables of all experiments written anew."""
    for name, parts in {"toy": toy(), "hyper-cleaning": hypercleaning(), "meta-learning": metalearning()}.items():
        page = tables.updated(page, name, "\n\n".join(parts) or NOTHING)
    return page


def toy() -> Iterator[str]:
    """Online, and with restarts; outer learning rate 0.1, horizons of 10 steps."""
    for rows in _files("paper_toy"):
        for mode in paper_toy.MODES:
            setting = paper_toy.name(mode, paper_toy.OUTER_LRS[0])
            yield f"**{mode.capitalize()}**\n\n{paper_toy.table(rows, setting, [10])}"
        yield _made_by(rows)


def hypercleaning() -> Iterator[str]:
    """One table for each data set and share of wrong labels."""
    for rows in _files("paper_hypercleaning_*"):
        dataset = rows[0]["cell"]["dataset"]
        for share in sorted({row["cell"]["share"] for row in rows}):
            its = [row for row in rows if row["cell"]["share"] == share]
            yield f"**{dataset}, p = {share:g}**\n\n{paper_hypercleaning.table(its, dataset, share)}"
        yield _made_by(rows)


def metalearning() -> Iterator[str]:
    """One table for each setting, number of classes in a task, and length of a run."""
    for rows in _files("paper_metalearning_*"):
        name = rows[0]["cell"]["setting"]
        setting = paper_metalearning.SETTINGS[name]
        by_size: dict[tuple[int, int, int], list[grid.Row]] = {}
        for row in rows:
            cell = row["cell"]
            by_size.setdefault((cell["n_way"], cell["n_outer_steps"], cell["n_episodes"]), []).append(row)
        for (n_way, n_outer_steps, n_episodes), its in sorted(by_size.items()):
            length = f"{n_outer_steps} outer steps of {n_episodes} task{'s' if n_episodes > 1 else ''}"
            title = f"**{name}, {n_way}-way {setting.n_shot}-shot, {length}**"
            yield f"{title}\n\n{paper_metalearning.table(its, setting, n_way)}"
        yield _made_by(rows)


def _files(pattern: str) -> Iterator[list[grid.Row]]:
    for path in sorted(RESULTS.glob(f"{pattern}.json")):
        yield json.loads(path.read_text(encoding="utf-8"))["rows"]


def _made_by(rows: list[grid.Row]) -> str:
    """The machines and commands of all rows, each once."""
    made_by = [row["made_by"] for row in rows]
    machines = dict.fromkeys(
        f"{m['machine']['gpu'] or m['machine']['processor']}, torch {m['versions']['torch']}" for m in made_by
    )
    commands = dict.fromkeys(m["command"] for m in made_by)
    hours = sum(row["seconds"] for row in rows) / 3600
    made = "\n".join(f"    {command}" for command in commands)
    how = f"{len(rows)} runs, {hours:.1f} hours in all, each on one thread, in part beside other work"
    return f"{how}, on {'; '.join(machines)}:\n\n{made}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
