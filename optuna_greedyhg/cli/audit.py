"""``greedyhg audit``: how the estimators compare with the exact hypergradient on a task, before anything is refined."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from optuna.trial import FixedTrial
from rich.console import Console

from optuna_greedyhg.cli.console import audit_table
from optuna_greedyhg.cli.options import (
    Data,
    Device,
    DeviceName,
    JsonFile,
    Quiet,
    Seed,
    TaskOption,
    load_task,
    require_writable,
    write_json,
)
from optuna_greedyhg.hypergrad.audit import HypergradientAudit
from optuna_greedyhg.hypergrad.estimators import ESTIMATORS
from optuna_greedyhg.hypergrad.update_rules import SGD, UpdateRule
from optuna_greedyhg.tasks import Task
from optuna_greedyhg.trials.alpha import Alpha

DEFAULT_ESTIMATORS = "t1t2,greedy,spectral,ift,drmad,reverse"


def audit(
    task: TaskOption,
    estimators: Annotated[str, typer.Option(help=f"Which, of {', '.join(ESTIMATORS)}.")] = DEFAULT_ESTIMATORS,
    horizon: Annotated[int, typer.Option(min=1, help="Training steps in the window.")] = 50,
    at_step: Annotated[int, typer.Option(min=0, help="Training steps before the window.")] = 200,
    momentum: Annotated[float | None, typer.Option(help="In place of the task's own.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Horizons before the window that warm an estimator up.")] = 0,
    device: Device = DeviceName.AUTO,
    seed: Seed = 0,
    data: Data = None,
    json_file: JsonFile = None,
    quiet: Quiet = False,
) -> None:
    """Compare estimators with the exact hypergradient: agreement, time, memory, cost."""
    console = Console(quiet=quiet)
    require_writable(json_file, "--json")
    names = _known(estimators)
    made = load_task(task.value, seed=seed, device=device, data=data)
    auditor = _auditor(made, momentum, horizon=horizon, at_step=at_step, n_warm_up=warm_up, seed=seed)
    rows = []
    for name in names:
        with console.status(f"Auditing {name}"):
            rows += auditor.run({name: ESTIMATORS[name]})
    window = f"training steps {at_step + 1} to {at_step + horizon}"
    console.print(f"Estimates of the hypergradient of {task.value}, {window}", style="bold", highlight=False)
    console.print(audit_table(rows))
    if modes := {row.product_mode.value for row in rows if row.product_mode is not None}:
        console.print(f"Products in {' and '.join(sorted(modes))} mode", highlight=False)
    for row in rows:
        if row.error is not None:
            console.print(f"{row.name}: {' '.join(row.error.split())}", highlight=False, markup=False)
    settings = {
        "task": task.value,
        "seed": seed,
        "horizon": horizon,
        "at_step": at_step,
        "n_warm_up": warm_up,
        "update_rule": str(auditor.update_rule),
        "device": auditor.problem.device.type,
    }
    write_json(json_file, {**settings, "estimators": [row.as_json() for row in rows]})


def _known(estimators: str) -> list[str]:
    """The names in a list with commas, each once."""
    names = list(dict.fromkeys(name.strip() for name in estimators.split(",")))
    unknown = [name for name in names if name not in ESTIMATORS]
    if unknown:
        raise typer.BadParameter(f"there is no {unknown[0]!r}, only {', '.join(ESTIMATORS)}", param_hint="--estimators")
    return names


def _auditor(
    task: Task, momentum: float | None, *, horizon: int, at_step: int, n_warm_up: int, seed: int
) -> HypergradientAudit:
    """The audit of a task at its defaults."""
    trial = FixedTrial(dict(task.defaults))
    alpha = Alpha(trial)
    problem, rule = task.define(trial, alpha)
    if momentum is not None:
        rule = _with_momentum(rule, momentum)
    try:
        return HypergradientAudit(
            problem.val_episodes[0],
            alpha.hyperparameters,
            update_rule=rule,
            horizon=horizon,
            at_step=at_step,
            n_warm_up=n_warm_up,
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--warm-up") from error


def _with_momentum(rule: UpdateRule, momentum: float) -> SGD:
    if not isinstance(rule, SGD):
        raise typer.BadParameter(f"the task trains with {rule}, which has none", param_hint="--momentum")
    try:
        return replace(rule, momentum=momentum)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--momentum") from error
