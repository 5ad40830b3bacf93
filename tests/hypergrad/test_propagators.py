import pytest
import torch

from optuna_greedyhg.hypergrad.estimators import Greedy
from optuna_greedyhg.hypergrad.propagators import Decay, LastStep
from optuna_greedyhg.hypergrad.spectral import Spectral
from optuna_greedyhg.hypergrad.update_rules import SGD
from tests.hypergrad.test_estimators import fold
from tests.problems import SPECIMENS, UPDATE_RULES, Case, float64
from tests.reference import assert_agree


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
            factor, propagated = Decay(0.5).propagate(None, v, range(n, n + 1))
            torch.testing.assert_close(factor * propagated.parameters["w"], 0.5**n * v["w"])
            assert propagated.slots == {}
            assert Decay(0.5).propagate(None, v, range(n, n + 3)).factor == 0.5**n * 1.75
            assert Decay(0.5).reaches(n)
            assert LastStep().reaches(n) == (n == 0)
        for steps, expected in ((range(1), 1.0), (range(3), 1.0), (range(1, 3), 0.0)):
            factor, propagated = LastStep().propagate(None, v, steps)
            torch.testing.assert_close(factor * propagated.parameters["w"], expected * v["w"])

    @pytest.mark.parametrize("gamma", [0.0, -0.1, 1.1, float("nan")])
    def test_a_decay_out_of_range_is_refused(self, gamma):
        with pytest.raises(ValueError, match=rf"gamma must be in \(0, 1\], but got {gamma}; for 0 there is LastStep"):
            Decay(gamma)
