"""The commands and their options. What a user gets wrong is one line on standard error, and exit code 2."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import optuna
import torch
import typer
from optuna.storages import BaseStorage
from optuna.trial import BaseTrial, Trial, TrialState
from rich.console import Console

from optuna_greedyhg.cli.audit import audit
from optuna_greedyhg.cli.compare import compare
from optuna_greedyhg.cli.console import StudyProgress, summary_table
from optuna_greedyhg.cli.options import (
    Artifacts,
    Data,
    Device,
    DeviceName,
    JsonFile,
    Quiet,
    Seed,
    TaskOption,
    load_task,
    open_artifacts,
    require_folder,
    require_writable,
    write_json,
)
from optuna_greedyhg.cli.report import report
from optuna_greedyhg.cli.storages import open_storage, optuna_silenced, shown, storage_errors
from optuna_greedyhg.hypergrad.audit import DivergedError
from optuna_greedyhg.hypergrad.descent import OuterStep
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS, Estimator, Greedy
from optuna_greedyhg.hypergrad.evaluation import Online
from optuna_greedyhg.report.dashboard import publish
from optuna_greedyhg.report.page import write_report
from optuna_greedyhg.report.summary import summarize
from optuna_greedyhg.tasks import TASKS, DataError, DigitsCleaning, make_objective
from optuna_greedyhg.tasks.comparison import compare_with_refined
from optuna_greedyhg.tasks.methods import SAMPLERS
from optuna_greedyhg.tasks.spending import OtherStudyError, open_study
from optuna_greedyhg.trials.policies import Always
from optuna_greedyhg.trials.refine import Callback

USAGE = 2
INTERRUPTED = 130  # which typer makes of a Ctrl-C

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


SamplerName = StrEnum("SamplerName", {name.upper(): name for name in SAMPLERS})  # type: ignore[misc]


_NONE = "none"
_ESTIMATOR_NAMES = {name.replace("-", "_").upper(): name for name in (*ESTIMATORS, _NONE)}
EstimatorName = StrEnum("EstimatorName", _ESTIMATOR_NAMES)  # type: ignore[misc]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(version("optuna-greedyhg"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Gradient-based refinement of hyperparameters inside Optuna trials."""


