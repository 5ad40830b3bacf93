"""Descents with and without recordings, compared."""

import pytest
import torch

UNRECORDABLE = {"distill", "spectral", "ift-cg"}  # which look at numbers, or carry some


def assert_same(steps, others, *, rtol=1e-9, atol=1e-12):
    """Two descents have come to the same, at the same cost."""
    assert len(steps) == len(others)
    for step, other in zip(steps, others, strict=True):
        assert step.cost == other.cost
        assert step.product_mode == other.product_mode
        assert step.val_loss == pytest.approx(other.val_loss, rel=rtol, nan_ok=True)
        assert step.best.scores == pytest.approx(other.best.scores, rel=rtol)
        for name, x in step.values.items():
            torch.testing.assert_close(x, other.values[name], rtol=rtol, atol=atol)
    states = [walked[-1].best.state for walked in (steps, others)]
    assert states[0].n_steps == states[1].n_steps
    for x, y in zip(*(state.tensors for state in states), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
