"""The greedy formula in JAX, as one compiled function, for reference: a package would add its own cost to this."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import torch
from torch import Tensor

from methods.jax_net import Network
from methods.problem import GAMMA, LR, MOMENTUM, Method, Setting


def greedy(setting: Setting) -> Callable[[], Tensor]:
    """``lax.scan`` over the steps; a step's gradient and the product with B_t are from one ``jax.vjp``."""
    network = Network(setting)

    @jax.jit
    def hypergradient(weights, logits, train, val):
        def step(carried, _):
            w, m, total = carried
            g, pull_back = jax.vjp(lambda logits: jax.grad(network.train_loss)(w, logits, train), logits)
            m = jax.tree.map(lambda m, g: MOMENTUM * m + g, m, g)
            w = jax.tree.map(lambda w, m: w - LR * m, w, m)
            v = jax.grad(network.val_loss)(w, logits, val)
            (term,) = pull_back(jax.tree.map(lambda v: -LR * v, v))
            return (w, m, GAMMA * total + term), None

        zeros = jax.tree.map(jax.numpy.zeros_like, (weights, logits))
        return jax.lax.scan(step, (weights, *zeros), length=setting.horizon)[0][-1]

    def run() -> Tensor:
        result = hypergradient(network.weights, network.logits, network.train, network.val)
        return torch.from_numpy(np.array(result))

    return run


METHODS = {"jitted": Method("greedy", greedy)}
