"""Models and losses on whose operators autograd needs help, or must be refused: every exact way against differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.domains import Unbounded
from optuna_greedyhg.hypergrad.estimators import Estimator, Forward, Reverse
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.product_modes import ProductMode, UnsupportedOperatorError
from optuna_greedyhg.hypergrad.products import Covector, Products
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, UpdateRule
from tests.problems import CPU
from tests.reference import assert_agree, central_differences

N_CLASSES = 3
SEED = 3
RULE = SGD(lr=0.2, momentum=0.9)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, N_CLASSES),
    )


def normalized_net(kind: str) -> nn.Sequential:
    """With statistics of the batch alone: running ones are constants of all derivatives."""
    norm = nn.BatchNorm1d(5, track_running_stats=False) if kind == "batch" else nn.LayerNorm(5)
    return nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, N_CLASSES))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 12), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.embed(x).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(dim=1))


class Transposed(nn.Module):
    """Drops out entries of a tensor that may not be contiguous."""

    def __init__(self, contiguous: bool) -> None:
        super().__init__()
        self.contiguous = contiguous
        self.embed, self.head = nn.Linear(4, 5), nn.Linear(15, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).transpose(1, 2)
        return self.head(F.dropout(y.contiguous() if self.contiguous else y, 0.3, self.training).flatten(1))


def weighted(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Example weights, and a scale of each channel of the images: α above the network, and below."""
    losses = F.cross_entropy(model(batch[0] * alpha["scale"]), batch[1], reduction="none")
    return (torch.sigmoid(alpha["weights"]) * losses).mean()


