"""Fidelity agrees with scikit-image and torchmetrics, LPIPS and the CLIP score with short computations of their own;
Fréchet distances, KID and inception score with torchmetrics, closed forms and explicit loops; precision and recall with
the latter."""

import json
import math
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from skipdit.checkpoints.errors import WeightsError
from skipdit.metrics import (
    IDENTICAL,
    fidelity_cells,
    frechet_distance,
    gaussian_frechet_distance,
    measure_fidelity,
    moments,
    psnr,
    ssim,
)
from skipdit.metrics.perceptual import BACKBONES, ClipScore, load_lpips
from skipdit.metrics.sets import inception_score, kid, precision_recall
from skipdit.utils.device import double


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
        assert psnr(a, b)[i].item() == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255), abs=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 11, 40), (1, 3, 120, 90), (16, 3, 24, 24)])  # 16: of a video
@pytest.mark.parametrize("noise", [2.0, 60.0])
def test_ssim_equals_torchmetrics(shape, noise):
    """Its map within the borders: what it makes of the borders depends on its version."""
    a, b = image_pairs(shape, noise)
    _, places = structural_similarity_index_measure(a.double(), b.double(), data_range=255.0, return_full_image=True)
    torch.testing.assert_close(ssim(a, b), places[..., 5:-5, 5:-5].mean((1, 2, 3)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_ssim_of_flat_images(level):
    """Where float32 would be off by up to 1e-3: the variance is a difference of large numbers."""
    a = torch.full((1, 3, 32, 32), level, dtype=torch.uint8)
    assert ssim(a, a).item() == pytest.approx(1, abs=1e-12)


def test_fidelity_of_a_set():
    """Means over frames, then over samples; frames that are identical count `IDENTICAL`."""
    a, b = (x.unflatten(0, (3, 2)) for x in image_pairs((6, 3, 16, 20), 20.0))
    b[1, 0] = a[1, 0]
    decibels = psnr(a.flatten(0, 1), b.flatten(0, 1)).clamp(max=IDENTICAL).view(3, 2).mean(1)
    found = measure_fidelity(a, b)
    assert found["psnr"] == pytest.approx(decibels.mean().item())
    assert found["psnr_error"] == pytest.approx(decibels.std().item() / math.sqrt(3))
    assert found["ssim"] == pytest.approx(ssim(a.flatten(0, 1), b.flatten(0, 1)).mean().item())
    assert found["identical"] is False and measure_fidelity(a[:1], b[:1])["psnr_error"] is None
    assert measure_fidelity(a, a) == {"psnr": IDENTICAL, "psnr_error": 0, "ssim": pytest.approx(1), "identical": True}


def test_fidelity_in_a_table():
    row = {"psnr": 35.416, "psnr_error": 0.5, "ssim": 0.99249, "identical": False}
    assert fidelity_cells(row) == ["35.42", "0.50", "0.992"]
    assert fidelity_cells(row | {"psnr_error": None}) == ["35.42", "", "0.992"]  # of one sample
    assert fidelity_cells(row | {"psnr_error": 0.0, "ssim": 1.0, "identical": True}) == ["same", "", "1.000"]
    assert fidelity_cells({"name": "uncached"}) == ["–", "–", "–"]


@pytest.mark.slow
def test_torchmetrics_waits_until_a_metric_is_computed():
    code = "import sys, skipdit, skipdit.evaluation.command, skipdit.evaluation.compare; "
    code += "assert 'torchmetrics' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
    distance = gaussian_frechet_distance(zero, torch.tensor([4.0, 0]).diag(), zero, torch.tensor([0, 9.0]).diag())
    assert distance == pytest.approx(13, rel=1e-12)


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


class Features(torch.nn.Module):
    """What torchmetrics takes for the Inception network: here features are given as they are."""

    num_features = 24

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize(("samples", "tolerance"), [(200, 1e-9), (10, 1e-5)])  # more and fewer than dimensions
def test_frechet_distance_equals_torchmetrics(samples, tolerance):
    """Loosely where covariances are singular: there its eigenvalues of AB are rounding noise, and ours zero."""
    a = torch.randn(samples, 24, dtype=torch.float64).relu()
    b = torch.randn(samples + 5, 24, dtype=torch.float64).relu() + 0.3
    metric = FrechetInceptionDistance(Features())
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=tolerance)


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


def test_kid_equals_a_double_loop():
    a, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64) + 0.5

    def mean(x, y, diagonal):
        values = [(float(p @ q) / 5 + 1) ** 3 for i, p in enumerate(x) for j, q in enumerate(y) if diagonal or i != j]
        return sum(values) / len(values)

    expected = mean(a, a, False) + mean(b, b, False) - 2 * mean(a, b, True)
    assert kid(a, b) == (pytest.approx(expected, rel=1e-12), 0)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_kid_equals_torchmetrics():
    a, b = torch.randn(40, 24).relu(), torch.randn(40, 24).relu() + 0.2
    metric = KernelInceptionDistance(Features(), subsets=1, subset_size=40)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    assert kid(a, b)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-12)


