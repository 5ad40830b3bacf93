import torch

from optuna_greedyhg.hypergrad import trees
from tests.problems import float64

X = {"a": float64(1.0, -2.0), "b": torch.tensor([[3.0, 0.5]]).double()}
Y = {"a": float64(0.5, 4.0), "b": torch.tensor([[-1.0, 2.0]]).double()}


def flat(tree):
    return torch.cat([x.reshape(-1) for x in tree.values()])


def test_arithmetic_agrees_with_that_of_the_concatenated_vectors():
    x, y = flat(X), flat(Y)
    torch.testing.assert_close(flat(trees.add(X, Y)), x + y)
    torch.testing.assert_close(flat(trees.sub(X, Y)), x - y)
    torch.testing.assert_close(flat(trees.scale(-3.0, X)), -3 * x)
    torch.testing.assert_close(flat(trees.add_scaled(X, 0.25, Y)), x + 0.25 * y)
    torch.testing.assert_close(flat(trees.zeros_like(X)), 0 * x)
    torch.testing.assert_close(trees.dot(X, Y), x @ y)
    torch.testing.assert_close(trees.norm(X), x.norm())


def test_a_clone_keeps_its_numbers_when_the_original_is_written_to():
    original = {"a": float64(1.0, 2.0)}
    copy = trees.clone(original)
    original["a"].zero_()
    torch.testing.assert_close(copy["a"], float64(1.0, 2.0))


def test_leaves_are_differentiable_and_leave_the_original_alone():
    leaves = trees.leaves(X)
    (gradient,) = torch.autograd.grad((leaves["a"] ** 2).sum(), [leaves["a"]])
    torch.testing.assert_close(gradient, 2 * X["a"])
    assert not X["a"].requires_grad


def test_one_bad_number_anywhere_is_not_finite():
    assert trees.all_finite(X.values())
    assert trees.all_finite([])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not trees.all_finite([X["a"], torch.tensor([[0.0], [bad]])])
