"""gradhpo, the JAX package of the same method: greedy, and its T1–T2."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import optax
import torch
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.t1t2 import T1T2Optimizer
from torch import Tensor

from methods.jax_net import Network
from methods.problem import GAMMA, LR, MOMENTUM, Method, Setting


def greedy(setting: Setting) -> Callable[[], Tensor]:
    """``GreedyOptimizer.compute_hypergradient``, compiled."""
    network = Network(setting)
    optimizer = GreedyOptimizer(
        optax.sgd(LR, momentum=MOMENTUM), optax.sgd(1.0), unroll_steps=setting.horizon, gamma=GAMMA
    )
    state = optimizer.init(network.weights, network.logits)
    compute = jax.jit(optimizer.compute_hypergradient, static_argnums=(3, 4))
    return lambda: _as_tensor(compute(state, network.train, network.val, network.train_loss, network.val_loss))


def t1t2(setting: Setting) -> Callable[[], Tensor]:
    """``T1T2Optimizer.compute_hypergradient`` of the last step, after T − 1 others; compiled together."""
    network, inner = Network(setting), optax.sgd(LR, momentum=MOMENTUM)
    optimizer = T1T2Optimizer(inner, optax.sgd(1.0), gamma=0.0)

    @jax.jit
    def compute(weights, logits, train, val):
        def step(carried, _):
            w, s = carried
            updates, s = inner.update(jax.grad(network.train_loss)(w, logits, train), s, w)
            return (optax.apply_updates(w, updates), s), None

        (w, s), _ = jax.lax.scan(step, (weights, inner.init(weights)), length=setting.horizon - 1)
        state = optimizer.init(w, logits).update(inner_opt_state=s)
        return optimizer.compute_hypergradient(state, train, val, network.train_loss, network.val_loss)

    return lambda: _as_tensor(compute(network.weights, network.logits, network.train, network.val))


def _as_tensor(x: jax.Array) -> Tensor:
    return torch.from_numpy(np.array(x))


METHODS = {"greedy": Method("greedy", greedy), "t1t2": Method("t1t2", t1t2)}
