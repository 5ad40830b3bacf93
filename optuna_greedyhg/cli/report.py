"""``greedyhg report``: what studies have found, as a page, as a picture of it, and in the dashboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import optuna
import typer
from rich.console import Console
from sqlalchemy.engine import make_url

from optuna_greedyhg.cli.console import summary_table
from optuna_greedyhg.cli.options import JsonFile, Quiet, require_writable, write_json
from optuna_greedyhg.cli.storages import open_storage, optuna_silenced, shown, storage_errors
from optuna_greedyhg.report.browser import VARIABLE, find_browser, write_png
from optuna_greedyhg.report.dashboard import publish
from optuna_greedyhg.report.page import write_report
from optuna_greedyhg.report.summary import summarize


def report(
    storage: Annotated[str, typer.Option(help="URL of the storage.")] = "sqlite:///greedyhg.db",
    study_name: Annotated[
        list[str] | None, typer.Option(help="A study to report on; give it again for more. By default all.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("greedyhg-report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write a picture of it; needs Chrome or Chromium.")] = None,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Also show it in optuna-dashboard.")] = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page about studies: what they found at what cost, and how."""
    console = Console(quiet=quiet)
    for path, option in ((out, "--out"), (png, "--png"), (json_file, "--json")):
        require_writable(path, option)
    if png is not None and find_browser() is None:
        raise typer.BadParameter(
            f"found no Chrome or Chromium; install one, or set {VARIABLE} to it", param_hint="--png"
        )
    with optuna_silenced(), storage_errors(storage):
        studies = _load(storage, study_name)
    summaries = [summarize(name, study) for name, study in studies.items()]
    prefix = next(iter(studies.values())).study_name.removesuffix(next(iter(studies)))
    try:
        page = write_report(
            out,
            title=f"greedyhg report: {prefix.rstrip('/') or ', '.join(studies)}",
            intro="",
            studies=studies,
            summaries=summaries,
            footer=f"Made from {shown(storage)}.",
        )
        if png is not None:
            write_png(png, page)
        if dashboard:
            for study in studies.values():
                publish(study)
    except (ImportError, RuntimeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    write_json(json_file, {"methods": [summary.as_json() for summary in summaries]})
    console.print(summary_table(summaries, "The best trial of each study; its cost is that of all its trials"))
    console.print(f"Report:    {out}", soft_wrap=True, highlight=False)
    if png is not None:
        console.print(f"Picture:   {png}", soft_wrap=True, highlight=False)
    if dashboard:
        console.print(f"Dashboard: optuna-dashboard {shown(storage)}", soft_wrap=True, highlight=False)


def _load(url: str, names: list[str] | None) -> dict[str, optuna.Study]:
    """The studies by name, without the folder that all of their names begin with."""
    file = make_url(url)
    if file.get_backend_name() == "sqlite" and file.database and not Path(file.database).is_file():
        raise FileNotFoundError(f"there is no file {file.database}")
    opened = open_storage(url)
    known = [study.study_name for study in optuna.get_all_study_summaries(opened, include_best_trial=False)]
    names = list(dict.fromkeys(names or known))
    if not names:
        raise LookupError("it has no study")
    if unknown := [name for name in names if name not in known]:
        raise LookupError(f"it has no study {unknown[0]!r}, only {', '.join(known) or 'none'}")
    folder = names[0][: names[0].rfind("/") + 1]
    shared = folder if len(names) > 1 and all(name.startswith(folder) for name in names) else ""
    return {name.removeprefix(shared): optuna.load_study(study_name=name, storage=opened) for name in names}
