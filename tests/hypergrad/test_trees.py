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
    torch.testing.assert_close(flat(trees.lerp(X, Y, 0.3)), 0.7 * x + 0.3 * y)
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


def test_a_flattened_tree_is_the_concatenated_vector_and_comes_back():
    torch.testing.assert_close(trees.flatten(X), flat(X))
    torch.testing.assert_close(trees.unflatten(flat(Y), like=X), Y)


def test_rows_of_a_stacked_tree_are_its_flattened_slices():
    rows = trees.flatten_rows({name: torch.stack([X[name], Y[name], X[name]]) for name in X})
    torch.testing.assert_close(rows, torch.stack([flat(X), flat(Y), flat(X)]))
    stacked = trees.unflatten(rows, like=X)
    torch.testing.assert_close({name: x[1] for name, x in stacked.items()}, Y)
    assert stacked["b"].shape == (3, 1, 2)


def test_leading_dimensions_may_be_of_any_number_and_empty():
    assert trees.unflatten(torch.zeros(2, 3, 4), like=X)["b"].shape == (2, 3, 1, 2)
    empty = trees.unflatten(torch.zeros(0, 4), like=X)
    assert empty["b"].shape == (0, 1, 2)
    assert trees.flatten_rows(empty).shape == (0, 4)


def test_numbers_without_a_dimension_have_their_place_too():
    tree = {"lr": float64(0.1), "w": float64(1.0, 2.0)}
    torch.testing.assert_close(trees.flatten(tree), float64(0.1, 1.0, 2.0))
    torch.testing.assert_close(trees.unflatten(float64(0.1, 1.0, 2.0), like=tree), tree)


def test_the_ends_of_a_line_are_its_two_trees():
    torch.testing.assert_close(trees.lerp(X, Y, 0.0), X, rtol=0.0, atol=0.0)
    torch.testing.assert_close(trees.lerp(X, Y, 1.0), Y, rtol=0.0, atol=0.0)