def cross_entropy(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_problem(
    model: nn.Module, shape: tuple[int, ...], train_loss: Any = weighted, **settings: Any
) -> tuple[BilevelProblem, Tensors]:
    """Random images and labels; α = 'weights' of 8 examples, 'scale' of the first dimension, and outer parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p, std=0.4)
        train, val = ((torch.randn(n, *shape, dtype=torch.float64), torch.randint(N_CLASSES, (n,))) for n in (8, 6))
    problem = BilevelProblem(
        model=model.double(),
        train_loss=train_loss,
        val_loss=cross_entropy,
        train_batches=train,
        val_batches=val,
        **settings,
    )
    alpha = {
        "weights": torch.linspace(-1, 1, 8, dtype=torch.float64),
        "scale": torch.linspace(0.7, 1.4, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1)),
        **problem.outer_parameters,
    }
    return problem, alpha


def estimate(
    problem: BilevelProblem, alpha: Tensors, estimator: Estimator[Any], horizon: int, rule: UpdateRule = RULE
) -> Tensors:
    products = Products(problem, {name: Unbounded() for name in alpha}, rule)
    memory, state = estimator.init(alpha), products.initial_state()
    with randomness.seeded(SEED, CPU):
        for t in range(1, horizon + 1):
            batch = next(products.train_stream)
            keep = estimator.keeps_graph(t, horizon)
            step = products.step(state, alpha, batch, keep_graph=keep, remaining=horizon - t)
            memory, state = estimator.observe(memory, step), step.after
        return estimator.estimate(memory, step)


def by_differences(problem: BilevelProblem, alpha: Tensors, horizon: int, rule: UpdateRule = RULE) -> Tensors:
    """dL_val(w_T, α)/dα, of steps without any derivative of theirs."""

    def val_loss(alpha: Tensors) -> Tensor:
        products = Products(problem, {name: Unbounded() for name in alpha}, rule)
        state = products.initial_state()
        with randomness.seeded(SEED, CPU):
            for _ in range(horizon):
                state = products.step(state, alpha, next(products.train_stream)).after
        return products.validate(state, alpha, next(products.val_stream)).loss

    return central_differences(val_loss, alpha)


class TestConvolutions:
    """Whose second derivative is left out in part, where α does not lie behind them."""

    @pytest.mark.parametrize("estimator", [Reverse(), Reverse(keep_graphs=True), Forward()], ids=str)
    @pytest.mark.parametrize("outer", [(), ("0.weight",), ("0.bias",), ("2",), ("5",)], ids=str)
    def test_alpha_before_within_and_after_them(self, outer: tuple[str, ...], estimator: Estimator[Any]) -> None:
        problem, alpha = make_problem(conv_net(), (2, 6, 6), outer_parameters=outer)
        expected = by_differences(problem, alpha, horizon=3)
        assert_agree(estimate(problem, alpha, estimator, horizon=3), expected, rtol=1e-6)

    @pytest.mark.parametrize("mode", ProductMode, ids=lambda mode: mode.value)
    def test_every_mode(self, mode: ProductMode) -> None:
        problem, alpha = make_problem(conv_net(), (2, 6, 6), outer_parameters=["2.weight"], product_mode=mode)
        expected = by_differences(problem, alpha, horizon=3, rule=Adam(lr=0.01))
        assert_agree(estimate(problem, alpha, Reverse(), 3, Adam(lr=0.01)), expected, rtol=1e-5)

    @pytest.mark.parametrize("kind", ["penalty", "per example", "along"])
    def test_a_loss_may_differentiate_them_itself(self, kind: str) -> None:
        def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch[0] * alpha["scale"], batch[1]
            loss = weighted(model, alpha, batch)
            if kind == "penalty":
                x = x.clone() if x.requires_grad else x.requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
            elif kind == "per example":
                slope = torch.func.vmap(torch.func.grad(lambda x: model(x[None]).square().sum()))(x)
            else:
                slope = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
            return loss + (alpha["weights"].reshape(-1, *[1] * (slope.ndim - 1)) * slope.square()).mean()

        problem, alpha = make_problem(conv_net(), (2, 6, 6), train_loss, product_mode=ProductMode.REVERSE)
        expected = by_differences(problem, alpha, horizon=2)
        assert_agree(estimate(problem, alpha, Reverse(), horizon=2), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["batch", "layer"])
class TestNormalizations:
    """Whose second derivative is computed otherwise, and left out in part, and whose third is wrong in PyTorch."""

    @pytest.mark.parametrize("estimator", [Reverse(), Reverse(keep_graphs=True), Forward()], ids=str)
    @pytest.mark.parametrize("outer", [(), ("0.weight",), ("1.weight",), ("1",), ("3",)], ids=str)
    def test_alpha_before_within_and_after_them(
        self, outer: tuple[str, ...], estimator: Estimator[Any], kind: str
    ) -> None:
        problem, alpha = make_problem(normalized_net(kind), (4,), outer_parameters=outer)
        expected = by_differences(problem, alpha, horizon=3)
        assert_agree(estimate(problem, alpha, estimator, horizon=3), expected, rtol=1e-6)

    @pytest.mark.parametrize("mode", ProductMode, ids=lambda mode: mode.value)
    def test_every_mode(self, mode: ProductMode, kind: str) -> None:
        problem, alpha = make_problem(normalized_net(kind), (4,), outer_parameters=["1.weight"], product_mode=mode)
        expected = by_differences(problem, alpha, horizon=3, rule=Adam(lr=0.01))
        assert_agree(estimate(problem, alpha, Reverse(), 3, Adam(lr=0.01)), expected, rtol=1e-5)

    @pytest.mark.parametrize("by", ["autograd", "func"])
    def test_of_a_penalty_on_slopes(self, by: str, kind: str) -> None:
        def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch[0] * alpha["scale"], batch[1]
            if by == "autograd":
                x = x.clone() if x.requires_grad else x.requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
            else:
                slope = torch.func.grad(lambda x: F.cross_entropy(model(x), y))(x)
            return weighted(model, alpha, batch) + 10 * (alpha["weights"].unsqueeze(1) * slope.square()).mean()

        problem, alpha = make_problem(normalized_net(kind), (4,), train_loss, product_mode=ProductMode.REVERSE)
        expected = by_differences(problem, alpha, horizon=2)
        assert_agree(estimate(problem, alpha, Reverse(), horizon=2), expected, rtol=1e-7)

    def test_of_a_penalty_from_a_later_step_on(self, kind: str) -> None:
        """The first step does without the normalization, and so does not show that there is one."""

        def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch[0] * alpha["scale"], batch[1]
            if len(y) == 1:
                return F.cross_entropy(model[3](torch.tanh(model[0](x))), y)
            x = x.clone() if x.requires_grad else x.requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
            return weighted(model, alpha, batch) + 10 * slope.square().mean()

        problem, alpha = make_problem(normalized_net(kind), (4,), train_loss)
        v = Covector(problem.initial_parameters)

        def product(of: Products) -> Tensors:
            step = of.step(of.initial_state(), alpha, next(problem.train_stream()), keep_graph=True)
            return step.times_b(v)

        first, second = (Products(problem, {name: Unbounded() for name in alpha}, RULE) for _ in range(2))
        x, y = next(problem.train_stream())
        second.step(second.initial_state(), alpha, (x[:1], y[:1]), keep_graph=True)
        assert_agree(product(second), product(first), rtol=1e-12)


class TestWeightNorm:
    """Whose second derivative in PyTorch is wrong."""

    @staticmethod
    def net(dim: int | None = 0) -> nn.Module:
        norm = weight_norm(nn.LayerNorm(8), dim=0)  # of a vector
        return nn.Sequential(
            weight_norm(nn.Linear(4, 8), dim=dim), nn.Tanh(), norm, weight_norm(nn.Linear(8, N_CLASSES))
        )

    @pytest.mark.parametrize("mode", ProductMode, ids=lambda mode: mode.value)
    @pytest.mark.parametrize("horizon", [1, 10])
    @pytest.mark.parametrize("dim", [0, 1, None])
    def test_every_mode(self, dim: int | None, horizon: int, mode: ProductMode) -> None:
        problem, alpha = make_problem(self.net(dim), (4,), product_mode=mode)
        expected = by_differences(problem, alpha, horizon)
        assert_agree(estimate(problem, alpha, Reverse(), horizon), expected, rtol=1e-5)

    def test_forward_mode_of_all_steps(self) -> None:
        problem, alpha = make_problem(self.net(), (4,))
        assert_agree(estimate(problem, alpha, Forward(), 3), by_differences(problem, alpha, 3), rtol=1e-6)

    def test_after_a_batch_that_does_without(self) -> None:
        def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            return weighted(model, alpha, batch) if len(batch[1]) > 1 else alpha["scale"].sum() * model[3].bias.sum()

        problem, alpha = make_problem(self.net(), (4,), train_loss)
        products = Products(problem, {name: Unbounded() for name in alpha}, RULE)
        state, batch = products.initial_state(), next(products.train_stream)
        v = Covector(state.parameters)
        expected = products.step(state, alpha, batch, keep_graph=True).times_a(v).parameters
        products = Products(problem, {name: Unbounded() for name in alpha}, RULE)
        products.step(state, alpha, (batch[0][:1], batch[1][:1]), keep_graph=True).times_b(v)
        assert_agree(products.step(state, alpha, batch, keep_graph=True).times_a(v).parameters, expected, rtol=1e-12)


@pytest.mark.parametrize("estimator", [Reverse(), Forward()], ids=str)
def test_attention(estimator: Estimator[Any]) -> None:
    problem, alpha = make_problem(Attention(), (5, 3))
    assert_agree(estimate(problem, alpha, estimator, 2), by_differences(problem, alpha, 2), rtol=1e-6)


DETERMINANTS = {
    "logdet": torch.logdet,
    "slogdet": lambda k: torch.linalg.slogdet(k)[1],
    "det": torch.linalg.det,
    "solve": lambda k: torch.linalg.solve(k, k.new_ones(len(k))).square().sum(),
    "inv": lambda k: torch.linalg.inv(k).square().sum(),
    "cholesky": lambda k: torch.linalg.cholesky(k).diagonal().log().sum(),
}


@pytest.mark.parametrize("mode", [ProductMode.REVERSE, ProductMode.FORWARD], ids=lambda mode: mode.value)
@pytest.mark.parametrize("function", DETERMINANTS.values(), ids=DETERMINANTS.keys())
def test_linear_algebra(function: Any, mode: ProductMode) -> None:
    def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        x = model(batch[0] * alpha["scale"])
        kernel = torch.exp(-(x[:, None] - x[None]).square().sum(dim=-1)) + torch.diag(alpha["weights"].exp())
        return weighted(model, alpha, batch) + 0.02 * function(kernel)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, N_CLASSES))
    problem, alpha = make_problem(model, (4,), train_loss, product_mode=mode)
    assert_agree(estimate(problem, alpha, Reverse(), 3), by_differences(problem, alpha, 3), rtol=1e-6)


class TestForwardModeOfAllSteps:
    def test_dropout_of_what_is_contiguous(self) -> None:
        problem, alpha = make_problem(Transposed(contiguous=True), (3, 4))
        assert_agree(estimate(problem, alpha, Forward(), 2), by_differences(problem, alpha, 2), rtol=1e-6)

    def test_rounding_is_no_other_mask(self) -> None:
        """At the end of training, where gradients are sums of much longer ones, and attention has two kernels."""
        problem, alpha = make_problem(Attention(), (5, 3), cross_entropy)
        products = Products(problem, {name: Unbounded() for name in alpha}, RULE)
        step = products.step(products.initial_state(), alpha, next(products.train_stream))
        step.gradient = {name: 1.1 * g for name, g in step.gradient.items()}
        step.push_forward(None)

    def test_another_mask_is_noticed(self) -> None:
        problem, alpha = make_problem(Transposed(contiguous=False), (3, 4))
        assert_agree(estimate(problem, alpha, Reverse(), 2), by_differences(problem, alpha, 2), rtol=1e-6)
        with pytest.raises(
            RuntimeError, match=r"same random numbers.* off the step's.*\.contiguous\(\), or use Reverse"
        ):
            estimate(problem, alpha, Forward(), 2)


class Square(torch.autograd.Function):
    """x², differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, y_bar: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * y_bar


class TestFunctionsThatAreDifferentiableOnce:
    """They end a graph silently, so that α behind them would seem to do nothing."""

    def test_at_the_end_of_a_loss(self) -> None:
        def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            return Square.apply(alpha["scale"] * model(batch[0])).mean()

        problem, alpha = make_problem(nn.Linear(3, N_CLASSES), (3,), train_loss)
        with pytest.raises(UnsupportedOperatorError, match=r"reverse: .*once_differentiable"):
            estimate(problem, alpha, Reverse(), 1)

    def test_in_a_later_batch_alone(self) -> None:
        def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            y = alpha["scale"] * model(batch[0])
            return (alpha["weights"].exp().mean() * (y**2 if batch[1] == 0 else Square.apply(y))).mean()

        problem, alpha = make_problem(nn.Linear(3, N_CLASSES), (3,), train_loss)
        products = Products(problem, {name: Unbounded() for name in alpha}, RULE)
        state = products.initial_state()
        first, second = (
            products.step(state, alpha, (torch.ones(2, 3, dtype=torch.float64), torch.tensor(i)), keep_graph=True)
            for i in range(2)
        )
        v = Covector(state.parameters)
        assert first.times_b(v)["scale"].any()
        with pytest.raises(UnsupportedOperatorError, match=r"reverse: .*once_differentiable"):
            second.times_b(v)


@pytest.mark.parametrize("mode", ProductMode, ids=lambda mode: mode.value)
def test_a_loss_may_look_at_alpha_without_depending_on_it(mode: ProductMode) -> None:
    def train_loss(model: Any, alpha: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        alpha["scale"].detach().mean().item()  # to be logged
        return cross_entropy(model, alpha, batch)

    problem, alpha = make_problem(nn.Linear(3, N_CLASSES), (3,), train_loss, product_mode=mode)
    for x in estimate(problem, alpha, Reverse(), 2).values():
        assert torch.equal(x, torch.zeros_like(x))


class CheckpointedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_a_checkpoint_which_would_compute_with_other_weights_is_refused() -> None:
    problem, alpha = make_problem(CheckpointedNet(), (3,))
    with pytest.raises(RuntimeError, match=r"torch\.utils\.checkpoint.*module's own weights.*ProductMode\.FORWARD"):
        estimate(problem, alpha, Reverse(), 1)


class Embedded(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4, **settings), nn.Linear(4, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x[:, 0].long().clamp(0, 4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_norm": 0.1}, r"must not write into its weights.*'embedding\.weight'.*max_norm"),
        ({"sparse": True}, r"must be dense.*'embedding\.weight'.*sparse=False"),
    ],
)
def test_an_embedding_that_writes_into_its_weights_or_has_sparse_gradients(
    settings: dict[str, Any], message: str
) -> None:
    problem, alpha = make_problem(Embedded(**settings), (1,))
    with pytest.raises(ValueError, match=message):
        estimate(problem, alpha, Reverse(), 1)


class WithCount(SGD):
    """SGD that carries two trees which depend on nothing, and on the weights alone."""

    def init(self, parameters: Tensors) -> dict[str, Tensors]:
        zeros = {name: torch.zeros_like(x) for name, x in parameters.items()}
        return {**super().init(parameters), "count": zeros, "average": zeros}

    def step(self, w: Tensors, g: Tensors, s: Any, theta: Any, n_steps: int) -> tuple[Tensors, Any]:
        after, slots = super().step(w, g, s, theta, n_steps)
        count = {name: x + 1 for name, x in s["count"].items()}
        average = {name: 0.9 * s["average"][name] + 0.1 * x for name, x in w.items()}
        pulled = {name: x - 0.1 * average[name] for name, x in after.items()}
        return pulled, {**slots, "count": count, "average": average}


def test_a_rule_may_carry_what_does_not_depend_on_the_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, N_CLASSES))
    problem, alpha = make_problem(model, (3,))
    rule = WithCount(lr=0.2, momentum=0.9)
    assert_agree(estimate(problem, alpha, Reverse(), 3, rule), by_differences(problem, alpha, 3, rule), rtol=1e-6)


def test_an_infinite_moment_is_no_finite_state() -> None:
    """Adam with it leaves the weights where they are, for ever."""
    problem, alpha = make_problem(nn.Linear(3, N_CLASSES), (3,), lambda *args: 1e200 * cross_entropy(*args))
    products = Products(problem, {name: Unbounded() for name in alpha}, Adam(lr=0.1))
    state = products.step(products.initial_state(), alpha, next(products.train_stream)).after
    assert all(x.isfinite().all() for x in state.parameters.values())
    assert not state.is_finite()
