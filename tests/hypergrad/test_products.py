from dataclasses import fields, replace
from itertools import chain, combinations, product

import pytest
import torch
from torch import nn

from optuna_greedyhg.hypergrad import randomness
from optuna_greedyhg.hypergrad.domains import Unbounded
from optuna_greedyhg.hypergrad.problem import BilevelProblem
from optuna_greedyhg.hypergrad.products import Covector, Products, TrainState
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, pulls_back
from tests import reference
from tests.problems import CPU, SPECIMENS, UPDATE_RULES, Case, bowl, classification, float64, with_numbers
from tests.reference import assert_agree, central_differences

SEED = 5
N_WARM = 4
CASES = {
    f"{rule}-{specimen}": (rule, specimen)
    for rule, specimen in [*product(UPDATE_RULES, ["minibatches"]), *product(["momentum", "Adam"], SPECIMENS)]
}
EVERY_CASE = pytest.mark.parametrize(("rule", "specimen"), CASES.values(), ids=CASES.keys())
GRAPHS = ({"keep_graph": True}, {})


def step_of(case, state, alpha, **graph):
    """One more step from ``state``, after which other random numbers are drawn."""
    with randomness.seeded(SEED, CPU):
        return case.products().step(state, alpha, case.train_batch(N_WARM), **graph)


def random_covector(state):
    generator = torch.Generator().manual_seed(11)

    def like(tree):
        return {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in tree.items()}

    return Covector(like(state.parameters), {kind: like(tree) for kind, tree in state.slots.items()})


def paired(v, state):
    """v·(w, s)."""
    pairs = [(v.parameters, state.parameters), *((v.slots[kind], state.slots[kind]) for kind in v.slots)]
    return float(sum((x[name] * y[name]).sum() for x, y in pairs for name in x))


@EVERY_CASE
def test_v_times_b_agrees_with_central_differences(rule, specimen):
    case = Case(SPECIMENS[specimen](), UPDATE_RULES[rule])
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)
    expected = central_differences(lambda z: paired(v, step_of(case, state, z).after), alpha)
    for graph in GRAPHS:
        assert_agree(step_of(case, state, alpha, **graph).times_b(v), expected, rtol=1e-6)


@EVERY_CASE
def test_v_times_a_agrees_with_central_differences_on_weights_and_optimizer_state(rule, specimen):
    case = Case(SPECIMENS[specimen](), UPDATE_RULES[rule])
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)

    def after(parameters, slots):
        moved = TrainState(parameters, state.buffers, slots, state.n_steps)
        return paired(v, step_of(case, moved, alpha).after)

    of_weights = central_differences(lambda w: after(w, state.slots), state.parameters)
    of_slots = {}
    for kind, slot in state.slots.items():
        # Second moments are positive and small: they are moved by a part of themselves.
        h = {name: 1e-3 * x for name, x in slot.items()} if kind == "exp_avg_sq" else 3e-4
        of_slots[kind] = central_differences(lambda s, k=kind: after(state.parameters, {**state.slots, k: s}), slot, h)
    for graph in GRAPHS:
        v_a, v_b = step_of(case, state, alpha, **graph).times_ab(v)
        assert_agree(v_a.parameters, of_weights, rtol=1e-6)
        assert v_a.slots.keys() == of_slots.keys()
        for kind, expected in of_slots.items():
            assert_agree(v_a.slots[kind], expected, rtol=1e-6)
        assert_agree(v_b, step_of(case, state, alpha, **graph).times_b(v), rtol=1e-12)


@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_products_agree_when_only_the_losses_read_alpha(rule):
    case = Case(SPECIMENS["full-batch"](), with_numbers(rule))
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)
    expected = central_differences(lambda z: paired(v, step_of(case, state, z).after), alpha)
    assert_agree(step_of(case, state, alpha, keep_graph=True).times_b(v), expected, rtol=1e-6)


