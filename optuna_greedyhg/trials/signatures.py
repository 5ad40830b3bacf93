"""Signatures: of what a refinement is a function, so that one is not gone on with as another.

A descent that is resumed under another learning rate, or from other initial weights, would end, with a number that
belongs to neither. So a checkpoint carries what has decided its path, in words that can be compared and shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from optuna_greedyhg.hypergrad.descent import DescentOptions
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.episodes import Problem
from optuna_greedyhg.hypergrad.estimators import Estimator
from optuna_greedyhg.hypergrad.evaluation import Online
from optuna_greedyhg.hypergrad.update_rules import UpdateRule

Signature = dict[str, str]


def signature_of(
    problem: Problem,
    hyperparameters: Mapping[str, Hyperparameter],
    update_rule: UpdateRule,
    estimator: Estimator[Any] | None,
    options: DescentOptions,
) -> Signature:
    """All that decides the path of a refinement, but for the losses and the data, of which nobody can tell.

    Initial weights count where training starts from them again, and not where the weights are only carried on. What
    prints as an address in memory, as functions do, counts by its name. Costs a pass over the weights.
    """
    first = problem.val_episodes[0]
    weights = first.initial_parameters
    initial = first.state_dict(weights, first.initial_buffers, first.outer_parameters)
    if isinstance(options.protocol, Online) and not options.restart:
        initial = {name: x for name, x in initial.items() if name not in weights}
    settings = {f.name: getattr(options, f.name) for f in fields(options)} | {"evaluate": options.protocol}
    inits = {name: h.init for name, h in hyperparameters.items()}
    return {
        "torch": torch.__version__.partition("+")[0],
        "device": first.device.type,
        "product mode": str(first.product_mode),
        "estimator": _without_addresses(estimator),
        "update_rule": _without_addresses(update_rule),
        **{name: _without_addresses(value) for name, value in settings.items()},
        # In their order, in which the outer optimizer knows them.
        "hyperparameters": ", ".join(f"{name} {_kind(h.init)} {h.domain}" for name, h in hyperparameters.items()),
        "hyperparameters' initial values": _digest(inits),
        "weights": ", ".join(f"{name} {_kind(x)}" for name, x in weights.items()),
        "model's initial state": _digest(initial),
    }


def difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """In what two signatures differ, in words; empty if in nothing."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return "; ".join(f"its {name} was {found.get(name)}, and is {expected.get(name)}" for name in names)


def _without_addresses(value: object) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _kind(x: Tensor) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha256 = hashlib.sha256()
    for name, x in tensors.items():
        sha256.update(f"{name} {_kind(x)}".encode())
        sha256.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:16]
