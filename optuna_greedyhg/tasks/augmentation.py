"""Random changes of small images, differentiable in how strong each of them is.

Every change is m·ξ with ξ drawn for each image from torch's generator and m its magnitude, so that a step's random
numbers are replayed with it. Images are resampled with hat functions written out,

    out(p) = Σ_ij hat(p_y − i)·hat(p_x − j)·image_ij,      hat(d) = max(0, 1 − |d|),

which is bilinear interpolation with zeros outside, and has the derivatives in p that ``grid_sample`` has not twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 8

MAGNITUDES: Mapping[str, float] = {
    "rotate": 0.5,  # radians
    "shift_x": 2.0,  # pixels, as the next
    "shift_y": 2.0,
    "zoom": 0.4,  # of the size
    "stretch": 0.4,  # width against height
    "shear_x": 0.5,
    "shear_y": 0.5,
    "warp": 1.0,  # pixels, a smooth displacement
    "brightness": 0.5,
    "contrast": 0.8,
    "gamma": 0.8,
    "noise": 0.5,
    "blur": 1.0,  # share of a 3×3 binomial blur
    "cutout": 1.0,  # how much of a soft disc is taken away
    "dropout": 1.0,  # how much of each pixel of a random quarter is taken away
}
"""The largest magnitude of each change; 0 changes nothing."""

_INK = 1e-3  # keeps a power's derivative finite where there is none


def augment(images: Tensor, magnitudes: Mapping[str, Tensor]) -> Tensor:
    """Changed images.

    Args:
        images: In [0, 1], shape (n, 64).
        magnitudes: One for each of ``MAGNITUDES``, 0-dimensional.
    """
    changed = _moved(images.reshape(-1, SIZE, SIZE), magnitudes)
    return _toned(changed, magnitudes).flatten(1)


def _moved(images: Tensor, m: Mapping[str, Tensor]) -> Tensor:
    """What changes where ink is: one affine map and one smooth displacement, in a single resampling."""
    draws = images.new_empty(7, len(images), 1).normal_()
    angle, zoom, stretch = m["rotate"] * draws[0], m["zoom"] * draws[1], m["stretch"] * draws[2]
    y, x = (grid.flatten() for grid in torch.meshgrid(_pixels(images), _pixels(images), indexing="ij"))
    scaled_x, scaled_y = x * (zoom + stretch / 2).exp(), y * (zoom - stretch / 2).exp()
    sheared_x = scaled_x + m["shear_x"] * draws[3] * scaled_y
    sheared_y = scaled_y + m["shear_y"] * draws[4] * scaled_x
    at_x = angle.cos() * sheared_x - angle.sin() * sheared_y + m["shift_x"] * draws[5]
    at_y = angle.sin() * sheared_x + angle.cos() * sheared_y + m["shift_y"] * draws[6]
    warp_x, warp_y = m["warp"] * _smooth_fields(images)
    return resampled(images, at_x + warp_x, at_y + warp_y)


def _smooth_fields(images: Tensor) -> Tensor:
    """Two random fields for each image, interpolated from 3×3 points; shape (2, n, 64)."""
    at = torch.linspace(0, 2, SIZE, device=images.device, dtype=images.dtype)
    weights = _hat(at[:, None] - torch.arange(3, device=at.device, dtype=at.dtype))
    points = images.new_empty(2, len(images), 3, 3).normal_()
    return (weights @ points @ weights.T).flatten(2)


def resampled(images: Tensor, at_x: Tensor, at_y: Tensor) -> Tensor:
    """Images of shape (n, 8, 8) at points of shape (n, 64), in pixels from their middle."""
    weights_x = _hat(at_x.unsqueeze(2) - _pixels(images))
    weights_y = _hat(at_y.unsqueeze(2) - _pixels(images))
    return ((weights_y @ images) * weights_x).sum(dim=2).reshape(images.shape)


def _pixels(images: Tensor) -> Tensor:
    return torch.arange(SIZE, device=images.device, dtype=images.dtype) - (SIZE - 1) / 2


def _toned(images: Tensor, m: Mapping[str, Tensor]) -> Tensor:
    """What changes how much ink there is."""
    n = len(images)
    gamma, contrast, brightness = images.new_empty(3, n, 1, 1).normal_()
    images = images + m["blur"] * images.new_empty(n, 1, 1).uniform_() * (_blurred(images) - images)
    power = (m["gamma"] * gamma).exp()
    images = (images + _INK) ** power - _INK**power
    middle = images.mean(dim=(1, 2), keepdim=True)
    images = middle + (images - middle) * (m["contrast"] * contrast).exp() + m["brightness"] * brightness
    images = images * (1 - m["cutout"] * _discs(images))
    images = images * (1 - m["dropout"] * (torch.rand_like(images) < 0.25))
    return images + m["noise"] * torch.randn_like(images)


def _blurred(images: Tensor) -> Tensor:
    kernel = 0.5 - (torch.arange(3, device=images.device, dtype=images.dtype) - 1).abs() / 4
    return F.conv2d(images.unsqueeze(1), torch.outer(kernel, kernel)[None, None], padding=1).squeeze(1)


def _discs(images: Tensor) -> Tensor:
    """1 in the middle of a disc about as wide as a stroke, 0 far from it; shape (n, 8, 8)."""
    pixels = _pixels(images)
    y, x = (images.new_empty(2, len(images), 1).uniform_() - 0.5) * (SIZE - 1)
    distances = (pixels - y).square().unsqueeze(2) + (pixels - x).square().unsqueeze(1)
    return torch.exp(-distances / 4)


def _hat(distance: Tensor) -> Tensor:
    return torch.relu(1 - distance.abs())
