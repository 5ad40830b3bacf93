from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.estimators import Greedy, Reverse
from optuna_greedyhg.hypergrad.products import TrainState
from optuna_greedyhg.hypergrad.propagators import Decay, LastStep, Spectral
from optuna_greedyhg.hypergrad.randomness import seeded
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, AdamW
from tests.hypergrad.test_estimators import fold
from tests.problems import CPU, N_EXAMPLES, SPECIMENS, UPDATE_RULES, Case, Specimen, Weights, cliff, float64
from tests.reference import assert_agree

P = 6
SPREAD = float64(6.0, 3.0, 1.0, 0.4, 0.1, -0.2)
"""Curvatures of every size, one of them negative."""
OUTLIERS = float64(6.0, -1.0, 0.05, 0.05, 0.05, 0.05)
"""Two outliers over an exactly flat bulk."""
SGD_RULES = {name: rule for name, rule in UPDATE_RULES.items() if isinstance(rule, SGD)}
EVERY_SGD = pytest.mark.parametrize("rule", SGD_RULES.values(), ids=SGD_RULES.keys())


def quadratic(spectrum=SPREAD, *, linear_val_loss=False):
    """L_train = ½(w − Mα)ᵀH(w − Mα) with a dense H of this spectrum, over weights of two shapes."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rotation, mixing, slope = torch.linalg.qr(random(P, P)).Q, random(P, 3), random(P)
    hessian = rotation @ torch.diag(spectrum) @ rotation.T
    module = torch.nn.Linear(2, 2).double()  # a weight of shape (2, 2) and a bias of shape (2,)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(random(*p.shape))

    def weights(model):
        return torch.cat([p.reshape(-1) for p in model.parameters()])

    def train_loss(model, alpha, _):
        away = weights(model) - mixing @ alpha["target"]
        return 0.5 * away @ hessian @ away

    def val_loss(model, alpha, _):
        w = weights(model)
        return slope @ w if linear_val_loss else (w - slope).cosh().sum() + alpha["target"].square().sum()

    return Specimen(module, train_loss, val_loss, {"target": Hyperparameter(float64(0.4, -0.7, 1.2))})


class TestSpectralIsExactOnAQuadratic:
    """The response of the update rule, state included, against reverse mode."""

    @pytest.mark.parametrize("horizon", [1, 2, 12])
    @EVERY_SGD
    def test_with_all_of_the_eigenpairs(self, rule, horizon):
        case = Case(quadratic(), rule)
        exact, _ = fold(Reverse(), case, horizon, n_warm=3)
        for rank in (P, P + 4):
            found, _ = fold(Greedy(propagator=Spectral(rank=rank), terminal=True), case, horizon, n_warm=3)
            assert_agree(found, exact, rtol=1e-10)

    @pytest.mark.parametrize("spectrum", [OUTLIERS, OUTLIERS - 0.05], ids=["flat", "zero"])
    @EVERY_SGD
    def test_with_the_outliers_over_a_flat_bulk(self, rule, spectrum):
        """Block iterations find two outliers to (bulk/outlier)^20, and the Rayleigh quotient a flat bulk."""
        case = Case(quadratic(spectrum), rule)
        propagator = Spectral(rank=2, n_iterations=10)
        exact, _ = fold(Reverse(), case, 12, n_warm=3)
        assert_agree(fold(Greedy(propagator=propagator, terminal=True), case, 12, n_warm=3)[0], exact, rtol=1e-9)

    @EVERY_SGD
    def test_running_too_where_the_validation_gradient_is_constant(self, rule):
        case = Case(quadratic(linear_val_loss=True), rule)
        exact, _ = fold(Reverse(), case, 12, n_warm=3)
        assert_agree(fold(Greedy(propagator=Spectral(rank=P)), case, 12, n_warm=3)[0], exact, rtol=1e-10)

    def test_without_eigenpairs_where_curvature_is_the_same_everywhere(self):
        case = Case(quadratic(torch.full((P,), 0.7).double()), SGD_RULES["momentum-decay"])
        exact, _ = fold(Reverse(), case, 12, n_warm=3)
        assert_agree(fold(Greedy(propagator=Spectral(rank=0), terminal=True), case, 12, n_warm=3)[0], exact, rtol=1e-10)

    def test_but_not_by_decay_nor_with_too_few_eigenpairs(self):
        """Guards the tests above: agreement has to be earned."""
        case = Case(quadratic(), SGD_RULES["momentum"])
        exact, decay, few = (
            fold(estimator, case, 12, n_warm=3)[0]["target"]
            for estimator in (
                Reverse(),
                Greedy(0.9, terminal=True),
                Greedy(propagator=Spectral(rank=1), terminal=True),
            )
        )
        assert float((decay - exact).norm() / exact.norm()) > 0.1
        assert float((few - exact).norm() / exact.norm()) > 1e-3

    @pytest.mark.parametrize(
        ("rule", "n_steps", "rtol"),
        [
            # The second moment moves by (1 − β2)·T = 1e-11 of itself, and both bias corrections are 1 to rounding.
            (Adam(lr="lr", betas=("beta1", 1 - 1e-12), eps="eps"), 10**14, 1e-8),
            (Adam(lr="lr", betas=("beta1", 1 - 1e-12), eps="eps", weight_decay="weight_decay"), 10**14, 1e-8),
            (AdamW(lr="lr", betas=("beta1", 1 - 1e-12), eps="eps", weight_decay="weight_decay"), 10**14, 1e-8),
            # √v/ε is 1e-3, and moves by less than a hundredth of itself within the horizon.
            (Adam(lr=100.0, betas=(0.7, 0.999), eps=1e3), 1000, 1e-4),
            (AdamW(lr=100.0, betas=(0.7, 0.999), eps=1e3, weight_decay=1e-3), 1000, 1e-4),
        ],
        ids=["Adam", "Adam-decay", "AdamW", "Adam-eps", "AdamW-eps"],
    )
    def test_preconditioned_where_the_second_moment_is_constant(self, rule, n_steps, rtol):
        case = Settled(quadratic(SPREAD.abs()), rule, n_steps)
        exact, _ = fold(Reverse(), case, 10)
        assert_agree(fold(Greedy(propagator=Spectral(rank=P), terminal=True), case, 10)[0], exact, rtol)
        as_if_isotropic, _ = fold(Greedy(propagator=Spectral(rank=0), terminal=True), case, 10)
        assert float((as_if_isotropic["target"] - exact["target"]).norm() / exact["target"].norm()) > 0.05


class Settled(Case):
    """A case that starts late in training, from second moments of different sizes."""

    def __init__(self, specimen, rule, n_steps):
        super().__init__(specimen, rule)
        object.__setattr__(self, "n_steps", n_steps)

    def state_after(self, n_steps, seed=99):
        state = super().state_after(n_steps, seed)
        first = trees.unflatten(torch.linspace(-1, 1, P).double(), state.parameters)
        second = trees.unflatten(torch.linspace(0.2, 2.0, P).double(), state.parameters)
        return TrainState(state.parameters, {}, {"exp_avg": first, "exp_avg_sq": second}, self.n_steps)


class TestScalarPropagators:
    @pytest.mark.parametrize("terminal", [False, True])
    @pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
    def test_they_are_the_gamma_form(self, rule, terminal):
        """Spectral propagation with a bulk of γ^n and no eigenpairs holds the optimizer's state constant, as decay."""
        case = Case(SPECIMENS["minibatches"](), rule)
        gamma, *others = (
            fold(Greedy(**how, terminal=terminal), case, 5, n_warm=4)[0]
            for how in ({"gamma": 0.7}, {"propagator": Decay(0.7)}, {"propagator": Spectral(rank=0, bulk=0.7)})
        )
        for found in others:
            assert_agree(found, gamma, rtol=1e-12)
        zero, last, bulk = (
            fold(Greedy(**how, terminal=terminal), case, 5, n_warm=4)[0]
            for how in ({"gamma": 0.0}, {"propagator": LastStep()}, {"propagator": Spectral(rank=0, bulk=0)})
        )
        assert_agree(last, zero, rtol=0.0)
        if terminal:  # running, T1–T2 looks at one validation batch only, which then is the first
            assert_agree(bulk, zero, rtol=1e-12)

    def test_only_the_last_step_is_paid_for(self):
        case = Case(SPECIMENS["full-batch"](), SGD(lr=0.1))
        _, cost = fold(Greedy(propagator=LastStep()), case, 5)
        assert cost == fold(Greedy(gamma=0.0), case, 5)[1]

    def test_their_maps(self):
        v = {"w": float64(1.0, -2.0)}
        for n in range(4):
            torch.testing.assert_close(Decay(0.5).propagate(None, v, n).parameters["w"], 0.5**n * v["w"])
            assert Decay(0.5).propagate(None, v, n).slots == {}
            assert Decay(0.5).reaches(n)
            assert LastStep().reaches(n) == (n == 0)
        torch.testing.assert_close(LastStep().propagate(None, v, 0).parameters["w"], v["w"])


