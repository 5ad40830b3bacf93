"""Whether two functions, or two modules, compute the same, as far as can be told without running them.

Lanes of one computation share its code. A loss that is written inside of a function which is called once a trial may
close over what is that trial's own, and then is not the loss of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn


def difference(x: Any, y: Any) -> str:
    """In what ``y`` is another than ``x``, in words; empty if in nothing that can be told.

    Tensors are the same if they are equal, functions if they have the same code, defaults, and variables that they
    close over, modules if they have the same parts with the same settings, whatever their parameters and buffers.
    """
    if x is y:
        return ""
    if isinstance(x, nn.Module) and isinstance(y, nn.Module):
        return _of_modules(x, y)
    return "" if _is_same(x, y) else "is another, or closes over other things"


def _of_modules(x: nn.Module, y: nn.Module) -> str:
    own, others = dict(x.named_modules()), dict(y.named_modules())
    if list(own) != list(others):
        return f"has the parts {list(own)}, and not {list(others)}"
    for path, part in own.items():
        if type(part) is not type(others[path]):
            return f"has a {type(part).__name__} at {path!r}, and not a {type(others[path]).__name__}"
        settings, expected = _settings(part), _settings(others[path])
        for name in {**settings, **expected}:
            if name not in settings or name not in expected or not _is_same(settings[name], expected[name]):
                return f"has {name}={settings.get(name)} at {path!r}, and not {expected.get(name)}"
    return ""


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module has noted for itself, apart from what nn.Module keeps in order."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


def _is_same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is not type(y):
        return False
    if isinstance(x, Tensor):
        return x.shape == y.shape and x.device == y.device and torch.equal(x, y)
    if isinstance(x, nn.Module):
        return not _of_modules(x, y)
    parts, others = _parts(x), _parts(y)
    if parts is None or others is None:
        return bool(x == y)
    return len(parts) == len(others) and all(map(_is_same, parts, others))


def _parts(x: Any) -> list[Any] | None:
    """What something is made of, if it is the same as another that is made of the same."""
    if isinstance(x, FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or ()]
        return [x.__code__, x.__defaults__, x.__kwdefaults__, cells]
    if isinstance(x, partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, Mapping):
        return [list(x), *x.values()]
    return list(x) if isinstance(x, (tuple, list)) else None
