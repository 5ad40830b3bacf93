"""Does refinement beat samplers alone at equal measured cost, and does a better hypergradient?

``greedyhg compare``, whose numbers are kept with the command, the versions and the machine. Runs are
studies of a storage, so that what was interrupted goes on.

    python benchmarks/compare.py --task digits-cleaning --storage sqlite:///compare.db
    python benchmarks/compare.py --task digits-l2 --storage sqlite:///compare.db

Runs of samplers alone do not depend on how α moves. When that has changed, ``--renew`` runs some methods again, under
the prices and the budget that the file has, and puts their rows in the place of the old ones:

    python benchmarks/compare.py --task digits-l2 --renew tpe+greedy,tpe+spectral --storage sqlite:///renewed.db
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import environment
import optuna
import torch

from optuna_greedyhg.cli import main as greedyhg
from optuna_greedyhg.cli.options import open_artifacts
from optuna_greedyhg.hypergrad.cost import Prices
from optuna_greedyhg.report.comparison import statistics_of
from optuna_greedyhg.report.files import write_whole
from optuna_greedyhg.report.runs import run_from_json
from optuna_greedyhg.tasks import make_task
from optuna_greedyhg.tasks.comparison import TPE, Yardstick, compare
from optuna_greedyhg.tasks.methods import method_named
from optuna_greedyhg.trials.records import ArtifactStore

METHODS = "defaults,random,tpe,tpe+greedy,tpe+spectral"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, help="folder of the tasks that read one")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budget", default="100", help="in full trainings")
    parser.add_argument("--seeds", default="5")
    parser.add_argument("--storage", default="sqlite:///compare.db")
    parser.add_argument(
        "--artifacts", type=Path, default=Path("greedyhg-artifacts"), help="folder for what trials inherit"
    )
    parser.add_argument("--renew", help="methods, with commas, to run again for the file that there is")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    path = arguments.results / f"compare_{arguments.task.replace('-', '_')}.json"
    if arguments.renew is None:
        run(arguments, path)
    else:
        content = json.loads(path.read_text(encoding="utf-8"))
        store = open_artifacts(arguments.artifacts)
        new = renewed(content, arguments.renew.split(","), arguments.storage, store, arguments.data)
        write_whole(path, json.dumps(new, indent=1) + "\n")


def run(arguments: argparse.Namespace, path: Path) -> None:
    """All methods, into a new file."""
    names = ("task", "methods", "budget", "seeds", "storage", "artifacts")
    options = {name: str(getattr(arguments, name)) for name in names}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    if arguments.data is not None:
        words += ["--data", str(arguments.data)]
    try:
        greedyhg(["compare", *words, "--device", "cpu", "--json", str(path)])
    except SystemExit as end:
        if end.code != 0:
            raise
    found = json.loads(path.read_text(encoding="utf-8"))
    write_whole(path, json.dumps({**environment.describe(), **found}, indent=1) + "\n")


def renewed(
    content: dict[str, Any], names: list[str], storage: str, store: ArtifactStore | None, folder: Path | None
) -> dict[str, Any]:
    """The content of a file with the rows of some methods made anew, on its seeds, prices and budget."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    runs = compare(
        lambda seed: make_task(content["task"], seed=seed, folder=folder),
        [method_named(name) for name in names],
        range(content["seeds"]),
        storage=optuna.storages.get_storage(storage),
        budget=content["budget"],
        yardstick=Yardstick(content["full_training"], Prices(**content["prices"])),
        device=torch.device("cpu"),
        artifact_store=store,
        on_step=lambda method, share, trial, step: print(f"\r{method} {share:.1%}", end="", flush=True),
    )
    made = {(its.method, its.seed): its.as_json() for its in runs}
    rows = [made.pop((row["method"], row["seed"]), row) for row in content["rows"]] + list(made.values())
    statistics = statistics_of([run_from_json(row) for row in rows], TPE, content["budget"]).as_json()
    return {**content, "renewed": {"methods": names, **environment.describe()}, "rows": rows, "statistics": statistics}


if __name__ == "__main__":
    main()
