from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optuna_greedyhg.hypergrad.audit import HypergradientAudit
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.estimators import Fixed, Greedy, Reverse
from optuna_greedyhg.hypergrad.peak_memory import peak_bytes
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.product_modes import ProductMode, UnsupportedOperatorError
from optuna_greedyhg.hypergrad.products import Covector, Products
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests.hypergrad.test_estimators import fold
from tests.hypergrad.test_products import EVERY_CASE, N_WARM, SEED, paired, random_covector, stacked, step_of
from tests.problems import CPU, SPECIMENS, UPDATE_RULES, Case, Specimen, Weights, bowl, float64
from tests.reference import assert_agree, central_differences, hessian

FORWARD, REVERSE, DIFFERENCES = ProductMode.FORWARD, ProductMode.REVERSE, ProductMode.DIFFERENCES
RTOL = {REVERSE: 1e-10, FORWARD: 1e-10, DIFFERENCES: 1e-6}
EVERY_MODE = pytest.mark.parametrize("mode", ProductMode, ids=lambda mode: mode.value)


class Forced(Case):
    """A case whose products are made in one mode."""

    def __init__(self, specimen, rule, mode):
        super().__init__(specimen, rule)
        object.__setattr__(self, "mode", mode)

    def products(self):
        domains = {name: h.domain for name, h in self.hyperparameters.items()}
        return Products(self.specimen.problem(product_mode=self.mode), domains, self.rule)


@EVERY_CASE
def test_products_agree_with_central_differences_and_reverse_mode(rule, specimen):
    case = Case(SPECIMENS[specimen](), UPDATE_RULES[rule])
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)
    expected = central_differences(lambda z: paired(v, step_of(case, state, z).after), alpha)
    v_a, v_b = step_of(Forced(case.specimen, case.rule, REVERSE), state, alpha).times_ab(v)
    for mode, graph in product(ProductMode, ({"keep_graph": True}, {})):
        step = step_of(Forced(case.specimen, case.rule, mode), state, alpha, **graph)
        assert_agree(step.times_b(v), expected, rtol=1e-6)
        found_a, found_b = step.times_ab(v)
        assert_agree(found_a.parameters, v_a.parameters, rtol=RTOL[mode])
        assert_agree(found_b, v_b, rtol=RTOL[mode])
        assert step.recipe.products.product_mode is mode


@EVERY_MODE
def test_times_hessian_agrees_with_the_dense_hessian(mode):
    case = Forced(SPECIMENS["dropout"](), UPDATE_RULES["momentum"], mode)
    alpha, state = case.alpha(), case.state_after(N_WARM)
    vectors = stacked(state, 3)
    found = step_of(case, state, alpha, keep_graph=True).times_hessian(vectors)
    rows = [torch.cat([x.reshape(3, -1) for x in tree.values()], dim=1) for tree in (found, vectors)]
    assert_agree({"vH": rows[0]}, {"vH": rows[1] @ hessian(case, state, alpha, N_WARM, SEED)}, rtol=RTOL[mode])


@EVERY_MODE
@pytest.mark.parametrize("estimator", [Greedy(0.6), Reverse()], ids=str)
def test_an_estimator_has_the_same_value_and_cost_in_each(estimator, mode):
    specimen, rule = SPECIMENS["batchnorm"](), UPDATE_RULES["Adam"]
    expected, cost = fold(estimator, Case(specimen, rule), 4, n_warm=3)
    found, its_cost = fold(estimator, Forced(specimen, rule, mode), 4, n_warm=3)
    assert_agree(found, expected, rtol=RTOL[mode])
    assert its_cost.n_products == cost.n_products
    if isinstance(estimator, Greedy):
        assert its_cost == cost


def test_a_direction_of_zero_has_a_product_of_zero():
    for mode in ProductMode:
        case = Forced(SPECIMENS["full-batch"](), SGD(lr=0.1), mode)
        state = case.state_after(1)
        zero = Covector({name: torch.zeros_like(x) for name, x in state.parameters.items()})
        for x in step_of(case, state, case.alpha()).times_b(zero).values():
            assert torch.equal(x, torch.zeros_like(x))


