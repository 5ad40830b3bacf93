"""What does a greedy outer step cost, beside the training and the validation gradients that nobody can do without?

Example weights, full batches of 1000 images of 28×28, SGD with momentum 0.9. The networks are the paper's convolutional
one and an MLP 784-256-256-10, and with normalizations, a residual one (BatchNorm) and a transformer over the 16 patches
of 7×7 (LayerNorm). The measure is plain PyTorch: T training steps by ``torch.optim.SGD``, and T gradients of the
validation loss. Times are taken in turns within one run; shown is the median of the ratios.

    export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=20000000000 MALLOC_TOP_PAD_=300000000
    python benchmarks/step_cost.py --out benchmarks/results/step_cost.json
    python benchmarks/performance_page.py    # writes its table into docs/performance.md

With F for one forward pass, the floor of the running variant is (3F + 3F + 2F) / (3F + 3F) = 1.33, with a tenth of the
validation examples (3F + 0.3F + 2F) / 3F = 1.77 times plain training, and that of the terminal variant for T = 10 steps
(3F·(2T − 1) + 3F + 2F·T) / (3F·T) = 2.67.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environment
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optuna_greedyhg.hypergrad.domains import Unbounded
from optuna_greedyhg.hypergrad.estimators import Estimator, Greedy, fold
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.product_modes import ProductMode
from optuna_greedyhg.hypergrad.products import Products
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.update_rules import SGD
from optuna_greedyhg.tasks import cleaning
from optuna_greedyhg.tasks.fashion import make_conv_net

N = 1000
HORIZON = 10


def make_mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


class Residual(nn.Module):
    """x + f(x) of two 3×3 convolutions, with BatchNorm after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.body = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Patches(nn.Module):
    """The 16 patches of 7×7 of an image, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(x, kernel_size=7, stride=7).transpose(1, 2)


class Mean(nn.Module):
    """That of the patches."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def make_resnet() -> nn.Sequential:
    stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*stem, Residual(8), Residual(8), *head).to(memory_format=torch.channels_last)


def make_transformer() -> nn.Sequential:
    layers = [nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)]
    return nn.Sequential(Patches(), nn.Linear(49, 32), *layers, Mean(), nn.LayerNorm(32), nn.Linear(32, 10))


MODELS: dict[str, Callable[[], nn.Sequential]] = {"conv": make_conv_net, "mlp": make_mlp}
NORMALIZED: dict[str, Callable[[], nn.Sequential]] = {"resnet": make_resnet, "transformer": make_transformer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {**environment.describe(), "threads": arguments.threads, "repeats": arguments.repeats}
    for model in (*MODELS, *NORMALIZED):
        result[model] = ratios(model, arguments.repeats)
        print(model, ", ".join(f"{name} {ratio:.3f}" for name, ratio in result[model].items()), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def ratios(model: str, repeats: int) -> dict[str, float]:
    """Medians of the time of an outer step, relative to what is named."""
    times = take_turns(pieces(model), repeats)
    return {
        "greedy / both gradients": median_ratio(times["greedy"], times["both gradients"]),
        "forward mode / both gradients": median_ratio(times["forward mode"], times["both gradients"]),
        "stride of 5 / both gradients": median_ratio(times["stride of 5"], times["both gradients"]),
        "greedy with a tenth of validation / training": median_ratio(times["greedy, a tenth"], times["training"]),
        "terminal / training": median_ratio(times["terminal"], times["training"]),
        "spectral / greedy": median_ratio(times["spectral"], times["greedy"]),
        "seconds of training": statistics.median(times["training"]),
    }


def pieces(model: str) -> dict[str, Callable[[], None]]:
    """What is timed, by name: a horizon of plain training, and outer steps."""
    torch.manual_seed(0)
    data = Data(N), Data(N), Data(N // 10)
    net = {**MODELS, **NORMALIZED}[model]()
    alpha = torch.zeros(N)
    return {
        "training": lambda: plain_training(net, alpha, data[0]),
        "both gradients": lambda: plain_training(net, alpha, data[0], data[1]),
        "greedy": outer_step(net, alpha, data[0], data[1], Greedy(0.9)),
        "forward mode": outer_step(net, alpha, data[0], data[1], Greedy(0.9), ProductMode.FORWARD),
        "stride of 5": outer_step(net, alpha, data[0], data[1], Greedy(0.9, stride=5)),
        "greedy, a tenth": outer_step(net, alpha, data[0], data[2], Greedy(0.9)),
        "terminal": outer_step(net, alpha, data[0], data[1], Greedy(0.9, terminal=True)),
        "spectral": outer_step(net, alpha, data[0], data[1], Greedy(propagator=Spectral())),
    }


class Data:
    """Random images, labels and indices."""

    def __init__(self, n: int) -> None:
        self.images = torch.randn(n, 1, 28, 28).to(memory_format=torch.channels_last)
        self.labels = torch.randint(10, (n,))


def plain_training(net: nn.Module, logits: Tensor, train: Data, val: Data | None = None) -> None:
    """T steps as anybody would write them, each followed by a gradient of the validation loss where there is one."""
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    for _ in range(HORIZON):
        optimizer.zero_grad()
        losses = F.cross_entropy(net(train.images), train.labels, reduction="none")
        (torch.sigmoid(logits) * losses).mean().backward()
        optimizer.step()
        if val is not None:
            torch.autograd.grad(F.cross_entropy(net(val.images), val.labels), parameters)


def outer_step(
    net: nn.Module,
    logits: Tensor,
    train: Data,
    val: Data,
    estimator: Estimator[Any],
    mode: ProductMode | None = None,
    horizon: int = HORIZON,
) -> Callable[[], None]:
    """One horizon of training from the initial weights, folded by an estimator."""
    problem = BilevelProblem(
        model=net,
        train_loss=cleaning.weighted_loss,
        val_loss=cleaning.clean_loss,
        train_batches=(train.images, train.labels, torch.arange(len(train.labels))),
        val_batches=(val.images, val.labels),
        product_mode=mode,
    )
    products = Products(problem, {cleaning.LOGITS: Unbounded()}, SGD(lr=0.01, momentum=0.9))
    alpha = {cleaning.LOGITS: logits}

    def run() -> None:
        fold(
            estimator,
            None,
            alpha,
            products.initial_state(),
            horizon,
            lambda before, t, keep_graph: products.step(
                before, alpha, next(products.train_stream), keep_graph=keep_graph, remaining=horizon - t
            ),
        )

    return run


def take_turns(work: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every piece of work, each done once in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for i in range(repeats + 1):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: list[float], of: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, of, strict=True))


if __name__ == "__main__":
    main()
