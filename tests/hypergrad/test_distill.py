from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.descent import descend
from optuna_greedyhg.hypergrad.estimators import FirstOrder, Greedy, Reverse, fold
from optuna_greedyhg.hypergrad.estimators.distill import HyperDistill, Sample, fitted
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests import reference
from tests.problems import CPU, N_EXAMPLES, SPECIMENS, UPDATE_RULES, Case, bowl, classification, float64, isotropic, toy
from tests.reference import assert_agree

SEED = 4  # draws another batch than the last
EVERY_RULE = pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())


class Horizons:
    """Horizons of ``length`` steps, one after the other, from ``n_warm`` steps into training."""

    def __init__(self, case, length, n_warm=0):
        self.case, self.length, self.n_steps = case, length, n_warm
        self.products, self.alpha = case.products(), case.alpha()
        self.state = case.state_after(n_warm)
        self.carried = None

    def fold(self, estimator):
        """The next horizon's estimate; training goes on from its end."""
        self.states, first = [self.state], self.n_steps

        def make_step(state, t, keep):
            batch, remaining = self.case.train_batch(first + t - 1), self.length - t
            step = self.products.step(state, self.alpha, batch, keep_graph=keep, remaining=remaining)
            self.states.append(step.after)
            return step

        with randomness.seeded(SEED, CPU):
            folded = fold(estimator, self.carried, self.alpha, self.state, self.length, make_step)
        self.state, self.carried, self.n_steps = folded.end.after, folded.carried, first + self.length
        return folded.estimate


def first_horizon(estimator, case, length, n_warm=0):
    return Horizons(case, length, n_warm).fold(estimator)


def draws_of(case, horizon, gamma, seed):
    """The draws of a horizon of that length that starts with this seed."""
    estimator, products, alpha = HyperDistill(gamma), case.products(), case.alpha()
    with randomness.seeded(seed, CPU):
        step = products.step(products.initial_state(), alpha, case.train_batch(0), remaining=horizon - 1)
        return estimator.observe(estimator.init(alpha), step).draws


class TestEstimate:
    @EVERY_RULE
    @pytest.mark.parametrize(("specimen", "gamma"), [("minibatches", 0.6), ("batchnorm", 0.9)], ids=str)
    def test_it_agrees_with_all_means_and_sums_written_out(self, rule, specimen, gamma):
        case, n_warm = Case(SPECIMENS[specimen](), rule), 4
        horizons = Horizons(case, 5, n_warm)
        estimate = horizons.fold(HyperDistill(gamma))
        draws = draws_of(case, 5, gamma, SEED)
        expected, theta = reference.distilled(case, horizons.states, case.alpha(), n_warm, gamma, draws)
        assert_agree(estimate, expected, rtol=1e-8)
        assert horizons.carried[0] == pytest.approx(theta, rel=1e-8)

    @EVERY_RULE
    @pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
    def test_it_is_exact_over_one_step(self, rule, gamma):
        case = Case(SPECIMENS["dropout"](), rule)
        expected = first_horizon(Reverse(), case, 1, n_warm=4)
        assert_agree(first_horizon(HyperDistill(gamma), case, 1, n_warm=4), expected, rtol=1e-9)

    def test_without_decay_it_has_the_direction_of_t1_t2(self):
        case = Case(SPECIMENS["dropout"](), UPDATE_RULES["momentum"])
        direct = first_horizon(FirstOrder(), case, 4)
        last = first_horizon(Greedy(0.0), case, 4)
        horizons = Horizons(case, 4)
        estimate = horizons.fold(HyperDistill(0.0))
        expected = {name: x + horizons.carried[0] * (last[name] - x) for name, x in direct.items()}
        assert_agree(estimate, expected, rtol=1e-9)

    @pytest.mark.parametrize("gamma", [0.5, 0.8, 1.0])
    def test_where_all_products_are_equal_only_the_length_may_be_wrong(self, gamma):
        """With A = (1 − lr)·I, g_s is c_s of 1 − lr, and u_s the same whatever the weights: θ = Σ c·c' / Σ c²."""
        case, horizon = Case(isotropic(), SGD(lr=0.2)), 6
        c, exact = (torch.tensor([sum(g**i for i in range(s)) for s in range(1, horizon + 1)]) for g in (gamma, 0.8))
        theta = float(c @ exact / (c @ c))
        expected = first_horizon(Reverse(), case, horizon)["angle"] * theta * c[-1] / exact[-1]
        assert_agree(first_horizon(HyperDistill(gamma), case, horizon), {"angle": expected}, rtol=1e-6)
        if gamma == 0.8:
            assert theta == pytest.approx(1.0)

    def test_it_finds_the_toys_optimum(self):
        case = Case(toy(), SGD(lr=0.1))
        *_, last = descend(
            case.specimen.problem(),
            case.hyperparameters,
            update_rule=case.rule,
            estimator=HyperDistill(fit_every=10),
            horizon=5,
            n_outer_steps=30,
            outer_optimizer=partial(torch.optim.SGD, lr=0.05),
            evaluate="online",
            evaluate_every=10**6,
        )
        assert last.val_loss < 0.02  # where T1–T2 is at 1.6


