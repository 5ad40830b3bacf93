from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from optuna_greedyhg.hypergrad import trees
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter
from optuna_greedyhg.hypergrad.estimators import Greedy, Reverse
from optuna_greedyhg.hypergrad.products import TrainState
from optuna_greedyhg.hypergrad.randomness import seeded
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, AdamW
from tests.hypergrad.test_estimators import fold
from tests.problems import CPU, N_EXAMPLES, SPECIMENS, UPDATE_RULES, Case, Specimen, Weights, cliff, float64
from tests.reference import assert_agree

P = 6
SPREAD = float64(6.0, 3.0, 1.0, 0.4, 0.1, -0.2)
"""Curvatures of every size, one of them negative."""
MASK = float64(1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
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

    @pytest.mark.parametrize("horizon", [1, 2, 5, 12])
    @EVERY_SGD
    def test_with_as_many_pairs_as_weights(self, rule, horizon):
        case = Case(quadratic(), rule)
        exact, _ = fold(Reverse(), case, horizon, n_warm=3)
        for rank in (P, P + 4):
            found, _ = fold(Greedy(propagator=Spectral(rank=rank), terminal=True), case, horizon, n_warm=3)
            assert_agree(found, exact, rtol=1e-9)

    @pytest.mark.parametrize("spectrum", [OUTLIERS, OUTLIERS - 0.05], ids=["flat", "zero"])
    @EVERY_SGD
    def test_with_three_pairs_where_there_are_three_curvatures(self, rule, spectrum):
        case = Case(quadratic(spectrum), rule)
        exact, _ = fold(Reverse(), case, 12, n_warm=3)
        found, _ = fold(Greedy(propagator=Spectral(rank=3), terminal=True), case, 12, n_warm=3)
        assert_agree(found, exact, rtol=1e-9)

    @pytest.mark.parametrize("refresh_every", [1, 5, 100])
    @EVERY_SGD
    def test_running_too_where_the_validation_gradient_is_constant(self, rule, refresh_every):
        case = Case(quadratic(linear_val_loss=True), rule)
        exact, _ = fold(Reverse(), case, 12, n_warm=3)
        propagator = Spectral(rank=P, refresh_every=refresh_every)
        assert_agree(fold(Greedy(propagator=propagator), case, 12, n_warm=3)[0], exact, rtol=1e-9)

    def test_without_pairs_where_curvature_is_the_same_everywhere(self):
        case = Case(quadratic(torch.full((P,), 0.7).double()), SGD_RULES["momentum-decay"])
        exact, _ = fold(Reverse(), case, 12, n_warm=3)
        assert_agree(fold(Greedy(propagator=Spectral(rank=0), terminal=True), case, 12, n_warm=3)[0], exact, rtol=1e-10)

    def test_but_not_by_decay_nor_with_too_few_pairs(self):
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
@pytest.mark.parametrize(("n_warm", "at_least"), [(0, 0.4), (20, 0.9)])
def test_adam_is_rough_in_its_first_steps_and_good_soon(rule, n_warm, at_least):
    """Weights of pixels that are all but always empty have a preconditioner of 1e8; a frozen one makes 1e20 of them."""
    case = Case(digits(), rule)
    exact, decay, spectral = (
        fold(estimator, case, 20, n_warm)[0]["example_logits"]
        for estimator in (Reverse(), Greedy(0.9), Greedy(propagator=Spectral(rank=10)))
    )
    assert float(spectral.norm()) < 100 * float(exact.norm())
    assert float(F.cosine_similarity(spectral, exact, dim=0)) > at_least
    assert 0.5 < float(F.cosine_similarity(decay, exact, dim=0)) < 0.6


@pytest.mark.parametrize("curvature", [-1e9, -3.0, 0.0, 0.4, 50.0, 1e9])
def test_a_preconditioned_response_does_not_grow(curvature):
    case = Case(quadratic(torch.full((P,), curvature).double()), Adam(lr=0.1))
    step = case.products().step(case.state_after(0), case.alpha(), 0, remaining=200)
    response = Spectral(rank=1).begin(None, step, step.validation().gradient, 200).response
    responses = torch.stack([response.after(range(n, n + 1)) for n in range(201)])
    assert responses.shape == (201, 2, 2)  # along one direction and in the rest, on the weights and the moment
    assert bool(torch.isfinite(responses).all())
    assert float(responses[:, :, 0].abs().max()) < 20


EDGES = {
    "SGD": SGD(lr=0.1),
    "momentum": SGD(lr=0.1, momentum=0.9),
    "nesterov": SGD(lr=0.1, momentum=0.9, nesterov=True),
}


def responses_to(curvature, rule, n):
    """To 0, 1, ..., n steps, on the weights."""
    case = Case(quadratic(torch.full((P,), curvature).double()), rule)
    step = case.products().step(case.state_after(0), case.alpha(), 0, remaining=n)
    response = Spectral(rank=1).begin(None, step, step.validation().gradient, n).response
    return torch.stack([response.after(range(k, k + 1))[0, 0] for k in range(n + 1)])


@pytest.mark.parametrize("rule", EDGES)
def test_beyond_the_edge_of_stability_a_response_is_held(rule):
    responses = responses_to(50.0, EDGES[rule], 200)
    assert float(responses.abs().max()) < 20
    assert float(responses[-20:].abs().max()) > 0.1  # and does not vanish


@pytest.mark.parametrize("curvature", [19.0, -3.0])
def test_below_the_edge_and_along_negative_curvature_it_is_what_a_step_does(curvature):
    expected = (1 - 0.1 * curvature) ** torch.arange(31).double()
    torch.testing.assert_close(responses_to(curvature, EDGES["SGD"], 30), expected)


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
            (Spectral(rank=2), 2),
            (Spectral(rank=5), 3),  # as many as there are steps to come
            (Spectral(rank=2, refresh_every=1), 4),  # nothing comes after the last step
            (Spectral(rank=2, refresh_every=2), 2),
            (Spectral(rank=2, bulk=0.9), 2),
            (Spectral(rank=0), 1),
            (Spectral(rank=0, bulk=0.9), 0),
        ],
        ids=str,
    )
    def test_what_it_costs(self, propagator, n_products):
        """Products only: the training step's own graph serves them and v·B."""
        steps = self.run(Case(SPECIMENS["full-batch"](), SGD(lr=0.1)), propagator)
        for before, after in pairwise(steps):
            assert after.cost.n_products - before.cost.n_products == (3 + n_products) * N_EXAMPLES
            assert after.cost.n_train_gradients - before.cost.n_train_gradients == 3 * N_EXAMPLES

    @pytest.mark.parametrize(("n_batches", "expected"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 2]), (4, [0, 2])])
    def test_the_last_batches_are_measured_together(self, n_batches, expected):
        """Of three batches in turn, three steps a horizon: the first knows one; the second, those of the first, too."""
        case = Case(SPECIMENS["minibatches"](), SGD(lr=0.1))
        sizes = [len(batch[0]) for batch in case.specimen.train_batches]
        plain = self.run(case, Spectral(rank=0, bulk=0.9, n_batches=1), n_outer_steps=2)
        steps = self.run(case, Spectral(rank=1, n_batches=n_batches), n_outer_steps=2)
        assert sizes == [4, 3, 5]
        extra = [a.cost.n_train_gradients - b.cost.n_train_gradients for a, b in zip(steps, plain, strict=True)][1:]
        assert extra[0] == 0
        assert extra[1] == sum(sizes[::-1][: expected[1]])

    def test_the_hessian_is_that_of_the_mean_over_batches(self):
        """Two batches of which each is blind to what the other sees."""
        specimen = quadratic(SPREAD.abs())
        halves = [quadratic(2 * SPREAD.abs() * mask) for mask in (MASK, 1 - MASK)]

        def train_loss(model, alpha, batch):
            return halves[batch].train_loss(model, alpha, batch)

        case = Case(replace(specimen, train_loss=train_loss, train_batches=[0, 1]), SGD(lr=0.1))
        products, propagator, known, state = case.products(), Spectral(rank=P), None, case.state_after(0)
        for batch in (0, 1):
            step = products.step(state, case.alpha(), batch, remaining=20)
            known = propagator.begin(known and propagator.carry(known), step, step.validation().gradient, 20)
            state = step.after
        along = known.response.after(range(1, 2))[:-1, 0]
        torch.testing.assert_close(along.sort().values, (1 - 0.1 * SPREAD.abs()).sort().values)

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
        spectral = Greedy(propagator=Spectral(rank=4, bulk=bulk), terminal=terminal)
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
    @pytest.mark.parametrize(("name", "low"), [("rank", 0), ("refresh_every", 1), ("n_batches", 1)])
    def test_counts_out_of_range_are_refused(self, name, low):
        with pytest.raises(ValueError, match=f"{name} must be at least {low}, but got {low - 1}"):
            Spectral(**{name: low - 1})

    @pytest.mark.parametrize("bulk", [-0.1, 1.1, float("nan"), "rayleigh", None], ids=str)
    def test_a_bulk_that_is_no_decay_is_refused(self, bulk):
        with pytest.raises(ValueError, match=rf"bulk must be 'auto' or a number in \[0, 1\], but got {bulk!r}"):
            Spectral(bulk=bulk)

    def test_they_print_and_compare(self):
        assert repr(Spectral(rank=3)) == "Spectral(rank=3, bulk='auto', refresh_every=10, n_batches=4)"
        assert Spectral(rank=3) == Spectral(rank=3) != Spectral(rank=4)
