"""What the base sampler learns from: the refined parameters of a trial, or the seeds that they grew from.

A seed x is refined to x*, which has the value f(x*). What is told to the sampler that proposed x?

    "refined"   (x*, f(x*)): what was acquired is inherited, as with Lamarck. The sampler models f, and is shown points
                that it has not proposed.
    "seed"      (x, f(x*)): only the disposition to it is inherited, as with Baldwin. The sampler models how well
                refinement ends that starts at x, and its own proposals come back to it.

The trial's parameters are the refined values either way; it is the base sampler's view of the study that differs. With
"seed", it cannot be told from a study in which the seeds were suggested and nothing was refined.

A running trial has not written its refined parameters yet. It is shown with its seeds either way, which is what keeps
parallel trials apart where a sampler looks at them, as TPE's constant liar does.

Source: D. Whitley, V. S. Gordon and K. Mathias, "Lamarckian evolution, the Baldwin effect and function optimization",
1994.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, get_args

from optuna.samplers import BaseSampler, BruteForceSampler, CmaEsSampler, GridSampler
from optuna.trial import FrozenTrial

from optuna_greedyhg.trials import records

Credit = Literal["refined", "seed"]


def seen(trial: FrozenTrial, credit: Credit) -> FrozenTrial:
    """The trial as the base sampler is to see it; a copy where that differs."""
    if credit == "refined" and trial.state.is_finished():
        return trial
    seeds = records.read_seeds(trial)
    shown = [name for name in seeds if credit == "seed" or name not in trial.params]
    if not shown:
        return trial
    changed = copy.copy(trial)
    changed.params = trial.params | {name: seeds[name][0] for name in shown}
    changed.distributions = trial.distributions | {name: seeds[name][1] for name in shown}
    return changed


def require_possible(credit: str, base_sampler: BaseSampler) -> None:
    """Checks that the base sampler, and those inside of it, can learn from what they are to be told.

    Raises:
        ValueError: If there is no such credit, or a sampler goes by its own record of what it has suggested.
    """
    if credit not in get_args(Credit):
        raise ValueError(f"credit must be one of {get_args(Credit)}, but got {credit!r}.")
    if credit == "refined":
        return
    for sampler in with_those_inside(base_sampler):
        reason = _why_not(sampler)
        if reason is not None:
            raise ValueError(
                "credit='seed' needs a base sampler that learns from the study's trials, but "
                f"{type(sampler).__name__} {reason}; use credit='refined', or another sampler."
            )


def _why_not(sampler: BaseSampler) -> str | None:
    # CmaEsSampler's setting has no public name.
    if isinstance(sampler, CmaEsSampler) and sampler._with_margin:
        return "with with_margin=True learns from points that it has noted itself"
    if isinstance(sampler, (BruteForceSampler, GridSampler)):
        return "goes through a list of points, whatever has become of them"
    return None


def with_those_inside(sampler: BaseSampler) -> Iterator[BaseSampler]:
    """The sampler and all that it holds: PartialFixedSampler's base, others' independent samplers."""
    yield sampler
    for held in vars(sampler).values():
        if isinstance(held, BaseSampler):
            yield from with_those_inside(held)
