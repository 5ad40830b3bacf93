import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.descent import DescentOptions, descend
from optuna_greedyhg.hypergrad.domains import Hyperparameter, Interval
from optuna_greedyhg.hypergrad.estimators import FirstOrder, Greedy, Reverse
from optuna_greedyhg.hypergrad.evaluation import Online, Retrain
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam
from tests import reference
from tests.problems import (
    N_EXAMPLES,
    N_FEATURES,
    SPECIMENS,
    UPDATE_RULES,
    Case,
    classification,
    cliff,
    float64,
    toy,
    with_numbers,
)
from tests.reference import assert_agree

T1T2 = Greedy(gamma=0.0)
FREE = {"evaluate": "online", "evaluate_every": 10**6}
"""Evaluations that cost next to nothing."""


def outer_sgd(lr):
    return partial(torch.optim.SGD, lr=lr)


def run(case, estimator, problem=None, **settings):
    hyperparameters = case.hyperparameters
    settings = {**FREE, **settings}
    problem = problem or case.specimen.problem()
    return list(descend(problem, hyperparameters, update_rule=case.rule, estimator=estimator, **settings))


def walk(*, limit=math.inf, length=1.0, problem=None, **settings):
    """A descent that moves α from 0 by ``length`` in every outer step, and trains NaN beyond ``limit``."""
    case = Case(cliff(limit), SGD(lr=0.5))
    replaced = case.specimen.problem(**problem) if problem else None
    return run(case, T1T2, replaced, **{"horizon": 1, "outer_optimizer": outer_sgd(length / 0.5), **settings})


def noise(generator):
    """Random features of two classes, and the examples' positions."""
    x = torch.randn(N_EXAMPLES, N_FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, 0] > 0).long(), torch.arange(N_EXAMPLES))


def coordinates(case, values):
    return {name: h.domain.to_coordinate(values[name]) for name, h in case.hyperparameters.items()}


def targets(steps):
    return [float(step.values["target"]) for step in steps]


