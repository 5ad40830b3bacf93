"""The audit's numbers against those computed here, by hand-made folds and NumPy."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from optuna_greedyhg.hypergrad import audit, clock, evaluation, randomness
from optuna_greedyhg.hypergrad.audit import AuditRow, DivergedError, HypergradientAudit
from optuna_greedyhg.hypergrad.cost import Cost
from optuna_greedyhg.hypergrad.estimators import (
    DrMAD,
    Estimator,
    FirstOrder,
    Fixed,
    Greedy,
    HyperDistill,
    Implicit,
    Reverse,
)
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.trees import Tensors
from optuna_greedyhg.hypergrad.update_rules import SGD
from optuna_greedyhg.hypergrad.work import at_once
from tests import reference
from tests.problems import CPU, SPECIMENS, UPDATE_RULES, Case, Specimen, bowl, toy

SEED, AT_STEP, HORIZON = 7, 5, 4
"""The last of the window's validation batches is not the first, where there are two."""

EVERY_SPECIMEN = pytest.mark.parametrize("specimen", SPECIMENS.values(), ids=SPECIMENS.keys())


def audited(case, **settings):
    given = {"horizon": HORIZON, "at_step": AT_STEP, "n_repeats": 1, "seed": SEED, **settings}
    return HypergradientAudit(case.specimen.problem(), case.hyperparameters, update_rule=case.rule, **given)


def row_of(estimator, case, **settings) -> AuditRow:
    (row,) = audited(case, **settings).run({"it": estimator})
    assert (row.name, row.error) == ("it", None)
    return row


def by_hand(estimator, case, *, reads_end_only, at_step=AT_STEP, n_warm_up=0):
    """The estimate at the end of one training from w_0, and what its window has cost."""
    products, alpha = case.products(), case.alpha()
    if reads_end_only:
        products.val_stream = (case.val_batch((k + 1) * HORIZON - 1) for k in range(n_warm_up + 1))
    state, memory = products.initial_state(), estimator.init(alpha)
    first = at_step - n_warm_up * HORIZON
    with randomness.seeded(SEED, CPU):
        for t in range(first):
            state = products.step(state, alpha, case.train_batch(t)).after
        for t in range(first, at_step + HORIZON):
            i = (t - first) % HORIZON + 1
            if i == 1:
                memory = memory if t == first else estimator.resume(alpha, estimator.carry(memory))
                products.cost = Cost()
            keep = estimator.keeps_graph(i, HORIZON)
            step = products.step(state, alpha, case.train_batch(t), keep_graph=keep, remaining=HORIZON - i)
            memory, state = estimator.observe(memory, step), step.after
            if i == HORIZON:
                estimate = estimator.estimate(memory, step)
    return estimate, products.cost


def assert_agreement(row, estimate, exact):
    """The row's numbers are those of these two trees, computed by NumPy."""
    x, y = ({name: t.numpy().ravel() for name, t in tree.items()} for tree in (estimate, exact))
    joined = [np.concatenate([tree[name] for name in y]) for tree in (x, y)]

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b)) if a.any() else math.nan

    assert row.cosine == pytest.approx(cosine(*joined), rel=1e-9)
    assert row.length_ratio == pytest.approx(np.linalg.norm(joined[0]) / np.linalg.norm(joined[1]), rel=1e-9)
    assert row.cosine_by_group == pytest.approx({n: cosine(x[n], y[n]) for n in y}, rel=1e-9, nan_ok=True)
    assert row.sign_agreement == {n: np.mean(np.sign(x[n]) == np.sign(y[n])) for n in y}


@dataclass(frozen=True)
class Distorted(Estimator[object]):
    """The exact hypergradient, twice as long and with one group's sign flipped."""

    flipped: str
    exact: Reverse = field(default_factory=Reverse)

    def init(self, alpha):
        return self.exact.init(alpha)

    def observe(self, memory, step):
        return self.exact.observe(memory, step)

    def estimate(self, memory, end):
        estimate = self.exact.estimate(memory, end)
        return {name: (-2 if name == self.flipped else 2) * x for name, x in estimate.items()}


