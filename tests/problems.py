"""Problems with known answers, small and in float64.

A :class:`Specimen` keeps a bilevel problem in its parts, so that a reference can compute with the user's own module and
loss functions and needs nothing of the package. A :class:`Case` is a specimen trained by an update rule, any of whose
own hyperparameters may be part of α.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.domains import Hyperparameter, Interval, Positive, to_coordinates
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.products import Products, TrainState
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, AdamW, UpdateRule, hyperparameter_names

CPU = torch.device("cpu")
N_EXAMPLES, N_FEATURES, N_CLASSES = 12, 3, 2


def float64(*numbers: float) -> Tensor:
    """A vector, or a 0-dimensional tensor where there is one number."""
    return torch.tensor(numbers[0] if len(numbers) == 1 else numbers, dtype=torch.float64)


@dataclass(frozen=True)
class Specimen:
    """A bilevel problem in its parts."""

    module: nn.Module
    train_loss: Callable[..., Tensor]
    val_loss: Callable[..., Tensor]
    hyperparameters: dict[str, Hyperparameter]
    train_batches: list[Any] = field(default_factory=lambda: [torch.zeros(1, dtype=torch.float64)])
    val_batches: list[Any] = field(default_factory=lambda: [torch.zeros(1, dtype=torch.float64)])

    def problem(self, **replaced: Any) -> BilevelProblem:
        parts = {
            "model": self.module,
            "train_loss": self.train_loss,
            "val_loss": self.val_loss,
            "train_batches": self.train_batches,
            "val_batches": self.val_batches,
        }
        return BilevelProblem(**{**parts, **replaced})


@dataclass(frozen=True)
class Case:
    """A specimen and the update rule that trains it."""

    specimen: Specimen
    rule: UpdateRule

    @property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        own = {name: OWN[name] for name in sorted(hyperparameter_names(self.rule)) if name in OWN}
        return {**own, **self.specimen.hyperparameters}

    def products(self) -> Products:
        domains = {name: h.domain for name, h in self.hyperparameters.items()}
        return Products(self.specimen.problem(), domains, self.rule)

    def alpha(self) -> Tensors:
        return to_coordinates(self.hyperparameters, CPU, torch.float64)

    def values(self, alpha: Mapping[str, Tensor]) -> Tensors:
        return {name: h.domain.to_value(alpha[name]) for name, h in self.hyperparameters.items()}

    def train_batch(self, t: int) -> Any:
        """The batch of step t = 0, 1, ..."""
        return self.specimen.train_batches[t % len(self.specimen.train_batches)]

    def val_batch(self, t: int) -> Any:
        return self.specimen.val_batches[t % len(self.specimen.val_batches)]

    def state_after(self, n_steps: int, seed: int = 99) -> TrainState:
        """A warm place to start from: α's seed trained for some steps."""
        products, alpha = self.products(), self.alpha()
        state = products.initial_state()
        with randomness.seeded(seed, CPU):
            for t in range(n_steps):
                state = products.step(state, alpha, self.train_batch(t)).after
        return state


OWN = {
    "lr": Hyperparameter(float64(0.1), Interval(1e-3, 1.0, log=True)),
    "momentum": Hyperparameter(float64(0.8), Interval(0.0, 0.99)),
    "weight_decay": Hyperparameter(float64(0.05), Positive()),
    "beta1": Hyperparameter(float64(0.7), Interval(0.0, 0.99)),
    "beta2": Hyperparameter(float64(0.9), Interval(0.5, 0.999)),
    "eps": Hyperparameter(float64(1e-2), Interval(1e-4, 1e-1, log=True)),
}
"""The update rules' own hyperparameters: values at which every one of them matters."""

UPDATE_RULES: dict[str, UpdateRule] = {
    "SGD": SGD(lr="lr"),
    "SGD-decay": SGD(lr="lr", weight_decay="weight_decay"),
    "momentum": SGD(lr="lr", momentum="momentum"),
    "momentum-decay": SGD(lr="lr", momentum="momentum", weight_decay="weight_decay"),
    "nesterov": SGD(lr="lr", momentum="momentum", nesterov=True),
    "nesterov-decay": SGD(lr="lr", momentum="momentum", weight_decay="weight_decay", nesterov=True),
    "Adam": Adam(lr="lr", betas=("beta1", "beta2"), eps="eps"),
    "Adam-decay": Adam(lr="lr", betas=("beta1", "beta2"), eps="eps", weight_decay="weight_decay"),
    "AdamW": AdamW(lr="lr", betas=("beta1", "beta2"), eps="eps", weight_decay="weight_decay"),
}
"""Every update rule, with all of its own hyperparameters in α."""


def with_numbers(rule: UpdateRule) -> UpdateRule:
    """The same rule with numbers in place of names: α then is the losses' alone."""
    numbers = {key: float(OWN[value].init) if isinstance(value, str) else value for key, value in rule.theta.items()}
    if isinstance(rule, Adam):
        numbers["betas"] = (numbers.pop("beta1"), numbers.pop("beta2"))
    return replace(rule, **numbers)


