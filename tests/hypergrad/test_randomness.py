import random

import numpy as np
import pytest
import torch

from optuna_greedyhg.hypergrad import randomness
from tests.problems import CPU


def test_equal_seeds_draw_equal_numbers_whatever_was_drawn_before():
    with randomness.seeded(3, CPU):
        first = torch.rand(4)
    torch.rand(17)
    with randomness.seeded(3, CPU):
        assert torch.equal(torch.rand(4), first)
    with randomness.seeded(4, CPU):
        assert not torch.equal(torch.rand(4), first)


@pytest.mark.parametrize("draw", [random.random, np.random.random], ids=["Python", "NumPy"])
def test_so_do_the_generators_of_python_and_numpy_whose_numbers_go_on_for_the_caller(draw):
    random.seed(5), np.random.seed(5)
    expected = [draw(), draw()]
    random.seed(5), np.random.seed(5)
    found = [draw()]
    drawn = []
    for seed in (2**40, 2**40, 2**40 + 1):
        with randomness.seeded(seed, CPU):
            drawn.append(draw())
    assert drawn[0] == drawn[1] != drawn[2]
    assert [*found, draw()] == expected


def test_a_captured_state_draws_the_same_again():
    with randomness.seeded(0, CPU):
        state = randomness.capture(CPU)
        first = torch.rand(4)
        torch.rand(5)
        with randomness.restored(state, CPU):
            assert torch.equal(torch.rand(4), first)


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_numbers_go_on_as_if_nothing_had_been_drawn(fails):
    def draw(context):
        with context:
            torch.rand(10)
            if fails:
                raise ArithmeticError

    with randomness.seeded(7, CPU):
        expected = torch.rand(6)
    with randomness.seeded(7, CPU):
        drawn = [torch.rand(2)]
        for context in (randomness.seeded(1, CPU), randomness.restored(randomness.capture(CPU), CPU)):
            if fails:
                with pytest.raises(ArithmeticError):
                    draw(context)
            else:
                draw(context)
            drawn.append(torch.rand(2))
    assert torch.equal(torch.cat(drawn), expected)