def test_one_step_needs_no_propagation():
    """h_0 = I whatever the spectrum: an optimizer's moment has not yet had the time to carry anything."""
    case = Case(SPECIMENS["dropout"](), UPDATE_RULES["Adam-decay"])
    spectral, last = (
        fold(estimator, case, 1, n_warm=4)[0] for estimator in (Greedy(propagator=Spectral(rank=3)), Greedy(0.0))
    )
    assert_agree(spectral, last, rtol=1e-12)


def digits():
    """A tanh network on digits, half of them mislabelled, with a weight for every example."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)[:400]
    x, y = torch.as_tensor(images[order]).double() / 16, torch.as_tensor(labels[order])
    wrong, random = torch.rand(200, generator=generator) < 0.5, torch.randint(10, (200,), generator=generator)
    with seeded(0, CPU):
        module = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)).double()

    def train_loss(model, alpha, batch):
        return (alpha["example_logits"].sigmoid() * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean()

    def val_loss(model, alpha, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    logits = {"example_logits": Hyperparameter(torch.zeros(200).double())}
    return Specimen(
        module,
        train_loss,
        val_loss,
        logits,
        [(x[:200], torch.where(wrong, random, y[:200]))],
        [(x[200:], y[200:])],
    )


@pytest.mark.parametrize("rule", [SGD(lr=0.5), SGD(lr=0.1, momentum=0.9)], ids=["SGD", "momentum"])
def test_on_a_network_it_points_where_the_exact_hypergradient_does(rule):
    case = Case(digits(), rule)
    exact, decay, spectral = (
        fold(estimator, case, 40, n_warm=150)[0]["example_logits"]
        for estimator in (Reverse(), Greedy(0.9), Greedy(propagator=Spectral(rank=10)))
    )
    of_decay, of_spectral = (float(F.cosine_similarity(x, exact, dim=0)) for x in (decay, spectral))
    assert of_spectral > 0.9
    assert of_spectral > of_decay + 0.2


@pytest.mark.parametrize("rule", [Adam(lr=0.01), AdamW(lr=0.01)], ids=str)
def test_from_the_first_step_of_adam_on_it_does_not_blow_up(rule):
    """Weights of pixels that are all but always empty have a preconditioner of 1e8; a frozen one makes 1e20 of them."""
    case = Case(digits(), rule)
    exact, decay, spectral = (
        fold(estimator, case, 20)[0]["example_logits"]
        for estimator in (Reverse(), Greedy(0.9), Greedy(propagator=Spectral(rank=10)))
    )
    assert float(spectral.norm()) < 100 * float(exact.norm())
    assert float(F.cosine_similarity(spectral, exact, dim=0)) > float(F.cosine_similarity(decay, exact, dim=0)) > 0.4


@pytest.mark.parametrize("curvature", [-1e9, -3.0, 0.0, 0.4, 50.0, 1e9])
def test_a_preconditioned_response_does_not_grow(curvature):
    case = Case(quadratic(torch.full((P,), curvature).double()), Adam(lr=0.1))
    step = case.products().step(case.state_after(0), case.alpha(), 0, remaining=200)
    known = Spectral(rank=1).begin(None, step, step.validation().gradient)
    for responses in (known.leading[:, 0], known.bulk):
        assert bool(torch.isfinite(responses).all())
        assert float(responses[:, 0].abs().max()) < 20


class TestHorizonAfterHorizon:
    """What is carried on in a descent."""

    def run(self, case, propagator, **settings):
        settings = {"horizon": 3, "evaluate": "online", "evaluate_every": 10**6, "n_outer_steps": 7, **settings}
        settings = {"outer_optimizer": partial(torch.optim.SGD, lr=1e-3), **settings}
        estimator = Greedy(propagator=propagator)
        hyperparameters = case.hyperparameters
        return list(
            descend(case.specimen.problem(), hyperparameters, update_rule=case.rule, estimator=estimator, **settings)
        )

    @pytest.mark.parametrize(
        ("propagator", "n_products"),
        [
            (Spectral(rank=3, n_iterations=2, refresh_every=3), [13, 1, 1, 7, 1, 1, 7]),
            (Spectral(rank=3, n_iterations=2, refresh_every=3, bulk=0.9), [12, 0, 0, 6, 0, 0, 6]),
            (Spectral(rank=2, n_iterations=1, refresh_every=1), [5, 3, 3, 3, 3, 3, 3]),
            (Spectral(rank=0), [1] * 7),
            (Spectral(rank=0, bulk=0.9), [0] * 7),
        ],
        ids=str,
    )
    def test_a_refresh_costs_half_of_the_first_search(self, propagator, n_products):
        steps = self.run(Case(SPECIMENS["full-batch"](), SGD(lr=0.1)), propagator)
        costs = [(after.cost.n_products - before.cost.n_products) // N_EXAMPLES for before, after in pairwise(steps)]
        assert costs == [3 + n for n in n_products]

    def test_the_graph_of_a_first_step_serves_the_search_and_is_built_again_for_its_product(self):
        (_, *steps) = self.run(Case(SPECIMENS["full-batch"](), SGD(lr=0.1)), Spectral(rank=2), n_outer_steps=2)
        costs = [step.cost for step in steps]
        once = Cost(4 * N_EXAMPLES, 3 * 5, 3 * N_EXAMPLES)
        assert costs[0] == replace(once, n_products=(3 + 9) * N_EXAMPLES, n_evaluations=costs[0].n_evaluations)
        assert costs[1].n_products - costs[0].n_products == (3 + 1) * N_EXAMPLES
        assert costs[1].n_train_gradients == 2 * once.n_train_gradients

    def test_a_refresh_goes_on_from_the_eigenpairs_before(self):
        """On a Hessian that stays as it is, one iteration a horizon comes as close as many at once."""
        case, one = Case(quadratic(), SGD(lr=0.1)), Spectral(rank=2, n_iterations=1, refresh_every=1)
        step = case.products().step(case.state_after(0), case.alpha(), 0, keep_graph=True, remaining=4)
        v, known = step.validation().gradient, None
        for _ in range(9):  # ten iterations, as the first search makes two
            known = one.begin(known, step, v)
        at_once = replace(one, n_iterations=5).begin(None, step, v)
        torch.testing.assert_close(known.pairs.values, at_once.pairs.values, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(known.pairs.values, SPREAD[:2], rtol=1e-6, atol=0.0)

    def test_eigenpairs_age_between_refreshes(self):
        case, propagator = Case(quadratic(), SGD(lr=0.1)), Spectral(rank=2, refresh_every=3)
        products, alpha = case.products(), case.alpha()
        known, ages, values = None, [], []
        state = case.state_after(0)
        for _ in range(7):
            step = products.step(state, alpha, 0, remaining=4)
            known = propagator.begin(known, step, step.validation().gradient)
            ages.append(known.age)
            values.append(known.pairs.values)
            state = step.after
        assert ages == [0, 1, 2, 0, 1, 2, 0]
        torch.testing.assert_close(values[2], values[0], rtol=0.0, atol=0.0)
        assert not torch.equal(values[3], values[2])

    def test_responses_are_those_of_the_update_rule_as_it_now_is(self):
        """Between refreshes the learning rate moves on: old eigenpairs, new responses."""
        case = Case(quadratic(), SGD(lr="lr"))
        products, propagator = case.products(), Spectral(rank=P, refresh_every=100)
        known = None
        for shift in (0.0, 3.0):
            alpha = {**case.alpha(), "lr": case.alpha()["lr"] + shift}
            step = products.step(case.state_after(0), alpha, 0, remaining=3)
            known = propagator.begin(known, step, step.validation().gradient)
            lr = case.values(alpha)["lr"]
            expected = torch.stack([(1 - lr * known.pairs.values) ** n for n in range(4)])
            torch.testing.assert_close(known.leading[:, :, 0], expected)

    def test_a_terminal_estimate_carries_nothing_over(self):
        case, estimator = Case(quadratic(), SGD(lr=0.1)), Greedy(propagator=Spectral(rank=2), terminal=True)
        step = case.products().step(case.state_after(0), case.alpha(), 0)
        memory = estimator.observe(estimator.init(case.alpha()), step)
        estimator.estimate(memory, step)
        assert estimator.carry(memory) is None

    @pytest.mark.parametrize("terminal", [False, True])
    @pytest.mark.parametrize("bulk", ["auto", 0.9])
    def test_after_training_that_turned_nan_it_goes_back_and_on(self, bulk, terminal):
        """The Hessian is NaN, too; with one step a horizon, nothing is propagated and all is as with T1–T2."""
        spectral = Greedy(propagator=Spectral(rank=4, bulk=bulk, refresh_every=2), terminal=terminal)
        runs = [
            list(
                descend(
                    wide_cliff(2.6).problem(),
                    wide_cliff(2.6).hyperparameters,
                    update_rule=SGD(lr=0.5),
                    estimator=estimator,
                    horizon=1,
                    n_outer_steps=6,
                    evaluate="online",
                    outer_optimizer=partial(torch.optim.SGD, lr=0.5),
                )
            )
            for estimator in (Greedy(0.0), spectral)
        ]
        expected, found = ([float(step.values["target"]) for step in steps] for steps in runs)
        assert max(expected) > 2.6
        assert found == pytest.approx(expected)
        assert runs[1][-1].stopped == "finished"


def wide_cliff(limit):
    """``cliff`` in four dimensions, with a Hessian that is NaN beyond."""
    specimen = cliff(limit)

    def train_loss(model, alpha, _):
        beyond = float("nan") if bool(alpha["target"] > limit) else 1.0
        return 0.5 * beyond * (model() - alpha["target"]).square().sum()

    return replace(
        specimen,
        module=Weights(0.0, 0.0, 0.0, 0.0),
        train_loss=train_loss,
        val_loss=lambda model, alpha, _: -model().sum(),
    )


class TestSettings:
    @pytest.mark.parametrize("bad", [{"rank": -1}, {"n_iterations": 0}, {"refresh_every": 0}], ids=str)
    def test_counts_out_of_range_are_refused(self, bad):
        message = "rank must be at least 0, n_iterations and refresh_every at least 1, but got Spectral"
        with pytest.raises(ValueError, match=message):
            Spectral(**bad)

    @pytest.mark.parametrize("bulk", [-0.1, 1.1, float("nan"), "rayleigh", None], ids=str)
    def test_a_bulk_that_is_no_decay_is_refused(self, bulk):
        with pytest.raises(ValueError, match=rf"bulk must be 'auto' or a number in \[0, 1\], but got {bulk!r}"):
            Spectral(bulk=bulk)

    @pytest.mark.parametrize("gamma", [0.0, -0.1, 1.1, float("nan")])
    def test_a_decay_out_of_range_is_refused(self, gamma):
        with pytest.raises(ValueError, match=rf"gamma must be in \(0, 1\], but got {gamma}; for 0 there is LastStep"):
            Decay(gamma)

    def test_they_print_and_compare(self):
        assert repr(Spectral(rank=3)) == "Spectral(rank=3, bulk='auto', n_iterations=2, refresh_every=5)"
        assert Spectral(rank=3) == Spectral(rank=3) != Spectral(rank=4)
