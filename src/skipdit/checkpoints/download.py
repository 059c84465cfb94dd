"""Released checkpoints from the Hugging Face Hub: `skipdit download`."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import get_hf_file_metadata, hf_hub_url, list_repo_files
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import HfHubHTTPError, build_hf_headers

from skipdit.checkpoints.catalogue import FOLDERS, Item, either_name, select
from skipdit.checkpoints.errors import WeightsError
from skipdit.checkpoints.files import load_state
from skipdit.checkpoints.loading import identify
from skipdit.checkpoints.sums import require_sound, sha256
from skipdit.cli import friendly_errors

T = TypeVar("T")
SECONDS = 5  # to wait for the Hub's first answer


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
        if item.url:
            published[item.repo] = [*published.get(item.repo, []), *item.files]
        elif item.repo not in published:
            published[item.repo] = _ask_hub(item, item.files, list_repo_files, item.repo, repo_type=item.repo_type)
    names, missing = {}, []
    for key, item in items.items():
        names[key], absent = _resolve(item, published[item.repo])
        missing += [f"  {item.repo}: {either_name([file])}" for file in absent]
    if missing:
        raise FileNotFoundError("nothing was fetched, because the Hub does not have:\n" + "\n".join(missing))
    local = []
    for key, item in items.items():
        target = folder / item.folder
        for name in names[key]:
            place = target / _saved_as(name, item)
            local.append(_ask_hub(item, [name], fetch, item.repo, name, place, item.repo_type, item.url))
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
            f"could not fetch {item.repo}: {either_name(files)} from the Hub: {reason}.\n"
            "Check the connection and the disk space; the same command again continues where this one stopped."
        ) from error


def _saved_as(name: str, item: Item) -> str:
    """What a published file is called here: one name, whichever of its two the Hub has."""
    either = (pattern.split("|") for pattern in item.files)
    return next((names[0] for names in either if len(names) > 1 and name in names), name)


def fetch(repo: str, name: str, target: Path, repo_type: str = "model", place: str = "") -> Path:
    """One file of a Hub repository, continued from what an interrupted call left. Returns `target`.

    Args:
        place: where the file lies if that is not the Hub, whose token then stays here.

    The Hub client's own download does the same but starts an interrupted file from its first byte again. Raises what
    the client raises, and OSError if the bytes do not have the published checksum.
    """
    url = f"{place}/{name}" if place else hf_hub_url(repo, name, repo_type=repo_type)
    access: dict[str, bool] = {"token": False} if place else {}
    remote = get_hf_file_metadata(url, **access)
    if target.exists() and target.stat().st_size == remote.size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{remote.etag[:12]}.partial")  # bytes of two versions never mix
    with open(partial, "ab") as file:
        if file.tell() > remote.size:  # two processes wrote it
            file.truncate(0)
        done = partial.stat().st_size
        http_get(url, file, resume_size=done, headers=build_hf_headers(**access), expected_size=remote.size)
    if len(remote.etag) == 64 and sha256(partial) != remote.etag:  # small files have no such checksum
        partial.unlink()
        raise OSError("what arrived is damaged and was removed")
    os.replace(partial, target)
    return target


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


@friendly_errors()
def main(args: argparse.Namespace) -> None:
    folder = args.dir or Path(FOLDERS[args.task])
    for name, item in select(args.task, args.only).items():
        print(f"{name:<18}{item} -> {folder / item.folder}")
    if not args.dry_run:
        print(*download(args.task, folder, args.only), sep="\n")