class TestTrajectory:
    @pytest.mark.parametrize(
        "optimizer",
        [
            outer_sgd(2.0),
            partial(torch.optim.SGD, lr=1.0, momentum=0.9),
            partial(torch.optim.Adam, lr=0.1),
            partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
            partial(torch.optim.RMSprop, lr=0.05),
        ],
        ids=["SGD", "momentum", "Adam", "AdamW", "RMSprop"],
    )
    def test_it_agrees_with_the_textbook_loop_for_any_torch_optimizer(self, optimizer):
        case = Case(SPECIMENS["dropout"](), UPDATE_RULES["momentum"])
        steps = run(case, Greedy(0.9), horizon=4, n_outer_steps=5, outer_optimizer=optimizer, seed=10)
        expected = reference.online_descent(case, 0.9, 4, optimizer, seeds=range(11, 16))
        for step, values in zip(steps[1:], expected, strict=True):
            assert_agree(step.values, values, rtol=1e-9)

    def test_the_norm_reported_is_that_of_the_hypergradient(self):
        case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["Adam"])
        step = run(case, Reverse(), horizon=4, n_outer_steps=1)[1]
        exact = reference.exact(case, case.state_after(0), case.alpha(), 0, 4)
        norm = torch.cat([x.reshape(-1) for x in exact.values()]).norm()
        assert step.hypergradient_norm == pytest.approx(float(norm), rel=1e-9)

    @pytest.mark.parametrize("rule", [UPDATE_RULES["momentum"], UPDATE_RULES["AdamW"]], ids=["momentum", "AdamW"])
    @pytest.mark.parametrize("restart", [False, True])
    def test_training_goes_on_online_and_starts_again_in_restart_mode(self, rule, restart):
        """Weights and optimizer state: with α at rest, training is that of torch.optim."""
        case = Case(classification(), rule)
        steps = run(case, T1T2, horizon=3, n_outer_steps=4, outer_optimizer=outer_sgd(0.0), restart=restart)
        for k, step in enumerate(steps[1:], start=1):
            n_steps = 3 if restart else 3 * k
            expected = reference.val_loss_by_torch_optim(case, case.alpha(), n_steps)
            assert step.val_loss == pytest.approx(expected, rel=1e-10)

    def test_it_goes_on_from_the_weights_that_evaluations_have_trained(self):
        """After the seed's and after that of step 2; from step 1 to 2 it is the same training."""
        case = Case(classification(), UPDATE_RULES["momentum"])
        settings = {"horizon": 3, "n_outer_steps": 3, "evaluate": Retrain(5), "evaluate_every": 2}
        seed, first, second, third = run(case, Reverse(), outer_optimizer=outer_sgd(0.1), **settings)

        def norm(state, values):
            exact = reference.exact(case, state, coordinates(case, values), 0, 3)
            return pytest.approx(float(torch.cat([x.reshape(-1) for x in exact.values()]).norm()), rel=1e-9)

        assert first.hypergradient_norm == norm(seed.evaluation.state, seed.values)
        assert second.hypergradient_norm != norm(seed.evaluation.state, first.values)
        assert third.hypergradient_norm == norm(second.evaluation.state, second.values)

    @pytest.mark.parametrize("settings", [{"restart": True}, {"rebase": False}], ids=str)
    def test_or_from_the_initial_weights(self, settings):
        case = Case(classification(), UPDATE_RULES["momentum"])
        exact = reference.exact(case, case.state_after(0), case.alpha(), 0, 3)
        norm = float(torch.cat([x.reshape(-1) for x in exact.values()]).norm())
        step = run(case, Reverse(), horizon=3, n_outer_steps=1, evaluate=Retrain(5), **settings)[1]
        assert step.hypergradient_norm == pytest.approx(norm, rel=1e-9)

    def test_without_an_estimator_the_seed_is_evaluated_and_that_is_all(self):
        case = Case(SPECIMENS["dropout"](), UPDATE_RULES["momentum"])
        (step,) = run(case, None, evaluate=Retrain(6), n_outer_steps=5, seed=3)
        assert step.stopped == "finished"
        *_, module = reference.by_torch_optim(case, case.alpha(), 6, seed=3)
        torch.testing.assert_close(step.best.state.parameters, dict(module.named_parameters()))

    def test_without_an_estimator_online_training_goes_on_under_the_seed(self):
        case = Case(classification(), with_numbers(UPDATE_RULES["Adam"]))
        steps = run(case, None, n_outer_steps=4, horizon=3)
        assert_agree(steps[-1].values, steps[0].values, rtol=1e-15)
        *_, module = reference.by_torch_optim(case, case.alpha(), 12)
        trained = steps[-1].evaluation.state.parameters
        torch.testing.assert_close(trained, dict(module.named_parameters()), rtol=1e-10, atol=1e-12)

    def test_zero_outer_steps_are_the_seed_alone(self):
        (step,) = walk(n_outer_steps=0)
        assert (step.index, step.stopped) == (0, "finished")

    @pytest.mark.parametrize("max_norm", [0.05, 1e6])
    def test_clipping_shortens_long_steps_only_and_keeps_their_direction(self, max_norm):
        case = Case(toy(), SGD(lr=0.1))
        settings = {"horizon": 5, "n_outer_steps": 1, "outer_optimizer": outer_sgd(1.0)}
        free = run(case, Greedy(0.9), **settings)[1]
        clipped = run(case, Greedy(0.9), **settings, max_hypergradient_norm=max_norm)[1]
        seed = case.alpha()["target"]
        long, short = free.values["target"] - seed, clipped.values["target"] - seed
        norm = float(long.norm())
        torch.testing.assert_close(short, long * min(1.0, max_norm / norm))
        assert free.hypergradient_norm == clipped.hypergradient_norm == pytest.approx(norm)


