import pytest
import torch

from optuna_greedyhg.hypergrad.curvature import ConjugateGradients, Neumann, block_iterations
from tests.problems import float64

GENERATOR = torch.Generator().manual_seed(0)
N = 6


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def matvec(matrix):
    """The product with a matrix, on trees of two vectors of three."""

    def product(x):
        y = matrix @ torch.cat([x["a"], x["b"]])
        return {"a": y[:3], "b": y[3:]}

    return product


def positive_definite():
    root = random(N, N)
    return root @ root.T / N + torch.eye(N, dtype=torch.float64)


def solve(solver, matrix, b):
    x = solver(matvec(matrix), {"a": b[:3], "b": b[3:]})
    return torch.cat([x["a"], x["b"]])


class TestConjugateGradients:
    @pytest.mark.parametrize("damping", [0.0, 0.7])
    def test_it_solves_a_positive_definite_system_in_as_many_steps_as_it_has_dimensions(self, damping):
        matrix, b = positive_definite(), random(N)
        expected = torch.linalg.solve(matrix + damping * torch.eye(N, dtype=torch.float64), b)
        found = solve(ConjugateGradients(max_steps=N, damping=damping, tolerance=0.0), matrix, b)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)

    def test_each_step_counts_the_last_too(self):
        """After k steps it has minimized the energy over the Krylov space of b, .., M^{k-1} b."""
        matrix, b = positive_definite(), random(N)
        for k in range(1, N):
            krylov = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(matrix, j) @ b for j in range(k)], 1))[0]
            expected = krylov @ torch.linalg.solve(krylov.T @ matrix @ krylov, krylov.T @ b)
            found = solve(ConjugateGradients(max_steps=k, tolerance=0.0), matrix, b)
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)

    def test_it_stops_at_its_tolerance(self):
        matrix, b = positive_definite(), random(N)
        calls = []

        def counted(x):
            calls.append(None)
            return matvec(matrix)(x)

        x = ConjugateGradients(max_steps=50, tolerance=1e-1)(counted, {"a": b[:3], "b": b[3:]})
        residual = b - matrix @ torch.cat([x["a"], x["b"]])
        assert residual.norm() <= 1e-1 * b.norm()
        assert len(calls) < N

    def test_a_direction_of_negative_curvature_ends_it(self):
        matrix = torch.diag(float64(1, 1, 1, 1, 1, -1))
        b = float64(1, 0, 0, 0, 0, 3)
        assert torch.equal(solve(ConjugateGradients(), matrix, b), torch.zeros(N, dtype=torch.float64))

    def test_zero_is_solved_by_zero(self):
        zero = torch.zeros(N, dtype=torch.float64)
        assert torch.equal(solve(ConjugateGradients(), positive_definite(), zero), zero)

    @pytest.mark.parametrize("bad", [{"max_steps": 0}, {"damping": -1.0}, {"tolerance": -1.0}])
    def test_bad_settings_are_refused(self, bad):
        with pytest.raises(ValueError, match="must be at least"):
            ConjugateGradients(**bad)


class TestNeumann:
    def test_it_is_the_sum_of_its_terms(self):
        matrix, b = positive_definite(), random(N)
        step = torch.eye(N, dtype=torch.float64) - 0.1 * matrix
        expected = 0.1 * sum(torch.linalg.matrix_power(step, j) @ b for j in range(4))
        torch.testing.assert_close(solve(Neumann(n_terms=3, scale=0.1), matrix, b), expected)

    def test_it_converges_to_the_solution(self):
        matrix, b = positive_definite(), random(N)
        found = solve(Neumann(n_terms=500, scale=0.2), matrix, b)
        torch.testing.assert_close(found, torch.linalg.solve(matrix, b))

    @pytest.mark.parametrize("bad", [{"n_terms": -1}, {"scale": 0.0}])
    def test_bad_settings_are_refused(self, bad):
        with pytest.raises(ValueError, match="n_terms must be at least 0 and scale above 0"):
            Neumann(**bad)


