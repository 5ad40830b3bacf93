"""What tasks compute themselves, against PyTorch's own and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from optuna_greedyhg.tasks.augmentation import MAGNITUDES, augment, resampled
from optuna_greedyhg.tasks.digits_heads import answers
from optuna_greedyhg.tasks.digits_mixed import make_mlp
from optuna_greedyhg.tasks.digits_mlp import NoisyMLP, smoothed_cross_entropy
from optuna_greedyhg.tasks.tabular import DiabetesRidge, WineRidge


def test_smoothed_cross_entropy_is_pytorchs() -> None:
    logits, labels = torch.randn(7, 4), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    for smoothing in (0.0, 0.3):
        expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(smoothed_cross_entropy(logits, labels, torch.tensor(smoothing)), expected)


def test_a_network_without_noise_is_its_layers() -> None:
    net, x = NoisyMLP(), torch.randn(5, 64)
    first, second, third = net.layers
    torch.testing.assert_close(net(x), third(torch.tanh(second(torch.tanh(first(x))))))
    torch.testing.assert_close(net(x, *torch.zeros(3)), net(x))
    assert not torch.allclose(net(x, torch.tensor(0.1), torch.tensor(0.0), torch.tensor(0.0)), net(x))


def test_digits_are_asked_about_rightly() -> None:
    #            odd  high  loop
    expected = {0: (0, 0, 1), 3: (1, 0, 0), 5: (1, 1, 0), 6: (0, 1, 1), 8: (0, 1, 1), 9: (1, 1, 1)}
    found = answers(torch.tensor(list(expected)))
    assert found.tolist() == [list(row) for row in expected.values()]


def test_a_networks_shape_is_what_was_suggested() -> None:
    net = make_mlp(width=20, depth=3, activation="gelu")
    assert [tuple(w.shape) for w in net.parameters() if w.ndim == 2] == [(20, 64), (20, 20), (20, 20), (10, 20)]
    assert [type(layer).__name__ for layer in net].count("GELU") == 3


def test_tables_are_standardized_by_the_training_split() -> None:
    task = DiabetesRidge()
    features, targets = task._train
    assert features.shape == (147, 65)  # 10 measurements, and 10·11/2 products
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(65), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(dim=0), torch.ones(65))
    torch.testing.assert_close(targets.std(dim=0), torch.ones(1))
    assert sum(len(labels) for _, labels in (WineRidge()._train, WineRidge()._val, WineRidge()._test)) == 178


def magnitudes(**of_some: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(of_some.get(name, 0.0), dtype=torch.float64) for name in MAGNITUDES}


IMAGES = torch.rand(6, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_no_magnitude_no_change() -> None:
    torch.testing.assert_close(augment(IMAGES, magnitudes()), IMAGES)


@pytest.mark.parametrize("name", MAGNITUDES)
def test_every_magnitude_changes_images_and_has_the_derivative_of_differences(name: str) -> None:
    def loss(magnitude: torch.Tensor) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return augment(IMAGES, {**magnitudes(), name: magnitude}).square().mean()

    at = torch.tensor(0.37 * MAGNITUDES[name], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(loss(at), at)
    with torch.no_grad():
        difference = (loss(at + 1e-6) - loss(at - 1e-6)) / 2e-6
    torch.testing.assert_close(derivative, difference, rtol=1e-4, atol=1e-7)
    assert abs(derivative) > 1e-4


def test_resampling_is_bilinear_interpolation() -> None:
    images = IMAGES.reshape(6, 8, 8)
    x, y = (torch.rand(2, 6, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) * 9
    grid = torch.stack([x, y], dim=2).reshape(6, 8, 8, 2) / 3.5
    expected = F.grid_sample(images.unsqueeze(1), grid, align_corners=True, padding_mode="zeros").squeeze(1)
    torch.testing.assert_close(resampled(images, x, y), expected)