def classification(
    *middle: nn.Module, batch_sizes: tuple[int, ...] = (N_EXAMPLES,), val_sizes: tuple[int, ...] = (5,)
) -> Specimen:
    """A tanh MLP, with layers of choice in the middle; α weighs every training example and penalises every feature.

    The validation loss reads one of the two groups, so that one has a direct gradient and the other has none.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(N_FEATURES, 4, bias=False), *middle, nn.Tanh(), nn.Linear(4, N_CLASSES))
    x = 2 * torch.randn(N_EXAMPLES, N_FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randint(N_CLASSES, (N_EXAMPLES,), generator=generator)
    val_x = torch.randn(sum(val_sizes), N_FEATURES, generator=generator, dtype=torch.float64)
    val_y = torch.randint(N_CLASSES, (sum(val_sizes),), generator=generator)
    logits = torch.randn(N_EXAMPLES, generator=generator, dtype=torch.float64)
    index = torch.arange(N_EXAMPLES)
    return Specimen(
        module=module.double(),
        train_loss=_weighted_and_penalised,
        val_loss=_cross_entropy_and_penalty,
        hyperparameters={
            "example_logits": Hyperparameter(logits),
            "penalties": Hyperparameter(float64(0.1, 0.3, 0.02), Positive()),
        },
        train_batches=list(zip(*(tensor.split(list(batch_sizes)) for tensor in (x, y, index)), strict=True)),
        val_batches=list(zip(val_x.split(list(val_sizes)), val_y.split(list(val_sizes)), strict=True)),
    )


def _weighted_and_penalised(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    x, y, index = batch
    losses = F.cross_entropy(model(x), y, reduction="none")
    first_layer = dict(model.named_parameters())["0.weight"]
    return (torch.sigmoid(alpha["example_logits"][index]) * losses).mean() + (alpha["penalties"] * first_layer**2).sum()


def _cross_entropy_and_penalty(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y) + (alpha["penalties"] ** 2).sum()


_SIZES = {"batch_sizes": (4, 3, 5), "val_sizes": (3, 5)}
SPECIMENS: dict[str, Callable[[], Specimen]] = {
    "full-batch": classification,
    "minibatches": lambda: classification(**_SIZES),
    "dropout": lambda: classification(nn.Dropout(0.4), **_SIZES),
    "batchnorm": lambda: classification(nn.BatchNorm1d(4), **_SIZES),
}


class Weights(nn.Module):
    """A model that is a vector of weights: calling it gives them."""

    def __init__(self, *start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(float64(*start))

    def forward(self) -> Tensor:
        return self.w


def toy() -> Specimen:
    """A validation loss with local minima, under a quadratic training loss whose minimum is α itself; best is α = 0."""
    curvature = float64(1.0, 0.5)
    return Specimen(
        module=Weights(2.0, 2.0),
        train_loss=lambda model, alpha, _: 0.5 * (curvature * (model() - alpha["target"]) ** 2).sum(),
        val_loss=lambda model, alpha, _: (model() ** 2).sum() + 10 * (model().sin() ** 2).sum(),
        hyperparameters={"target": Hyperparameter(float64(1.0, 1.0))},
    )


ISOTROPIC_MIXING = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, 1.0], [-1.0, 0.7, 0.2], [0.0, 1.1, -0.4]]).double()
ISOTROPIC_SLOPE = float64(0.5, -1.0, 2.0, 0.3)


def isotropic() -> Specimen:
    """∇²L_train = I and a constant ∇_w L_val = c, where greedy with γ = 1 − lr is exact.

    L_train = ½‖w − M·sin α‖² and L_val = c·w, so v·B_t = lr·cᵀM·diag(cos α) at every step of SGD.
    """
    return Specimen(
        module=Weights(1.0, -1.0, 0.5, 2.0),
        train_loss=lambda model, alpha, _: 0.5 * ((model() - ISOTROPIC_MIXING @ alpha["angle"].sin()) ** 2).sum(),
        val_loss=lambda model, alpha, _: ISOTROPIC_SLOPE @ model(),
        hyperparameters={"angle": Hyperparameter(float64(0.4, -0.7, 1.2))},
    )


def bowl(*, start: float = 2.0) -> Specimen:
    """L_train = ½·α·w² and L_val = w: a step is w ← (1 − lr·α)·w, and v·B = −lr·w at the weights before it."""
    return Specimen(
        module=Weights(start),
        train_loss=lambda model, alpha, _: 0.5 * alpha["curvature"] * model() ** 2,
        val_loss=lambda model, alpha, _: model(),
        hyperparameters={"curvature": Hyperparameter(float64(1.0))},
    )


def regression() -> Specimen:
    """Least squares with a weight for every example: a training loss whose Hessian is positive definite everywhere."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_EXAMPLES, N_FEATURES, generator=generator, dtype=torch.float64)
    y = torch.randn(N_EXAMPLES, generator=generator, dtype=torch.float64)
    logits = torch.randn(N_EXAMPLES, generator=generator, dtype=torch.float64)
    return Specimen(
        module=Weights(*([0.5] * N_FEATURES)),
        train_loss=lambda model, alpha, b: (alpha["example_logits"].sigmoid() * (b[0] @ model() - b[1]) ** 2).mean(),
        val_loss=lambda model, alpha, _: (model() ** 3).sum() + alpha["example_logits"].square().mean(),
        hyperparameters={"example_logits": Hyperparameter(logits)},
        train_batches=[(x, y)],
    )


def cliff(limit: float, *, slope: Callable[[Tensor], Tensor] = lambda w: -w) -> Specimen:
    """Training turns NaN as soon as α, which the validation loss ``slope`` drives upwards from 0, passes ``limit``.

    L_train = ½(w − α)², so that T1–T2's hypergradient after SGD is lr·∇L_val(w_T).
    """

    def train_loss(model: Any, alpha: Mapping[str, Tensor], _: Any) -> Tensor:
        beyond = float("nan") if bool(alpha["target"] > limit) else 0.0
        return 0.5 * (model() - alpha["target"]) ** 2 + beyond * model()

    return Specimen(
        module=Weights(0.0),
        train_loss=train_loss,
        val_loss=lambda model, alpha, _: slope(model()),
        hyperparameters={"target": Hyperparameter(float64(0.0))},
    )
