"""TorchOpt: the exact hypergradient, through the graph of all steps; implicit differentiation by Neumann's series."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchopt
from torch import Tensor
from torch.func import functional_call, grad

from methods.problem import LR, MOMENTUM, N_TERMS, SCALE, Method, Setting, plain_training, train_loss, val_loss


def unroll(setting: Setting) -> Callable[[], Tensor]:
    """``torchopt.MetaSGD``."""
    net = setting.net()
    optimizer = torchopt.MetaSGD(net, lr=LR, momentum=MOMENTUM)
    initial = [torchopt.extract_state_dict(x, by="copy", detach_buffers=True) for x in (net, optimizer)]

    def run() -> Tensor:
        logits = torch.zeros(setting.n_examples, requires_grad=True)
        for _ in range(setting.horizon):
            optimizer.step(train_loss(net, logits, setting.train))
        (result,) = torch.autograd.grad(val_loss(net, setting.val), logits)
        for x, state in zip((net, optimizer), initial, strict=True):
            torchopt.recover_state_dict(x, state)
        return result

    return run


def implicit(setting: Setting) -> Callable[[], Tensor]:
    """``torchopt.diff.implicit.custom_root`` with the solver ``solve_inv(ns=True)``."""
    net, train, val = setting.net(), setting.train, setting.val
    names = [name for name, _ in net.named_parameters()]

    def model(weights: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
        return lambda images: functional_call(net, dict(zip(names, weights, strict=True)), (images,))

    def optimality(weights: tuple[Tensor, ...], logits: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda weights: train_loss(model(weights), logits, train))(weights)

    train_plainly = plain_training(setting)
    solver = torchopt.linear_solve.solve_inv(ns=True, maxiter=N_TERMS, alpha=SCALE)

    @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solver)
    def trained(weights: tuple[Tensor, ...], logits: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return tuple(train_plainly())

    def run() -> Tensor:
        logits = torch.zeros(setting.n_examples, requires_grad=True)
        weights = trained(tuple(net.parameters()), logits)
        return torch.autograd.grad(val_loss(model(weights), val), logits)[0]

    return run


METHODS = {"unroll": Method("reverse", unroll), "implicit": Method("implicit", implicit)}
