"""What a committed result says about how it was made."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path

import optuna
import torch

import optuna_greedyhg

ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
"""What has glibc keep freed memory; see docs/performance.md, "On a CPU"."""


def describe() -> dict[str, object]:
    """The command, as given in the repository's root, the versions and the machine of this process."""
    program, *arguments = sys.argv
    path, root = Path(program).resolve(), Path(__file__).resolve().parent.parent
    shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    assignments = [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    return {
        "command": shlex.join([*assignments, "python", shown, *arguments]),
        "versions": {
            "optuna_greedyhg": optuna_greedyhg.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "optuna": optuna.__version__,
        },
        "machine": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
