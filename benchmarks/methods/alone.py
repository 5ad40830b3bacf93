"""The methods of one package in a process of their own: their estimates, and the memory that they take.

    python -m methods.alone PACKAGE MODEL HORIZON N_EXAMPLES N_THREADS ANSWERS.pt

A method's peak is what the process holds at most (``VmHWM``) while it does the work a second time, beyond what it holds
before (``VmRSS``): the first time compiles, and fills caches. Linux only.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from methods.problem import Method, Setting

_BENCHMARKS = Path(__file__).parent.parent
# Whatever is freed goes back to the system at once, so that what a process holds is what its arrays take.
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_TIMEOUT = 900


class Answer(NamedTuple):
    """What a method gives.

    Attributes:
        estimate: The hypergradient, shape (n,).
        peak_bytes: The most memory that it takes.
        error: Why there is neither.
    """

    estimate: Tensor | None
    peak_bytes: int | None
    error: str | None = None


def use_threads(n: int) -> None:
    """Confines this process to ``n`` cores, as JAX has no other setting, and it must not have been imported yet."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])
    torch.set_num_threads(n)


def methods_of(package: str) -> Mapping[str, Method]:
    """The methods of a package; raises whatever importing it does."""
    methods: Mapping[str, Method] = import_module(f"methods.{package}").METHODS
    return methods


def answers_of(package: str, setting: Setting, n_threads: int) -> Mapping[str, Answer]:
    """The answers of all methods of a package, from a fresh process.

    Raises:
        RuntimeError: If the process fails, with the last line that it has written, or takes longer than a quarter of an
            hour.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answers.pt"
        what = [package, setting.model, setting.horizon, setting.n_examples, n_threads, file]
        command = [sys.executable, "-m", "methods.alone", *map(str, what)]
        environment = {**os.environ, **_RETURN_MEMORY}
        try:
            done = subprocess.run(
                command, cwd=_BENCHMARKS, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {_TIMEOUT} seconds, compilation among them") from None
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
            raise RuntimeError(lines[-1])
        return {name: Answer(*answer) for name, answer in torch.load(file).items()}


def answer_of(method: Method, setting: Setting) -> Answer:
    """The answer of one method, in this process."""
    try:
        work = method.prepare(setting)
        return Answer(work(), peak_of(work))
    except Exception as error:  # of any kind, in other people's code; the benchmark says so
        return Answer(None, None, f"{type(error).__name__}: {error}")


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that the process holds at most during ``work``, beyond what it holds before."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    package, model, horizon, n_examples, n_threads, file = sys.argv[1:]
    use_threads(int(n_threads))
    setting = Setting(model, int(horizon), int(n_examples))
    torch.save({name: tuple(answer_of(method, setting)) for name, method in methods_of(package).items()}, file)


if __name__ == "__main__":
    main()