class TestToy:
    """A quadratic training loss whose minimum is α, a validation loss with local minima; the best α is 0."""

    def end(self, estimator, lr, horizon, n_outer_steps=100, **settings):
        case = Case(toy(), SGD(lr=0.1))
        settings = {"horizon": horizon, "n_outer_steps": n_outer_steps, "outer_optimizer": outer_sgd(lr), **settings}
        return run(case, estimator, **settings)[-1].val_loss

    def test_online_greedy_keeps_up_with_the_exact_gradient_far_ahead_of_t1_t2(self):
        greedy, exact, t1_t2 = (self.end(e, lr=0.01, horizon=5) for e in (Greedy(0.9), Reverse(), T1T2))
        assert exact < greedy < 2e-3
        assert t1_t2 > 2.5

    @pytest.mark.parametrize("horizon", [5, 10, 20])
    def test_online_greedy_reaches_the_optimum_whatever_the_horizon(self, horizon):
        assert self.end(Greedy(0.9), lr=0.1, horizon=horizon) < 1e-6

    def test_restarting_biases_greedy_and_not_the_others(self):
        with pytest.warns(UserWarning, match=r"Greedy\(gamma=0.9\).*restart=False, Greedy\(gamma=0.0\) or Reverse"):
            greedy = self.end(Greedy(0.9), lr=0.1, horizon=10, restart=True)
        assert greedy == pytest.approx(7.57, abs=0.01)
        assert self.end(Reverse(), lr=0.1, horizon=10, restart=True) < 1e-6
        assert self.end(T1T2, lr=0.1, horizon=10, restart=True, n_outer_steps=250) < 1e-3


