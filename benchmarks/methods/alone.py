"""One method in a process of its own: its estimate, and the memory that it takes.

    python -m methods.alone PACKAGE METHOD MODEL HORIZON N_EXAMPLES N_THREADS ESTIMATE.pt

prints the peak in bytes. It is what the process holds at most (``VmHWM``) while it does the work a second time, beyond
what it holds before (``VmRSS``): the first time compiles, and fills caches. Linux only.
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

import torch
from torch import Tensor

from methods.problem import Method, Setting

_BENCHMARKS = Path(__file__).parent.parent
# Whatever is freed goes back to the system at once, so that what a process holds is what its arrays take.
_RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

_TIMEOUT = 900


def use_threads(n: int) -> None:
    """Confines this process to ``n`` cores, as JAX has no other setting, and it must not have been imported yet."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])
    torch.set_num_threads(n)


def methods_of(package: str) -> Mapping[str, Method]:
    """The methods of a package; raises whatever importing it does."""
    methods: Mapping[str, Method] = import_module(f"methods.{package}").METHODS
    return methods


def run_alone(package: str, method: str, setting: Setting, n_threads: int) -> tuple[Tensor, int]:
    """The estimate and the peak of memory in bytes, from a fresh process.

    Raises:
        RuntimeError: If it fails, with the last line that it has written, or takes a quarter of an hour.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "estimate.pt"
        what = [package, method, setting.model, setting.horizon, setting.n_examples, n_threads, file]
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
        return torch.load(file), int(done.stdout.splitlines()[-1])


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
    package, method, model, horizon, n_examples, n_threads, file = sys.argv[1:]
    use_threads(int(n_threads))
    work = methods_of(package)[method].prepare(Setting(model, int(horizon), int(n_examples)))
    torch.save(work(), file)
    print(peak_of(work))


if __name__ == "__main__":
    main()
