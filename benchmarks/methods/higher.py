"""higher: the exact hypergradient, through the graph of all steps."""

from __future__ import annotations

from collections.abc import Callable

import higher
import torch
from torch import Tensor

from methods.problem import LR, MOMENTUM, Method, Setting, train_loss, val_loss


def unroll(setting: Setting) -> Callable[[], Tensor]:
    """``higher.innerloop_ctx``."""
    net = setting.net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)

    def run() -> Tensor:
        logits = torch.zeros(setting.n_examples, requires_grad=True)
        with higher.innerloop_ctx(net, optimizer) as (trained, differentiable):
            for _ in range(setting.horizon):
                differentiable.step(train_loss(trained, logits, setting.train))
            return torch.autograd.grad(val_loss(trained, setting.val), logits)[0]

    return run


METHODS = {"unroll": Method("reverse", unroll)}
