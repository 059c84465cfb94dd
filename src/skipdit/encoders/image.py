"""Image encoders, from a folder or the Hub: a vision transformer of timm or transformers, such as a DINOv2."""

import inspect
import json
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from skipdit.checkpoints.download import hub_is_away
from skipdit.checkpoints.files import require_finite
from skipdit.utils.errors import UserError


class ImageEncoder:
    """A frozen vision transformer that turns images into patch tokens.

    Attributes:
        size: pixels along a side of what it sees; images are resized to that.
        mean, std: of each channel of pixels 0 to 1, by which they are normalised.
        grid: rows and columns of its tokens.
        dim: channels D of a token.

    Raises ValueError for a model without tokens of square patches, and a `size` that these do not divide.
    """

    def __init__(self, model: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...]):
        self.model, self.size, self.mean, self.std = model.eval().requires_grad_(False), size, mean, std
        patch = getattr(getattr(model, "patch_embed", getattr(model, "config", None)), "patch_size", None)
        patch = patch[0] if isinstance(patch, tuple | list) and len(set(patch)) == 1 else patch
        if not isinstance(patch, int):
            raise UserError(f"{type(model).__name__} is no ViT with square patches")
        if size % patch:
            raise UserError(f"--features-size {size} is not a multiple of {patch}, the side of a patch")
        self.grid = (size // patch, size // patch)
        tokens = self._tokens(torch.zeros(1, 3, size, size))
        if tokens.ndim != 3 or tokens.shape[1] < self.grid[0] * self.grid[1]:
            raise UserError(f"{type(model).__name__} is no ViT: it does not keep a token per patch")
        self.dim = tokens.shape[-1]

    def _tokens(self, x: Tensor) -> Tensor:
        """Normalised images -> all tokens (N, tokens, D)."""
        if hasattr(self.model, "forward_features"):
            return self.model.forward_features(x)
        parameters = inspect.signature(self.model.forward).parameters
        resized = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        return self.model(pixel_values=x, **resized).last_hidden_state

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> tokens (N, P, D) of the whole image, row by row, float16, on the encoder's device.

        Raises ValueError if they are not finite.
        """
        device = next(self.model.parameters()).device
        pixels = F.interpolate(images.to(device) / 255, (self.size, self.size), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(numbers, device=device)[:, None, None] for numbers in (self.mean, self.std))
        tokens = self._tokens((pixels.clamp(0, 1) - mean) / std)
        tokens = tokens[:, -self.grid[0] * self.grid[1] :].half()  # those of the class and registers come first
        if not tokens.isfinite().all():
            raise UserError("features are not finite in float16: take another image encoder")
        return tokens


def load_image_encoder(name: str, size: int | None = None) -> ImageEncoder:
    """An image encoder on the CPU, in float32.

    Args:
        name: folder; or a name on the Hub, where timm's names are without their owner, `timm/`.
        size: pixels along a side of what it sees; None: as it was trained, or what its processor gives.

    Raises FileNotFoundError if it is neither a folder nor to be had from the Hub; ValueError if it cannot be loaded.
    """
    folder, place = Path(name), name if "/" in name else f"timm/{name}"
    if not folder.is_dir():
        files = ["*.json", "model*.safetensors"]
        try:
            folder = Path(snapshot_download(place, allow_patterns=files, local_files_only=hub_is_away(place)))
        except Exception as error:  # each major version of the client brings the exceptions of another HTTP library
            raise FileNotFoundError(
                f"no image encoder {name}: neither a folder here nor fetched from the Hub, as {place}"
            ) from error
    try:
        settings = json.loads((folder / "config.json").read_bytes())
        loaded = _load_timm(folder, settings, size) if "architecture" in settings else _load_transformers(folder, size)
        encoder = ImageEncoder(*loaded)
    except Exception as error:  # damaged files make the parsers behind raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot take features of {name}, which should be a ViT: {reason}") from error
    require_finite(name, encoder.model.state_dict())
    return encoder


Loaded = tuple[nn.Module, int, tuple[float, ...], tuple[float, ...]]  # arguments of `ImageEncoder`


def _load_timm(folder: Path, settings: dict[str, Any], size: int | None) -> Loaded:
    given = settings.get("model_args", {}) | {"num_classes": 0} | ({"img_size": size} if size else {})
    kind, own = settings["architecture"], settings["pretrained_cfg"]
    place = {"file": str(folder / "model.safetensors"), "custom_load": False}
    model = timm.create_model(kind, pretrained=True, pretrained_cfg=own, pretrained_cfg_overlay=place, **given)
    return model, size or own["input_size"][-1], tuple(own["mean"]), tuple(own["std"])


def _load_transformers(folder: Path, size: int | None) -> Loaded:
    model, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if absent := sorted(name for name in report["missing_keys"] if "pooler." not in name):  # which is not used here
        raise UserError(f"weights are missing, {', '.join(absent[:5])}")
    processor = AutoImageProcessor.from_pretrained(folder).to_dict()
    sides = processor["crop_size"] if processor.get("do_center_crop") else processor["size"]
    own = sides.get("height") or sides["shortest_edge"]
    model = getattr(model, "vision_model", model)  # of one that reads texts, too
    return model, size or own, tuple(processor["image_mean"]), tuple(processor["image_std"])
