"""What is released: the files of each task, most of them on the Hugging Face Hub."""

from collections.abc import Sequence
from dataclasses import dataclass

from skipdit.utils.errors import UserError


@dataclass(frozen=True)
class Item:
    """Files of one Hub repository that belong together.

    Attributes:
        repo: Hub repository, owner/name.
        files: names or patterns in the repository; "a|b" is one file published under either name, saved as a.
        folder: where they go, below the folder for all checkpoints; inside, they keep the repository's layout.
        gigabytes: published size, where known.
        holds: what `weights.identify` must say of the checkpoint; None for files that are no checkpoint of ours.
        repo_type: model or dataset, as the Hub calls it.
        optional: fetched only where it is asked for by name.
        url: where the files lie that are not on the Hub; `repo` is then whose they are.
    """

    repo: str
    files: tuple[str, ...]
    folder: str = "."
    gigabytes: float | None = None
    holds: str | None = None
    repo_type: str = "model"
    optional: bool = False
    url: str = ""

    def __str__(self) -> str:
        size = f"{self.gigabytes:5.2f} GB" if self.gigabytes else "size n/a"
        repo = self.url or (f"{self.repo} (dataset)" if self.repo_type == "dataset" else self.repo)
        return f"{size}  {repo}: {either_name(self.files)}"


def _skip_dit(files: str, gigabytes: float, holds: str) -> Item:
    return Item("GuanjieChen/Skip-DiT", (files,), gigabytes=gigabytes, holds=holds)


def _plain_dit(size: int) -> Item:
    """The DiT-XL/2 that was published with DiT, whose license allows no commercial use; no checksum is published."""
    place = "https://dl.fbaipublicfiles.com/DiT/models"
    file = f"DiT-XL-2-{size}x{size}.pt"
    return Item("facebookresearch/DiT", (file,), holds="class-to-image DiT, 1000 classes", optional=True, url=place)


def _plain_latte(file: str, holds: str) -> Item:
    """A Latte that was published with it, under the name that its own scripts have."""
    return Item("maxin-cn/Latte", (file,), "Latte", holds=holds, optional=True)


# The table of the paper's repository swaps the links of Latte-skip and DiT-XL/2-skip. File names are right, so they
# are what counts here, and the content is checked after the download.
_LATTE = "class-to-video Latte, 7 long skips"
_SD_VAE = Item("stabilityai/sd-vae-ft-ema", ("config.json", "*.safetensors"), "sd-vae-ft-ema")
TASKS: dict[str, dict[str, Item]] = {
    "class-to-image": {
        "dit": _skip_dit("DiT-XL-2-skip.pt", 11.40, "class-to-image DiT, 14 long skips, 1000 classes"),
        "vae": _SD_VAE,
        "plain-256": _plain_dit(256),
        "plain-512": _plain_dit(512),
    },
    "class-to-video": {
        "ffs": _skip_dit("ffs-skip.pt", 2.77, _LATTE),
        "sky": _skip_dit("skylapse-skip.pt|skytimelapse-skip.pt", 2.77, _LATTE),
        "taichi": _skip_dit("taichi-skip.pt", 2.77, _LATTE),
        "ucf101": _skip_dit("ucf101-skip.pt", 2.77, f"{_LATTE}, 101 classes"),
        "vae": _SD_VAE,
        "plain-ffs": _plain_latte("ffs.pt", "class-to-video Latte"),
        "plain-sky": _plain_latte("skytimelapse.pt", "class-to-video Latte"),
        "plain-taichi": _plain_latte("taichi-hd.pt", "class-to-video Latte"),
        "plain-ucf101": _plain_latte("ucf101.pt", "class-to-video Latte, 101 classes"),
    },
    "text-to-video": {
        "latte": _skip_dit("Latte-skip.pt", 8.76, "text-to-video Latte, 14 long skips"),
        "pipeline": Item(
            "maxin-cn/Latte-0", ("vae/*", "text_encoder/*", "scheduler/*", "transformer/config.json"), "Latte-0"
        ),
        "tokenizer": Item("maxin-cn/Latte-1", ("tokenizer/*",), "Latte-0"),  # beside the rest of the pipeline
        "plain": Item(  # to compare with, and for stage 1 of training
            "maxin-cn/Latte-0",
            ("transformer/config.json", "transformer/*.safetensors"),
            "Latte-0",
            holds="text-to-video Latte",
            optional=True,
        ),
        "temporal_decoder": Item("maxin-cn/Latte-0", ("vae_temporal_decoder/*",), "Latte-0", optional=True),
        "data": Item("GuanjieChen/video_seg", ("*",), "video_seg", repo_type="dataset", optional=True),
    },
    "text-to-image": {
        "hunyuan": Item(
            "Tencent-Hunyuan/HunyuanDiT-v1.2",
            ("t2i/model/pytorch_model_ema.pt",),
            holds="text-to-image Hunyuan-DiT, 19 long skips",
        ),
        "pipeline": Item(
            "Tencent-Hunyuan/HunyuanDiT-v1.2",
            ("t2i/clip_text_encoder/*", "t2i/mt5/*", "t2i/sdxl-vae-fp16-fix/*", "t2i/tokenizer/*"),
        ),
        "diffusers": Item(  # both of these once more
            "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
            (
                "model_index.json",
                *(f"{part}/*" for part in ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
                *("transformer/*", "vae/*"),
            ),
            "HunyuanDiT-v1.2-Diffusers",
            optional=True,
        ),
    },
}
FOLDERS = dict.fromkeys(TASKS, "checkpoints") | {"text-to-image": "ckpts"}  # the latter as the released code has it


def select(task: str, only: Sequence[str] = ()) -> dict[str, Item]:
    """The items of a task that are not optional, or those that `only` names. Raises ValueError for an unknown name."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if unknown := [name for name in only if name not in TASKS[task]]:
        raise UserError(f"{task} has no {', '.join(unknown)}; known: {', '.join(TASKS[task])}")
    return {name: item for name, item in TASKS[task].items() if (name in only if only else not item.optional)}


def either_name(files: Sequence[str]) -> str:
    return ", ".join(files).replace("|", " or ")
