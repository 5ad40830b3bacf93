"""What several commands share: options that mean the same everywhere, and the files that they name."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from optuna.artifacts import FileSystemArtifactStore

from optuna_greedyhg.hypergrad.devices import as_device
from optuna_greedyhg.report.files import write_whole
from optuna_greedyhg.tasks import FROM_FOLDER, TASKS, Task, make_task

TaskName = StrEnum("TaskName", {name.replace("-", "_").upper(): name for name in TASKS})  # type: ignore[misc]


class DeviceName(StrEnum):
    """Where to compute."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"

    def make(self) -> torch.device:
        """The device; auto is a GPU if there is one."""
        if self == DeviceName.CUDA and not torch.cuda.is_available():
            raise typer.BadParameter("this machine has no CUDA device; use --device auto or cpu", param_hint="--device")
        return as_device(self.value)


TaskOption = Annotated[TaskName, typer.Option("--task", help="The task; see greedyhg tasks.")]
Data = Annotated[Path | None, typer.Option(help="Folder with the task's data files.")]
Device = Annotated[DeviceName, typer.Option(help="Where to compute.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seeds data, weights and samplers.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Artifacts = Annotated[Path | None, typer.Option(help="Folder that keeps the refined tensors, and pictures.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results to this file, for machines.")]


def load_task(name: str, *, seed: int, device: DeviceName, data: Path | None) -> Task:
    """The task on its device; refuses a folder of data for one that brings its own."""
    if data is not None and name not in FROM_FOLDER:
        raise typer.BadParameter(f"the task {name} brings its own data", param_hint="--data")
    return make_task(name, seed=seed, device=device.make(), folder=data)


def require_writable(path: Path | None, option: str) -> None:
    """Refuses a file that could not be written in the end, before anything is computed."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"cannot write {path}; name a file in a folder that exists", param_hint=option)


def require_folder(folder: Path | None, option: str) -> None:
    """Refuses a folder that is not there and cannot be made, without making it."""
    if folder is None:
        return
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not present.is_dir() or not os.access(present, os.W_OK):
        raise typer.BadParameter(
            f"cannot make the folder {folder}: {present} is not a writable folder", param_hint=option
        )


def open_artifacts(folder: Path | None) -> FileSystemArtifactStore | None:
    """A store in this folder, which is made where it is missing."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return FileSystemArtifactStore(folder)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Writes the results, if the user has asked for them."""
    if path is not None:
        write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
