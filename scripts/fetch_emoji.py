"""Fetch a small data set of captioned videos, animated emoji, or of captioned pictures, still ones.

    python scripts/fetch_emoji.py --out data/emoji-anim              # 732 videos, a download of 740 MB
    python scripts/fetch_emoji.py --kind 3d --out data/emoji-3d      # 1854 pictures, a download of 23 MB

Microsoft's Fluent emoji as repackaged in npm's @lobehub/fluent-emoji-*, and their names and groups from
emojibase-data (all MIT). They become

    videos/<subgroup>/<codepoints>.mp4, or images/<subgroup>/<codepoints>.png
    captions.jsonl    a line each: video or image, caption, tags, label (the subgroup), group; for videos frames and fps
    source.json       packages and settings, which one folder cannot mix

in RGB on white. Skin tones are left out, and so are animations too short for a 16-frame clip. The same command again
continues an interrupted run.
"""

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageSequence
from tqdm import tqdm

from skipdit.cli import Parser, friendly_errors
from skipdit.utils.errors import UserError

ANIMATED = tuple(f"@lobehub/fluent-emoji-anim-{part}@1.0.0" for part in (1, 2, 3, 4))
STILL = ("@lobehub/fluent-emoji-3d@1.1.0",)
NAMES = "emojibase-data@17.0.0"
MIN_FRAMES = 16  # a clip of the video models
# x264's result depends on its number of threads, and its own choice on the machine
X264 = ["-crf", "16", "-preset", "slow", "-threads", "2"]


