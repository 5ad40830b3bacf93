"""Does refinement beat samplers alone at equal measured cost, and does a better hypergradient?

``greedyhg compare``, whose numbers are kept with the command, the versions and the machine. Runs are
studies of a storage, so that what was interrupted goes on.

    python benchmarks/compare.py --task digits-cleaning --storage sqlite:///compare.db
    python benchmarks/compare.py --task digits-l2 --storage sqlite:///compare.db
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import environment

from optuna_greedyhg.cli import main as greedyhg
from optuna_greedyhg.report.files import write_whole

METHODS = "defaults,random,tpe,tpe+greedy,tpe+spectral"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budget", default="100", help="in full trainings")
    parser.add_argument("--seeds", default="5")
    parser.add_argument("--storage", default="sqlite:///compare.db")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    path = arguments.results / f"compare_{arguments.task.replace('-', '_')}.json"
    options = {name: getattr(arguments, name) for name in ("task", "methods", "budget", "seeds", "storage")}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    try:
        greedyhg(["compare", *words, "--device", "cpu", "--json", str(path)])
    except SystemExit as end:
        if end.code != 0:
            raise
    found = json.loads(path.read_text(encoding="utf-8"))
    write_whole(path, json.dumps({**environment.describe(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
