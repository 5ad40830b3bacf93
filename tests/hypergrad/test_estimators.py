from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.curvature import ConjugateGradients, Neumann
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.estimators import DrMAD, FirstOrder, Forward, Greedy, Implicit, Reverse
from optuna_greedyhg.hypergrad.products import Covector, TrainState
from optuna_greedyhg.hypergrad.propagators import LastStep
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, AdamW, PulledBack, has_constant_jacobian, pulls_back
from tests import reference
from tests.problems import (
    CPU,
    ISOTROPIC_MIXING,
    ISOTROPIC_SLOPE,
    N_EXAMPLES,
    SPECIMENS,
    UPDATE_RULES,
    Case,
    Specimen,
    bowl,
    classification,
    float64,
    isotropic,
    regression,
    toy,
    with_numbers,
)
from tests.reference import assert_agree, central_differences

SEED = 5
EVERY_RULE = pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
EVERY_CASE = pytest.mark.parametrize(
    ("rule", "specimen"),
    [
        pytest.param(UPDATE_RULES[rule], make, id=f"{rule}-{name}")
        for rule, (name, make) in product(UPDATE_RULES, SPECIMENS.items())
    ],
)
EVERY_WINDOW = pytest.mark.parametrize(("n_warm", "horizon"), [(0, 3), (4, 5), (2, 1)], ids=str)


def fold(estimator, case, horizon, n_warm=0, alpha=None):
    """The estimator's value over a horizon that starts ``n_warm`` steps into training, and what it has cost."""
    products, alpha = case.products(), case.alpha() if alpha is None else alpha
    memory, state = estimator.init(alpha), case.state_after(n_warm)
    with randomness.seeded(SEED, CPU):
        for t in range(1, horizon + 1):
            keep = estimator.keeps_graph(t, horizon)
            batch = case.train_batch(n_warm + t - 1)
            step = products.step(state, alpha, batch, keep_graph=keep, remaining=horizon - t)
            memory, state = estimator.observe(memory, step), step.after
        return estimator.estimate(memory, step), products.cost


class TestReverse:
    @EVERY_WINDOW
    @EVERY_CASE
    def test_it_agrees_with_autograd_through_all_the_steps(self, rule, specimen, n_warm, horizon):
        case = Case(specimen(), rule)
        expected = reference.exact(case, case.state_after(n_warm), case.alpha(), n_warm, horizon, SEED)
        estimate, _ = fold(Reverse(), case, horizon, n_warm)
        zero = [name for name, x in expected.items() if not x.any()]
        for name in zero:  # the momentum, in a first step
            assert not estimate.pop(name).any()
            del expected[name]
        assert_agree(estimate, expected, rtol=1e-8)

    @EVERY_RULE
    def test_it_agrees_with_differences_of_whole_trainings_by_torch_optim(self, rule):
        case = Case(SPECIMENS["minibatches"](), rule)
        expected = central_differences(lambda z: reference.val_loss_by_torch_optim(case, z, n_steps=6), case.alpha())
        assert_agree(fold(Reverse(), case, horizon=6)[0], expected, rtol=1e-6)

    @EVERY_RULE
    def test_it_agrees_when_only_the_losses_read_alpha(self, rule):
        case = Case(SPECIMENS["dropout"](), with_numbers(rule))
        expected = reference.exact(case, case.state_after(4), case.alpha(), 4, 5, SEED)
        assert_agree(fold(Reverse(), case, horizon=5, n_warm=4)[0], expected, rtol=1e-8)

    @pytest.mark.parametrize("specimen", SPECIMENS.values(), ids=SPECIMENS.keys())
    @EVERY_RULE
    def test_kept_graphs_give_the_same_and_replay_nothing(self, rule, specimen):
        case = Case(specimen(), rule)
        replayed, cost = fold(Reverse(), case, horizon=3, n_warm=2)
        kept, cost_of_kept = fold(Reverse(keep_graphs=True), case, horizon=3, n_warm=2)
        assert_agree(kept, replayed, rtol=1e-12)
        assert 2 * cost_of_kept.n_train_gradients == cost.n_train_gradients
        assert cost_of_kept.n_products == cost.n_products


