"""The greedy formula in JAX, compiled, for reference: a package would add its own cost to this.

Once as one function of the whole horizon, by ``lax.scan``, and once as a function of a step that Python calls T times.
The first is for the MLP only: on a CPU, XLA computes convolutions within a loop several times slower than outside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import torch
from torch import Tensor

from methods.jax_net import Network
from methods.problem import GAMMA, LR, MOMENTUM, Method, Setting


def greedy(setting: Setting, *, scan: bool) -> Callable[[], Tensor]:
    """A step's gradient and the product with B_t are from one ``jax.vjp``."""
    if scan and setting.model == "conv":
        raise NotImplementedError("left out, as XLA computes convolutions in a loop several times slower than outside")
    network = Network(setting)

    def step(carried, logits, train, val):
        w, m, total = carried
        g, pull_back = jax.vjp(lambda logits: jax.grad(network.train_loss)(w, logits, train), logits)
        m = jax.tree.map(lambda m, g: MOMENTUM * m + g, m, g)
        w = jax.tree.map(lambda w, m: w - LR * m, w, m)
        v = jax.grad(network.val_loss)(w, logits, val)
        (term,) = pull_back(jax.tree.map(lambda v: -LR * v, v))
        return w, m, GAMMA * total + term

    @jax.jit
    def horizon(carried, logits, train, val):
        def body(carried, _):
            return step(carried, logits, train, val), None

        return jax.lax.scan(body, carried, length=setting.horizon)[0]

    data = network.logits, network.train, network.val
    zeros = jax.tree.map(jax.numpy.zeros_like, (network.weights, network.logits))
    compiled = jax.jit(step)

    def run() -> Tensor:
        carried = (network.weights, *zeros)
        if scan:
            carried = horizon(carried, *data)
        else:
            for _ in range(setting.horizon):
                carried = compiled(carried, *data)
        return torch.from_numpy(np.array(carried[-1]))

    return run


METHODS = {
    "scan": Method("greedy", partial(greedy, scan=True)),
    "step by step": Method("greedy", partial(greedy, scan=False)),
}