@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_products_agree_when_only_the_update_rule_reads_alpha(rule):
    specimen = SPECIMENS["full-batch"]()
    fixed = {name: h.init for name, h in specimen.hyperparameters.items()}

    def train_loss(model, alpha, batch):
        return specimen.train_loss(model, fixed, batch)

    case = Case(replace(specimen, train_loss=train_loss, hyperparameters={}), rule)
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)
    expected = central_differences(lambda z: paired(v, step_of(case, state, z).after), alpha)
    step = step_of(case, state, alpha, keep_graph=True)
    assert_agree(step.times_b(v), expected, rtol=1e-6)
    assert_agree(step.times_ab(v)[1], expected, rtol=1e-6)


def as_of_a_user(rule, length=1.0):
    """A rule that has overridden ``step``, by the same or by one that goes ``length`` as far, and nothing else."""

    class Overridden(type(rule)):
        def step(self, parameters, *others):
            after, slots = super().step(parameters, *others)
            return {name: w + length * (after[name] - w) for name, w in parameters.items()}, slots

    return Overridden(**{field.name: getattr(rule, field.name) for field in fields(rule)})


@pytest.mark.parametrize("in_alpha", [False, True], ids=["numbers", "in alpha"])
@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_a_rules_own_pull_back_agrees_with_autograd_on_any_kinds_of_state(rule, in_alpha):
    case = Case(SPECIMENS["minibatches"](), rule if in_alpha else with_numbers(rule))
    other = Case(case.specimen, as_of_a_user(case.rule))
    assert pulls_back(case.rule)
    assert not pulls_back(other.rule)
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)
    for kinds in chain.from_iterable(combinations(v.slots, n) for n in range(len(v.slots) + 1)):
        some = Covector(v.parameters, {kind: v.slots[kind] for kind in kinds})
        found, expected = (step_of(c, state, alpha, keep_graph=True).times_b(some) for c in (case, other))
        assert_agree(found, expected, rtol=1e-11)
        (to_state, to_alpha), (expected_to_state, _) = (
            step_of(c, state, alpha, keep_graph=True).times_ab(some) for c in (case, other)
        )
        assert_agree(to_alpha, expected, rtol=1e-11)
        assert_agree(to_state.parameters, expected_to_state.parameters, rtol=1e-11)
        assert set(to_state.slots) == set(state.slots)
        for kind in state.slots:
            assert_agree(to_state.slots[kind], expected_to_state.slots[kind], rtol=1e-11)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_the_pull_back_of_a_rule_is_not_used_for_another_step(rule, graph):
    case = Case(SPECIMENS["minibatches"](), as_of_a_user(rule, length=0.5))
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)
    expected = central_differences(lambda z: paired(v, step_of(case, state, z).after), alpha)
    assert_agree(step_of(case, state, alpha, **graph).times_b(v), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("middle", "has_lean"),
    [
        (nn.Tanh(), False),
        (nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 1), nn.Flatten()), True),
        (nn.LayerNorm(4), True),
    ],
    ids=["dense", "convolutional", "normalized"],
)
def test_lean_operators_are_not_looked_for_again_where_there_are_none(middle, has_lean):
    case = Case(classification(middle), SGD(lr="lr"))
    alpha, state, products = case.alpha(), case.state_after(0), case.products()
    v = random_covector(state)
    first, second = (products.step(state, alpha, case.train_batch(0), keep_graph=True).times_b(v) for _ in range(2))
    assert products.has_lean == has_lean
    assert_agree(second, first, rtol=1e-12)


def test_a_second_product_of_one_step_is_made_from_its_replay():
    case = Case(SPECIMENS["dropout"](), UPDATE_RULES["momentum"])
    step = step_of(case, case.state_after(N_WARM), case.alpha(), keep_graph=True)
    v = random_covector(step.after)
    assert_agree(step.times_b(v), step.times_b(v), rtol=0.0)