class TestGreedy:
    @pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
    @EVERY_CASE
    def test_it_agrees_with_the_discounted_sum_term_by_term(self, rule, specimen, gamma):
        case = Case(specimen(), rule)
        n_warm, horizon = 4, 5
        start, n_val = case.state_after(n_warm), horizon - 1 if gamma == 0.0 else 0
        # T1–T2 looks at one validation batch only, which therefore is the first.
        expected, _ = reference.greedy(case, start, case.alpha(), n_warm, horizon, gamma, SEED, n_val=-n_val)
        assert_agree(fold(Greedy(gamma), case, horizon, n_warm)[0], expected, rtol=1e-8)

    @EVERY_RULE
    def test_a_vanishing_gamma_is_t1_t2(self, rule):
        case = Case(SPECIMENS["full-batch"](), rule)
        vanishing, zero = (fold(Greedy(gamma), case, horizon=6, n_warm=3)[0] for gamma in (1e-15, 0.0))
        assert_agree(vanishing, zero, rtol=1e-12)  # earlier terms are up to a hundred times the last

    @pytest.mark.parametrize("lr", [0.05, 0.2, 0.9])
    def test_it_is_exact_on_an_isotropic_quadratic_with_a_constant_validation_gradient(self, lr):
        case = Case(isotropic(), SGD(lr=lr))
        expected = reference.exact(case, case.state_after(3), case.alpha(), 3, 20, SEED)
        assert_agree(fold(Greedy(1 - lr), case, horizon=20, n_warm=3)[0], expected, rtol=1e-9)
        closed = ISOTROPIC_SLOPE @ ISOTROPIC_MIXING * case.alpha()["angle"].cos() * (1 - (1 - lr) ** 20)
        assert_agree(expected, {"angle": closed}, rtol=1e-9)

    def test_another_gamma_is_not_exact_there(self):
        case = Case(isotropic(), SGD(lr=0.2))
        exact, wrong = (fold(estimator, case, horizon=20)[0]["angle"] for estimator in (Reverse(), Greedy(0.9)))
        assert float((wrong - exact).norm() / exact.norm()) > 0.5


class TestTerminalGreedy:
    """The last validation gradient in the place of all of them, in a second pass."""

    @pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
    @EVERY_CASE
    def test_it_agrees_with_the_discounted_sum_term_by_term(self, rule, specimen, gamma):
        case = Case(specimen(), rule)
        expected = reference.terminal_greedy(case, case.state_after(4), case.alpha(), 4, 5, gamma, SEED)
        assert_agree(fold(Greedy(gamma, terminal=True), case, 5, n_warm=4)[0], expected, rtol=1e-8)

    def test_it_is_not_the_running_sum(self):
        case = Case(SPECIMENS["full-batch"](), UPDATE_RULES["momentum"])
        running, terminal = (fold(Greedy(0.9, terminal=t), case, 8)[0]["example_logits"] for t in (False, True))
        assert float((running - terminal).norm() / terminal.norm()) > 1e-2

    def test_with_a_constant_validation_gradient_it_is(self):
        case = Case(isotropic(), SGD(lr=0.2))
        running, terminal = (fold(Greedy(0.7, terminal=t), case, 8)[0] for t in (False, True))
        assert_agree(terminal, running, rtol=1e-12)

    def test_an_estimate_leaves_its_memory_alone(self):
        """Asked for twice, it is the same, and the replays leave the random numbers that follow alone."""
        case, estimator = Case(SPECIMENS["dropout"](), UPDATE_RULES["Adam"]), Greedy(0.9, terminal=True)
        products, alpha, state = case.products(), case.alpha(), case.state_after(2)
        memory = estimator.init(alpha)
        with randomness.seeded(SEED, CPU):
            for t in range(3):
                step = products.step(state, alpha, case.train_batch(t), remaining=2 - t)
                memory, state = estimator.observe(memory, step), step.after
            before = torch.get_rng_state()
            first, second = (estimator.estimate(memory, step) for _ in range(2))
            assert torch.equal(torch.get_rng_state(), before)
        assert_agree(second, first, rtol=0.0)

    @pytest.mark.parametrize("gamma", [0.9, 1.0])
    def test_restarting_does_not_bias_it(self, gamma):
        """Where the running sum ends at a loss of 7.57, and nobody is warned."""
        case = Case(toy(), SGD(lr=0.1))
        *_, last = descend(
            case.specimen.problem(),
            case.hyperparameters,
            update_rule=case.rule,
            estimator=Greedy(gamma, terminal=True),
            horizon=10,
            n_outer_steps=60,
            outer_optimizer=partial(torch.optim.SGD, lr=0.1),
            restart=True,
            evaluate="online",
            evaluate_every=10**6,
        )
        assert last.val_loss < 1e-6

    @pytest.mark.parametrize(
        ("estimator", "is_biased"),
        [
            (Greedy(0.9), True),
            (Greedy(0.0), False),
            (Greedy(0.9, terminal=True), False),
            (Greedy(propagator=Spectral()), True),
            (Greedy(propagator=Spectral(), terminal=True), False),
            (Greedy(propagator=LastStep()), False),
        ],
        ids=str,
    )
    def test_only_running_sums_are_biased(self, estimator, is_biased):
        assert estimator.biased_in_restart_mode == is_biased


