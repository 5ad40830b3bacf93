import pytest
import torch

from optuna_greedyhg.hypergrad.curvature import ConjugateGradients, Neumann, lanczos
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


class TestLanczos:
    """Ritz pairs in the Krylov space of one vector."""

    values = float64(5.0, -3.0, 1.0, -0.5, 0.2, 0.1, 0.0, -2.0)

    def symmetric(self, values=None):
        values = self.values if values is None else values
        vectors = torch.linalg.qr(random(len(values), len(values))).Q.T  # rows
        return (vectors.T * values) @ vectors

    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_its_nodes_are_those_of_gauss_quadrature(self, k):
        """xᵀAʲx is exact for all j < 2k, which no other k numbers and weights give."""
        matrix, x = self.symmetric(), random(8)
        pairs = lanczos(lambda rows: rows @ matrix, x, k)
        weights = (pairs.vectors @ x).square()
        for j in range(2 * k):
            moment = x @ torch.linalg.matrix_power(matrix, j) @ x
            torch.testing.assert_close((weights * pairs.values**j).sum(), moment, rtol=1e-9, atol=1e-9)
        missed = x @ torch.linalg.matrix_power(matrix, 2 * k) @ x - (weights * pairs.values ** (2 * k)).sum()
        assert abs(float(missed)) > 1e-4

    @pytest.mark.parametrize("k", [1, 3, 8])
    def test_its_vectors_are_orthonormal_and_its_quotient_is_that_of_the_start(self, k):
        matrix, x = self.symmetric(), random(8)
        pairs = lanczos(lambda rows: rows @ matrix, x, k)
        torch.testing.assert_close(pairs.vectors @ pairs.vectors.T, torch.eye(k).double(), rtol=0.0, atol=1e-12)
        torch.testing.assert_close(pairs.quotient, (x @ matrix @ x / (x @ x)).unsqueeze(0), rtol=1e-12, atol=0.0)

    @pytest.mark.parametrize("k", [3, 5, 12])
    def test_a_space_that_is_exhausted_is_found_whole_and_nothing_is_counted_twice(self, k):
        matrix, x = self.symmetric(float64(2.0, 2.0, 2.0, -1.0, -1.0, 0.3)), random(6)  # three different values
        pairs = lanczos(lambda rows: rows @ matrix, x, k)
        length = torch.linalg.vector_norm(pairs.vectors, dim=1)
        assert sorted(length.round().tolist()) == [0.0] * (k - 3) + [1.0] * 3
        torch.testing.assert_close(pairs.values[length > 0.5], float64(-1.0, 0.3, 2.0), rtol=1e-9, atol=0.0)
        response = ((pairs.vectors @ x) * pairs.values.exp()) @ pairs.vectors
        torch.testing.assert_close(response, x @ torch.linalg.matrix_exp(matrix), rtol=1e-9, atol=0.0)

    def test_each_vector_is_one_product(self):
        matrix, rows_seen = self.symmetric(), []

        def product(rows):
            rows_seen.append(len(rows))
            return rows @ matrix

        lanczos(product, random(8), 4)
        assert rows_seen == [1] * 4

    def test_it_knows_half_precision(self):
        matrix = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
        pairs = lanczos(lambda rows: rows @ matrix.bfloat16(), random(4).bfloat16(), 4)
        assert pairs.values.dtype == pairs.vectors.dtype == torch.bfloat16
        torch.testing.assert_close(pairs.values.max().float(), torch.tensor(8.0), rtol=0.02, atol=0.0)

    def test_of_nothing_there_is_nothing(self):
        values, vectors, quotient = lanczos(lambda rows: 1 / 0, random(5), 0)
        assert (values.shape, vectors.shape, quotient.shape) == ((0,), (0, 5), (0,))
        zero = lanczos(lambda rows: rows, torch.zeros(5).double(), 2)
        assert not bool(zero.vectors.any())
        assert zero.quotient.tolist() == [0.0]

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("k", [1, 3])
    def test_what_is_not_finite_gives_nan_and_no_error(self, k, bad):
        matrix = self.symmetric()
        matrix[0, 0] = bad
        found = lanczos(lambda rows: rows @ matrix, random(8), k)
        assert bool(found.values.isnan().all())
        assert (found.values.shape, found.vectors.shape) == ((k,), (k, 8))
        assert not bool(found.vectors.isfinite().any())