@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_a_replayed_step_has_the_products_of_a_kept_one(rule):
    case = Case(SPECIMENS["batchnorm"](), rule)
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)
    (v_a, v_b), (kept_a, kept_b) = (step_of(case, state, alpha, **g).times_ab(v) for g in ({}, GRAPHS[0]))
    assert_agree(v_a.parameters, kept_a.parameters, rtol=1e-12)
    assert_agree(v_b, kept_b, rtol=1e-12)


@pytest.mark.parametrize("graph", GRAPHS, ids=["kept", "replayed"])
@pytest.mark.parametrize("specimen", ["dropout", "batchnorm"])
def test_a_step_ends_in_the_same_state_whatever_is_kept_of_it(specimen, graph):
    case = Case(SPECIMENS[specimen](), UPDATE_RULES["Adam"])
    alpha, state = case.alpha(), case.state_after(N_WARM)
    after, plain = step_of(case, state, alpha, **graph).after, step_of(case, state, alpha).after
    torch.testing.assert_close(after.parameters, plain.parameters)
    torch.testing.assert_close(after.buffers, plain.buffers)
    torch.testing.assert_close(after.slots, plain.slots)
    assert not any(x.requires_grad for x in (*after.parameters.values(), *after.buffers.values()))


def test_dropout_masks_matter_to_the_products():
    """Guards the replay's tests: a mask without an effect would agree with any other."""
    case = Case(SPECIMENS["dropout"](), UPDATE_RULES["momentum"])
    alpha, state = case.alpha(), case.state_after(N_WARM)
    with randomness.seeded(SEED + 1, CPU):
        other = case.products().step(state, alpha, case.train_batch(N_WARM))
    v = random_covector(state)
    here = step_of(case, state, alpha).times_b(v)["example_logits"]
    assert float((other.times_b(v)["example_logits"] - here).abs().max()) > 1e-2 * float(here.abs().max())


@pytest.mark.parametrize("specimen", SPECIMENS)
def test_validation_agrees_with_the_users_module_and_draws_batch_after_batch(specimen):
    case = Case(SPECIMENS[specimen](), with_numbers(UPDATE_RULES["SGD"]))
    products, alpha = case.products(), case.alpha()
    state = products.initial_state()
    for t in range(4):
        step = products.step(state, alpha, case.train_batch(t))
        state = step.after
        module = case.specimen.module.eval()
        module.load_state_dict({**state.parameters, **state.buffers})
        z = {name: x.clone().requires_grad_() for name, x in alpha.items()}
        loss = case.specimen.val_loss(module, case.values(z), case.val_batch(t))
        weights = dict(module.named_parameters())
        gradients = torch.autograd.grad(loss, [*weights.values(), z["penalties"]])
        for _ in range(2):  # asked for twice, it is the same batch's
            validation = step.validation()
            torch.testing.assert_close(validation.loss, loss.detach())
            assert_agree(validation.gradient, dict(zip(weights, gradients[:-1], strict=True)), rtol=1e-12)
            torch.testing.assert_close(validation.direct["penalties"], gradients[-1])
            torch.testing.assert_close(validation.direct["example_logits"], torch.zeros(12).double())


def test_b_is_taken_at_the_weights_before_the_step():
    case = Case(bowl(start=2.0), SGD(lr=0.25))  # w_1 = (1 − lr)·2 = 1.5
    products, alpha = case.products(), case.alpha()
    step = products.step(products.initial_state(), alpha, 0, keep_graph=True)
    torch.testing.assert_close(step.after.parameters["w"], float64(1.5))
    torch.testing.assert_close(step.times_b(Covector({"w": float64(1.0)}))["curvature"], float64(-0.25 * 2.0))


