"""The two networks and their losses in JAX, with the same weights; images are (n, height, width, channels) there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from torch import Tensor, nn

from methods.problem import Batch, Setting

Weights = list[tuple[jax.Array, ...]]


class Network:
    """A ``torch.nn.Sequential`` of the layers that the two networks have."""

    def __init__(self, setting: Setting) -> None:
        self._layers = list(setting.net())
        self.weights: Weights = [tuple(_array(p) for p in layer.parameters()) for layer in self._layers]
        self.train, self.val = _batch(setting.train), _batch(setting.val)
        self.logits = jnp.zeros(setting.n_examples)

    def train_loss(self, weights: Weights, logits: jax.Array, batch: Any) -> jax.Array:
        return (jax.nn.sigmoid(logits) * self._losses(weights, batch)).mean()

    def val_loss(self, weights: Weights, logits: jax.Array, batch: Any) -> jax.Array:
        return self._losses(weights, batch).mean()

    def _losses(self, weights: Weights, batch: Any) -> jax.Array:
        x, labels = batch
        for layer, own in zip(self._layers, weights, strict=True):
            x = _apply(layer, own, x)
        return -jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], axis=1)[:, 0]


def _apply(layer: nn.Module, own: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    match layer:
        case nn.Linear():
            return x @ own[0] + own[1]
        case nn.Conv2d():
            y = jax.lax.conv_general_dilated(x, own[0], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return y + own[1]
        case nn.MaxPool2d():  # by reshaping, whose derivative XLA computes much faster than that of reduce_window
            n, height, width, channels = x.shape
            x = x[:, : height // 2 * 2, : width // 2 * 2]
            return x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
        case nn.LeakyReLU():
            return jnp.where(x > 0, x, layer.negative_slope * x)
        case nn.ReLU():
            return jnp.where(x > 0, x, 0.0)
        case nn.Flatten():  # in PyTorch's order
            return x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    raise TypeError(f"There is no {layer} here.")


def _array(p: Tensor) -> jax.Array:
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[p.ndim]
    return jnp.asarray(p.detach().permute(*order).contiguous().numpy())


def _batch(batch: Batch) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(batch.images.permute(0, 2, 3, 1).contiguous().numpy()), jnp.asarray(batch.labels.numpy())