def fetch(packages: Sequence[str], cache: Path) -> list[Path]:
    """The npm tarballs of packages given as name@version, from `cache` where they are there.

    Raises:
        FileNotFoundError: tarballs are missing, and so is npm.
        OSError: npm failed.
    """
    paths = [cache / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz") for package in packages]
    missing = {path: package for path, package in zip(paths, packages, strict=True) if not path.exists()}
    npm = shutil.which("npm")
    if missing and npm is None:
        raise FileNotFoundError(
            "npm is not there. Install Node.js, or put the tarballs (npm pack NAME@VERSION) in the folder yourself:\n"
            + "\n".join(f"  {path} of {package}" for path, package in missing.items())
        )
    cache.mkdir(parents=True, exist_ok=True)
    for path, package in missing.items():
        print(f"fetching {package} into {cache}", flush=True)
        with TemporaryDirectory(dir=cache, prefix=".partial-") as scratch:  # whoever is killed leaves no half tarball
            # in npm's own cache, all of it would stay on the disk once more
            own = ["--cache", f"{scratch}/cache", "--logs-max", "0", "--loglevel", "error"]
            command = [npm, "pack", package, "--pack-destination", scratch, *own]
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise OSError(f"npm could not fetch {package}:\n{done.stderr.strip()}")
            os.replace(Path(scratch) / path.name, path)
    return paths


def contents(path: Path, bar: tqdm | None = None) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a tarball, in its order; `bar` counts the tarball's bytes.

    Nothing is unpacked to disk, so no name in a tarball can lead anywhere. Raises OSError if it is damaged.
    """
    seen = 0
    try:
        with open(path, "rb") as file, gzip.open(file) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member).read()
                if bar is not None:
                    bar.update(file.tell() - seen)
                    seen = file.tell()
            while plain.read(2**20):  # the checksum comes last
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise OSError(f"{path} is damaged ({error}): remove it and run the same command again") from error


def key(codepoints: str) -> str:
    """What the packages' spellings of an emoji share: they differ in case and in variation selectors (fe0f)."""
    return codepoints.lower().replace("-fe0f", "")


def read_names(path: Path) -> dict[str, dict]:
    """Caption, tags, label and group of emoji by their `key`, from the tarball of emojibase-data.

    Skin tones are no entries of their own there; the 26 regional indicators have no group and are left out.
    """
    wanted = ("package/en/data.json", "package/meta/groups.json")
    found = {name: json.loads(data) for name, data in contents(path) if name in wanted}
    if len(found) < len(wanted):
        raise OSError(f"{path} lacks {' or '.join(wanted)}: it is not {NAMES}")
    emoji, meta = (found[name] for name in wanted)
    return {
        key(one["hexcode"]): {
            "caption": one["label"],
            "tags": one["tags"],
            "label": meta["subgroups"][str(one["subgroup"])],
            "group": meta["groups"][str(one["group"])],
        }
        for one in emoji
        if "group" in one
    }


def durations(webp: bytes) -> list[int]:
    """Milliseconds of each frame, from the headers of the ANMF chunks; none for a still picture.

    Pillow would have to decode all frames to tell.
    """
    found, start = [], 12  # after "RIFF", the file's size and "WEBP"
    while start < len(webp):
        size = int.from_bytes(webp[start + 4 : start + 8], "little")
        if webp[start : start + 4] == b"ANMF":  # position and size of the frame are 3 bytes each, then its duration
            found.append(int.from_bytes(webp[start + 20 : start + 23], "little"))
        start += 8 + size + size % 2
    return found


def frames(webp: bytes, size: int) -> Iterator[Image.Image]:
    """All frames as RGB pictures of `size` x `size`, what is transparent on white."""
    with Image.open(io.BytesIO(webp)) as image:
        for frame in ImageSequence.Iterator(image):
            frame = frame.convert("RGBA")
            white = Image.new("RGBA", frame.size, "white")
            white.alpha_composite(frame)
            yield white.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def save_video(webp: bytes, size: int, fps: int, path: Path) -> None:
    """An H.264 video of all frames at an even rate."""
    with imageio.get_writer(
        path, format="FFMPEG", fps=fps, codec="libx264", quality=None, macro_block_size=2, output_params=X264
    ) as writer:
        for frame in frames(webp, size):
            writer.append_data(np.asarray(frame))


def convert(tarballs: Sequence[Path], names: dict[str, dict], out: Path, size: int, still: bool, only: set[str]) -> int:
    """Write the videos or pictures that `out` lacks, and captions.jsonl of all that are there.

    Args:
        tarballs: of the packages with the emoji.
        names: of `read_names`.
        out: folder.
        size: height and width, pixels.
        still: make pictures.
        only: labels to make; what is there of others stays.

    Returns:
        The number of lines in captions.jsonl.
    """
    kind, folder, suffix = ("image", "images", ".png") if still else ("video", "videos", ".mp4")
    lines = {}
    with (
        TemporaryDirectory(dir=out, prefix=".partial-") as scratch,
        tqdm(total=sum(path.stat().st_size for path in tarballs), desc=folder, unit="B", unit_scale=True) as bar,
    ):
        for name, webp in (item for path in tarballs for item in contents(path, bar)):
            codepoints, entry = PurePosixPath(name).stem, names.get(key(PurePosixPath(name).stem))
            if entry is None or not name.endswith(".webp"):
                continue
            timing = {}
            if not still:
                times = durations(webp)
                if len(times) < MIN_FRAMES:  # most are stills, and two clips too short
                    continue
                timing = {"frames": len(times), "fps": round(1000 * len(times) / sum(times))}
            target = out / folder / entry["label"] / (codepoints + suffix)
            if not target.exists():
                if entry["label"] not in only:
                    continue
                partial = Path(scratch) / target.name
                if still:
                    next(frames(webp, size)).save(partial, optimize=True)
                else:
                    save_video(webp, size, timing["fps"], partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(partial, target)
            relative = target.relative_to(out).as_posix()
            lines[relative] = json.dumps({kind: relative, **entry, **timing}, ensure_ascii=False) + "\n"
        captions = Path(scratch) / "captions.jsonl"
        captions.write_text("".join(lines[relative] for relative in sorted(lines)), encoding="utf-8", newline="\n")
        os.replace(captions, out / captions.name)
    return len(lines)


def claim(out: Path, source: dict) -> None:
    """Note in source.json what a folder is made of. Raises ValueError if it was made of something else."""
    path, text = out / "source.json", json.dumps(source, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{out} was made of other packages or in another size, see {path}: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@friendly_errors()
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for the data set")
    parser.add_argument("--kind", choices=("anim", "3d"), default="anim", help="videos or still pictures [%(default)s]")
    parser.add_argument("--still", dest="kind", action="store_const", const="3d", help="the same as --kind 3d")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels [%(default)s]")
    parser.add_argument(
        "--only", nargs="+", metavar="SUBGROUP", help="make only these, for example cat-face sky-weather"
    )
    parser.add_argument("--cache", type=Path, help="folder that keeps the tarballs of npm [OUT/npm]")
    args = parser.parse_args(argv)
    still = args.kind == "3d"
    packages = STILL if still else ANIMATED
    if args.size < 1 or (args.size % 2 and not still):
        raise UserError(f"--size {args.size}: must be positive, and for this video format even")
    claim(args.out, {"packages": [*packages, NAMES], "size": args.size})
    *tarballs, named = fetch([*packages, NAMES], args.cache or args.out / "npm")
    names = read_names(named)
    labels = {entry["label"] for entry in names.values()}
    if unknown := set(args.only or ()) - labels:
        raise UserError(f"no subgroup {', '.join(sorted(unknown))}; known: {', '.join(sorted(labels))}")
    count = convert(tarballs, names, args.out, args.size, still, set(args.only or labels))
    print(f"{args.out}: {count} {'pictures' if still else 'videos'} and captions.jsonl")


if __name__ == "__main__":
    main()