def test_a_loss_that_is_linear_in_the_weights_has_no_hessian():
    specimen = replace(bowl(), train_loss=lambda model, alpha, _: 3 * model() + alpha["curvature"])
    for mode in ProductMode:
        case = Forced(specimen, SGD(lr=0.1), mode)
        step = case.products().step(case.state_after(0), case.alpha(), 0)
        v_a, v_b = step.times_ab(Covector({"w": float64(2.0)}))
        torch.testing.assert_close(v_a.parameters["w"], float64(2.0))
        assert v_b["curvature"] == 0


def deep(n_layers=8, n=64):
    """A network whose activations are many more than its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(*(layer for _ in range(n_layers) for layer in (nn.Linear(4, 4), nn.Tanh()))).double()
        batch = torch.randn(n, 4, dtype=torch.float64), torch.arange(n)
    return Specimen(
        module,
        lambda model, alpha, b: (alpha["weights"][b[1]] * model(b[0]).square().sum(dim=1)).mean(),
        lambda model, alpha, b: model(b[0]).square().mean(),
        {"weights": Hyperparameter(torch.ones(n, dtype=torch.float64))},
        [batch],
        [(batch[0][:2],)],
    )


def test_forward_mode_keeps_no_activations():
    """Beside the graph of plain training, which is freed before, it has some activations at a time, not all of them."""
    in_mode = {}
    for mode in (REVERSE, FORWARD):
        case = Forced(deep(), SGD(lr=0.1), mode)
        state, alpha = case.state_after(0), case.alpha()
        step = case.products().step(state, alpha, case.train_batch(0))
        v = Covector(state.parameters)
        in_mode[mode] = peak_bytes(lambda step=step, v=v: step.times_b(v), CPU)
    assert in_mode[FORWARD] < 0.5 * in_mode[REVERSE]


class Cube(torch.autograd.Function):
    """x³, with as many derivatives as its subclasses are given."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, y_bar):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * y_bar


class ForwardCube(Cube):
    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


def cubic(operator):
    """α·Σw³, by an operator without a second derivative in reverse mode."""
    return replace(bowl(), train_loss=lambda model, alpha, _: alpha["curvature"] * operator.apply(model()))