class TestStride:
    """Every k-th term, for all the steps that end with it."""

    @pytest.mark.parametrize(("stride", "horizon"), [(2, 6), (3, 7), (4, 3)], ids=str)
    @EVERY_RULE
    def test_it_agrees_with_the_sum_in_which_a_term_stands_for_those_before_it(self, rule, stride, horizon):
        case, n_warm = Case(SPECIMENS["dropout"](), rule), 4
        start, alpha = case.state_after(n_warm), case.alpha()
        expected, _ = reference.greedy(case, start, alpha, n_warm, horizon, 0.6, SEED, stride=stride)
        assert_agree(fold(Greedy(0.6, stride=stride), case, horizon, n_warm)[0], expected, rtol=1e-8)

    @pytest.mark.parametrize("horizon", [1, 5, 6, 7])
    @pytest.mark.parametrize("stride", [2, 3, 10])
    @pytest.mark.parametrize(
        "how",
        [
            {"gamma": 0.7},
            {"gamma": 1.0},
            {"gamma": 0.0},
            {"gamma": 0.7, "terminal": True},
            {"propagator": Spectral()},
            {"propagator": Spectral(rank=0, bulk=0.7), "terminal": True},
        ],
        ids=str,
    )
    def test_where_all_terms_are_equal_the_sum_is_the_same(self, how, stride, horizon):
        case = Case(isotropic(), SGD(lr=0.2))
        every, strided = (fold(Greedy(**how, stride=k), case, horizon)[0] for k in (1, stride))
        assert_agree(strided, every, rtol=1e-12)

    def test_where_they_are_not_it_differs(self):
        case = Case(SPECIMENS["full-batch"](), UPDATE_RULES["momentum"])
        every, strided = (fold(Greedy(0.9, stride=k), case, 8)[0]["example_logits"] for k in (1, 4))
        assert 1e-3 < float((strided - every).norm() / every.norm()) < 0.5

    @pytest.mark.parametrize("terminal", [False, True])
    def test_steps_between_take_no_validation_gradients_and_keep_no_graphs(self, terminal):
        """Training batches of 4, 3, 5, 4, 3, of which every other has a term."""
        case, estimator = Case(SPECIMENS["minibatches"](), UPDATE_RULES["Adam"]), Greedy(stride=2, terminal=terminal)
        _, cost = fold(estimator, case, horizon=5)
        expected = Cost(n_train_gradients=19, n_val_gradients=3 + 5 + 3, n_products=4 + 5 + 3)
        if terminal:
            expected = replace(expected, n_train_gradients=2 * 19 - 3, n_val_gradients=3)
        assert cost == expected
        kept = [t for t in range(1, 6) if estimator.keeps_graph(t, 5)]
        assert kept == ([5] if terminal else [1, 3, 5])

    @pytest.mark.parametrize("stride", [0, -1])
    def test_a_stride_below_one_is_refused(self, stride):
        with pytest.raises(ValueError, match=f"stride must be at least 1, but got {stride}"):
            Greedy(stride=stride)


