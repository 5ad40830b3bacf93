import copy

import pytest
import torch

from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, AdamW
from tests.problems import OWN, SPECIMENS, UPDATE_RULES, Case, float64, with_numbers
from tests.reference import by_torch_optim, torch_optimizer


@pytest.mark.parametrize("in_alpha", [False, True], ids=["numbers", "in alpha"])
@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_training_agrees_step_for_step_with_torch_optim(rule, in_alpha):
    case = Case(SPECIMENS["minibatches"](), rule if in_alpha else with_numbers(rule))
    products, alpha = case.products(), case.alpha()
    state = products.initial_state()
    for t, module in enumerate(by_torch_optim(case, alpha, n_steps=20)):
        state = products.step(state, alpha, case.train_batch(t)).after
        torch.testing.assert_close(state.parameters, dict(module.named_parameters()), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("rule", "torch_class"), [(SGD(), torch.optim.SGD), (Adam(), torch.optim.Adam), (AdamW(), torch.optim.AdamW)]
)
def test_the_defaults_are_those_of_torch_optim(rule, torch_class):
    start = float64(1.0, -2.0)
    reference = start.clone().requires_grad_()
    optimizer = torch_class([reference])
    parameters, slots = {"w": start}, rule.init({"w": start})
    for t, g in enumerate([float64(0.3, -0.1), float64(-0.2, 0.5), float64(1e-9, 2.0)]):
        reference.grad = g
        optimizer.step()
        parameters, slots = rule.step(parameters, {"w": g}, slots, rule.theta, t)
    torch.testing.assert_close(parameters["w"], reference.detach(), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_a_step_leaves_what_it_is_given_alone(rule):
    case = Case(SPECIMENS["full-batch"](), rule)
    products, alpha = case.products(), case.alpha()
    state = case.state_after(2)
    before = copy.deepcopy((state.parameters, state.slots, alpha))
    products.step(state, alpha, case.train_batch(0))
    torch.testing.assert_close((state.parameters, state.slots, alpha), before, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [Adam(lr=0.1), Adam(lr=0.1, weight_decay=0.1), AdamW(lr=0.1)], ids=str)
def test_weights_that_never_get_a_gradient_have_finite_derivatives(rule):
    w, g = float64(0.0, 1.0).requires_grad_(), float64(0.0, 0.5).requires_grad_()
    m, v = float64(0.0, 0.1).requires_grad_(), float64(0.0, 0.2).requires_grad_()
    after, _ = rule.step({"w": w}, {"w": g}, {"exp_avg": {"w": m}, "exp_avg_sq": {"w": v}}, rule.theta, 3)
    for derivative in torch.autograd.grad(after["w"].sum(), [w, g, m, v]):
        assert bool(torch.isfinite(derivative).all())
        assert derivative[1] != 0.0


def test_the_counterparts_in_torch_are_made_with_the_same_numbers():
    """Guards the reference: a hyperparameter lost on the way would make both sides agree on a default."""
    alpha = {name: h.init for name, h in OWN.items()}
    for name, rule in UPDATE_RULES.items():
        (group,) = torch_optimizer(rule, [torch.nn.Parameter(float64(1.0))], alpha).param_groups
        expected = {key: float(OWN[value].init) for key, value in rule.theta.items() if isinstance(value, str)}
        given = dict(group, **dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False)))
        assert {key: given[key] for key in expected} == expected, name
        assert given.get("nesterov", False) == ("nesterov" in name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=-0.1), "lr must be at least 0, .* but got -0.1"),
        (lambda: SGD(momentum=1.0), r"momentum must be in \[0, 1\), .* but got 1.0"),
        (lambda: SGD(weight_decay=-1.0), "weight_decay must be at least 0"),
        (lambda: SGD(lr=float("nan")), "lr must be at least 0, .* but got nan"),
        (lambda: SGD(nesterov=True), "Nesterov's step needs a momentum above 0"),
        (lambda: Adam(betas=(1.0, 0.9)), r"beta1 must be in \[0, 1\)"),
        (lambda: Adam(betas=(0.9, -0.1)), r"beta2 must be in \[0, 1\)"),
        (lambda: Adam(eps=-1e-8), "eps must be at least 0"),
        (lambda: AdamW(weight_decay=-1e-2), "weight_decay must be at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_reference_trains_at_all():
    """Guards the reference: weights that stood still would agree with anything that stands still."""
    case = Case(SPECIMENS["minibatches"](), UPDATE_RULES["SGD"])
    (module,) = by_torch_optim(case, case.alpha(), n_steps=1)
    start = dict(case.specimen.module.named_parameters())
    for name, p in module.named_parameters():
        assert float((p - start[name]).detach().abs().max()) > 1e-4, name