class TestEvaluations:
    def test_the_seed_is_evaluated_exactly_where_it_was_given(self):
        case = Case(cliff(math.inf), SGD(lr="lr"))
        seeds = {"lr": float64(0.5), "target": float64(0.1)}
        hyperparameters = {
            "lr": Hyperparameter(seeds["lr"], Interval(1e-3, 0.5, log=True)),  # the coordinate cannot hold the bound
            "target": Hyperparameter(seeds["target"], Interval(0.0, 0.3)),
        }
        first = next(descend(case.specimen.problem(), hyperparameters, update_rule=case.rule, estimator=Reverse()))
        for values in (first.values, first.evaluation.values, first.best.values):
            torch.testing.assert_close(values, seeds, rtol=0.0, atol=0.0)
        assert math.isnan(first.val_loss)

    @pytest.mark.parametrize(
        ("every", "n_outer_steps", "expected"), [(1, 3, [0, 1, 2, 3]), (3, 7, [0, 3, 6, 7]), (5, 2, [0, 2])]
    )
    def test_they_are_made_on_a_grid_at_the_seed_and_at_the_end(self, every, n_outer_steps, expected):
        steps = walk(n_outer_steps=n_outer_steps, evaluate_every=every, evaluate=Retrain(1))
        made = [step for step in steps if step.evaluation is not None]
        assert [step.index for step in made] == expected
        assert [step.evaluation.outer_step for step in made] == expected
        assert targets(made) == expected == [float(step.evaluation.values["target"]) for step in made]
        assert [step.stopped for step in steps] == [None] * n_outer_steps + ["finished"]

    def test_retraining_judges_alpha_after_the_step_by_the_declared_training(self):
        case = Case(SPECIMENS["batchnorm"](), UPDATE_RULES["Adam"])
        settings = {"horizon": 3, "n_outer_steps": 2, "evaluate_every": 1, "seed": 4}
        for step in run(case, Greedy(0.9), evaluate=Retrain(5), **settings):
            *_, module = reference.by_torch_optim(case, coordinates(case, step.evaluation.values), 5, seed=4)
            weights = step.evaluation.state.parameters
            torch.testing.assert_close(weights, dict(module.named_parameters()), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(step.evaluation.values, step.values, rtol=1e-12, atol=0.0)

    def test_retraining_takes_as_many_steps_as_the_descent_unless_told(self):
        case = Case(cliff(math.inf), SGD(lr=0.5))
        steps = run(case, T1T2, horizon=3, n_outer_steps=4, evaluate="retrain")
        torch.testing.assert_close(
            steps[-1].evaluation.state.parameters["w"], steps[-1].values["target"] * (1 - 0.5**12)
        )

    @pytest.mark.parametrize("evaluate", ["online", Online()])
    def test_online_evaluations_judge_the_weights_carried_along(self, evaluate):
        steps = walk(n_outer_steps=4, evaluate=evaluate, evaluate_every=1)
        w, weights = 0.0, []
        for alpha in (0.0, 1.0, 2.0, 3.0):
            w = 0.5 * w + 0.5 * alpha
            weights.append(w)
        assert [float(step.evaluation.state.parameters["w"]) for step in steps[1:]] == pytest.approx(weights)
        assert [step.evaluation.scores["loss"] for step in steps[1:]] == pytest.approx([-w for w in weights])
        assert [float(step.evaluation.values["target"]) for step in steps[1:]] == [0.0, 1.0, 2.0, 3.0]

    @pytest.mark.parametrize(("sign", "maximize"), [(1.0, False), (-1.0, True)], ids=["minimize", "maximize"])
    def test_the_best_by_the_metric_comes_out_and_not_the_last(self, sign, maximize):
        metrics = {"distance": lambda model, alpha, _: sign * (alpha["target"] - 4.0) ** 2}
        steps = walk(
            n_outer_steps=9,
            evaluate_every=1,
            evaluate=Retrain(1),
            problem={"metrics": metrics},
            metric="distance",
            maximize=maximize,
        )
        assert [step.best.outer_step for step in steps] == [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
        assert targets(steps)[-1] == 9.0
        assert float(steps[-1].best.values["target"]) == 4.0
        assert steps[-1].best.scores["distance"] == 0.0

    @pytest.mark.parametrize("maximize", [False, True])
    def test_a_score_of_nan_never_wins(self, maximize):
        def odd(model, alpha, _):
            """NaN at the seed and from 3 on."""
            return alpha["target"] if 0.5 < alpha["target"] < 2.5 else float("nan") * alpha["target"]

        settings = {"n_outer_steps": 5, "evaluate_every": 1, "metric": "odd", "maximize": maximize}
        best = walk(problem={"metrics": {"odd": odd}}, **settings)[-1].best
        assert float(best.values["target"]) == (2.0 if maximize else 1.0)

    def test_the_first_of_equals_is_kept(self):
        steps = walk(problem={"metrics": {"same": lambda *_: 1.0}}, metric="same", n_outer_steps=3, evaluate_every=1)
        assert steps[-1].best.outer_step == 0

    @pytest.mark.parametrize(("patience", "every", "stop"), [(1, 1, 5), (3, 1, 7), (2, 2, 8), (None, 1, 20)])
    def test_patience_counts_evaluations_since_the_best(self, patience, every, stop):
        metrics = {"distance": lambda model, alpha, _: (alpha["target"] - 4.0) ** 2}
        settings = {"n_outer_steps": 20, "evaluate_every": every, "metric": "distance", "patience": patience}
        last = walk(problem={"metrics": metrics}, evaluate=Retrain(1), **settings)[-1]
        assert (last.index, last.stopped) == (stop, "finished" if patience is None else "patience")
        assert float(last.best.values["target"]) == 4.0

    def test_patience_starts_anew_with_every_new_best(self):
        scores = dict(enumerate([5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0, 6.0]))
        metrics = {"jagged": lambda model, alpha, _: scores[round(float(alpha["target"]))]}
        settings = {"n_outer_steps": 7, "evaluate_every": 1, "metric": "jagged", "patience": 2}
        last = walk(problem={"metrics": metrics}, evaluate=Retrain(1), **settings)[-1]
        assert (last.index, last.stopped, last.best.outer_step) == (6, "patience", 4)

    def test_the_costs_of_everything_add_up(self):
        case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["momentum"])
        settings = {"horizon": 3, "n_outer_steps": 3, "evaluate": Retrain(2), "evaluate_every": 2}
        steps = run(case, Greedy(0.9), **settings)
        evaluation = Cost(n_train_gradients=4 + 3, n_evaluations=8)
        outer = [Cost(n_train_gradients=12, n_products=12, n_val_gradients=n) for n in (3 + 5 + 3, 5 + 3 + 5, 11)]
        expected = [evaluation]
        for k, step in enumerate(outer, start=1):
            expected.append(expected[-1] + step + (evaluation if k in (2, 3) else Cost()))
        assert [step.cost for step in steps] == expected


class TestDivergence:
    def test_it_goes_back_halves_its_steps_and_goes_on(self):
        steps = walk(limit=2.6, n_outer_steps=6, evaluate_every=1)
        # 3 is beyond: 2 + 1/2. Twice 1/2 is 1 again, and 3.5 is beyond: 2.5 + 1/2, 1/4, 1/8, and 1/16 is good. Twice
        # that is 1/8: 2.6875 is beyond, as is 2.5625 + 1/16, and 1/32 is good.
        alphas = [0.0, 1.0, 2.0, 2.5, 2.5625, 2.59375]
        proposals = [1.0, 2.0, 3.0, 3.5, 2.6875, 2.65625]
        assert targets(steps)[1:] == pytest.approx(proposals, rel=1e-12)
        w = 0.0
        for alpha, step in zip(alphas, steps[1:], strict=True):
            w = 0.5 * w + 0.5 * alpha
            assert float(step.evaluation.state.parameters["w"]) == pytest.approx(w, rel=1e-12)
        assert steps[-1].stopped == "finished"

    @pytest.mark.parametrize(
        "optimizer",
        [
            partial(torch.optim.Adam, lr=0.5),
            partial(torch.optim.RMSprop, lr=0.2, momentum=0.5),
            partial(torch.optim.SGD, lr=0.3, momentum=0.9),
        ],
        ids=["Adam", "RMSprop", "momentum"],
    )
    def test_the_outer_optimizer_goes_back_with_it(self, optimizer):
        """A state that had already been stepped would step twice along the same hypergradient."""
        limit = 1.2
        case = Case(cliff(limit, slope=lambda w: 0.5 * (w - 5.0) ** 2), SGD(lr=0.5))
        steps = run(case, T1T2, horizon=1, n_outer_steps=8, outer_optimizer=optimizer)

        def displacement(gradients):
            """The optimizer's last step, after this history of gradients."""
            x = float64(0.0).requires_grad_()
            outer = optimizer([x])
            for gradient in gradients:
                before, x.grad = float(x.detach()), float64(gradient)
                outer.step()
            return float(x.detach()) - before

        alpha, w, scale, gradients, last_good, n_failures = 0.0, 0.0, 1.0, [], 0.0, 0
        for step in steps[1:]:
            while alpha > limit:
                scale, n_failures = scale / 2, n_failures + 1
                alpha = last_good + scale * displacement(gradients)
            w = 0.5 * w + 0.5 * alpha
            gradients.append(0.5 * (w - 5.0))
            scale = min(1.0, 2 * scale)
            last_good, alpha = alpha, alpha + scale * displacement(gradients)
            assert float(step.values["target"]) == pytest.approx(alpha, rel=1e-9)
        assert n_failures >= 2

    @pytest.mark.parametrize(("max_failures", "stop"), [(0, "diverged"), (8, "diverged"), (9, "finished")])
    def test_it_gives_up_with_the_best_so_far_after_too_many_failures_in_a_row(self, max_failures, stop):
        # 1000 / 2^8 = 3.9 is the ninth failure, 1000 / 2^9 = 1.95 is good.
        steps = walk(limit=2.6, length=1000.0, n_outer_steps=2, max_failures=max_failures, evaluate_every=1)
        assert (steps[-1].index, steps[-1].stopped) == (2, stop)
        if stop == "diverged":
            torch.testing.assert_close(steps[-1].values, steps[-1].best.values)
            assert steps[-1].best.outer_step == steps[1].best.outer_step
            assert math.isfinite(steps[-1].best.scores["loss"])

    def test_an_alpha_that_retrains_to_nan_is_never_the_best(self):
        steps = walk(limit=2.6, n_outer_steps=6, evaluate=Retrain(3), evaluate_every=1)
        scores = [step.evaluation.scores["loss"] for step in steps]
        assert [math.isnan(score) for score in scores] == [False, False, False, True, True, True, True]
        assert float(steps[-1].best.values["target"]) == 2.0

    @pytest.mark.parametrize("evaluate", ["online", "retrain"])
    def test_a_seed_that_diverges_ends_the_descent_at_its_first_step(self, evaluate):
        steps = walk(limit=-1.0, n_outer_steps=5, evaluate=evaluate)
        assert [step.stopped for step in steps] == [None, "diverged"]
        assert float(steps[-1].best.values["target"]) == 0.0
        if evaluate == "retrain":
            assert math.isnan(steps[0].evaluation.scores["loss"])

    def test_training_that_overflows_is_divergence_too(self):
        case = Case(toy(), SGD(lr=1e200))
        assert [step.stopped for step in run(case, Greedy(0.9), horizon=5, n_outer_steps=3)] == [None, "diverged"]


class TestNothingElseChanges:
    @pytest.mark.parametrize("training", [True, False])
    def test_the_users_module_and_random_numbers_are_as_before(self, training):
        specimen = classification(nn.BatchNorm1d(4), nn.Dropout(0.3))
        specimen.module.train(training)
        case = Case(specimen, UPDATE_RULES["Adam"])
        before = copy.deepcopy(specimen.module.state_dict())
        seeds = copy.deepcopy({name: h.init for name, h in case.hyperparameters.items()})
        random_state = torch.get_rng_state()
        for _ in descend(
            specimen.problem(),
            case.hyperparameters,
            update_rule=case.rule,
            estimator=Greedy(0.9),
            horizon=2,
            n_outer_steps=3,
            evaluate_every=1,
        ):
            assert torch.equal(torch.get_rng_state(), random_state)
        torch.testing.assert_close(dict(specimen.module.state_dict()), dict(before), rtol=0.0, atol=0.0)
        assert all(part.training == training for part in specimen.module.modules())
        assert all(p.grad is None and p.requires_grad for p in specimen.module.parameters())
        now = {name: h.init for name, h in case.hyperparameters.items()}
        torch.testing.assert_close(now, seeds, rtol=0.0, atol=0.0)

    def test_batches_are_left_alone(self):
        specimen = SPECIMENS["minibatches"]()
        before = copy.deepcopy((specimen.train_batches, specimen.val_batches))
        run(Case(specimen, SGD(lr=0.1)), Reverse(), horizon=3, n_outer_steps=2)
        torch.testing.assert_close((specimen.train_batches, specimen.val_batches), before, rtol=0.0, atol=0.0)

    def test_equal_seeds_are_bit_identical_and_others_are_not(self):
        data = noise(torch.Generator().manual_seed(0))
        specimen = classification(nn.Dropout(0.4))

        def trajectory(seed):
            torch.rand(3)
            loader = DataLoader(data, batch_size=5, shuffle=True)
            problem = specimen.problem(train_batches=loader)
            settings = {"horizon": 3, "n_outer_steps": 4, "evaluate": Retrain(4), "evaluate_every": 2, "seed": seed}
            steps = run(Case(specimen, Adam(lr="lr")), Greedy(0.9), problem, **settings)
            values = [x for step in steps for x in step.values.values()]
            scores = [float64(step.evaluation.scores["loss"]) for step in steps if step.evaluation]
            return torch.cat([x.reshape(-1) for x in (*values, *scores)])

        first = trajectory(0)
        assert torch.equal(trajectory(0), first)
        assert not torch.equal(trajectory(1), first)


class TestWarnings:
    def test_hyperparameters_without_an_effect_are_named(self):
        case = Case(classification(), SGD(lr=0.1))
        with pytest.warns(
            UserWarning, match=r"FirstOrder\(\) sees no effect of the hyperparameters \['example_logits'\]"
        ):
            run(case, FirstOrder(), horizon=2, n_outer_steps=2)

    @pytest.mark.parametrize("estimator", [T1T2, Reverse()], ids=str)
    def test_restarting_is_no_trap_for_estimators_without_bias(self, estimator):
        """Warnings are errors here."""
        case = Case(toy(), SGD(lr=0.1))
        assert run(case, estimator, horizon=2, n_outer_steps=1, restart=True)[-1].stopped == "finished"


class TestRefusals:
    case = Case(toy(), SGD(lr=0.1))

    def start(self, *, hyperparameters=None, rule=None, estimator=T1T2, problem=None, **settings):
        """A refusal comes from the call itself, before the first step is asked for."""
        hyperparameters = self.case.hyperparameters if hyperparameters is None else hyperparameters
        problem = problem or self.case.specimen.problem()
        return descend(problem, hyperparameters, update_rule=rule or self.case.rule, estimator=estimator, **settings)

    @pytest.mark.parametrize(
        ("name", "value", "low"),
        [
            ("horizon", 0, 1),
            ("horizon", 2.5, 1),
            ("n_outer_steps", -1, 0),
            ("evaluate_every", 0, 1),
            ("patience", 0, 1),
            ("max_failures", -1, 0),
            ("seed", -1, 0),
        ],
    )
    def test_integers_out_of_range(self, name, value, low):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least {low}, but got {value}"):
            self.start(**{name: value})

    @pytest.mark.parametrize("norm", [0.0, -1.0, math.nan])
    def test_a_norm_that_is_not_positive(self, norm):
        with pytest.raises(ValueError, match=f"max_hypergradient_norm must be above 0, or None, but got {norm}"):
            self.start(max_hypergradient_norm=norm)

    @pytest.mark.parametrize("evaluate", ["final", None, Retrain])
    def test_an_unknown_protocol(self, evaluate):
        with pytest.raises(ValueError, match=r"evaluate must be 'retrain', 'online', Retrain\(n_steps\) or Online\(\)"):
            self.start(evaluate=evaluate)

    def test_an_unknown_setting(self):
        with pytest.raises(TypeError, match="horizons"):
            self.start(horizons=3)

    def test_options_and_settings_at_once(self):
        with pytest.raises(TypeError, match=r"either options or single settings, but got both: \['horizon'\]"):
            self.start(options=DescentOptions(), horizon=3)

    def test_an_unknown_metric(self):
        with pytest.raises(ValueError, match=r"metric must be one of \('loss',\), but got 'accuracy'"):
            self.start(metric="accuracy")

    def test_no_hyperparameters(self):
        with pytest.raises(ValueError, match="at least one hyperparameter to refine"):
            self.start(hyperparameters={})

    def test_an_update_rule_that_names_a_hyperparameter_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"uses the hyperparameter 'lr', but there are only \['target'\]"):
            self.start(rule=SGD(lr="lr"))

    def test_an_update_rule_that_is_given_a_vector(self):
        with pytest.raises(ValueError, match=r"'target' must be 0-dimensional, but has shape \(2,\)"):
            self.start(rule=SGD(lr="target"))

    @pytest.mark.parametrize("loss", ["train_loss", "val_loss"])
    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda model, alpha, _: model(), r"must return a 0-dimensional tensor, but got shape \(2,\)"),
            (lambda model, alpha, _: 1.0, "must return a 0-dimensional tensor, but got float"),
            (lambda model, alpha, _: model().sum().detach(), "must depend on the weights"),
            (
                lambda model, alpha, _: alpha["gone"] * model().sum(),
                r"No hyperparameter 'gone'; there are \['target'\]",
            ),
        ],
        ids=["vector", "float", "detached", "unknown name"],
    )
    def test_a_loss_that_cannot_be_differentiated(self, loss, function, message):
        steps = self.start(problem=self.case.specimen.problem(**{loss: function}), n_outer_steps=1)
        with pytest.raises((ValueError, KeyError), match=f"{loss} {message}" if "must" in message else message):
            list(steps)

    @pytest.mark.parametrize("stream", ["train_batches", "val_batches"])
    def test_batches_that_run_out(self, stream):
        problem = self.case.specimen.problem(**{stream: iter([torch.zeros(1)] * 3), "n_eval_batches": 1})
        steps = self.start(problem=problem, estimator=Greedy(0.9), horizon=2, n_outer_steps=3, evaluate="online")
        with pytest.raises(RuntimeError, match=f"{stream} ended .* it is a one-shot iterator"):
            list(steps)


