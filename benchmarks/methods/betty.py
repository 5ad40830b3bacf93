"""Betty: implicit differentiation by Neumann's series, and by central differences without a solver (DARTS).

Both are taken at w_T: the second is −v_T·∂²L_train/∂w∂α there, which is T1–T2 but for the point and the factor lr.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from methods.problem import LR, MOMENTUM, N_TERMS, SCALE, Batch, Method, Setting, train_loss, val_loss


class _Logits(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n))


class _Problem(ImplicitProblem):
    batch: Batch

    def get_batch(self) -> Batch:
        return self.batch


class _Training(_Problem):
    def training_step(self, batch: Batch) -> Tensor:
        return train_loss(self.module, self.weighting.module.logits, batch)


class _Weighting(_Problem):
    hypergradient: Tensor

    def training_step(self, batch: Batch) -> Tensor:
        return val_loss(self.training.module, batch)

    def grad_callback(self) -> None:
        self.hypergradient = self.module.logits.grad.detach().clone()


def hypergradient(setting: Setting, **settings: Any) -> Callable[[], Tensor]:
    """An ``Engine`` of two problems, of which the upper has its turn after T steps of the lower."""
    logging.disable(logging.INFO)
    net, logits = setting.net(), _Logits(setting.n_examples)
    initial = setting.net().state_dict()
    training = _Training(
        "training",
        Config(unroll_steps=setting.horizon, **settings),
        net,
        torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM),
    )
    weighting = _Weighting("weighting", Config(retain_graph=True), logits, torch.optim.SGD(logits.parameters(), lr=0.0))
    training.batch, weighting.batch = setting.train, setting.val
    dependencies = {"u2l": {weighting: [training]}, "l2u": {training: [weighting]}}
    engine = Engine([weighting, training], EngineConfig(train_iters=setting.horizon), dependencies)

    def run() -> Tensor:
        net.load_state_dict(initial)
        training.optimizer.state.clear()
        engine.run()
        return weighting.hypergradient

    return run


METHODS = {
    "neumann": Method(
        "implicit", partial(hypergradient, type="neumann", neumann_iterations=N_TERMS, neumann_alpha=SCALE)
    ),
    "darts": Method("implicit, no terms", partial(hypergradient, type="darts")),
}
