"""Fetch released checkpoints, and what their pipelines need, from the Hugging Face Hub.

    python -m skipdit download class-to-image                      # everything for the task, into checkpoints/
    python -m skipdit download class-to-video --only ffs sky       # some of it
    python -m skipdit download text-to-video --dry-run             # only list it
    python -m skipdit download text-to-image                       # into ckpts/, as the released code has it

The same command again continues where an interrupted one stopped, and skips what is there.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import get_hf_file_metadata, hf_hub_url, list_repo_files
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import HfHubHTTPError, build_hf_headers

from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import load_state
from skipdit.checkpoints.loading import identify
from skipdit.checkpoints.sums import require_sound, sha256
from skipdit.cli import friendly_errors
from skipdit.utils.text import with_home

T = TypeVar("T")
SECONDS = 5  # to wait for the Hub's first answer


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
    """

    repo: str
    files: tuple[str, ...]
    folder: str = "."
    gigabytes: float | None = None
    holds: str | None = None
    repo_type: str = "model"
    optional: bool = False

    def __str__(self) -> str:
        size = f"{self.gigabytes:5.2f} GB" if self.gigabytes else "size n/a"
        repo = f"{self.repo} (dataset)" if self.repo_type == "dataset" else self.repo
        return f"{size}  {repo}: {_either(self.files)}"


def _skip_dit(files: str, gigabytes: float, holds: str) -> Item:
    return Item("GuanjieChen/Skip-DiT", (files,), gigabytes=gigabytes, holds=holds)


