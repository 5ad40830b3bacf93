import copy
from contextlib import nullcontext

import pytest
import torch

from optuna_greedyhg.hypergrad.domains import Hyperparameter, Interval, Positive, Unbounded
from optuna_greedyhg.hypergrad.update_rules import SGD, Adam, AdamW, Made, require_ranges
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
    derivatives = torch.autograd.grad(after["w"].sum(), [w, g, m, v])
    for derivative in derivatives:
        assert bool(torch.isfinite(derivative).all())
        assert derivative[1] != 0.0
    before = {"exp_avg": {"w": m.detach()}, "exp_avg_sq": {"w": v.detach()}}
    _, slots = rule.step({"w": w.detach()}, {"w": g.detach()}, before, rule.theta, 3)
    made = Made({"w": w.detach()}, {"w": g.detach()}, before, rule.theta, 3, slots)
    pulled = rule.pull_back({"w": torch.ones_like(w)}, {}, made, to_state=True)
    to_g, to_m, to_v = pulled.factor * pulled.u["w"], pulled.slots["exp_avg"]["w"], pulled.slots["exp_avg_sq"]["w"]
    torch.testing.assert_close([pulled.parameters["w"], to_g, to_m, to_v], list(derivatives), rtol=1e-12, atol=0.0)


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
    ("rule", "domain", "message"),
    [
        (
            SGD(lr="x"),
            Interval(-1.0, 0.5),
            r"lr must be at least 0, .* 'x' may move from -1 to 0\.5; give it a domain",
        ),
        (SGD(lr="x"), Unbounded(), r"lr must be at least 0, but .* 'x' may move from -1e\+06 to 1e\+06"),
        (SGD(momentum="x"), Interval(0.0, 1.5), r"momentum must be in \[0, 1\), but .* 'x' may move from 0 to 1\.5"),
        (SGD(momentum="x"), Positive(), r"momentum must be in \[0, 1\), but .* 'x' may move from 0 to inf"),
        (Adam(betas=(0.9, "x")), Interval(0.3, 2.0, log=True), r"beta2 must be in \[0, 1\)"),
        (SGD(lr="x"), Positive(), None),
        (SGD(momentum="x"), Interval(0.0, 1.0), None),
    ],
)
def test_a_hyperparameter_that_may_leave_the_range_of_a_rule_is_refused(rule, domain, message):
    hyperparameters = {"x": Hyperparameter(float64(0.4), domain)}
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        require_ranges(rule, hyperparameters)


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


SYMMETRIC = torch.tensor([[3.0, 1.0, -0.5], [1.0, -0.4, 0.7], [-0.5, 0.7, 0.2]]).double()


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("rule", UPDATE_RULES.values(), ids=UPDATE_RULES.keys())
def test_its_transition_is_its_steps_own_derivative_along_eigenvectors(rule, n_steps):
    """The Jacobian of step ``n_steps`` with g = H·w, on (P^(1/2)·q, P^(−1/2)·q) for eigenvectors q; exact but for Adam.

    There, the second moments are so large that their derivative, relative to the first moment's, is g·m/v = 1e-9.
    """
    rule = with_numbers(rule)
    if isinstance(rule, Adam):
        rule = type(rule)(lr=1e4, betas=rule.betas, eps=5e3, weight_decay=1e-5 if rule.decoupled else rule.weight_decay)
    theta = rule.theta
    start, moment = float64(0.3, -0.2, 0.4), float64(0.1, 0.5, -0.3)
    seconds = {"exp_avg_sq": {"w": 1e9 * float64(1.0, 2.0, 0.5)}} if isinstance(rule, Adam) else {}

    def step(w, m):
        slots = seconds if rule.moment is None else {rule.moment: {"w": m}, **seconds}
        return rule.step({"w": w}, {"w": SYMMETRIC @ w}, slots, theta, n_steps - 1)

    def after(w, m):
        parameters, slots = step(w, m)
        return parameters["w"], m if rule.moment is None else slots[rule.moment]["w"]

    preconditioner = rule.preconditioner(step(start, moment)[1], theta, n_steps)
    root = torch.ones(3).double() if preconditioner is None else preconditioner["w"].sqrt()
    assert (preconditioner is None) == isinstance(rule, SGD)
    penalised = SYMMETRIC + rule.penalty * torch.eye(3).double()
    curvatures, q = torch.linalg.eigh(root[:, None] * penalised * root)
    found = rule.transition(curvatures, theta, n_steps)

    (w_w, m_w), (w_m, m_m) = torch.autograd.functional.jacobian(after, (start, moment))
    outer, inner = 1 / root[:, None], root[:, None]  # of what comes out of w, and of what goes in
    blocks = [[outer * w_w * root, outer * m_w / root], [inner * w_m * root, inner * m_m / root]]
    size = 1 if rule.moment is None else 2
    for i, j in ((i, j) for i in range(size) for j in range(size)):
        expected = q.T @ blocks[i][j] @ q
        scale = float(found[:, i, j].abs().max())
        torch.testing.assert_close(torch.diag(found[:, i, j]), expected, rtol=0.0, atol=1e-7 * scale)
    assert found.shape == (3, size, size)


@pytest.mark.parametrize("rule", [r for r in UPDATE_RULES.values() if isinstance(r, Adam)], ids=str)
def test_the_preconditioner_is_what_multiplies_the_first_moment_in_a_step(rule):
    """Δw = −lr/(1 − β1^t)·P·m_t, beside decoupled weight decay."""
    rule = with_numbers(rule)
    theta, w = rule.theta, {"w": float64(1.0, -2.0), "b": float64(0.5)}
    slots = rule.init(w)
    for t in range(1, 4):
        after, slots = rule.step(w, {name: x**2 + 0.1 for name, x in w.items()}, slots, theta, t - 1)
        p = rule.preconditioner(slots, theta, t)
        kept = 1 - theta["lr"] * theta["weight_decay"] if rule.decoupled else 1.0
        for name, x in w.items():
            moved = theta["lr"] / (1 - theta["beta1"] ** t) * p[name] * slots["exp_avg"][name]
            torch.testing.assert_close(after[name], kept * x - moved, rtol=1e-12, atol=0.0)
        w = after


def test_what_a_rule_adds_to_the_curvature_is_its_coupled_penalty():
    assert SGD(weight_decay=0.3).penalty == Adam(weight_decay=0.3).penalty == 0.3
    assert SGD(weight_decay="wd").penalty == "wd"
    assert AdamW(weight_decay=0.3).penalty == 0.0