@dataclass(frozen=True)
class Given(Estimator[None]):
    """An estimate that is known beforehand, and steps that are handed to somebody else."""

    known: Tensors
    on_step: Callable[..., object] = lambda *_: None
    on_resume: Callable[..., object] = lambda *_: None

    def init(self, alpha):
        return None

    def carry(self, memory):
        return 1 if memory is None else memory + 1

    def resume(self, alpha, carried):
        self.on_resume(carried)
        return carried

    def observe(self, memory, step):
        self.on_step(step)
        return memory

    def estimate(self, memory, end):
        return self.known


class TestAgreement:
    @pytest.mark.parametrize(
        ("estimator", "reads_end_only"),
        [
            (Greedy(0.8), False),
            (Greedy(0.0), True),
            (Greedy(0.8, terminal=True), True),
            (Greedy(propagator=Spectral(2)), False),
            (DrMAD(), True),
            (Implicit(), True),
        ],
        ids=str,
    )
    @pytest.mark.parametrize(("specimen", "rule"), [("minibatches", "momentum-decay"), ("dropout", "AdamW")])
    def test_it_is_that_of_folds_made_by_hand(self, estimator, reads_end_only, specimen, rule):
        case = Case(SPECIMENS[specimen](), UPDATE_RULES[rule])
        exact, _ = by_hand(Reverse(), case, reads_end_only=True)
        estimate, cost = by_hand(estimator, case, reads_end_only=reads_end_only)
        row = row_of(estimator, case)
        assert_agreement(row, estimate, exact)
        assert row.cost == cost
        assert row.cosine < 1 - 1e-9

    @pytest.mark.parametrize("at_step", [0, AT_STEP])
    @pytest.mark.parametrize("rule", ["momentum-decay", "AdamW"])
    def test_the_exact_one_is_that_of_autograd_through_all_steps_of_the_window(self, rule, at_step):
        specimen = replace(SPECIMENS["minibatches"](), val_batches=SPECIMENS["full-batch"]().val_batches)
        case = Case(specimen, UPDATE_RULES[rule])
        exact = reference.exact(case, case.state_after(at_step), case.alpha(), at_step, HORIZON)
        row = row_of(Given(exact), case, at_step=at_step)
        assert (row.cosine, row.length_ratio) == pytest.approx((1, 1), rel=1e-12)
        assert row.cosine_by_group == pytest.approx(dict.fromkeys(exact, 1), rel=1e-12)
        assert row.sign_agreement == dict.fromkeys(exact, 1)

    @EVERY_SPECIMEN
    def test_the_exact_one_agrees_with_itself(self, specimen):
        case = Case(specimen(), SGD(lr=0.1, momentum=0.9))
        row = row_of(Reverse(), case)
        ones = dict.fromkeys(case.hyperparameters, 1)
        assert (row.cosine, row.length_ratio) == pytest.approx((1, 1), rel=1e-12)
        assert row.cosine_by_group == pytest.approx(ones, rel=1e-12)
        assert row.sign_agreement == ones

    def test_lengths_and_signs_of_a_distorted_one_are_exactly_that(self):
        def no_direct_gradient(model, alpha, batch):  # which would be nearly all of it
            return F.cross_entropy(model(batch[0]), batch[1])

        case = Case(replace(SPECIMENS["dropout"](), val_loss=no_direct_gradient), SGD(lr="lr"))
        exact, _ = by_hand(Reverse(), case, reads_end_only=True)
        row = row_of(Distorted("penalties"), case)
        square = {name: float(x.square().sum()) for name, x in exact.items()}
        expected = 1 - 2 * square["penalties"] / sum(square.values())
        assert row.cosine == pytest.approx(expected, rel=1e-9)
        assert abs(expected) < 0.99
        assert row.length_ratio == pytest.approx(2, rel=1e-12)
        assert row.cosine_by_group == pytest.approx({"lr": 1, "example_logits": 1, "penalties": -1}, rel=1e-12)
        assert row.sign_agreement == {"lr": 1, "example_logits": 1, "penalties": 0}

    def test_groups_are_compared_by_name_and_not_by_their_order(self):
        case = Case(SPECIMENS["full-batch"](), SGD(lr=0.1))
        exact, _ = by_hand(Reverse(), case, reads_end_only=True)
        assert row_of(Given(dict(reversed(exact.items()))), case).cosine == pytest.approx(1, rel=1e-12)

    def test_the_sign_of_zero_is_neither_plus_nor_minus(self):
        case = Case(SPECIMENS["full-batch"](), SGD(lr=0.1))
        exact, _ = by_hand(Reverse(), case, reads_end_only=True)
        known = {name: x.clone() for name, x in exact.items()}
        known["penalties"][0] = 0.0
        known["example_logits"][:3] *= -1
        row = row_of(Given(known), case)
        assert row.sign_agreement == {"penalties": pytest.approx(2 / 3), "example_logits": 9 / 12}

    def test_an_estimate_of_zero_has_no_direction(self):
        row = row_of(Fixed(), Case(SPECIMENS["full-batch"](), SGD(lr=0.1)))
        assert math.isnan(row.cosine)
        assert row.length_ratio == 0

    def test_an_exact_one_of_zero_has_no_direction_and_json_says_null(self):
        case = Case(replace(toy(), train_loss=lambda model, alpha, _: (model() ** 2).sum()), SGD(lr=0.1))
        zero, other = audited(case).run({"zero": Reverse(), "other": Given({"target": torch.ones(2)})})
        read = json.loads(json.dumps([zero.as_json(), other.as_json()], allow_nan=False))
        for row in read:
            assert (row["cosine"], row["length_ratio"], row["cosine_by_group"]) == (None, None, {"target": None})
            assert row["error"] is None
            assert row["seconds"] > 0
        assert [row["sign_agreement"] for row in read] == [{"target": 1}, {"target": 0}]