def test_kid_over_subsets():
    """Unbiased: near zero for two halves of one set, below it half of the time; the same every time."""
    a, b = torch.randn(2, 400, 8)
    mean, std = kid(a, b, subsets=50, size=50)
    assert abs(mean) < 3 * std / math.sqrt(50) + 0.02 and std > 0
    assert kid(a, b, subsets=50, size=50) == (mean, std)
    assert kid(a, b + 1, subsets=50, size=50)[0] > 1


def test_inception_score_closed_forms():
    alike, certain = torch.randn(10).expand(60, 10), torch.full((60, 10), -math.inf)
    certain[torch.arange(60), torch.arange(60) % 10] = 0
    assert inception_score(alike) == (pytest.approx(1), pytest.approx(0))
    assert inception_score(certain) == (pytest.approx(10), pytest.approx(0))
    mean, std = inception_score(torch.cat([alike, certain]), split=60)
    assert (mean, std) == (pytest.approx(5.5), pytest.approx(4.5))


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore`", "ignore:std")
def test_inception_score_equals_torchmetrics():
    """Of one part: it takes parts of a shuffled set."""
    logits = 3 * torch.randn(50, 24)
    metric = InceptionScore(Features(), splits=1)
    metric.update(logits.double())
    assert inception_score(logits)[0] == pytest.approx(metric.compute()[0].item(), rel=1e-12)


def test_inception_score_of_two_classes():
    """Half of the samples (p, 1 - p), half the other way round: exp(log 2 - H(p))."""
    p = torch.tensor([0.8, 0.2], dtype=torch.float64)
    expected = math.exp(math.log(2) + float((p * p.log()).sum()))
    assert inception_score(torch.stack([p, p.flip(0)]).log().repeat(5, 1))[0] == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_of_points_on_a_line():
    """Reference 0 .. 9: with k=3 the ball of an inner point has radius 2, that of 0 and of 9 radius 3."""
    reference = torch.arange(10.0)[:, None]
    samples = torch.tensor([-3.0, -3.1, 4.5, 11.9, 12.1])[:, None]
    precision, recall = precision_recall(samples, reference)
    assert precision == pytest.approx(3 / 5)  # -3, 4.5 and 11.9
    # Radii of the samples: 7.6, 7.6, 7.6 (to 12.1), 14.9, 15.1: from 12.1 and 11.9 down to 0, all is reached.
    assert recall == 1
    assert precision_recall(reference, reference) == (1, 1)
    assert precision_recall(reference, reference + 100) == (0, 0)


def test_precision_and_recall_of_a_part():
    """Samples that show one of two far clusters: all are real, half of the reality is missing."""
    cluster = torch.randn(20, 3)
    assert precision_recall(cluster, torch.cat([cluster, cluster + 100])) == (1, 0.5)


@pytest.mark.parametrize(
    ("metric", "message"), [(kid, "at least 2 samples"), (precision_recall, "more than 3 samples")]
)
def test_set_metrics_refuse(metric, message):
    with pytest.raises(ValueError, match=message):
        metric(torch.randn(1, 4), torch.randn(9, 4))
    with pytest.raises(ValueError, match="must be"):
        metric(torch.randn(9, 5), torch.randn(9, 4))


def backbone(name: str) -> torch.nn.Sequential:
    """The convolutions of torchvision's network, random."""
    if name == "alex":
        return torchvision.models.alexnet(weights=None).features
    return torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "taps"), [("alex", [1, 4, 7, 9, 11]), ("vgg", [3, 8, 15, 22, 29])])
def test_lpips_equals_its_definition(name, taps, tmp_path):
    """Zhang et al., equation 1, with the heads of the package: distances of normalised activations, weighted."""
    lpips = pytest.importorskip("lpips")
    layers = backbone(name)
    torch.save({f"features.{key}": value for key, value in layers.state_dict().items()}, tmp_path / "backbone.pth")
    file = Path(lpips.__file__).parent / f"weights/v0.1/{name}.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    distance, protocol = load_lpips(name, str(tmp_path / "backbone.pth"), torch.device("cpu"))

    a, b = image_pairs((2, 3, 40, 48), 30)
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    x, y = ((p / 127.5 - 1 - shift) / scale for p in (a, b))
    expected, head = torch.zeros(2), 0
    with torch.no_grad():
        for i, layer in enumerate(layers[: taps[-1] + 1]):
            x, y = layer(x), layer(y)
            if i in taps:
                squares = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
                weighted = (squares * heads[f"lin{head}.model.1.weight"]).sum(1, keepdim=True)
                expected += F.interpolate(weighted, (40, 48), mode="bilinear").mean((1, 2, 3))
                head += 1
        assert head == 5
        torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=1e-7)
        assert distance(a, a).tolist() == [0, 0]
    assert protocol["released"] is False and len(protocol["sha256"]) == 64 and protocol["spatial"]
    least = BACKBONES[name][1]
    distance(a[..., :least, :least], b[..., :least, :least])
    with pytest.raises(ValueError, match=f"needs pictures of {least} pixels"):
        distance(a[..., : least - 1], b[..., : least - 1])


@pytest.mark.slow
def test_lpips_refuses_other_weights(tmp_path):
    pytest.importorskip("lpips")
    state = {f"features.{key}": value for key, value in backbone("alex").state_dict().items()}
    file = tmp_path / "backbone.pth"
    torch.save({key: value for key, value in state.items() if "features.8." not in key}, file)
    with pytest.raises(WeightsError, match=r"no alex of torchvision: features.8.bias, features.8.weight"):
        load_lpips("alex", str(file), torch.device("cpu"))
    torch.save(state | {"features.0.weight": torch.zeros(64, 3, 3, 3)}, file)
    with pytest.raises(WeightsError, match="size mismatch"):
        load_lpips("alex", str(file), torch.device("cpu"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny random CLIP of the real class, with a processor and a tokenizer that knows letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    text = size | ids | {"max_position_embeddings": 12, "pad_token_id": len(tokens) - 1}
    vision = size | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    crop = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPProcessor(CLIPImageProcessor(**crop), tokenizer).save_pretrained(folder)
    return folder


def test_double_precision_of_a_device_without():
    """An Apple GPU raises a TypeError, as the mock does that has no such method."""
    x = mock.Mock(spec=["device", "cpu"], cpu=lambda: torch.ones(2))
    x.device.type = "mps"
    assert double(x).dtype == double(torch.ones(2)).dtype == torch.float64


def test_clip_score_equals_its_definition(clip_folder):
    """One picture and one text at a time, each through its own half of the model."""
    frames = [torch.randint(0, 256, (count, 3, 20, 16), dtype=torch.uint8) for count in (1, 3, 2)]
    prompts = ["a cat", "two birds fly", "red"]
    score = ClipScore(str(clip_folder), torch.device("cpu"))
    model = CLIPModel.from_pretrained(clip_folder)
    tokenizer, images = CLIPTokenizer.from_pretrained(clip_folder), CLIPImageProcessor.from_pretrained(clip_folder)
    expected = []
    with torch.no_grad():
        for clip, prompt in zip(frames, prompts, strict=True):
            ids = tokenizer(prompt, truncation=True, max_length=12, return_tensors="pt")["input_ids"]
            text = model.text_projection(model.text_model(ids).pooler_output)
            values = []
            for frame in clip:
                picture = images(Image.fromarray(frame.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
                seen = model.visual_projection(model.vision_model(picture).pooler_output)
                values.append(max(0.0, 100 * F.cosine_similarity(seen, text).item()))
            expected.append(sum(values) / len(values))
        assert score(frames, prompts).tolist() == pytest.approx(expected, abs=1e-3)
        assert max(expected) > 1
        alone = torch.cat([score([clip], [prompt]) for clip, prompt in zip(frames, prompts, strict=True)])
        assert alone.tolist() == pytest.approx(expected, abs=1e-3)
    assert score.too_long(prompts) == ["two birds fly"]  # eleven letters, and two marks
    assert len(score.protocol()["fingerprint"]) == 16  # CLIP has a parameter without dimensions


def test_clip_score_refuses(clip_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no CLIP"):
        ClipScore(str(tmp_path), torch.device("cpu"))
    model = CLIPModel.from_pretrained(clip_folder)
    state = {key: value for key, value in model.state_dict().items() if "text_projection" not in key}
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(WeightsError, match=r"lacks weights, which would be random: text_projection"):
        ClipScore(str(tmp_path), torch.device("cpu"))