class TestChoice:
    @pytest.mark.parametrize(
        ("specimen", "expected"),
        [(bowl(), REVERSE), (cubic(ForwardCube), FORWARD)],
        ids=["reverse", "forward"],
    )
    def test_it_is_the_first_in_which_every_operator_has_a_derivative(self, specimen, expected):
        case = Case(specimen, SGD(lr=0.1))
        products = case.products()
        step = products.step(products.initial_state(), case.alpha(), 0, keep_graph=True)
        assert products.product_mode is None
        v = Covector({"w": float64(1.0)})
        w = step.before.parameters["w"]
        d_alpha = 3 * w**2 if expected is FORWARD else w
        torch.testing.assert_close(step.times_b(v)["curvature"], -0.1 * d_alpha)
        assert products.product_mode is expected
        assert products.with_rule(SGD(lr=0.2)).product_mode is expected  # it is the problem's, whoever asks

    def test_a_graph_that_is_cut_midway_is_not_taken_for_whole(self):
        """Of Σ(c·(a·w)³), the derivative by c goes past the cut, and that by a would be zero."""

        def train_loss(model, alpha, _):
            return (alpha["outer"] * ForwardCube.apply(alpha["inner"] * model())).sum()

        hyperparameters = {name: Hyperparameter(float64(0.5)) for name in ("outer", "inner")}
        case = Case(replace(bowl(), train_loss=train_loss, hyperparameters=hyperparameters), SGD(lr=0.1))
        found = step_of(case, case.state_after(0), case.alpha(), keep_graph=True).times_b(Covector({"w": float64(1.0)}))
        # g = 3·c·a³·w² at w = 2, c = a = ½
        assert_agree(found, {"outer": float64(-0.1 * 1.5), "inner": float64(-0.1 * 4.5)}, rtol=1e-12)

    def test_none_is_needed_where_the_update_rule_alone_reads_alpha(self):
        specimen = replace(bowl(), train_loss=lambda model, alpha, _: Cube.apply(model()), hyperparameters={})
        case = Case(specimen, UPDATE_RULES["momentum"])
        products = case.products()
        products.step(products.initial_state(), case.alpha(), 0, keep_graph=True).times_b(Covector({"w": float64(1.0)}))
        assert products.product_mode is None

    def test_an_operator_without_any_is_named(self):
        def train_loss(model, alpha, _):
            return alpha["curvature"] * torch.pdist(model().reshape(2, 1)).sum()

        case = Case(replace(bowl(), module=Weights(0.2, 0.3), train_loss=train_loss), SGD(lr=0.1))
        with pytest.raises(UnsupportedOperatorError, match=r"reverse: .*_pdist_backward.*forward: .*_pdist_forward"):
            step_of(case, case.state_after(0), case.alpha()).times_b(Covector({"w": float64(1.0, 1.0)}))

    def test_differences_need_no_second_derivative(self):
        v = Covector({"w": float64(1.0)})
        case = Case(cubic(Cube), SGD(lr=0.1))
        with pytest.raises(
            UnsupportedOperatorError, match=r"reverse: .*once_differentiable.*forward: .*jvp.*DIFFERENCES"
        ):
            step_of(case, case.state_after(0), case.alpha()).times_b(v)
        forced = Forced(case.specimen, case.rule, DIFFERENCES)
        found = step_of(forced, forced.state_after(0), forced.alpha()).times_b(v)
        torch.testing.assert_close(found["curvature"], float64(-0.1 * 3 * 2.0**2), rtol=1e-8, atol=0.0)

    def test_a_forced_mode_does_not_give_way(self):
        case = Forced(cubic(ForwardCube), SGD(lr=0.1), REVERSE)
        with pytest.raises(UnsupportedOperatorError, match=r"reverse: .*once_differentiable"):
            step_of(case, case.state_after(0), case.alpha(), keep_graph=True).times_b(Covector({"w": float64(1.0)}))

    def test_errors_of_other_kinds_go_through(self):
        def train_loss(model, alpha, _):
            loss = alpha["curvature"] * model() ** 2
            return loss if torch.autograd.forward_ad.unpack_dual(model()).tangent is None else loss @ loss

        case = Forced(replace(bowl(), train_loss=train_loss), SGD(lr=0.1), FORWARD)
        with pytest.raises(RuntimeError, match="both arguments to matmul"):
            step_of(case, case.state_after(0), case.alpha()).times_b(Covector({"w": float64(1.0)}))

    def test_a_descent_says_which(self):
        case = Case(cubic(ForwardCube), SGD(lr=0.01))
        first, *others = descend(
            case.specimen.problem(),
            case.hyperparameters,
            update_rule=case.rule,
            estimator=Greedy(),
            horizon=2,
            n_outer_steps=2,
        )
        assert first.product_mode is None
        assert [step.product_mode for step in others] == [FORWARD, FORWARD]

    def test_an_audit_says_which_and_that_some_need_none(self):
        case = Case(cubic(ForwardCube), SGD(lr=0.01))
        audit = HypergradientAudit(
            case.specimen.problem(), case.hyperparameters, update_rule=case.rule, horizon=3, at_step=0, n_repeats=1
        )
        greedy, fixed = audit.run({"greedy": Greedy(), "fixed": Fixed()})
        assert (greedy.product_mode, fixed.product_mode) == (FORWARD, None)
        assert (greedy.as_json()["product_mode"], fixed.as_json()["product_mode"]) == ("forward", None)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].mean(dim=(1, 2))


LAYERS = {
    "attention": Attention,
    "conv": lambda: nn.Sequential(nn.Conv1d(5, 3, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(3, 1)),
    "groupnorm": lambda: nn.Sequential(nn.GroupNorm(5, 5), nn.GELU(), nn.Flatten(), nn.Linear(20, 1)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_common_layers_agree_forward_and_reverse(layer):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = LAYERS[layer](), torch.randn(3, 5, 4)
    found = {}
    for mode in (REVERSE, FORWARD):
        problem = BilevelProblem(
            model=model.double(),
            train_loss=lambda m, alpha, b: (alpha["weights"] * F.softplus(m(b)).reshape(-1)).mean(),
            val_loss=lambda m, alpha, b: m(b).sum(),
            train_batches=x.double(),
            val_batches=x.double(),
            product_mode=mode,
        )
        products = Products(problem, {"weights": Hyperparameter(torch.ones(3)).domain}, SGD(lr=1.0))
        step = products.step(products.initial_state(), {"weights": torch.ones(3, dtype=torch.float64)}, x.double())
        found[mode] = step.times_b(Covector(step.validation().gradient))
    assert_agree(found[FORWARD], found[REVERSE], rtol=1e-10)