def test_a_gradient_that_is_constant_has_a_product_of_zero():
    specimen = replace(bowl(), train_loss=lambda model, alpha, _: 3 * model() + alpha["curvature"])
    case = Case(specimen, SGD(lr="lr"))
    products, alpha = case.products(), case.alpha()
    v_a, v_b = products.step(products.initial_state(), alpha, 0, keep_graph=True).times_ab(
        Covector({"w": float64(2.0)})
    )
    torch.testing.assert_close(v_a.parameters["w"], float64(2.0))
    torch.testing.assert_close(v_b["curvature"], float64(0.0))
    d_lr = central_differences(lambda z: 2.0 * float(2.0 - case.values(z)["lr"] * 3.0), {"lr": alpha["lr"], **alpha})
    torch.testing.assert_close(v_b["lr"], d_lr["lr"], rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("rule", [SGD(lr="lr"), Adam(lr="lr")], ids=str)
def test_a_covector_that_leaves_out_the_optimizer_state_is_zero_there(rule):
    case = Case(SPECIMENS["full-batch"](), rule)
    alpha, state = case.alpha(), case.state_after(N_WARM)
    v = random_covector(state)
    zeros = {kind: {name: torch.zeros_like(x) for name, x in tree.items()} for kind, tree in v.slots.items()}
    left_out = step_of(case, state, alpha).times_ab(Covector(v.parameters))
    explicit = step_of(case, state, alpha).times_ab(Covector(v.parameters, zeros))
    assert_agree(left_out[0].parameters, explicit[0].parameters, rtol=1e-14)
    assert_agree(left_out[1], explicit[1], rtol=1e-14)


def stacked(state, n):
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(n, *x.shape, generator=generator, dtype=torch.float64) for name, x in state.parameters.items()
    }


def flat_rows(tree):
    return torch.cat([x.reshape(len(x), -1) for x in tree.values()], dim=1)


class TestTimesHessian:
    @pytest.mark.parametrize("specimen", SPECIMENS)
    def test_it_agrees_with_the_dense_hessian_from_any_graph(self, specimen):
        case = Case(SPECIMENS[specimen](), UPDATE_RULES["momentum-decay"])  # whose penalty is not the loss's
        alpha, state = case.alpha(), case.state_after(N_WARM)
        vectors = stacked(state, 3)
        expected = flat_rows(vectors) @ reference.hessian(case, state, alpha, N_WARM, SEED)
        for graph in GRAPHS:
            step = step_of(case, state, alpha, **graph)
            for _ in range(2):  # the kept graph is used up by the first
                assert_agree({"vH": flat_rows(step.times_hessian(vectors))}, {"vH": expected}, rtol=1e-12)
            with step.held():
                for _ in range(2):
                    assert_agree({"vH": flat_rows(step.times_hessian(vectors))}, {"vH": expected}, rtol=1e-12)

    def test_its_products_are_counted_by_vector(self):
        case = Case(SPECIMENS["minibatches"](), SGD(lr=0.1))
        state = case.state_after(N_WARM)
        n_examples = len(case.train_batch(N_WARM)[0])
        step = step_of(case, state, case.alpha())
        cost = step.recipe.products.cost
        for n in (3, 1):
            before = cost.n_products
            step.times_hessian(stacked(state, n))
            assert cost.n_products - before == n * n_examples

    @pytest.mark.parametrize("graph", GRAPHS, ids=["kept", "replayed"])
    def test_a_loss_that_is_linear_in_the_weights_has_none(self, graph):
        """Be it altogether, so that its gradient has no graph, or with a graph that only α is in."""
        for train_loss in (
            lambda model, alpha, _: 3 * model() + alpha["curvature"],
            lambda model, alpha, _: model() * alpha["curvature"],
        ):
            case = Case(replace(bowl(), train_loss=train_loss), SGD(lr=0.1))
            products = case.products()
            step = products.step(products.initial_state(), case.alpha(), 0, **graph)
            assert torch.equal(step.times_hessian({"w": float64(1.0, 2.0)})["w"], float64(0.0, 0.0))