class TestBlockIterations:
    """Leading eigenpairs, by absolute value."""

    values = float64(5.0, -3.0, 1.0, -0.5, 0.2, 0.1, 0.0, 0.0)

    def symmetric(self, values=None):
        values = self.values if values is None else values
        vectors = torch.linalg.qr(random(len(values), len(values))).Q.T  # rows
        return (vectors.T * values) @ vectors, vectors

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_it_finds_the_leading_pairs_of_either_sign(self, k):
        matrix, vectors = self.symmetric()
        found = block_iterations(lambda rows: rows @ matrix, random(k, len(matrix)), n_iterations=60)
        torch.testing.assert_close(found.values, self.values[:k], rtol=1e-10, atol=0.0)
        torch.testing.assert_close((found.vectors @ vectors[:k].T).abs(), torch.eye(k).double(), rtol=0.0, atol=1e-9)

    @pytest.mark.parametrize("n_iterations", [1, 2, 5])
    @pytest.mark.parametrize("k", [1, 4, 8])
    def test_its_vectors_are_orthonormal_wherever_it_stops(self, k, n_iterations):
        matrix, _ = self.symmetric()
        found = block_iterations(lambda rows: rows @ matrix, random(k, len(matrix)), n_iterations)
        assert found.vectors.shape == (k, len(matrix))
        torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(k).double(), rtol=0.0, atol=1e-12)

    @pytest.mark.parametrize("n_iterations", [1, 3])
    @pytest.mark.parametrize("k", [8, 11])
    def test_as_many_rows_as_dimensions_are_the_whole_matrix_at_once(self, k, n_iterations):
        matrix, _ = self.symmetric()
        found = block_iterations(lambda rows: rows @ matrix, random(k, len(matrix)), n_iterations)
        torch.testing.assert_close((found.vectors.T * found.values) @ found.vectors, matrix, rtol=0.0, atol=1e-12)

    def test_a_matrix_of_lower_rank_is_found_whole(self):
        """Rows of zero, with which the others must not mix."""
        matrix, _ = self.symmetric(float64(2.0, 0.0, 0.0, -1.0, 0.0))
        found = block_iterations(lambda rows: rows @ matrix, random(4, 5), n_iterations=2)
        torch.testing.assert_close(found.values, float64(2.0, -1.0, 0.0, 0.0), rtol=0.0, atol=1e-12)
        torch.testing.assert_close((found.vectors.T * found.values) @ found.vectors, matrix, rtol=0.0, atol=1e-12)

    def test_every_iteration_comes_closer_and_the_next_goes_on_from_it(self):
        """By |λ_3/λ_2| = 1/3 in the vectors; also when only one iteration is made at a time."""
        matrix, vectors = self.symmetric()
        start = rows = random(2, len(matrix))
        for n in range(1, 25):
            rows = block_iterations(lambda x: x @ matrix, rows, 1).vectors
            at_once = block_iterations(lambda x: x @ matrix, start, n).vectors
            torch.testing.assert_close(rows.T @ rows, at_once.T @ at_once, rtol=0.0, atol=1e-9)
        outside = rows - rows @ vectors[:2].T @ vectors[:2]
        assert float(outside.norm()) < 100 * 3.0**-24

    def test_a_warm_start_is_better_than_a_cold_one_at_equal_cost(self):
        matrix, _ = self.symmetric()
        moved = matrix + 0.02 * self.symmetric()[0]
        expected = torch.linalg.eigvalsh(moved)
        expected = expected[expected.abs().argsort(descending=True)][:2]
        start = random(2, len(matrix))
        warm = block_iterations(lambda rows: rows @ matrix, start, 20).vectors
        errors = [
            float((block_iterations(lambda rows: rows @ moved, x, 2).values - expected).abs().max())
            for x in (warm, start)
        ]
        assert errors[0] < 1e-3 * errors[1]

    def test_each_iteration_is_one_product_of_every_row(self):
        matrix, _ = self.symmetric()
        blocks = []

        def product(rows):
            blocks.append(len(rows))
            return rows @ matrix

        block_iterations(product, random(3, len(matrix)), 4)
        assert blocks == [3] * 4

    def test_no_rows_have_no_eigenpairs_and_cost_nothing(self):
        values, vectors = block_iterations(lambda rows: 1 / 0, random(0, 5), 3)
        assert (values.shape, vectors.shape) == ((0,), (0, 5))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("k", [1, 3])
    def test_what_is_not_finite_gives_nan_and_no_error(self, k, bad):
        matrix, _ = self.symmetric()
        matrix[0, 0] = bad
        found = block_iterations(lambda rows: rows @ matrix, random(k, len(matrix)), 2)
        assert bool(found.values.isnan().all())
        assert found.values.shape == (k,)
        assert bool(found.vectors.isnan().all())
        assert found.vectors.shape == (k, len(matrix))
