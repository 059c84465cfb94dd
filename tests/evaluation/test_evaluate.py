"""`python -m skipdit evaluate`: figures, protocol, kept features, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import Pooled, skipdit_command
from PIL import Image
from pytorch_fid import fid_score, inception
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from skipdit.data.video import read_mp4
from skipdit.evaluation import command as evaluate
from skipdit.metrics import frechet_distance, gaussian_frechet_distance, psnr
from skipdit.metrics.networks import load_image_script, load_inception
from skipdit.metrics.samples import Stretches
from skipdit.metrics.sets import kid, precision_recall
from skipdit.utils.video import write_mp4

CPU = torch.device("cpu")


class MockI3D(torch.nn.Module):
    """The signature of the I3D of StyleGAN-V, which takes clips as it got them: uint8 (N, 3, F, H, W)."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        assert rescale and resize and return_features
        assert x.dtype == torch.uint8 and x.shape[1] == 3 and x.shape[2] == 16
        x = x.float() / 255 * 2 - 1
        return torch.cat([x.mean((3, 4)).flatten(1)[:, ::8], x.std((2, 3, 4))], dim=1)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """Networks as TorchScript files."""
    folder = tmp_path_factory.mktemp("scripts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        networks = {"pooled": Pooled(), "slow": Pooled(2), "i3d": MockI3D()}
        for name, network in networks.items():
            torch.jit.script(network).save(str(folder / f"{name}.pt"))
    return folder


def pictures(count: int, seed: int = 0, size: int = 32) -> np.ndarray:
    """uint8 (N, H, W, 3), noise of a colour of its own each."""
    rng = np.random.default_rng(seed)
    colours = rng.uniform(40, 216, (count, 1, 1, 3)) + rng.uniform(-40, 40, (count, size, size, 3))
    return colours.round().astype(np.uint8)


def save_pictures(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i:06d}.png")
    return folder


def make_run(folder: Path, pixels: np.ndarray, cache: str = "none", **settings) -> Path:
    """What a class-to-image sampler leaves."""
    save_pictures(folder, pixels)
    Image.new("RGB", (99, 99)).save(folder / "grid.png")
    config = {
        "steps": 50,
        "seed": 0,
        "guidance_scale": 4.0,
        "sampler": "ddim",
        "weights": "w.pt",
        "vae": "v",
    } | settings
    cached = 0 if cache == "none" else 20
    report = {"config": config, "cache": cache, "steps": {"full": 50 - cached, "cached": cached}, "device": "cpu"}
    report |= {"versions": {"torch": "2.15"}, "num_samples": len(pixels)}
    (folder / "report.json").write_text(json.dumps(report))
    job = config | {"cache": cache, "weights": "aa", "vae": "bb", "dtype": "torch.float32", "device": "cpu"}
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def run(*arguments, out: Path | None = None) -> dict:
    """The command in this process; what it wrote."""
    more = ["--out", str(out)] if out else []
    with mock.patch.object(sys, "argv", ["evaluate", *map(str, arguments), *more]):
        skipdit_command("evaluate")()
    return json.loads((out or Path(arguments[1], "evaluation")).joinpath(f"{arguments[0]}.json").read_text())


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def noisy(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(int) + np.random.default_rng(9).integers(-3, 4, pixels.shape)).clip(0, 255).astype(np.uint8)


def test_fidelity_of_a_cached_run(tmp_path, capsys):
    a, b = pictures(5), noisy(pictures(5))
    b[3] = a[3]
    reference = make_run(tmp_path / "uncached", a)
    record = run("fidelity", make_run(tmp_path / "cached", b, "N2-700-50"), "--reference", reference)
    settings = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    psnrs = [peak_signal_noise_ratio(a[i], b[i]) for i in (0, 1, 2, 4)]
    ssims = [structural_similarity(x, y, data_range=255, **settings) for x, y in zip(a, b, strict=True)]
    results = record["results"]
    assert results["psnr"] == pytest.approx(np.mean(psnrs), rel=1e-6)
    assert results["ssim"] == pytest.approx(np.mean(ssims), rel=1e-6)
    assert (results["pairs"], results["identical_pairs"]) == (5, 1)
    protocol = record["protocol"]
    assert protocol["differences"] == {} and record["notes"] == []
    assert protocol["samples"]["cache"] == "N2-700-50" and protocol["reference"]["cache"] == "none"
    expected = {"guidance_scale": 4.0, "steps": 50, "sampler": "ddim", "seed": 0, "num_samples": 5, "full_steps": 30}
    assert expected.items() <= protocol["samples"].items()
    assert protocol["samples"]["vae"] == {"source": "v", "fingerprint": "bb"}
    assert {"skipdit", "torch", "torchvision", "numpy"} <= protocol["versions"].keys()
    assert "psnr: " in capsys.readouterr().out

    whole = run("fidelity", reference, "--reference", reference, out=tmp_path / "same")
    assert whole["results"]["psnr"] is None and whole["results"]["identical_pairs"] == 5


@pytest.mark.slow
def test_fidelity_of_clips_with_identical_frames(tmp_path):
    """They count, as in the benchmarks, and do not take their clip out of the mean."""
    films = torch.full((3, 4, 3, 32, 32), 128, dtype=torch.uint8)
    other = films.clone()
    other[0, 2:] = 60
    other[1] = 100
    ours, theirs = save_clips(tmp_path / "ours", other), save_clips(tmp_path / "theirs", films)
    frames = [psnr(read_mp4(ours / name), read_mp4(theirs / name)) for name in ("000000.mp4", "000001.mp4")]
    assert frames[0].isinf().tolist() == [True, True, False, False] and frames[1].isfinite().all()
    results = run("fidelity", ours, "--reference", theirs)["results"]
    expected = [(2 * 100 + frames[0][2:].sum()) / 4, frames[1].mean()]
    assert results["psnr"] == pytest.approx(sum(expected).item() / 2, rel=1e-6)
    assert (results["pairs"], results["identical_pairs"]) == (3, 1)


def test_fidelity_states_differences(tmp_path, capsys):
    a = pictures(3)
    fewer = make_run(tmp_path / "fewer", noisy(a)[:2], steps=20)
    record = run("fidelity", fewer, "--reference", make_run(tmp_path / "cached", a, "N2-700-50"))
    assert record["protocol"]["differences"] == {"steps": [20, 50]}
    assert record["protocol"]["reference_samples_without_partner"] == 1
    assert any("steps: 20 here, 50" in note for note in record["notes"])
    assert any("not uncached: N2-700-50" in note for note in record["notes"])
    plain = save_pictures(tmp_path / "plain", a)
    record = run("fidelity", plain, "--reference", plain)
    assert "steps" in record["protocol"]["samples"]["unknown"]
    assert any("unknown whether" in note for note in record["notes"])


def test_fidelity_refuses(tmp_path, capsys):
    a = pictures(3)
    reference = make_run(tmp_path / "a", a)
    message = refused(capsys, "fidelity", make_run(tmp_path / "b", a, seed=1), "--reference", reference)
    assert "not the same samples" in message and "seed: 1 in" in message
    message = refused(capsys, "fidelity", make_run(tmp_path / "c", pictures(4)), "--reference", reference)
    assert "no partner of 000003.png" in message
    small = make_run(tmp_path / "d", pictures(3, size=16))
    assert "000000.png is (1, 3, 16, 16)" in refused(capsys, "fidelity", small, "--reference", reference)
    (tmp_path / "a/000002.png").unlink()
    message = refused(capsys, "fidelity", reference, "--reference", reference)
    assert "holds 2 samples, and its report.json says 3" in message
    (tmp_path / "a/report.json").unlink()
    assert "unfinished run" in refused(capsys, "fidelity", reference, "--reference", reference)
    assert "neither a folder nor" in refused(capsys, "fidelity", tmp_path / "none", "--reference", reference)


@pytest.mark.slow
def test_fidelity_with_lpips(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lpips")
    import torchvision

    state = torchvision.models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{key}": value for key, value in state.items()}, tmp_path / "alex.pth")
    a, b = make_run(tmp_path / "a", pictures(2)), make_run(tmp_path / "b", noisy(pictures(2)), "N2-700-50")
    weights = "--alex-weights", tmp_path / "alex.pth"
    record = run("fidelity", b, "--reference", a, "--lpips", "alex", *weights)
    assert 0 < record["results"]["lpips_alex"] < 1
    assert record["protocol"]["networks"][0]["file"] == str(tmp_path / "alex.pth")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    offline = mock.Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    message = refused(capsys, "fidelity", b, "--reference", a, "--lpips", "alex")
    assert "alexnet-owt-7be5be79.pth is not in" in message and "--alex-weights FILE" in message
    (tmp_path / "torch/hub/checkpoints/alexnet-owt-7be5be79.pth").write_bytes((tmp_path / "alex.pth").read_bytes())
    assert "is damaged" in refused(capsys, "fidelity", b, "--reference", a, "--lpips", "alex")
    with mock.patch.dict(sys.modules, {"lpips": None}):
        assert "pip install lpips" in refused(capsys, "fidelity", b, "--reference", a, "--lpips", "alex", *weights)


def features(pixels: np.ndarray) -> Tensor:
    return Pooled()(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)


@pytest.mark.slow
def test_frechet_distance_by_a_script(tmp_path, scripts):
    """Independently computed features; a run, its folder without report, and its .npz give one figure."""
    mine, real = pictures(70), pictures(50, seed=1)
    folder = make_run(tmp_path / "run", mine, "N2-1000-20")
    np.savez(folder / "samples.npz", arr_0=mine)
    plain, reference = save_pictures(tmp_path / "plain/nested", mine).parent, save_pictures(tmp_path / "real", real)
    arguments = "--reference", reference, "--network", scripts / "pooled.pt"
    record = run("fid", folder, *arguments)
    a, b = features(mine), features(real)
    results = record["results"]
    assert results["frechet_distance"] == pytest.approx(frechet_distance(a, b), rel=1e-5)
    rounding = {"rel": 1e-5, "abs": 1e-7}  # of features in other batches; KID is a small difference of sums near 1
    assert results["kid"] == pytest.approx(kid(a, b)[0], **rounding)
    assert (results["precision"], results["recall"]) == pytest.approx(precision_recall(a, b))
    assert "inception_score" not in results and "fid" not in results
    assert any("of 70 samples, not 50,000" in note for note in record["notes"])
    assert any("not hold the network of published figures" in note for note in record["notes"])
    protocol = record["protocol"]
    assert protocol["network"]["file"] == str(scripts / "pooled.pt") and len(protocol["network"]["sha256"]) == 64
    assert protocol["reference"]["num_samples"] == 50 and len(protocol["reference"]["sha256"]) == 64
    assert "unknown" in protocol["reference"] and protocol["samples"]["cache"] == "N2-1000-20"

    again = run("fid", folder, *arguments, "--batch-size", "7", out=tmp_path / "again")["results"]
    assert again == pytest.approx(results, **rounding)
    assert run("fid", plain, *arguments)["results"] == results
    packed = run("fid", folder / "samples.npz", *arguments, out=tmp_path / "packed")
    assert packed["results"] == results and packed["protocol"]["samples"]["cache"] == "N2-1000-20"


def test_reference_of_another_size_is_cropped(tmp_path, scripts):
    large = np.zeros((6, 64, 96, 3), np.uint8)
    large[:, :, 16:80] = pictures(6, size=64)  # what the crop leaves; the box filter halves it
    halved = large[:, :, 16:80].reshape(6, 32, 2, 32, 2, 3).mean((2, 4)).round().astype(np.uint8)
    folder, reference = make_run(tmp_path / "run", halved), save_pictures(tmp_path / "real", large)
    record = run("fid", folder, "--reference", reference, "--network", scripts / "pooled.pt")
    assert record["results"]["frechet_distance"] < 1e-3
    assert record["protocol"]["reference"]["fitted_to"] == [32, 32]


def test_kept_features_are_not_stale(tmp_path, scripts):
    """Only the part with the changed sample is computed anew, whatever its file's time says."""
    pixels = pictures(130)
    folder, reference = make_run(tmp_path / "run", pixels), save_pictures(tmp_path / "real", pictures(40, seed=1))
    arguments = "fid", folder, "--reference", reference, "--network", scripts / "pooled.pt"
    before = run(*arguments)["results"]
    parts = {file: file.stat().st_mtime_ns for file in (folder / "evaluation/features").rglob("*.safetensors")}
    assert len(parts) == 7  # of 32 samples: five of the run, two of the reference
    assert run(*arguments)["results"] == before
    assert all(file.stat().st_mtime_ns == made for file, made in parts.items())

    file, pixels[70] = folder / "000070.png", 255
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    Image.fromarray(pixels[70]).save(file)
    os.utime(file, ns=times)
    after = run(*arguments)["results"]
    assert after["frechet_distance"] == pytest.approx(
        frechet_distance(features(pixels), features(pictures(40, 1))), 1e-5
    )
    assert after["frechet_distance"] != before["frechet_distance"]
    changed = [file.name for file, made in parts.items() if file.stat().st_mtime_ns != made]
    assert changed == ["0000064.safetensors"]

    next(iter(parts)).write_bytes(b"cut off")
    assert run(*arguments)["results"] == after


@pytest.mark.slow
def test_killed_evaluation_continues(tmp_path, scripts, capsys):
    folder, reference = (
        make_run(tmp_path / "run", pictures(200)),
        save_pictures(tmp_path / "real", pictures(20, seed=1)),
    )
    arguments = ["fid", str(folder), "--reference", str(reference), "--network", str(scripts / "slow.pt")]
    parts = folder / "evaluation/features"
    command = [sys.executable, "-m", "skipdit", "evaluate", *arguments, "--batch-size", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(parts.rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    shown = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL and not (folder / "evaluation/fid.json").exists()
    assert "run:" in shown and "/200" in shown  # the progress bar
    kept = {file: file.stat().st_mtime_ns for file in parts.rglob("*.safetensors")}
    assert 1 <= len(kept) < 7

    record = run(*arguments)
    assert all(file.stat().st_mtime_ns == made for file, made in kept.items())
    uninterrupted = run(*arguments, "--batch-size", "1", out=tmp_path / "fresh")
    assert record["results"] == pytest.approx(uninterrupted["results"], rel=1e-5, abs=1e-7)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights of the Inception of FID."""
    torch.manual_seed(0)
    nothing = mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: {})
    with nothing, mock.patch.object(torch.nn.Module, "load_state_dict"):
        network = inception.fid_inception_v3()
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:  # default ones let the signal die away
            torch.nn.init.kaiming_normal_(parameter)
        if name == "fc.weight":
            torch.nn.init.normal_(parameter, std=0.5)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


def frechet_of_few(a: np.ndarray, b: np.ndarray) -> float:
    """Of fewer samples than features: with centred X and Y the trace of the root is the nuclear norm of X Y'."""
    x, y = ((rows - rows.mean(0)) / np.sqrt(len(rows) - 1) for rows in (a, b))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * overlap


@pytest.mark.slow
def test_fid_equals_pytorch_fid(tmp_path, inception_file):
    """Features as pytorch-fid gives them, logits as the whole network gives them without the bias.

    The reference is as ADM has it: statistics, of which the FID is, and fewer pictures, of which KID and others are.
    """
    folder = make_run(tmp_path / "run", pictures(6))
    all_real = save_pictures(tmp_path / "real", pictures(7, seed=1))
    state = torch.load(inception_file, weights_only=True)
    with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
        theirs, whole = inception.InceptionV3().eval(), inception.fid_inception_v3().eval()
    a, b = (
        fid_score.get_activations(sorted(place.glob("0*.png")), theirs, 3, num_workers=0)
        for place in (folder, all_real)
    )
    assert a.std(0).mean() > 0.01
    statistics = {"mu": b.mean(0), "sigma": np.cov(b, rowvar=False)}
    np.savez(tmp_path / "adm.npz", arr_0=pictures(7, seed=1)[:5], **statistics)
    record = run("fid", folder, "--reference", tmp_path / "adm.npz", "--inception", inception_file)
    results, protocol = record["results"], record["protocol"]
    assert results["fid"] == pytest.approx(frechet_of_few(a, b), rel=1e-4)
    assert results["kid"] == pytest.approx(kid(a, b[:5])[0], rel=0.02)  # 100 random subsets
    assert protocol["network"]["released"] is False
    assert any("not hold the network of published figures" in note for note in record["notes"])
    assert protocol["reference"]["statistics"] == "mu and sigma of the file"
    assert len(protocol["reference"]["file_sha256"]) == 64 and protocol["reference"]["num_samples"] == 5

    pixels = torch.from_numpy(pictures(6)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        logits = whole(2 * torch.nn.functional.interpolate(pixels, (299, 299), mode="bilinear") - 1) - state["fc.bias"]
    p = logits.double().softmax(1)
    divergence = (p * (p / p.mean(0)).log()).sum(1).mean()
    assert results["inception_score"] == pytest.approx(divergence.exp().item(), rel=1e-4)
    assert results["inception_score"] > 1.01


@pytest.mark.slow
def test_fid_refuses(tmp_path, capsys, scripts, inception_file, monkeypatch):
    folder = make_run(tmp_path / "run", pictures(6))
    arguments = "fid", folder, "--reference", folder
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=urllib.error.URLError("no network")))
    message = refused(capsys, *arguments)
    assert "pt_inception-2015-12-05-6726825d.pth is not in" in message and "--inception FILE" in message
    assert "no such file; it is published at" in refused(capsys, *arguments, "--inception", tmp_path / "none.pth")
    state = torch.load(inception_file, weights_only=True)
    del state["fc.weight"]
    torch.save(state, tmp_path / "other.pth")
    message = refused(capsys, *arguments, "--inception", tmp_path / "other.pth")
    assert "does not hold the Inception network of FID" in message and "fc.weight" in message
    assert "no TorchScript file" in refused(capsys, *arguments, "--network", inception_file)
    message = refused(capsys, *arguments, "--network", scripts / "i3d.pt")
    assert "i3d.pt did not take pictures float32 (N, 3, H, W) in [-1, 1]" in message
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(12), sigma=np.eye(12))
    message = refused(
        capsys, "fid", folder, "--reference", tmp_path / "statistics.npz", "--network", scripts / "pooled.pt"
    )
    assert "leave out --network" in message
    np.savez(tmp_path / "wrong.npz", arr_0=np.zeros((4, 8, 8, 3)))
    message = refused(capsys, "fid", folder, "--reference", tmp_path / "wrong.npz", "--network", scripts / "pooled.pt")
    assert "arr_0 is float64 (4, 8, 8, 3), not uint8" in message


def clips(count: int, frames: int, seed: int = 0, size: int = 16) -> Tensor:
    """uint8 (N, F, 3, H, W), of slowly changing colours."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(count, frames, 3, 1, 1, generator=generator).cumsum(1) * 20
    return (colours % 255).expand(-1, -1, -1, size, size).to(torch.uint8)


def save_clips(folder: Path, films: Tensor) -> Path:
    folder.mkdir(parents=True)
    for i, film in enumerate(films):
        write_mp4(folder / f"{i:06d}.mp4", film, 8)
    return folder


def save_frames(folder: Path, films: Tensor) -> Path:
    for i, film in enumerate(films):
        save_pictures(folder / f"{i:03d}", film.permute(0, 2, 3, 1).numpy())
    return folder


@pytest.mark.slow
def test_fvd_by_the_protocol_of_stylegan_v(tmp_path, scripts, capsys):
    """The clips of a run against stretches of real ones, covariances divided by N."""
    mine, real = clips(8, 18), clips(9, 31, seed=1)
    folder = save_clips(tmp_path / "run", mine)
    for name in ("report.json", "job.json"):
        (folder / name).write_bytes((make_run(tmp_path / "other", pictures(8)) / name).read_bytes())
    reference = save_frames(tmp_path / "real", real)
    save_frames(tmp_path / "real/short", clips(1, 5))
    arguments = "fvd", folder, "--i3d", scripts / "i3d.pt"
    record = run(*arguments, "--reference", reference, "--interval", "2", "--clips", "9")
    ours = evaluate.open_samples(folder)
    gaussians = []
    for films in ([ours[i][:16] for i in range(8)], [film[:31:2] for film in real]):  # 31 frames: one place only
        rows = MockI3D()(torch.stack(films).transpose(1, 2), True, True, True).double().numpy()
        gaussians += [torch.from_numpy(rows.mean(0)), torch.from_numpy(np.cov(rows, rowvar=False, bias=True))]
    assert record["results"]["fvd"] == pytest.approx(gaussian_frechet_distance(*gaussians), rel=1e-4)
    about = record["protocol"]["reference"]
    assert (about["clips"], about["clips_left_out"], about["frame_interval"]) == (9, 1, 2)
    assert record["protocol"]["frames"] == 16 and record["protocol"]["samples"]["steps"] == 50
    assert any("8 clips of the run, not 2,048" in note for note in record["notes"])
    assert any("9 clips of the reference" in note for note in record["notes"])

    assert run(*arguments, "--reference", folder)["results"]["fvd"] == pytest.approx(0, abs=1e-12)
    message = refused(capsys, *arguments, "--reference", reference, "--frames", "40")
    assert "all 10 clips are too short" in message
    assert "has 18 frames, fewer than 40" in refused(capsys, *arguments, "--reference", folder, "--frames", "40")
    assert "--interval is of data sets" in refused(capsys, *arguments, "--reference", folder, "--interval", "2")
    message = refused(capsys, "fvd", folder, "--reference", folder, "--i3d", tmp_path / "none.pt")
    assert "none.pt: no such file; StyleGAN-V's is published at https://" in message
    message = refused(capsys, "fvd", folder, "--reference", folder, "--i3d", scripts / "pooled.pt")
    assert "pooled.pt did not take clips uint8 (N, 3, F, H, W)" in message
    assert "holds clips, not pictures" in refused(  # before the network is asked for
        capsys, "fid", folder, "--reference", folder, "--network", scripts / "none.pt"
    )


def test_torchscript_opens_without_what_torch_deprecates(scripts, recwarn):
    warnings.simplefilter("always")
    load_image_script(str(scripts / "pooled.pt"), torch.device("cpu"))
    assert not recwarn.list


def test_the_folder_around_a_run_from_a_prompt_names_it(tmp_path, capsys):
    """`--prompt` gives every prompt a folder of its own in `out`."""
    folder = make_run(tmp_path / "samples/a-cat", pictures(2))
    (folder / "prompts.json").write_text("{}")
    assert refused(capsys, "clip", tmp_path / "samples", "--model", "m").rstrip().endswith(f"{folder} has one")


def test_stretches_of_real_clips(tmp_path):
    """One of every clip if there are enough, else further ones, none twice; the same ones every time."""
    films = save_frames(tmp_path / "real", clips(6, 20))
    few = Stretches(films, 16, 1, 16, 4)
    assert len({name.split(":")[0] for name in few.names}) == 4
    more = Stretches(films, 16, 1, 16, 20)
    assert len(set(more.names)) == 20 and more.names == Stretches(films, 16, 1, 16, 20).names
    assert len(Stretches(films, 16, 1, 16, 99)) == 6 * 5  # every place where 16 of 20 frames can begin
    name, start = more.names[0].split(":")
    expected = clips(6, 20)[int(name), int(start) : int(start) + 16]
    assert torch.equal(more[0], expected)
    before = more.stamp(0)
    Image.new("RGB", (16, 16)).save(films / name / "000019.png")
    assert Stretches(films, 16, 1, 16, 20).stamp(0) != before


def test_clip_score_of_clips_and_pictures(tmp_path, capsys):
    """The score is a mean over samples, with each sample's own prompt; a changed prompt is not served from before."""

    class Score:
        def __init__(self, source: str, device: torch.device): ...

        def protocol(self) -> dict:
            return {"name": "CLIP", "source": "s", "fingerprint": "f"}

        def too_long(self, prompts: list[str]) -> list[str]:
            return prompts[:1]

        def __call__(self, samples: list[Tensor], prompts: list[str]) -> Tensor:
            return torch.tensor([len(s) + 100.0 * len(p) for s, p in zip(samples, prompts, strict=True)])

    folder = save_clips(tmp_path / "clips", clips(3, 4))
    with mock.patch.object(evaluate, "ClipScore", Score):
        assert "prompts.json is missing" in refused(capsys, "clip", folder, "--model", "m")
        prompts = {"000000.mp4": "a", "000001.mp4": "bb", "000002.mp4": "ccc"}
        (folder / "prompts.json").write_text(json.dumps(prompts))
        record = run("clip", folder, "--model", "m")
        assert record["results"]["clip_score"] == 204 and record["protocol"]["prompts_cut"] == 1
        assert record["notes"] == ["1 prompts are longer than the model reads, and were cut"]
        (folder / "prompts.json").write_text(json.dumps(prompts | {"000002.mp4": "cccccc"}))
        assert run("clip", folder, "--model", "m")["results"]["clip_score"] == 304
        (folder / "prompts.json").write_text(json.dumps({"000000.mp4": "a"}))
        assert "has no prompt of 000001.mp4" in refused(capsys, "clip", folder, "--model", "m")


def test_vbench_layout(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    table = {f"{i:06d}-x.mp4": ["a red fox", "two birds"][i // 2] for i in range(4)}
    for name in table:
        (folder / name).write_bytes(name.encode())
    (folder / "prompts.json").write_text(json.dumps(table))
    with mock.patch("skipdit.metrics.samples.read_mp4", lambda path: torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        record = run("vbench", folder, "--each", "2")
        place = Path(record["results"]["folder"])
        assert sorted(file.name for file in place.iterdir()) == [
            "a red fox-0.mp4",
            "a red fox-1.mp4",
            "two birds-0.mp4",
            "two birds-1.mp4",
        ]
        assert (place / "two birds-1.mp4").read_text() == "000003-x.mp4"
        assert record["results"]["missing"] == []
        (tmp_path / "wanted.txt").write_text("a red fox\na cat\n")
        with pytest.raises(SystemExit) as ended:
            run("vbench", folder, "--each", "3", "--prompts", tmp_path / "wanted.txt")
        assert ended.value.code == 1
        record = json.loads((folder / "evaluation/vbench.json").read_text())
        assert record["results"]["missing"] == ["a red fox-2.mp4", *(f"a cat-{i}.mp4" for i in range(3))]
        assert "4 clips are missing" in capsys.readouterr().out

        (tmp_path / "named.txt").write_text("a red fox\ntwo birds\n")
        record = run("vbench", place, "--each", "2", "--prompts", tmp_path / "named.txt", out=tmp_path / "out")
        assert record["results"]["folder"] == str(place) and record["results"]["missing"] == []


@pytest.mark.slow
def test_inception_from_the_download_cache(tmp_path, inception_file, monkeypatch):
    """The cached file counts if its hash is the one in its name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    digest = evaluate.sha256(inception_file)
    name = f"pt_inception-2015-12-05-{digest[:8]}.pth"
    monkeypatch.setattr(inception, "FID_WEIGHTS_URL", f"https://example.com/{name}")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints" / name).symlink_to(inception_file)
    network = load_inception(None, CPU)
    assert network.released and network.sha256 == digest and network.classifier.shape == (1008, 2048)
