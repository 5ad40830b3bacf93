import math
from typing import ClassVar

import pytest
import torch

from optuna_greedyhg.hypergrad.domains import Hyperparameter, Interval, Positive, Unbounded, Values, to_coordinates
from tests.problems import CPU, float64
from tests.reference import assert_agree, central_differences

DOMAINS = {
    "unbounded": (Unbounded(), float64(-3.0, 0.0, 7.5)),
    "positive": (Positive(), float64(1e-6, 1.0, 40.0)),
    "interval": (Interval(-2.0, 3.0), float64(-1.9, 0.5, 2.0)),
    "log-interval": (Interval(1e-4, 1.0, log=True), float64(2e-4, 1e-2, 0.9)),
    "slow-interval": (Interval(1e-4, 1.0, log=True, slowness=10.0), float64(2e-4, 1e-2, 0.9)),
}
EVERY_DOMAIN = pytest.mark.parametrize(("domain", "values"), DOMAINS.values(), ids=DOMAINS.keys())


@EVERY_DOMAIN
def test_a_value_comes_back_from_its_coordinate(domain, values):
    torch.testing.assert_close(domain.to_value(domain.to_coordinate(values)), values, rtol=1e-12, atol=0.0)


@EVERY_DOMAIN
def test_the_derivative_of_the_value_agrees_with_central_differences(domain, values):
    z = domain.to_coordinate(values).requires_grad_()
    (derivative,) = torch.autograd.grad(domain.to_value(z).sum(), z)
    numerical = central_differences(lambda at: float(domain.to_value(at["z"]).sum()), {"z": z.detach()})
    torch.testing.assert_close(derivative, numerical["z"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("interval", "middle"),
    [(Interval(-2.0, 3.0), 0.5), (Interval(1e-4, 1.0, log=True), 1e-2)],
    ids=["linear", "log"],
)
def test_coordinate_zero_is_the_middle_and_the_far_ends_are_the_bounds(interval, middle):
    values = interval.to_value(float64(-1e4, 0.0, 1e4))
    torch.testing.assert_close(values, float64(interval.low, middle, interval.high), rtol=1e-12, atol=0.0)
    assert bool(((values >= interval.low) & (values <= interval.high)).all())


@pytest.mark.parametrize(("slowness", "percent"), [(1.0, 2.5), (10.0, 0.25)])
def test_a_small_step_in_the_middle_moves_by_what_the_documentation_says(slowness, percent):
    z = float64(0.1)
    moved = Interval(2.0, 4.0, slowness=slowness).to_value(z)
    assert float(moved) - 3.0 == pytest.approx(2.0 * percent / 100, rel=1e-3)
    moved = Interval(1e-4, 1.0, log=True, slowness=slowness).to_value(z)
    assert math.log(float(moved) / 1e-2) == pytest.approx(math.log(1e4) * percent / 100, rel=1e-3)


@pytest.mark.parametrize("log", [False, True])
def test_rounding_never_leads_out_of_an_interval(log):
    """Without care it does: exp(log(low)) may be below low, and low + (high − low) above high."""
    for i in range(1, 200):
        interval = Interval(0.1 + 0.037 * i, 1.3 + 0.071 * i, log=log)
        low, high = interval.to_value(float64(-1e4, 1e4)).tolist()
        assert interval.low <= low < high <= interval.high


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_on_a_bound_stays_there_to_a_thousandth_and_can_move(log, dtype):
    interval = Interval(0.1, 0.7, log=log)  # neither bound is a float32 number
    bounds = torch.tensor([0.1, 0.7], dtype=dtype)
    z = interval.to_coordinate(bounds).requires_grad_()
    values = interval.to_value(z)
    torch.testing.assert_close(values.detach(), bounds, rtol=1e-3, atol=0.0)
    (derivative,) = torch.autograd.grad(values.sum(), z)
    assert bool((derivative > 1e-8).all())


@pytest.mark.parametrize(
    ("domain", "bad"),
    [
        (Unbounded(), math.nan),
        (Unbounded(), math.inf),
        (Positive(), 0.0),
        (Positive(), math.inf),
        (Positive(), math.nan),
        (Interval(0.0, 1.0), 1.001),
        (Interval(0.0, 1.0), -0.001),
        (Interval(0.0, 1.0), math.nan),
        (Interval(1e-3, 1.0, log=True), 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("vector", [False, True])
def test_a_seed_outside_of_its_domain_is_refused_with_the_value_received(domain, bad, vector):
    init = float64(0.5, bad) if vector else float64(bad)
    with pytest.raises(ValueError, match=r"A hyperparameter must be .*, but got .*start it inside its domain"):
        Hyperparameter(init, domain)


@pytest.mark.parametrize(
    ("low", "high", "log", "message"),
    [
        (1.0, 1.0, False, "low < high"),
        (2.0, 1.0, False, "low < high"),
        (0.0, math.inf, False, "finite bounds"),
        (math.nan, 1.0, False, "finite bounds"),
        (0.0, 1.0, True, "positive low"),
    ],
)
def test_an_interval_without_an_inside_is_refused(low, high, log, message):
    with pytest.raises(ValueError, match=message):
        Interval(low, high, log=log)


@pytest.mark.parametrize("slowness", [0.0, -1.0, math.inf, math.nan])
def test_an_interval_without_a_pace_is_refused(slowness):
    with pytest.raises(ValueError, match=f"slowness must be finite and above 0, but got {slowness}"):
        Interval(0.0, 1.0, slowness=slowness)


@pytest.mark.parametrize("init", [1.0, torch.tensor(1), [0.5]], ids=["float", "integer tensor", "list"])
def test_a_seed_that_is_no_floating_point_tensor_is_refused(init):
    with pytest.raises(TypeError, match="floating point tensor, but got"):
        Hyperparameter(init)


def test_the_starting_point_does_not_share_memory_with_the_seed():
    seed = Hyperparameter(float64(1.0, 2.0))
    to_coordinates({"a": seed}, CPU, torch.float64)["a"].zero_()
    torch.testing.assert_close(seed.init, float64(1.0, 2.0))


def test_the_starting_point_has_the_dtype_asked_for():
    (start,) = to_coordinates({"a": Hyperparameter(torch.tensor([0.5, 2.0]), Positive())}, CPU, torch.float64).values()
    torch.testing.assert_close(start, float64(0.5, 2.0).log(), rtol=1e-12, atol=0.0)


class TestValues:
    domains: ClassVar = {"a": Positive(), "b": Interval(0.0, 4.0)}
    coordinates: ClassVar = {"a": float64(0.5, -1.0), "b": float64(0.0)}

    def slope_of_b(self):
        return central_differences(lambda z: float(self.domains["b"].to_value(z["b"])), {"b": float64(0.0)})["b"]

    def test_it_gives_values_differentiable_in_the_coordinates(self):
        z = {name: x.clone().requires_grad_() for name, x in self.coordinates.items()}
        values = Values(self.domains, z)
        torch.testing.assert_close(values["a"], z["a"].exp())
        torch.testing.assert_close(values["b"], float64(2.0))
        gradients = torch.autograd.grad(values["a"].sum() + values["b"], list(z.values()))
        assert_agree(dict(zip(z, gradients, strict=True)), {"a": z["a"].exp().detach(), "b": self.slope_of_b()}, 1e-8)

    def test_it_knows_what_was_read_and_what_was_only_asked_about(self):
        values = Values(self.domains, self.coordinates)
        assert "a" in values
        assert "c" not in values
        assert list(values) == ["a", "b"]
        assert len(values) == 2
        assert values.used == set()
        assert values["b"] == 2.0
        assert values.used == {"b"}

    def test_an_unknown_name_is_refused_with_the_names_there_are(self):
        with pytest.raises(KeyError, match=r"No hyperparameter 'c'; there are \['a', 'b'\]"):
            Values(self.domains, self.coordinates)["c"]