@app.command()
def demo(
    storage: Annotated[str, typer.Option(help="URL of the storage.")] = "sqlite:///greedyhg.db",
    seed: Seed = 0,
    artifacts: Artifacts = None,
    n_trials: Annotated[int, typer.Option(min=1, help="Number of refined trials.")] = 8,
    report: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("greedyhg-report.html"),
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compare defaults, TPE, and TPE with greedy refinement on digits with corrupted labels."""
    console = Console(quiet=quiet)
    require_writable(report, "--report")
    require_writable(json_file, "--json")
    require_folder(artifacts, "--artifacts")
    with optuna_silenced(), storage_errors(storage):
        opened = open_storage(storage)
        prefix = _unused_prefix(opened, f"demo-{DigitsCleaning.name}")
    store = open_artifacts(artifacts)
    # Its matrices are so small that a second thread costs more than it brings, much more on a busy machine.
    torch.set_num_threads(1)
    task = DigitsCleaning(seed)
    console.print(f"[bold]{task.name}[/bold]: {task.summary}.")
    with optuna_silenced(), StudyProgress(console) as progress:
        comparison = compare_with_refined(
            task,
            storage=opened,
            prefix=prefix,
            seed=seed,
            n_trials=n_trials,
            artifact_store=store,
            on_step=progress.update,
        )
        progress.finish()
    summaries = comparison.summaries
    console.print(summary_table(summaries, "The best trial of each method; its cost is that of all its trials"))
    write_json(json_file, {"task": task.name, "seed": seed, "methods": [s.as_json() for s in summaries]})
    command = f"optuna-dashboard {shown(storage)}" + (f" --artifact-dir {artifacts}" if artifacts else "")
    write_report(
        report,
        title=f"greedyhg demo: {task.name}",
        intro=f"{task.summary}. TPE alone has as many trials as cost what the refined trials have cost.",
        studies=comparison.studies,
        summaries=summaries,
        footer=f"Open the studies with: {command}",
    )
    if find_spec("optuna_dashboard"):
        with console.status("Publishing for the dashboard"):
            for study in comparison.studies.values():
                publish(study)
    console.print(f"Report:    {report}\nDashboard: {command}", soft_wrap=True, highlight=False)


@app.command()
def run(
    task: TaskOption,
    sampler: Annotated[SamplerName, typer.Option(help="Draws the seeds.")] = SamplerName["TPE"],
    estimator: Annotated[EstimatorName, typer.Option(help="Estimates hypergradients.")] = EstimatorName["GREEDY"],
    n_trials: Annotated[int, typer.Option(min=1, help="Number of trials to add to the study.")] = 10,
    storage: Annotated[str | None, typer.Option(help="URL of the storage; in memory by default.")] = None,
    study_name: Annotated[str | None, typer.Option(help="Name of the study; an existing one is carried on.")] = None,
    gamma: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Decay of the greedy estimator; 0.9 by default.")
    ] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Training steps in an outer step.")] = None,
    outer_steps: Annotated[int | None, typer.Option(min=1, help="Outer steps in a trial.")] = None,
    device: Device = DeviceName.AUTO,
    seed: Seed = 0,
    timeout: Annotated[
        float | None, typer.Option(min=0.0, help="End after this many seconds, with the outer step then in progress.")
    ] = None,
    data: Data = None,
    artifacts: Artifacts = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Run a study of one task, all of whose trials are refined, or carry one on."""
    console = Console(quiet=quiet)
    name = task.value
    require_writable(json_file, "--json")
    require_folder(artifacts, "--artifacts")
    if study_name is not None and storage is None:
        raise typer.BadParameter("a study in memory is gone at the end; give a --storage", param_hint="--study-name")
    chosen = _estimator(estimator, gamma)
    problem = load_task(name, seed=seed, device=device, data=data)
    settings = replace(
        problem.settings,
        horizon=horizon or problem.settings.horizon,
        n_outer_steps=outer_steps or problem.settings.n_outer_steps,
        policy=Always(),  # a task's own is for a budget, of which seeds are to have their share
    )
    identity: dict[str, Any] = {"task": name, "task_seed": seed}
    if isinstance(settings.evaluate, Online):  # whose values depend on how long training went on
        identity["n_training_steps"] = settings.horizon * settings.n_outer_steps
    with optuna_silenced(), storage_errors(storage):
        study = _open_study(open_storage(storage), study_name, sampler, identity)
    store = open_artifacts(artifacts)
    n_before = len(study.get_trials(deepcopy=False))
    if n_before > 0:
        console.print(f"Carrying on the study {study.study_name}, which has {n_before} trials.", highlight=False)
    with optuna_silenced(), StudyProgress(console) as progress:
        objective = make_objective(
            problem,
            estimator=chosen,
            settings=settings,
            artifact_store=store,
            callbacks=[
                lambda trial, step: progress.update(
                    name, (trial.number - n_before + step.index / settings.n_outer_steps) / n_trials, trial, step
                ),
                *([] if timeout is None else [_stop_after(timeout)]),
            ],
        )
        # A trial that fails is recorded as failed, and the study goes on.
        study.optimize(objective, n_trials=n_trials, timeout=timeout, catch=(Exception,))
        progress.finish()
    summary = summarize(f"{sampler}+{estimator}", study, problem.diagnostics)
    write_json(json_file, {"task": name, "seed": seed, "study_name": study.study_name, "methods": [summary.as_json()]})
    console.print(summary_table([summary], f"The best of all trials in the study {study.study_name}"))
    trials = study.get_trials(deepcopy=False)
    if len(trials) == n_before:
        _fail(f"no trial was started within {timeout} seconds", code=1)
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        _fail("no trial of the study has completed; see the messages above", code=1)


def _estimator(name: str, gamma: float | None) -> Estimator[Any] | None:
    """The estimator of this name, the greedy one with its decay; ``None`` leaves trials unrefined."""
    if gamma is not None and name != "greedy":
        raise typer.BadParameter(f"{name} has no γ; take --estimator greedy, or leave it out", param_hint="--gamma")
    if name == _NONE:
        return None
    return ESTIMATORS[name] if gamma is None else Greedy(gamma)


def _stop_after(seconds: float) -> Callback:
    """Ends the trial in progress, for whose end ``study.optimize(timeout=...)`` would wait."""
    deadline = time.monotonic() + seconds

    def stop(trial: BaseTrial, step: OuterStep) -> None:
        if isinstance(trial, Trial) and time.monotonic() >= deadline:
            trial.study.stop()

    return stop


app.command()(audit)
app.command()(compare)
app.command()(report)


@app.command()
def tasks() -> None:
    """List the tasks."""
    for name, summary in TASKS.items():
        typer.echo(f"{name:21}{summary}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits; the entry point of ``greedyhg``.

    Args:
        arguments: Instead of the process's own.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: typer.echo(f"greedyhg: warning: {message}", err=True)
            code = app(args=arguments, standalone_mode=False)
    except (typer.TyperException, DataError, DivergedError) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        _fail(message, code=USAGE)
    if code == INTERRUPTED:
        _fail("interrupted; finished trials are in the storage", code=INTERRUPTED)
    sys.exit(code or 0)


def _fail(message: str, *, code: int) -> NoReturn:
    """Says it in one line, and exits."""
    if message:  # there is none when no command was given, and the help has been printed
        typer.echo(f"greedyhg: error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _open_study(
    storage: BaseStorage, study_name: str | None, sampler: SamplerName, identity: dict[str, Any]
) -> optuna.Study:
    """Creates the study, or loads it, if it is one of the same task and data."""
    try:
        return open_study(storage, study_name, SAMPLERS[sampler], identity, identity["task_seed"])
    except OtherStudyError as error:
        raise typer.BadParameter(str(error), param_hint="--study-name") from error


def _unused_prefix(storage: BaseStorage, stem: str) -> str:
    """``<stem>-1/``, or the first number after it that no study's name begins with."""
    names = [summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)]
    number = 1
    while any(name.startswith(f"{stem}-{number}/") for name in names):
        number += 1
    return f"{stem}-{number}/"