class TestFit:
    def test_it_recovers_the_factor(self):
        generator = torch.Generator().manual_seed(0)
        trees = [{"a": torch.randn(3, generator=generator), "b": torch.randn((), generator=generator)} for _ in "1234"]
        samples = [
            Sample(c, u, {k: -0.7 * c * x for k, x in u.items()}) for c, u in zip((1, 2, 3, 4), trees, strict=True)
        ]
        assert fitted(samples, otherwise=5.0) == pytest.approx(-0.7)

    def test_it_weighs_samples_as_least_squares_do(self):
        """min (1 − θ)² + (0 − 2·3·θ)², where the second sample's product is 3 and its c is 2."""
        samples = [Sample(1.0, {"a": float64(1.0)}, {"a": float64(1.0)})]
        samples.append(Sample(2.0, {"a": float64(3.0)}, {"a": float64(0.0)}))
        assert fitted(samples, otherwise=5.0) == pytest.approx(1 / 37)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
    def test_samples_that_are_not_finite_are_left_out(self, bad):
        good = Sample(2.0, {"a": float64(1.0, 0.0)}, {"a": float64(4.0, 1.0)})
        beyond = Sample(1.0, {"a": float64(bad, 1.0)}, {"a": float64(-bad, 1.0)})
        assert fitted([beyond, good, beyond], otherwise=5.0) == 2.0

    @pytest.mark.parametrize("u", [0.0, float("nan")])
    def test_without_a_sample_that_says_something_it_stays_what_it_was(self, u):
        assert fitted([], otherwise=5.0) == 5.0
        assert fitted([Sample(1.0, {"a": float64(u)}, {"a": float64(1.0)})] * 3, otherwise=5.0) == 5.0

    def test_it_is_made_every_so_many_horizons_and_carried_in_between(self):
        horizons, estimator = Horizons(Case(toy(), SGD(lr=0.1)), 4), HyperDistill(0.9, fit_every=3)
        carried = []
        for _ in range(7):
            horizons.fold(estimator)
            carried.append(horizons.carried)
        thetas, ages = zip(*carried, strict=True)
        assert ages == (1, 2, 3, 1, 2, 3, 1)
        assert thetas[0] == thetas[1] == thetas[2]
        assert thetas[3] == thetas[4] == thetas[5]
        assert min(abs(thetas[0] - thetas[3]), abs(thetas[3] - thetas[6])) > 1e-6

    def test_the_estimate_has_the_length_that_is_carried(self):
        estimates = []
        for theta in (1.0, -2.5):
            horizons = Horizons(Case(bowl(), SGD(lr=0.3)), 4)
            horizons.carried = (theta, 1)
            estimates.append(horizons.fold(HyperDistill(0.9))["curvature"])
        torch.testing.assert_close(estimates[1], -2.5 * estimates[0])

    def test_a_fit_that_fails_keeps_what_was_there(self):
        """At w = 0, the products with ½·α·w² are all zero."""
        horizons = Horizons(Case(bowl(start=0.0), SGD(lr=0.3)), 4)
        horizons.carried = (0.3, 50)
        assert horizons.fold(HyperDistill(0.9))["curvature"] == 0
        assert horizons.carried == (0.3, 1)


