"""Which part of an axis to show, when some trials are a thousand times worse than the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

_LOG_FROM_RATIO = 3.0
_MAX_TICKS = 6
_CLOSEST_TICKS = 0.15  # of the axis, which may be as high as six lines of text
# The digits that the ticks of a logarithmic axis start with, from many to few.
_DIGITS = ((1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0,))


@dataclass(frozen=True)
class Scale:
    """A range of scores that holds all but the outliers on the bad side, linear or logarithmic.

    Attributes:
        low, high: The ends of the range.
        log: Whether the axis is logarithmic.
        maximize: Whether larger is better; otherwise smaller is.
    """

    low: float
    high: float
    log: bool
    maximize: bool

    @classmethod
    def around(cls, values: Sequence[float], maximize: bool = False) -> Scale:
        """A range for finite values, without those worse than the middle half by more than three times its width.

        It is logarithmic if what it holds is positive and spans a factor of three. The best value is always inside.
        """
        if not values:
            return cls(0.0, 1.0, False, maximize)
        positive = min(values) > 0
        x = np.log10(values) if positive else np.asarray(values, dtype=float)
        first, third = np.quantile(x, [0.25, 0.75])
        fence = 3 * (third - first)
        inside = [
            y for y, at in zip(values, x, strict=True) if (at >= first - fence if maximize else at <= third + fence)
        ]
        low, high = min(inside), max(inside)
        return cls(low, high, positive and high / low >= _LOG_FROM_RATIO, maximize)

    def holds(self, value: float | None) -> bool:
        """Whether a value lies in the range; ``None`` does not."""
        return value is not None and self.low <= value <= self.high

    def shown(self, value: float | None) -> float:
        """Where to draw a value: at itself, or at the bad end of the range if it lies beyond, or there is none."""
        if value is None:
            return self.low if self.maximize else self.high
        return min(max(value, self.low), self.high)

    def axis(self) -> dict[str, Any]:
        """The range with some air, as settings of a plotly axis."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        air = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        ticks = log_ticks([self.low, self.high]) if self.log else {"type": "linear"}
        return {**ticks, "range": [low - air, high + air], "fixedrange": True}  # the ticks are for this range only


def log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Settings of a logarithmic plotly axis that shows positive values, with few ticks at round numbers.

    Plotly's own ticks are too many on a low panel, say 120µ for 1.2e-4, and 3 for 0.3.
    """
    low, high = 0.95 * min(values), 1.05 * max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [
        [x for power in powers for d in digits if low <= (x := float(f"{d}e{power}")) <= high] for digits in _DIGITS
    ]
    ticks = next((choice for choice in choices if _is_legible(choice, low, high)), choices[-1])
    ticks = ticks[:: -(-len(ticks) // _MAX_TICKS) or 1] or [float(f"{values[0]:.3g}")]
    return {"type": "log", "tickvals": ticks, "ticktext": [_tick(x) for x in ticks]}


def _is_legible(ticks: Sequence[float], low: float, high: float) -> bool:
    closest = min((math.log(b / a) for a, b in pairwise(ticks)), default=math.inf)
    return len(ticks) <= _MAX_TICKS and closest >= _CLOSEST_TICKS * math.log(high / low)


def _tick(x: float) -> str:
    if 1e-3 <= x < 1e5:
        return f"{x:g}"
    mantissa, exponent = f"{x:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