def test_options_may_be_given_as_one_object():
    options = DescentOptions(horizon=3, n_outer_steps=2, evaluate=Retrain(4), evaluate_every=5, seed=1)
    case = Case(toy(), SGD(lr=0.1))
    parts = {"update_rule": case.rule, "estimator": Greedy(0.9)}
    as_one = list(descend(case.specimen.problem(), case.hyperparameters, **parts, options=options))
    one_by_one = run(case, Greedy(0.9), horizon=3, n_outer_steps=2, evaluate=Retrain(4), seed=1, evaluate_every=5)
    for a, b in zip(as_one, one_by_one, strict=True):
        torch.testing.assert_close(a.values, b.values, rtol=0.0, atol=0.0)


def test_a_validation_loss_that_is_not_a_number_is_a_failure_even_if_its_gradient_is_finite():
    class NaNWithFiniteGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * math.nan

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    case = Case(toy(), SGD(lr=0.1))
    problem = case.specimen.problem(
        val_loss=lambda model, alpha, batch: NaNWithFiniteGradient.apply(model().square().sum())
    )
    last = run(case, Greedy(), problem, n_outer_steps=3, horizon=2)[-1]
    assert (last.stopped, last.index) == ("diverged", 1)


def test_without_an_estimator_no_outer_optimizer_moves_alpha():
    case = Case(toy(), SGD(lr=0.1))
    decaying = partial(torch.optim.SGD, lr=0.1, weight_decay=0.5)
    last = run(case, None, n_outer_steps=3, horizon=2, outer_optimizer=decaying)[-1]
    assert last.index == 3
    for name, value in last.values.items():
        assert torch.equal(value, case.hyperparameters[name].init)