class TestDraw:
    @pytest.mark.parametrize("gamma", [0.5, 1.0])
    def test_each_batch_has_the_probability_that_it_has_in_the_mean(self, gamma):
        case, horizon, n_seeds = Case(bowl(), SGD(lr=0.1)), 3, 300
        all_draws = [draws_of(case, horizon, gamma, seed) for seed in range(n_seeds)]
        for s in range(1, horizon + 1):
            counts = Counter(draws[s - 1] for draws in all_draws)
            shares = torch.tensor([gamma**n for n in range(s)]) / sum(gamma**n for n in range(s))
            assert set(counts) == set(range(s))
            for n, share in enumerate(shares.tolist()):
                assert counts[n] / n_seeds == pytest.approx(share, abs=3 * (share * (1 - share) / n_seeds) ** 0.5)

    def test_it_does_not_depend_on_the_numbers_that_training_draws(self):
        """Where the first of these is small, the draw would always be the same, if it were made from it."""
        case, draws = Case(bowl(), SGD(lr=0.1)), set()
        for seed in range(200):
            with randomness.seeded(seed, CPU):
                number = float(torch.rand((), dtype=torch.float64))
            if number < 0.2:
                draws.add(draws_of(case, 3, 1.0, seed)[-1])
        assert draws == {0, 1, 2}

    @pytest.mark.parametrize("rule", [UPDATE_RULES["momentum"], UPDATE_RULES["Adam"]], ids=["momentum", "Adam"])
    def test_training_does_not_notice(self, rule):
        """Dropout and shuffling draw the same as with another estimator that validates as often, in every horizon."""

        def trained_with(estimator):
            case = Case(classification(nn.Dropout(0.4)), rule)
            train, val = (
                TensorDataset(*batches[0]) for batches in (case.specimen.train_batches, case.specimen.val_batches)
            )
            problem = case.specimen.problem(
                train_batches=DataLoader(train, batch_size=5, shuffle=True),
                val_batches=DataLoader(val, batch_size=2, shuffle=True),
            )
            steps = descend(
                problem,
                case.hyperparameters,
                update_rule=rule,
                estimator=estimator,
                horizon=4,
                n_outer_steps=4,
                outer_optimizer=partial(torch.optim.SGD, lr=0.0),
                evaluate="online",
                evaluate_every=1,
            )
            return [(step.val_loss, step.evaluation.scores["loss"]) for step in steps][1:]

        assert trained_with(HyperDistill(fit_every=2)) == trained_with(Greedy(0.0))


class TestCost:
    def test_of_horizons_with_a_fit_and_without(self):
        horizons, horizon = Horizons(Case(classification(), UPDATE_RULES["Adam"]), 5), 5
        estimator, seen = HyperDistill(fit_every=2), []
        for _ in range(3):
            before = replace(horizons.products.cost)
            horizons.fold(estimator)
            after = horizons.products.cost
            seen.append((after.n_train_gradients - before.n_train_gradients, after.n_products - before.n_products))
        with_fit = ((horizon + 1 + 2 * horizon) * N_EXAMPLES, (1 + 3 * horizon - 1) * N_EXAMPLES)
        assert seen == [with_fit, ((horizon + 1) * N_EXAMPLES, N_EXAMPLES), with_fit]
        assert horizons.products.cost.n_val_gradients == 3 * 5

    def test_batches_are_kept_only_for_a_fit(self):
        estimator, alpha = HyperDistill(), {"a": float64(0.0)}
        assert estimator.init(alpha).line is not None
        assert estimator.resume(alpha, (1.0, 49)).line is None
        assert estimator.resume(alpha, (1.0, 50)).line is not None


@pytest.mark.parametrize(("gamma", "fit_every"), [(-0.1, 1), (1.1, 1), (float("nan"), 1), (0.9, 0)])
def test_numbers_out_of_range_are_refused(gamma, fit_every):
    with pytest.raises(ValueError, match=rf"fit_every at least 1, but got HyperDistill\(gamma={gamma}, fit_every"):
        HyperDistill(gamma, fit_every)


def test_restarts_do_not_bias_it():
    assert not HyperDistill().biased_in_restart_mode