def test_greedy_prints_what_it_uses():
    assert repr(Greedy(0.5, stride=3)) == "Greedy(gamma=0.5, stride=3)"
    assert repr(Greedy()) == "Greedy(gamma=0.9)"
    assert repr(Greedy(0.5, terminal=True)) == "Greedy(gamma=0.5, terminal=True)"
    assert repr(Greedy(propagator=LastStep())) == "Greedy(propagator=LastStep())"
    spectral = "Spectral(rank=3, bulk=0.9, refresh_every=10, n_batches=4)"
    assert (
        repr(Greedy(propagator=Spectral(3, bulk=0.9), terminal=True)) == f"Greedy(propagator={spectral}, terminal=True)"
    )


def test_first_order_is_the_direct_gradient_at_the_end():
    case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["momentum"])
    estimate, _ = fold(FirstOrder(), case, horizon=4)
    z = case.alpha()["penalties"].requires_grad_()
    (direct,) = torch.autograd.grad((z.exp() ** 2).sum(), z)
    torch.testing.assert_close(estimate.pop("penalties"), direct)
    assert not any(x.any() for x in estimate.values())


class TestBugsOfOthers:
    """What went wrong in other packages, each with numbers that show it."""

    @pytest.mark.parametrize("estimator", [Greedy(0.0), Greedy(0.9), Reverse()], ids=str)
    def test_every_entry_of_a_vector_has_its_own_derivative(self, estimator):
        """One number, broadcast to the whole of α."""
        case = Case(isotropic(), SGD(lr=0.2))
        estimate = fold(estimator, case, horizon=8)[0]["angle"]
        profile = ISOTROPIC_SLOPE @ ISOTROPIC_MIXING * case.alpha()["angle"].cos()
        torch.testing.assert_close(estimate / estimate[0], profile / profile[0])

    @pytest.mark.parametrize("lr", [0.1, 0.2])
    def test_b_holds_the_learning_rate(self, lr):
        """The learning rate, left out of B."""
        case = Case(isotropic(), SGD(lr=lr))
        expected = lr * (ISOTROPIC_SLOPE @ ISOTROPIC_MIXING) * case.alpha()["angle"].cos()
        assert_agree(fold(Greedy(0.0), case, horizon=3)[0], {"angle": expected}, rtol=1e-12)

    @pytest.mark.parametrize("horizon", [1, 4])
    def test_b_is_taken_before_the_step(self, horizon):
        """B taken at w_T, where it would be smaller by a factor of 1 − lr."""
        expected = -0.25 * 2.0 * 0.75 ** (horizon - 1)
        estimate, _ = fold(Greedy(0.0), Case(bowl(start=2.0), SGD(lr=0.25)), horizon)
        torch.testing.assert_close(estimate["curvature"], float64(expected))

    def test_the_optimizer_state_goes_on_from_step_to_step(self):
        """Momentum that starts from zero at each step: then its derivative −lr·v·m_{t−1} would be zero."""
        case = Case(isotropic(), SGD(lr=0.1, momentum="momentum"))
        w = case.specimen.module.w.detach()
        goal = ISOTROPIC_MIXING @ case.alpha()["angle"].sin()
        mu = float(case.hyperparameters["momentum"].init)
        m = w - goal
        m = mu * m + (w - 0.1 * m - goal)  # the momentum after two steps
        d_mu = central_differences(lambda z: float(case.values(z)["momentum"]), case.alpha())["momentum"]
        estimate, _ = fold(Greedy(0.0), case, horizon=3)
        assert_agree({"mu": estimate["momentum"]}, {"mu": -0.1 * (ISOTROPIC_SLOPE @ m) * d_mu}, rtol=1e-8)

    @pytest.mark.parametrize("estimator", [Greedy(0.9), Reverse()], ids=str)
    @pytest.mark.parametrize("horizon", [1, 2, 3])
    def test_every_step_has_its_own_batch(self, estimator, horizon):
        """One batch for all steps: examples of the later ones would have no derivative."""
        sizes = (4, 3, 5)
        case = Case(classification(batch_sizes=sizes), SGD(lr=0.1))
        estimate = fold(estimator, case, horizon)[0]["example_logits"]
        seen = sum(sizes[:horizon])
        assert estimate[:seen].all()
        assert not estimate[seen:].any()

    @pytest.mark.parametrize("estimator", [Greedy(0.0), Greedy(0.9), Reverse()], ids=str)
    def test_a_validation_loss_may_leave_alpha_alone(self, estimator):
        """Failure where L_val does not depend on α; and as the direct gradient adds up, it is no more than that."""
        specimen = classification()
        silent = replace(
            specimen, val_loss=lambda model, alpha, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
        )
        with_direct, without = (fold(estimator, Case(s, SGD(lr=0.1)), horizon=4)[0] for s in (specimen, silent))
        direct, _ = fold(FirstOrder(), Case(specimen, SGD(lr=0.1)), horizon=4)
        assert_agree({n: without[n] + direct[n] for n in without}, with_direct, rtol=1e-12)
        assert float(without["penalties"].abs().min()) > 0

    @pytest.mark.parametrize("rule", [Adam(lr=0.1, betas=(0.9, "beta2")), AdamW(lr=0.1, betas=(0.9, "beta2"))], ids=str)
    def test_beta2_reaches_the_weights_through_both_of_its_places(self, rule):
        """β2's gradient, cut in the bias correction or in the second moment."""
        case = Case(SPECIMENS["minibatches"](), rule)
        expected = central_differences(lambda z: reference.val_loss_by_torch_optim(case, z, n_steps=4), case.alpha())
        assert_agree(fold(Reverse(), case, horizon=4)[0], expected, rtol=1e-6)