def shuffled(source):
    """Batches of noise whose order, or content, depends on how often they were drawn before."""
    generator = torch.Generator().manual_seed(0)
    data = noise(generator)
    if source == "loader with a generator":
        return DataLoader(data, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3))
    if source == "loader":
        return DataLoader(data, batch_size=5, shuffle=True)

    def endless():
        while True:
            index = torch.randint(N_EXAMPLES, (5,), generator=generator)
            yield data[index]

    return endless()


@pytest.mark.parametrize("source", ["loader", "loader with a generator", "endless iterator"])
def test_every_retraining_sees_the_same_batches(source):
    """With an α that hardly moves, all evaluations agree; they would differ as much as batches do."""
    problem = classification().problem(train_batches=shuffled(source))
    case = Case(classification(), SGD(lr=0.1))
    settings = {"horizon": 3, "n_outer_steps": 4, "evaluate": Retrain(7), "evaluate_every": 1}
    steps = run(case, T1T2, problem, outer_optimizer=outer_sgd(1e-12), **settings)
    losses = [step.evaluation.scores["loss"] for step in steps]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-9)


def test_a_metric_that_is_finite_where_training_diverged_does_not_win():
    """The argmax of NaN is a class, and may be the right one."""
    metrics = {"first_class": lambda model, alpha, _: torch.stack([model(), model() * 0]).argmax().eq(0).double()}
    problem = {"metrics": metrics, "val_loss": lambda model, alpha, _: model()}
    settings = {"metric": "first_class", "maximize": True, "n_outer_steps": 3, "evaluate_every": 1}
    options = DescentOptions(metric="first_class", maximize=True)
    steps = walk(limit=-1.0, problem=problem, evaluate=Retrain(2), **settings)
    assert steps[-1].best.scores["first_class"] == 1.0
    assert options.loss_of(steps[-1].best) == math.inf


def test_a_seed_on_its_bound_is_evaluated_there():
    case = Case(cliff(math.inf), SGD(lr=0.5))
    hyperparameters = {"target": Hyperparameter(float64(3.0), Interval(0.0, 3.0))}
    steps = descend(
        case.specimen.problem(), hyperparameters, update_rule=case.rule, estimator=None, evaluate=Retrain(60)
    )
    assert float(next(steps).evaluation.state.parameters["w"]) == 3.0


def test_an_outer_optimizer_that_needs_a_closure_is_refused():
    with pytest.raises(ValueError, match="without a closure, which LBFGS does not"):
        walk(n_outer_steps=1, outer_optimizer=torch.optim.LBFGS)


def test_without_outer_steps_the_length_of_training_must_be_said():
    with pytest.raises(ValueError, match=r"evaluate=Retrain\(n_steps=\.\.\.\)"):
        DescentOptions(n_outer_steps=0)
    assert DescentOptions(n_outer_steps=0, evaluate=Retrain(3)).protocol == Retrain(3)
    assert DescentOptions(n_outer_steps=0, evaluate="online").protocol == Online()