class TestHeld:
    @pytest.mark.parametrize(("graph", "n_gradients"), [({"keep_graph": True}, 1), ({}, 2)], ids=["kept", "replayed"])
    def test_all_products_within_share_one_graph(self, graph, n_gradients):
        case = Case(SPECIMENS["dropout"](), SGD(lr=0.1, momentum=0.9))
        state = case.state_after(N_WARM)
        v, n_examples = random_covector(state), len(case.train_batch(N_WARM)[0])
        expected = step_of(case, state, case.alpha()).times_ab(v)
        step = step_of(case, state, case.alpha(), **graph)
        with step.held() as held:
            for _ in range(2):
                held.times_hessian(stacked(state, 2))
                assert_agree(held.times_b(v), expected[1], rtol=1e-12)
                assert_agree(held.times_a(v).parameters, expected[0].parameters, rtol=1e-12)
        assert step.recipe.products.cost.n_train_gradients == n_gradients * n_examples
        step.times_b(v)  # the graph is gone, and built again
        assert step.recipe.products.cost.n_train_gradients == (n_gradients + 1) * n_examples


class TestRecipe:
    @pytest.mark.parametrize("graph", GRAPHS, ids=["kept", "replayed"])
    @pytest.mark.parametrize("specimen", SPECIMENS)
    def test_made_from_another_state_it_is_the_step_from_there_with_the_same_random_numbers(self, specimen, graph):
        case = Case(SPECIMENS[specimen](), UPDATE_RULES["Adam-decay"])
        alpha, here, there = case.alpha(), case.state_after(N_WARM), case.state_after(N_WARM + 3)
        made = step_of(case, here, alpha, remaining=2).recipe.make(there, **graph)
        expected = step_of(case, there, alpha)
        torch.testing.assert_close(made.after.parameters, expected.after.parameters, rtol=0.0, atol=0.0)
        torch.testing.assert_close(made.after.slots, expected.after.slots, rtol=0.0, atol=0.0)
        torch.testing.assert_close(made.after.buffers, expected.after.buffers, rtol=0.0, atol=0.0)
        assert (made.before, made.after.n_steps, made.remaining) == (there, there.n_steps + 1, 2)
        v = random_covector(there)
        assert_agree(made.times_b(v), expected.times_b(v), rtol=1e-12)

    def test_by_another_rule_it_is_that_rules_step_and_counts_with_the_first(self):
        case, other = (Case(SPECIMENS["dropout"](), rule) for rule in (SGD(lr=0.1), SGD(lr=0.3)))
        alpha, state = case.alpha(), case.state_after(N_WARM)
        step, expected = step_of(case, state, alpha), step_of(other, state, alpha)
        cost = step.recipe.products.cost
        n_before = cost.n_train_gradients
        made = step.recipe.with_rule(other.rule).make(state)
        torch.testing.assert_close(made.after.parameters, expected.after.parameters, rtol=0.0, atol=0.0)
        assert cost.n_train_gradients - n_before == len(case.train_batch(N_WARM)[0])
        assert (step.rule, made.rule) == (case.rule, other.rule)
        v = random_covector(state)
        assert_agree(made.times_b(v), expected.times_b(v), rtol=1e-12)


def test_attention_has_products():
    """The fused kernels have no second derivative: products must go through the plain one."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0].mean(dim=(1, 2))

    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    problem = BilevelProblem(
        model=Attention(),
        train_loss=lambda model, alpha, batch: (alpha["weights"] * model(batch).square()).mean(),
        val_loss=lambda model, alpha, batch: model(batch).sum(),
        train_batches=x,
        val_batches=x,
    )
    products = Products(problem, {"weights": Unbounded()}, SGD(lr=1.0))
    alpha = {"weights": torch.ones(3)}
    step = products.step(products.initial_state(), alpha, x, keep_graph=True)
    v = Covector(step.validation().gradient)
    h = 1e-2
    moved = [
        products.step(products.initial_state(), {"weights": torch.tensor([1.0 + s * h, 1.0, 1.0])}, x).after.parameters
        for s in (1, -1)
    ]
    difference = sum((v.parameters[k] * (moved[0][k] - moved[1][k])).sum() for k in v.parameters) / (2 * h)
    assert float(step.times_b(v)["weights"][0]) == pytest.approx(float(difference), rel=1e-3)