class Idle(torch.nn.Module):
    """A module beside weights that no output depends on."""

    def __init__(self, module: torch.nn.Module, idle: float) -> None:
        super().__init__()
        self.module = module
        self.idle = torch.nn.Parameter(float64(idle, idle))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def with_idle_weights(specimen: Specimen, idle: float) -> Specimen:
    def train_loss(model, alpha, batch):
        x, y, index = batch
        losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        return (torch.sigmoid(alpha["example_logits"][index]) * losses).mean()

    def val_loss(model, alpha, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    module = specimen.module if idle is None else Idle(specimen.module, idle)
    logits = {"example_logits": specimen.hyperparameters["example_logits"]}
    return replace(specimen, module=module, train_loss=train_loss, val_loss=val_loss, hyperparameters=logits)


@pytest.mark.parametrize("estimator", [Greedy(0.9), Reverse()], ids=str)
@pytest.mark.parametrize("idle", [0.0, 1.5])
@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_weights_that_never_get_a_gradient_change_nothing(rule, idle, estimator):
    with_idle = fold(estimator, Case(with_idle_weights(classification(), idle), rule), horizon=5)[0]
    without = fold(estimator, Case(with_idle_weights(classification(), None), rule), horizon=5)[0]
    assert_agree(with_idle, without, rtol=1e-10)


class TestCost:
    """Counts of examples, with batches of 4, 3, 5, 4, 3 in training and 3, 5, 3, 5, 3 in validation."""

    @pytest.mark.parametrize(
        ("estimator", "expected"),
        [
            (FirstOrder(), Cost(n_train_gradients=19, n_val_gradients=3)),
            (Greedy(0.0), Cost(n_train_gradients=19, n_val_gradients=3, n_products=3)),
            (Greedy(0.9), Cost(n_train_gradients=19, n_val_gradients=19, n_products=19)),
            (Greedy(0.9, terminal=True), Cost(n_train_gradients=2 * 19 - 3, n_val_gradients=3, n_products=19)),
            (Greedy(0.0, terminal=True), Cost(n_train_gradients=19, n_val_gradients=3, n_products=3)),
            (Reverse(), Cost(n_train_gradients=2 * 19, n_val_gradients=3, n_products=2 * 19 - 4)),
        ],
        ids=str,
    )
    def test_of_hyperparameters_in_the_training_loss(self, estimator, expected):
        assert fold(estimator, Case(SPECIMENS["minibatches"](), UPDATE_RULES["Adam"]), horizon=5)[1] == expected

    @pytest.mark.parametrize(
        ("estimator", "expected"),
        [
            (Greedy(0.9), Cost(n_train_gradients=5, n_val_gradients=5)),
            (Reverse(), Cost(n_train_gradients=5 + 4, n_val_gradients=1, n_products=4)),
        ],
        ids=str,
    )
    def test_products_of_the_update_rules_own_hyperparameters_are_free(self, estimator, expected):
        specimen = replace(bowl(), train_loss=lambda model, alpha, _: 0.5 * model() ** 2, hyperparameters={})
        assert fold(estimator, Case(specimen, UPDATE_RULES["momentum"]), horizon=5)[1] == expected

    def test_costs_add_up(self):
        assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_decay_out_of_range_is_refused(gamma):
    with pytest.raises(ValueError, match=rf"gamma must be in \[0, 1\], but got {gamma}"):
        Greedy(gamma=gamma)


def test_hyperparameters_of_any_shape_have_derivatives_of_that_shape():
    specimen = classification()
    shaped = replace(
        specimen,
        train_loss=lambda model, alpha, batch: specimen.train_loss(
            model, {"example_logits": alpha["grid"].reshape(-1), "penalties": alpha["penalties"]}, batch
        ),
        hyperparameters={
            "grid": Hyperparameter(specimen.hyperparameters["example_logits"].init.reshape(3, N_EXAMPLES // 3)),
            "penalties": specimen.hyperparameters["penalties"],
        },
    )
    flat, grid = (fold(Reverse(), Case(s, UPDATE_RULES["Adam"]), horizon=4)[0] for s in (specimen, shaped))
    torch.testing.assert_close(grid["grid"].reshape(-1), flat["example_logits"])


class TestForward:
    @pytest.mark.parametrize(("n_warm", "horizon"), [(4, 3), (2, 1)], ids=str)
    @EVERY_CASE
    def test_it_agrees_with_reverse_mode(self, rule, specimen, n_warm, horizon):
        case = Case(specimen(), rule)
        expected, _ = fold(Reverse(), case, horizon, n_warm)
        found, cost = fold(Forward(), case, horizon, n_warm)
        assert_agree(found, expected, rtol=1e-8)
        n_coordinates = sum(z.numel() for z in case.alpha().values())
        assert cost.n_products == horizon * n_coordinates * cost.n_train_gradients / horizon


class TestDrMAD:
    @EVERY_RULE
    def test_it_is_exact_over_one_step(self, rule):
        case = Case(SPECIMENS["dropout"](), rule)
        assert_agree(fold(DrMAD(), case, 1, n_warm=4)[0], fold(Reverse(), case, 1, n_warm=4)[0], rtol=1e-9)

    def test_it_is_exact_where_the_path_is_straight(self):
        """Where the training loss is linear in the weights, gradient descent makes even steps along a line."""
        specimen = replace(isotropic(), train_loss=lambda model, alpha, batch: _tilted(model, alpha))
        case = Case(specimen, SGD(lr=0.1))
        assert_agree(fold(DrMAD(), case, 6)[0], fold(Reverse(), case, 6)[0], rtol=1e-9)

    @EVERY_RULE
    def test_it_sweeps_along_the_straight_line(self, rule):
        """The recursion written out again, with steps that are made from points of the line."""
        case, horizon, n_warm = Case(SPECIMENS["minibatches"](), rule), 4, 3
        products, alpha = case.products(), case.alpha()
        start = state = case.state_after(n_warm)
        for t in range(horizon):
            end = products.step(state, alpha, case.train_batch(n_warm + t))
            state = end.after
        v, expected = Covector(end.validation().gradient), end.validation().direct
        for t in reversed(range(horizon)):
            beta = t / horizon
            between = TrainState(
                {k: (1 - beta) * w + beta * state.parameters[k] for k, w in start.parameters.items()},
                start.buffers,
                {
                    s: {k: (1 - beta) * x + beta * state.slots[s][k] for k, x in y.items()}
                    for s, y in start.slots.items()
                },
                start.n_steps + t,
            )
            v, term = products.step(between, alpha, case.train_batch(n_warm + t)).times_ab(v)
            expected = {name: x + term[name] for name, x in expected.items()}
        assert_agree(fold(DrMAD(), case, horizon, n_warm)[0], expected, rtol=1e-9)

    def test_what_it_costs(self):
        case, horizon = Case(classification(), SGD(lr=0.1, momentum=0.9)), 5
        _, cost = fold(DrMAD(), case, horizon)
        assert cost.n_products == (2 * horizon - 1) * N_EXAMPLES
        assert cost.n_train_gradients == 2 * horizon * N_EXAMPLES


def _tilted(model, alpha):
    (w,) = model.parameters()
    target = next(iter(alpha.values()))
    return (w.flatten()[0] * target.sum()) + w.sum()


class TestImplicit:
    @pytest.mark.parametrize(
        ("rule", "solver"),
        [
            (SGD(lr=0.5), ConjugateGradients(max_steps=100, tolerance=1e-12)),
            (
                SGD(lr=0.1, momentum=0.8, weight_decay="weight_decay"),
                ConjugateGradients(max_steps=100, tolerance=1e-12),
            ),
            (SGD(lr=0.5, weight_decay="weight_decay"), Neumann(n_terms=4000, scale=0.5)),
            (Adam(lr=0.01, betas=(0.5, 0.9), weight_decay="weight_decay"), ConjugateGradients(max_steps=100)),
        ],
        ids=str,
    )
    def test_it_agrees_with_the_implicit_function_theorem(self, rule, solver):
        """At any point: −v·(∂F/∂w)⁻¹·∂F/∂α with all matrices written out, F the gradient of the penalized loss."""
        case = Case(regression(), rule)
        expected = reference.implicit(case, case.state_after(7), case.alpha())
        assert_agree(fold(Implicit(solver), case, 3, n_warm=4)[0], expected, rtol=1e-6)

    def test_what_training_alone_reads_has_no_effect_on_where_it_ends(self):
        case = Case(classification(), SGD(lr="lr", momentum="momentum"))
        estimate, _ = fold(Implicit(), case, 3)
        assert estimate["lr"] == 0
        assert estimate["momentum"] == 0
        assert estimate["example_logits"].abs().min() > 0

    def test_what_it_costs(self):
        case = Case(classification(), SGD(lr=0.1))
        _, cost = fold(Implicit(Neumann(n_terms=3)), case, 5)
        assert cost.n_products == (3 + 1) * N_EXAMPLES
        assert cost.n_train_gradients == (5 + 1) * N_EXAMPLES


class Cubed(SGD):
    """A rule of a user with its own pull-back, w ← w − lr·g³, which is not linear as that of its base is."""

    def step(self, parameters, gradient, slots, theta, n_steps):
        return {name: w - theta["lr"] * gradient[name] ** 3 for name, w in parameters.items()}, {}

    def pull_back(self, v, on_slots, made, *, to_state):
        u = {name: 3 * made.gradient[name] ** 2 * x for name, x in v.items()}
        return PulledBack(-made.theta["lr"], u, {}, v if to_state else {}, {})


@pytest.mark.parametrize("keep_graphs", [False, True])
def test_a_pull_back_of_a_users_own_has_all_that_it_reads(keep_graphs):
    case = Case(SPECIMENS["minibatches"](), Cubed(lr=0.1))
    assert pulls_back(case.rule)
    assert not has_constant_jacobian(case.rule)
    assert has_constant_jacobian(SGD(lr=0.1, momentum=0.9))
    assert not has_constant_jacobian(SGD(lr="lr"))
    assert not has_constant_jacobian(Adam())
    found, _ = fold(Reverse(keep_graphs=keep_graphs), case, horizon=4, n_warm=2)
    assert_agree(found, reference.exact(case, case.state_after(2), case.alpha(), 2, 4, SEED), rtol=1e-9)
