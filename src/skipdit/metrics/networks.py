"""Networks that metrics look through. Each comes from a file whose hash is known; none is ever random or another one.

Files that are given with a command count; else those in torch's download cache, fetched into it if absent.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import load_checkpoint
from skipdit.checkpoints.sums import require_sound, sha256
from skipdit.utils.errors import UserError
from skipdit.utils.pixels import to_float

I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"
I3D_SHAPE = "clips uint8 (N, 3, F, H, W), rescale=True, resize=True, return_features=True"


@dataclass
class Network:
    """Features of samples.

    Attributes:
        name: for people.
        file, sha256: its weights.
        released: whether these are the weights that published figures are of; None where that cannot be told.
        features: pixels uint8 (N, F, 3, H, W), on the network's device -> (N, D) float32.
        classifier: (classes, D), what turns features into logits; None without.
    """

    name: str
    file: Path
    sha256: str
    released: bool | None
    features: Callable[[Tensor], Tensor] = field(repr=False)
    classifier: Tensor | None = field(default=None, repr=False)

    def protocol(self) -> dict:
        return {"name": self.name, "file": str(self.file), "sha256": self.sha256, "released": self.released}


def weights_file(given: str | None, url: str, option: str) -> tuple[Path, str, bool]:
    """A file of weights, its hash, and whether it is the one at the address, whose name ends in its hash.

    Args:
        given: a path, or None for torch's download cache.
        url: where it is published.
        option: of the command line, for messages.

    Raises FileNotFoundError, with the address, if it is not there; ValueError if the cached one is damaged.
    """
    name = url.rpartition("/")[2]
    expected = name.rpartition(".")[0].rpartition("-")[2]
    path = Path(given or Path(torch.hub.get_dir(), "checkpoints", name))
    if given and not path.is_file():
        raise FileNotFoundError(f"{option} {given}: no such file; it is published at {url}")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), expected)
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise FileNotFoundError(
                f"{name} is not in {path.parent} and could not be downloaded ({error}); "
                f"fetch {url} and put it there, or name it: {option} FILE"
            ) from error
    found = sha256(path)
    if not given and not found.startswith(expected):
        raise UserError(f"{path} is damaged: its hash begins with {found[:8]}, not {expected}; delete it")
    return path, found, found.startswith(expected)


def load_inception(given: str | None, device: torch.device) -> Network:
    """The Inception network of FID in its PyTorch port (pytorch-fid): 2048 features, 1008 classes.

    Pixels are resized to 299x299 bilinearly, as there. The classifier goes without its bias, as in the published code
    of the inception score.

    Raises FileNotFoundError or ValueError for weights that are not there or not its own.
    """
    from pytorch_fid import inception  # here: it takes a second to import

    path, digest, released = weights_file(given, inception.FID_WEIGHTS_URL, "--inception")
    state = load_checkpoint(path)
    require_sound(path, state)
    try:
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
            model = inception.InceptionV3().eval().to(device)
    except (RuntimeError, AttributeError) as error:
        raise WeightsError(f"{path} does not hold the Inception network of FID: {str(error)[:500]}") from error

    def features(pixels: Tensor) -> Tensor:
        return model(pixels.flatten(0, 1).float() / 255)[0].flatten(1)

    return Network("Inception v3 of FID (pytorch-fid)", path, digest, released, features, state["fc.weight"].to(device))


def load_image_network(script: str | None, inception: str | None, device: torch.device) -> Network:
    """The TorchScript file that is given, or the network of FID. Arguments and errors as of the next two."""
    return load_image_script(script, device) if script else load_inception(inception, device)


def load_image_script(file: str, device: torch.device) -> Network:
    """A TorchScript file that gives features (N, D) of pictures, float32 (N, 3, H, W) in [-1, 1].

    Raises FileNotFoundError or ValueError if there is none, or it does not take these.
    """
    network = _script(file, "--network", device)

    def features(pixels: Tensor) -> Tensor:
        with _complaint(file, "pictures float32 (N, 3, H, W) in [-1, 1]"):
            return network(to_float(pixels.flatten(0, 1))).flatten(1)

    return Network("TorchScript", Path(file), sha256(file), False, features)


def load_i3d(file: str, device: torch.device) -> Network:
    """The TorchScript I3D of StyleGAN-V (arXiv 2112.14683): 400 logits before the softmax, of clips.

    Which file that is nobody has put into its name, so its hash is reported and not checked.

    Raises FileNotFoundError or ValueError if there is none, or it does not take clips as that one does.
    """
    network = _script(file, "--i3d", device, f"StyleGAN-V's is published at {I3D_URL}")

    def features(pixels: Tensor) -> Tensor:
        with _complaint(file, I3D_SHAPE):
            clips = pixels.transpose(1, 2).contiguous()
            return network(clips, rescale=True, resize=True, return_features=True).flatten(1)

    return Network("TorchScript I3D", Path(file), sha256(file), None, features)


def _script(file: str, option: str, device: torch.device, fix: str = "") -> nn.Module:
    if not Path(file).is_file():
        raise FileNotFoundError(f"{option} {file}: no such file{fix and '; '}{fix}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit")  # which PyTorch deprecates
            return torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{option} {file} is no TorchScript file: {str(error).splitlines()[0]}") from error


class _complaint:
    """Turns what a network of others raises into a message that names it."""

    def __init__(self, file: str, takes: str):
        self.file, self.takes = file, takes

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return
        if isinstance(error, RuntimeError | AttributeError):
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"{self.file} did not take {self.takes}: {last}") from error
