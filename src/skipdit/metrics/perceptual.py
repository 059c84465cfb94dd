"""Image against image through a network: LPIPS, and the CLIP score of an image and its prompt."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from skipdit.checkpoints.download import hub_is_away
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import load_checkpoint
from skipdit.checkpoints.sums import require_sound
from skipdit.metrics.networks import weights_file
from skipdit.utils.errors import UserError
from skipdit.utils.pixels import to_float
from skipdit.utils.provenance import fingerprint

BACKBONES = {  # as --lpips names them: torchvision's ImageNet weights, and the least side of a picture
    "alex": ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", 31),
    "vgg": ("https://download.pytorch.org/models/vgg16-397923af.pth", 16),
}


def load_lpips(
    name: str, given: str | None, device: torch.device
) -> tuple[Callable[[Tensor, Tensor], Tensor], dict[str, object]]:
    """LPIPS 0.1 (Zhang et al., arXiv 1801.03924), the mean of its map over all pixels, as in the paper's protocol.

    Args:
        name: of the backbone, "alex" or "vgg".
        given: file with torchvision's weights of it; None for torch's download cache.

    Returns:
        The distance of uint8 (N, 3, H, W) and (N, 3, H, W) -> (N,), float32; and what to report of it.

    Raises FileNotFoundError or ValueError for weights that are not there or not its own, or without the package lpips.
    """
    try:
        import lpips
    except ImportError as error:
        raise UserError(
            'LPIPS needs the package lpips: pip install "skipdit[metrics]", or pip install lpips'
        ) from error
    url, least = BACKBONES[name]
    path, digest, released = weights_file(given, url, f"--{name}-weights")
    state = load_checkpoint(path)
    require_sound(path, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it calls torchvision in an old way
        model = lpips.LPIPS(net=name, pnet_rand=True, spatial=True, verbose=False)
    # Ours "slice2.3.weight" is torchvision's "features.3.weight"; the classifier after them is not used.
    wanted = {key: f"features.{key.partition('.')[2]}" for key in model.net.state_dict()}
    if missing := sorted(set(wanted.values()) - state.keys()):
        raise WeightsError(f"{path} holds no {name} of torchvision: {', '.join(missing[:5])} ... are missing")
    try:
        model.net.load_state_dict({key: state[theirs] for key, theirs in wanted.items()})
    except RuntimeError as error:
        raise WeightsError(f"{path} holds no {name} of torchvision: {error}") from error
    model.to(device).requires_grad_(False)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        if min(a.shape[-2:]) < least:
            raise UserError(f"LPIPS with {name} needs pictures of {least} pixels; these are {tuple(a.shape[-2:])}")
        return model(to_float(a), to_float(b)).mean(dim=(1, 2, 3))

    protocol = {"name": f"LPIPS 0.1, {name}", "file": str(path), "sha256": digest, "released": released}
    return distance, protocol | {"spatial": True}


class ClipScore:
    """100 cos(image, prompt), not below 0 (Hessel et al., arXiv 2104.08718, in the scale of the paper's tables).

    Args:
        source: folder or Hub name of a CLIP of transformers, for example openai/clip-vit-base-patch32.

    Raises FileNotFoundError or ValueError if it is not there, or lacks weights.
    """

    def __init__(self, source: str, device: torch.device):
        from transformers import CLIPModel, CLIPProcessor  # here: they take seconds to import

        try:
            cached = {"local_files_only": hub_is_away(source)}
            self._model, report = CLIPModel.from_pretrained(source, output_loading_info=True, **cached)
            self._processor = CLIPProcessor.from_pretrained(source, **cached)
        except (OSError, ValueError) as error:
            reason = "which does not answer" if cached["local_files_only"] else str(error).splitlines()[0]
            if Path(source).exists():
                raise FileNotFoundError(f"{source} holds no CLIP of transformers ({reason})") from error
            raise FileNotFoundError(
                f"no CLIP {source}: neither a folder here nor fetched from the Hub ({reason}); "
                f"`hf download {source} --local-dir FOLDER` fetches it, and --model FOLDER takes it from there"
            ) from error
        if missing := sorted(report["missing_keys"]):
            raise WeightsError(f"{source} lacks weights, which would be random: {', '.join(map(str, missing[:5]))}")
        self._model.to(device).eval().requires_grad_(False)
        self.source = source
        self._limit = self._model.config.text_config.max_position_embeddings

    def protocol(self) -> dict:
        return {"name": "CLIP", "source": self.source, "fingerprint": fingerprint(self._model)}

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """Prompts of which the model reads only the beginning."""
        ids = self._processor.tokenizer(list(prompts))["input_ids"]
        return [prompt for prompt, some in zip(prompts, ids, strict=True) if len(some) > self._limit]

    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Per sample: pictures or frames, uint8 (F, 3, H, W), and a prompt -> (N,), means over the frames."""
        device, tokenizer = self._model.device, self._processor.tokenizer
        texts = tokenizer(list(prompts), padding=True, truncation=True, max_length=self._limit, return_tensors="pt")
        frames = [frame for sample in pictures for frame in sample]
        pixels = self._processor.image_processor(frames, return_tensors="pt")["pixel_values"]
        out = self._model(**texts.to(device), pixel_values=pixels.to(device))  # embeddings come out normalised
        owner = torch.repeat_interleave(torch.tensor([len(sample) for sample in pictures])).to(device)
        scores = (100 * (out.image_embeds * out.text_embeds[owner]).sum(1)).clamp(min=0)
        return torch.stack([scores[owner == i].mean() for i in range(len(pictures))])
