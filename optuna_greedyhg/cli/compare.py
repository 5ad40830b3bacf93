"""``greedyhg compare``: methods on one task at equal cost, on several seeds, with statistics, a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from optuna_greedyhg.cli.console import StudyProgress, against_table, anytime_table, scores_table
from optuna_greedyhg.cli.options import (
    Data,
    Device,
    DeviceName,
    JsonFile,
    Quiet,
    TaskOption,
    load_task,
    open_artifacts,
    require_folder,
    require_writable,
    write_json,
)
from optuna_greedyhg.cli.storages import open_storage, optuna_silenced, shown, storage_errors
from optuna_greedyhg.report.browser import VARIABLE, find_browser, write_png
from optuna_greedyhg.report.comparison import Statistics, statistics_of
from optuna_greedyhg.report.comparison_page import comparison_page
from optuna_greedyhg.report.files import write_whole
from optuna_greedyhg.report.runs import Run
from optuna_greedyhg.report.wording import against_note, anytime_note, ranking_note
from optuna_greedyhg.tasks import TASKS, Task
from optuna_greedyhg.tasks.comparison import TPE, Yardstick, measure, recorded_yardstick
from optuna_greedyhg.tasks.comparison import compare as run_methods
from optuna_greedyhg.tasks.methods import DEFAULTS, SAMPLERS, Method, method_named
from optuna_greedyhg.tasks.spending import OtherStudyError

_METHODS_HELP = f"With commas: {DEFAULTS}, or a sampler ({', '.join(SAMPLERS)}) with +ESTIMATOR or without."


def compare(
    task: TaskOption,
    methods: Annotated[str, typer.Option(help=_METHODS_HELP)] = "defaults,tpe,random,tpe+greedy,tpe+spectral",
    budget: Annotated[float, typer.Option(help="What a run may cost, in full trainings of the task.")] = 100.0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 5,
    storage: Annotated[str, typer.Option(help="URL of the storage.")] = "sqlite:///greedyhg.db",
    out: Annotated[Path | None, typer.Option(help="Folder for the page, and for a picture of it.")] = None,
    device: Device = DeviceName.AUTO,
    data: Data = None,
    artifacts: Annotated[
        Path, typer.Option(help="Folder for refined tensors, which later trials of some tasks start from.")
    ] = Path("greedyhg-artifacts"),
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compare methods on a task at equal cost, or carry a comparison on where it stopped."""
    console = Console(quiet=quiet)
    name = task.value
    chosen = _chosen(methods)
    if not budget >= 1:
        raise typer.BadParameter(f"a run needs at least one full training, but got {budget}", param_hint="--budget")
    require_writable(json_file, "--json")
    require_folder(out, "--out")
    require_folder(artifacts, "--artifacts")
    target = device.make()

    def make(seed: int) -> Task:
        return load_task(name, seed=seed, device=device, data=data)

    first = make(0)  # before a storage is made, so that a folder without its data is refused
    with optuna_silenced(), storage_errors(storage):
        opened = open_storage(storage)
        known = recorded_yardstick(opened, name)
    # Such small matrices gain nothing from more, and what runs beside this would change the prices.
    torch.set_num_threads(1)
    yardstick = known or measure(first)
    limit = budget * yardstick.full_training
    console.print(f"[bold]{name}[/bold]: {TASKS[name]}.", highlight=False)
    console.print(_described(budget, yardstick), highlight=False)
    with optuna_silenced(), StudyProgress(console) as progress:
        try:
            runs = run_methods(
                make,
                chosen,
                range(seeds),
                storage=opened,
                budget=limit,
                yardstick=yardstick,
                device=target,
                artifact_store=open_artifacts(artifacts if first.settings.inherit else None),
                on_step=progress.update,
            )
        except OtherStudyError as error:
            raise typer.BadParameter(str(error), param_hint="--storage") from error
        progress.finish()
    statistics = statistics_of(runs, _reference(chosen), limit)
    settings = {"task": name, "seeds": seeds, "n_full_trainings": budget, "budget": limit, "device": target.type}
    _write(
        out,
        json_file,
        console,
        runs=runs,
        statistics=statistics,
        yardstick=yardstick,
        settings=settings,
        footer=f"Made from {shown(storage)}.",
    )
    console.print(scores_table(statistics))
    if len(chosen) > 1:
        console.print(against_table(statistics))
        console.print(anytime_table(statistics))
        notes = against_note(statistics), anytime_note(statistics), ranking_note(statistics)
        console.print(*notes, sep="\n", highlight=False, markup=False)
    for run in runs:
        if not run.has_spent(limit) and run.method != DEFAULTS:
            console.print(f"{run.method}, seed {run.seed}: given up after three failed trials; see the messages above")
    if not all(run.curve for run in runs):
        raise typer.Exit(1)


def _chosen(methods: str) -> list[Method]:
    """The methods in a list with commas, each once."""
    try:
        return [method_named(name) for name in dict.fromkeys(name.strip() for name in methods.split(","))]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--methods") from error


def _reference(methods: Sequence[Method]) -> str:
    """TPE if it is among them, else the first."""
    names = [method.name for method in methods]
    return TPE if TPE in names else names[0]


def _described(budget: float, yardstick: Yardstick) -> str:
    prices = yardstick.prices
    return (
        f"Budget of a run: {budget:g} full trainings, or {budget * yardstick.full_training:,.0f} training gradients of "
        f"one example, beside which a validation gradient costs {prices.val_gradient:.2f}, a product "
        f"{prices.product:.2f}, and an evaluation {prices.evaluation:.2f}, as measured."
    )


def _write(
    out: Path | None,
    json_file: Path | None,
    console: Console,
    *,
    runs: Sequence[Run],
    statistics: Statistics,
    yardstick: Yardstick,
    settings: dict[str, Any],
    footer: str,
) -> None:
    rows = [run.as_json() for run in runs]
    prices = asdict(yardstick.prices)
    content = {**settings, "full_training": yardstick.full_training, "prices": prices, "rows": rows}
    write_json(json_file, {**content, "statistics": statistics.as_json()})
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    page = comparison_page(
        f"greedyhg compare: {settings['task']}",
        f"{TASKS[settings['task']]}.\n\n{_described(settings['n_full_trainings'], yardstick)}",
        runs,
        statistics,
        full_training=yardstick.full_training,
        budget=settings["budget"],
        footer=footer,
    )
    write_whole(out / "comparison.html", page)
    console.print(f"Page:      {out / 'comparison.html'}", soft_wrap=True, highlight=False)
    if find_browser() is None:
        console.print(f"Picture:   none, as no Chrome or Chromium was found; install one, or set {VARIABLE} to it")
        return
    try:
        write_png(out / "comparison.png", page)
    except RuntimeError as error:
        console.print(f"Picture:   none: {error}", highlight=False, markup=False)
        return
    console.print(f"Picture:   {out / 'comparison.png'}", soft_wrap=True, highlight=False)