# The table of the paper's repository swaps the links of Latte-skip and DiT-XL/2-skip. File names are right, so they
# are what counts here, and the content is checked after the download.
_LATTE = "class-to-video Latte, 7 long skips"
_SD_VAE = Item("stabilityai/sd-vae-ft-ema", ("config.json", "*.safetensors"), "sd-vae-ft-ema")
TASKS: dict[str, dict[str, Item]] = {
    "class-to-image": {
        "dit": _skip_dit("DiT-XL-2-skip.pt", 11.40, "class-to-image DiT, 14 long skips, 1000 classes"),
        "vae": _SD_VAE,
    },
    "class-to-video": {
        "ffs": _skip_dit("ffs-skip.pt", 2.77, _LATTE),
        "sky": _skip_dit("skylapse-skip.pt|skytimelapse-skip.pt", 2.77, _LATTE),
        "taichi": _skip_dit("taichi-skip.pt", 2.77, _LATTE),
        "ucf101": _skip_dit("ucf101-skip.pt", 2.77, f"{_LATTE}, 101 classes"),
        "vae": _SD_VAE,
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


def is_hub_name(place: str) -> bool:
    """Whether `owner/name` is of the Hub: not if its owner is a folder here, or one that downloads make."""
    owner = place.partition("/")[0]
    local = owner in FOLDERS.values() or Path(owner).is_dir()
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", place)) and not local


@cache
def hub_is_away(place: str) -> bool:
    """Whether a place is a Hub name and the Hub cannot be asked: then only what it gave before can be had.

    The libraries ask for half a minute before they give up. One question, of a few seconds at most, saves that.
    """
    if not is_hub_name(place):
        return False
    try:
        get_hf_file_metadata(hf_hub_url(place, "config.json"), timeout=SECONDS)
    except HfHubHTTPError:  # it has answered
        return False
    except Exception:  # each major version of the client brings the exceptions of another HTTP library
        return True
    return False


def select(task: str, only: Sequence[str] = ()) -> dict[str, Item]:
    """The items of a task that are not optional, or those that `only` names. Raises ValueError for an unknown name."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if unknown := [name for name in only if name not in TASKS[task]]:
        raise ValueError(f"{task} has no {', '.join(unknown)}; known: {', '.join(TASKS[task])}")
    return {name: item for name, item in TASKS[task].items() if (name in only if only else not item.optional)}


def download(task: str, folder: str | Path | None = None, only: Sequence[str] = ()) -> list[Path]:
    """Fetch what `select` gives: partial files are resumed, complete ones passed over.

    Args:
        folder: None: the task's of `FOLDERS`.

    Returns:
        The local files.

    Raises:
        FileNotFoundError: the Hub lacks files (all are listed, before anything is fetched) or cannot be reached.
        WeightsError: a checkpoint is damaged or holds another model.
    """
    items, folder = select(task, only), Path(folder or FOLDERS[task])
    published: dict[str, list[str]] = {}
    for item in items.values():
        if item.repo not in published:
            published[item.repo] = _ask_hub(item, item.files, list_repo_files, item.repo, repo_type=item.repo_type)
    names, missing = {}, []
    for key, item in items.items():
        names[key], absent = _resolve(item, published[item.repo])
        missing += [f"  {item.repo}: {_either([file])}" for file in absent]
    if missing:
        raise FileNotFoundError("nothing was fetched, because the Hub does not have:\n" + "\n".join(missing))
    local = []
    for key, item in items.items():
        target = folder / item.folder
        for name in names[key]:
            place = target / _saved_as(name, item)
            local.append(_ask_hub(item, [name], fetch, item.repo, name, place, repo_type=item.repo_type))
        if item.holds:
            _check(local[-1], item)
    return local


def _ask_hub(item: Item, files: Sequence[str], call: Callable[..., T], *args, **kwargs) -> T:
    """A call that asks the Hub, whose failures become a FileNotFoundError that names repository and files."""
    try:
        return call(*args, **kwargs)
    except Exception as error:  # each major version of the client brings the exceptions of another HTTP library
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FileNotFoundError(
            f"could not fetch {item.repo}: {_either(files)} from the Hub: {reason}.\n"
            "Check the connection and the disk space; the same command again continues where this one stopped."
        ) from error


def _saved_as(name: str, item: Item) -> str:
    """What a published file is called here: one name, whichever of its two the Hub has."""
    either = (pattern.split("|") for pattern in item.files)
    return next((names[0] for names in either if len(names) > 1 and name in names), name)


def fetch(repo: str, name: str, target: Path, repo_type: str = "model") -> Path:
    """One file of a Hub repository, continued from what an interrupted call left. Returns `target`.

    The Hub client's own download does the same but starts an interrupted file from its first byte again. Raises what
    the client raises, and OSError if the bytes do not have the published checksum.
    """
    url = hf_hub_url(repo, name, repo_type=repo_type)
    remote = get_hf_file_metadata(url)
    if target.exists() and target.stat().st_size == remote.size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{remote.etag[:12]}.partial")  # bytes of two versions never mix
    with open(partial, "ab") as file:
        if file.tell() > remote.size:  # two processes wrote it
            file.truncate(0)
        done = partial.stat().st_size
        http_get(url, file, resume_size=done, headers=build_hf_headers(), expected_size=remote.size)
    if len(remote.etag) == 64 and sha256(partial) != remote.etag:  # small files have no such checksum
        partial.unlink()
        raise OSError("what arrived is damaged and was removed")
    os.replace(partial, target)
    return target


def _either(files: Sequence[str]) -> str:
    return ", ".join(files).replace("|", " or ")


def _resolve(item: Item, published: list[str]) -> tuple[list[str], list[str]]:
    """Names of an item's files among the published ones, and the patterns that match none."""
    names, absent = [], []
    for pattern in item.files:
        found = [[name for name in published if fnmatch(name, either)] for either in pattern.split("|")]
        first = next(filter(None, found), [])
        names += first
        absent += [] if first else [pattern]
    # a .bin beside .safetensors is the same weights once more, pickled
    safe = {PurePosixPath(name).parent for name in names if name.endswith(".safetensors") and ".fp16." not in name}
    return [name for name in names if not (name.endswith(".bin") and PurePosixPath(name).parent in safe)], absent


def _check(path: Path, item: Item) -> None:
    """Raise WeightsError unless a checkpoint is whole, and holds the model that it should."""
    state = load_state(path)
    require_sound(path, state)
    found = identify(state)
    if found != item.holds:
        raise WeightsError(
            f"{path} from {item.repo} holds {found}, but should hold {item.holds}. Some published links lead to the "
            "wrong file: if you saved this one by hand, remove it and run the command again."
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m skipdit download",
        description=__doc__,
        epilog="\n".join(
            f"{task}:\n" + "\n".join(f"{' *'[item.optional]} {name:<18}{item}" for name, item in items.items())
            for task, items in TASKS.items()
        )
        + "\n\n* only where --only names it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--dir", type=Path, help="folder for the files [checkpoints; of text-to-image: ckpts]")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="fetch only these, see below")
    parser.add_argument("--dry-run", action="store_true", help="list what would be fetched, without a connection")
    args = with_home(parser.parse_args(argv))
    folder = args.dir or Path(FOLDERS[args.task])
    with friendly_errors():
        for name, item in select(args.task, args.only).items():
            print(f"{name:<18}{item} -> {folder / item.folder}")
        if not args.dry_run:
            print(*download(args.task, folder, args.only), sep="\n")