class TestTheWindow:
    """All estimators see the same one, which is that of plain training."""

    @staticmethod
    def shuffled(specimen: Specimen) -> Specimen:
        """Batches of a ``DataLoader`` that draws from the same generator as dropout."""
        x, y, index = (torch.cat(parts) for parts in zip(*specimen.train_batches, strict=True))
        val = (torch.cat(parts) for parts in zip(*specimen.val_batches, strict=True))
        return replace(
            specimen,
            train_batches=DataLoader(list(zip(x, y, index, strict=True)), batch_size=4, shuffle=True),
            val_batches=DataLoader(list(zip(*val, strict=True)), batch_size=2, shuffle=True),
        )

    @pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
    def test_nothing_that_an_estimator_does_changes_it(self, shuffle):
        specimen = SPECIMENS["dropout"]()
        case = Case(self.shuffled(specimen) if shuffle else specimen, SGD(lr=0.1, momentum=0.9))
        seen: dict[str, list] = {"quiet": [], "greedy": []}

        def quiet(step):
            seen["quiet"].append((step.gradient, step.after.parameters, step.remaining))
            if step.remaining == 0:
                seen["quiet"].append(step.validation())

        def greedy(step):
            torch.rand(3)
            seen["greedy"].append((step.gradient, step.after.parameters, step.remaining))
            val = step.validation()
            if step.remaining == 0:
                seen["greedy"].append(val)

        zero = {name: torch.zeros_like(x) for name, x in case.alpha().items()}
        audited(case).run({"quiet": Given(zero, quiet), "greedy": Given(zero, greedy)})
        once = HORIZON + 1
        assert len(seen["quiet"]) == len(seen["greedy"]) == 3 * once  # the estimate, the time, the memory
        for a, b in zip(seen["quiet"], seen["greedy"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        for i in range(3):
            torch.testing.assert_close(seen["quiet"][:once], seen["quiet"][i * once :][:once], rtol=0, atol=0)

        problem = case.specimen.problem()
        domains = {name: h.domain for name, h in case.hyperparameters.items()}
        end = at_once(evaluation.train)(
            audit.Products(problem, domains, case.rule), case.alpha(), AT_STEP + HORIZON, SEED
        )
        torch.testing.assert_close(seen["quiet"][HORIZON - 1][1], end.parameters, rtol=0, atol=0)

    def test_another_seed_gives_another(self):
        case = Case(SPECIMENS["dropout"](), SGD(lr=0.1))
        assert row_of(Greedy(), case).cosine == row_of(Greedy(), case).cosine
        assert row_of(Greedy(), case).cosine != row_of(Greedy(), case, seed=SEED + 1).cosine

    def test_what_an_estimator_draws_is_repeatable_and_leaves_the_callers_numbers_alone(self):
        case, drawn = Case(SPECIMENS["dropout"](), SGD(lr=0.1)), []
        zero = {name: torch.zeros_like(x) for name, x in case.alpha().items()}
        before = torch.get_rng_state()
        row_of(Given(zero, lambda _: drawn.append(float(torch.rand(())))), case)
        assert torch.equal(torch.get_rng_state(), before)
        assert drawn == 3 * drawn[:HORIZON]
        assert len(set(drawn)) == HORIZON

    def test_warming_up_folds_the_horizons_before(self):
        case, seen, resumed = Case(SPECIMENS["full-batch"](), SGD(lr=0.1)), [], []
        zero = {name: torch.zeros_like(x) for name, x in case.alpha().items()}
        estimator = Given(zero, lambda step: seen.append((step.before.n_steps, step.remaining)), resumed.append)
        row = row_of(estimator, case, horizon=3, at_step=7, n_warm_up=2)
        warm = [(n, 2 - (n - 1) % 3) for n in range(1, 7)]
        window = [(7, 2), (8, 1), (9, 0)]
        assert seen == [*warm, *window, *window, *warm, *window]  # to estimate, for the time; for the memory
        assert resumed == [1, 2, 2, 1, 2]
        assert row.cost == Cost(n_train_gradients=3 * 12)

    @pytest.mark.parametrize(
        ("estimator", "reads_end_only"), [(Greedy(propagator=Spectral(2)), False), (HyperDistill(), True)], ids=str
    )
    def test_what_is_carried_is_used(self, estimator, reads_end_only):
        case, at_step = Case(SPECIMENS["minibatches"](), SGD(lr=0.1, momentum=0.9)), 3 * HORIZON
        exact, _ = by_hand(Reverse(), case, reads_end_only=True, at_step=at_step)
        warmed = {"at_step": at_step, "n_warm_up": 2}
        estimate, cost = by_hand(estimator, case, reads_end_only=reads_end_only, **warmed)
        row = row_of(estimator, case, **warmed)
        assert_agreement(row, estimate, exact)
        assert row.cost == cost
        cold = row_of(estimator, case, at_step=at_step)
        assert row.length_ratio != cold.length_ratio
        assert row.cost != cold.cost


class TestPrice:
    def test_seconds_are_the_median_and_relative_to_plain_training(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

        def train_loss(model, alpha, _):
            now[0] += 1.0  # a step's gradient
            return 0.5 * ((model() - alpha["target"]) ** 2).sum()

        sweeps = iter([1000.0, 3.0, 50.0, 4.0, 1000.0])  # the first is for the estimate, the last for memory

        @dataclass(frozen=True)
        class Slow(Fixed):
            def estimate(self, memory, end):
                now[0] += next(sweeps)
                return memory

        row = row_of(Slow(), Case(replace(toy(), train_loss=train_loss), SGD(lr=0.1)), n_repeats=3)
        assert row.seconds == HORIZON + 4.0
        assert row.relative_seconds == (HORIZON + 4.0) / HORIZON

    def test_memory_of_reverse_grows_with_the_horizon_and_that_of_greedy_does_not(self):
        case = Case(SPECIMENS["full-batch"](), SGD(lr=0.1))
        state = 8 * sum(x.numel() for x in case.state_after(0).parameters.values())
        short, long = (
            audited(case, horizon=horizon).run({"reverse": Reverse(), "greedy": Greedy()}) for horizon in (4, 12)
        )
        assert long[0].peak_bytes - short[0].peak_bytes == 8 * state  # the weights of every step
        assert long[1].peak_bytes == short[1].peak_bytes > 0

    def test_memory_counts_what_was_carried_into_the_window(self):
        many = 10_000

        @dataclass(frozen=True)
        class Hoarder(Fixed):
            def carry(self, memory):
                return torch.zeros(many)

            def resume(self, alpha, carried):
                return self.init(alpha)

        case = Case(SPECIMENS["full-batch"](), SGD(lr=0.1))
        plain, hoarder = (row_of(e, case, n_warm_up=1).peak_bytes for e in (Fixed(), Hoarder()))
        assert hoarder > 4 * many > plain


@dataclass(frozen=True)
class Broken(Fixed):
    def estimate(self, memory, end):
        raise RuntimeError("out of\nmemory")


class TestFailures:
    def test_an_estimator_that_raises_has_a_row_that_says_so(self):
        case = Case(SPECIMENS["full-batch"](), SGD(lr=0.1))
        rows = audited(case).run({"broken": Broken(), "first": FirstOrder()})
        assert [(row.name, row.error is None) for row in rows] == [("broken", False), ("first", True)]
        assert math.isnan(rows[0].cosine)
        read = json.loads(json.dumps(rows[0].as_json(), allow_nan=False))
        assert read.pop("name") == "broken"
        assert read.pop("error") == "RuntimeError: out of\nmemory"
        assert set(read.values()) == {None}

    def test_an_estimate_that_is_not_finite_is_said_beside_its_price(self):
        case = Case(SPECIMENS["full-batch"](), SGD(lr=0.1))
        nan = {name: torch.full_like(x, math.nan) for name, x in case.alpha().items()}
        (row,) = audited(case).run({"nan": Given(nan)})
        assert "NaN or infinite" in row.error
        assert math.isnan(row.cosine)
        assert row.seconds > 0

    @pytest.mark.parametrize(("at_step", "horizon"), [(20, 5), (8, 5), (0, 11)])
    def test_training_that_diverges_before_the_end_names_the_step(self, at_step, horizon):
        case = Case(bowl(start=2.0), SGD(lr=1e30))  # |w| = 2·10^(30·t), infinite at t = 11
        with pytest.raises(DivergedError, match=f"after step 11 of {at_step + horizon}; lower the learning rate"):
            audited(case, at_step=at_step, horizon=horizon).run({})

    def test_training_that_diverges_after_the_window_is_no_matter(self):
        case = Case(bowl(start=2.0), SGD(lr=1e30))
        assert audited(case, at_step=2, horizon=2).run({}) == []

    def test_an_exact_hypergradient_that_is_not_finite_is_an_error(self):
        case = Case(replace(bowl(), val_loss=lambda model, alpha, _: (0 * model()).sqrt()), SGD(lr=0.1))
        with pytest.raises(DivergedError, match="shorter horizon"):
            audited(case).run({"greedy": Greedy()})

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"horizon": 0}, "horizon must be an integer of at least 1"),
            ({"at_step": -1}, "at_step must be an integer of at least 0"),
            ({"n_repeats": 0}, "n_repeats must be"),
            ({"n_warm_up": 2}, "2 horizons of 4 steps do not fit in the at_step=5 steps"),
            ({"seed": 0.5}, "seed must be"),
        ],
    )
    def test_settings_out_of_range_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            audited(Case(toy(), SGD(lr=0.1)), **settings)

    def test_hyperparameters_that_are_missing_are_refused(self):
        case = Case(toy(), SGD(lr="rate"))
        with pytest.raises(ValueError, match="uses the hyperparameter 'rate'"):
            audited(case)
        with pytest.raises(ValueError, match="at least one hyperparameter"):
            HypergradientAudit(case.specimen.problem(), {}, update_rule=SGD(lr=0.1))
        outer = SPECIMENS["full-batch"]().problem(outer_parameters=["0"])
        with pytest.raises(ValueError, match=r"The outer parameter '0.weight' must be"):
            HypergradientAudit(outer, case.hyperparameters, update_rule=SGD(lr=0.1))
