"""Fidelity agrees with scikit-image, Fréchet distances with closed forms."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from skipdit.metrics import frechet_distance, gaussian_frechet_distance, moments, psnr, ssim


def image_pairs(shape: tuple[int, ...], noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth uint8 images and noisy copies."""
    n, c, h, w = shape
    coarse = torch.rand(n, c, 4, 4)
    smooth = torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic") * 255
    return tuple(x.round().clamp(0, 255).to(torch.uint8) for x in (smooth, smooth + noise * torch.randn(shape)))


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 11, 40), (2, 3, 45, 27)])
@pytest.mark.parametrize("noise", [2.0, 60.0])
def test_fidelity_equals_skimage(shape, noise):
    a, b = image_pairs(shape, noise)
    for i, (x, y) in enumerate(zip(a.numpy(), b.numpy(), strict=True)):
        expected = structural_similarity(
            x, y, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(a, b)[i].item() == pytest.approx(expected, abs=1e-9)
        assert psnr(a, b)[i].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), abs=1e-9)


def test_fidelity_of_identical_images():
    a, _ = image_pairs((2, 3, 16, 16), 0.0)
    assert psnr(a, a).tolist() == [math.inf, math.inf]
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


def test_psnr_closed_form():
    a = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr(a, a + 255).item() == 0
    assert psnr(a, a + 1).item() == pytest.approx(20 * math.log10(255))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_fidelity_refuses(metric):
    image = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="must be uint8"):
        metric(image.float(), image.float())
    with pytest.raises(ValueError, match="same"):
        metric(image, image[:1])
    with pytest.raises(ValueError, match="same"):
        metric(image[0], image[0])


def test_ssim_refuses_images_smaller_than_its_window():
    small = torch.zeros(1, 3, 10, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="too small"):
        ssim(small, small)


def random_gaussian(size: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    factor = torch.randn(size, rank, dtype=torch.float64)
    return torch.randn(size, dtype=torch.float64), factor @ factor.T


def test_frechet_distance_in_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2"""
    a, b = 2 + 3 * torch.randn(50, 1), -1 + 0.5 * torch.randn(80, 1)
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)  # the right side is float32


def test_frechet_distance_of_diagonal_gaussians():
    mean_a, mean_b = torch.randn(2, 20, dtype=torch.float64)
    var_a, var_b = torch.rand(2, 20, dtype=torch.float64)
    expected = (mean_a - mean_b).square().sum() + (var_a.sqrt() - var_b.sqrt()).square().sum()
    distance = gaussian_frechet_distance(mean_a, var_a.diag(), mean_b, var_b.diag())
    assert distance == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("rank", [30, 4, 0])
def test_frechet_distance_of_scaled_gaussians(rank):
    """Covariances A and 9 A, of full rank, singular or zero: (3 - 1)^2 tr A."""
    mean, cov = random_gaussian(30, rank)
    distance = gaussian_frechet_distance(mean, cov, mean + 1, 9 * cov)
    assert distance == pytest.approx(30 + 4 * cov.trace().item(), rel=1e-9)


def test_frechet_distance_of_gaussians_on_orthogonal_lines():
    """Both covariances singular, and so is their product, which is zero."""
    zero = torch.zeros(2)
    assert gaussian_frechet_distance(zero, torch.tensor([4.0, 0]).diag(), zero, torch.tensor([0, 9.0]).diag()) == 13


def test_frechet_distance_of_correlated_gaussians():
    """In two dimensions tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt(det A det B))."""
    (mean, a), (_, b) = random_gaussian(2, 2), random_gaussian(2, 2)
    overlap = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * overlap).item()
    assert gaussian_frechet_distance(mean, a, mean, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [200, 10])  # more and fewer than dimensions
def test_frechet_distance_is_symmetric_and_zero_for_equals(samples):
    a, b = torch.randn(samples, 64), 2 * torch.randn(samples, 64) + 1
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 64
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


def test_moments_equal_numpy():
    features = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    mean, cov = moments(features)
    np.testing.assert_allclose(mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.randn(1, 4), "at least 2"),
        (torch.randn(4), "samples, dimensions"),
        (torch.full((3, 4), math.nan), "finite"),
        (torch.randn(5, 3), "do not fit"),
    ],
)
def test_frechet_distance_refuses(features, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, torch.randn(9, 4))


def test_frechet_distance_refuses_a_covariance_that_is_not_square():
    mean = torch.zeros(3)
    with pytest.raises(ValueError, match="do not fit"):
        gaussian_frechet_distance(mean, torch.eye(3), mean, torch.ones(3))
