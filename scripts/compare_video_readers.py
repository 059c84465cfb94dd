"""Compare readers of video files: do they give the frames that the `ffmpeg` program decodes, and how long do they take?

    pip install torchcodec decord      # what is not installed is left out; torchcodec needs FFmpeg's libraries
    python scripts/compare_video_readers.py

Prints a table. Every file shows a moving test pattern; a read opens it and takes 16 frames, every third, as training
does. A frame is right if no other frame of the file is nearer to it. Times are CPU times, which depend less on what
else the machine does.
"""

import importlib.util
import multiprocessing
import random
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from skipdit.cli import Parser, friendly_errors
from skipdit.data.video import Video

HEIGHT, WIDTH, FRAMES, INTERVAL = 240, 320, 16, 3
LIMIT = 60  # seconds for all reads of a file
FILES = {  # name: what it is called, how it is encoded
    "h264.mp4": ("H.264", ["libx264", "-g", "24"]),
    "h264-open.mkv": ("H.264, open GOP", ["libx264", "-x264-params", "open-gop=1:keyint=24:bframes=3:scenecut=0"]),
    "hevc-open.mkv": ("HEVC, open GOP", ["libx265", "-x265-params", "open-gop=1:keyint=24:log-level=none"]),
    "mpeg4.avi": ("MPEG-4 with B-frames, AVI", ["mpeg4", "-bf", "2", "-g", "24", "-q:v", "3"]),
    "mpeg2.mpg": ("MPEG-2", ["mpeg2video", "-bf", "2", "-g", "15", "-q:v", "3"]),
    "vp9.webm": ("VP9", ["libvpx-vp9", "-g", "30", "-b:v", "400k", "-cpu-used", "8"]),
}
CUT, COUNT = "cut.mp4", "count.avi"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--reads", type=int, default=20, metavar="N", help="reads of every file [%(default)s]")
    parser.add_argument("--files", nargs="+", choices=[*FILES, CUT, COUNT], metavar="NAME", help="only these")
    args = parser.parse_args()
    readers = {title: reader for title, (package, reader) in READERS.items() if importlib.util.find_spec(package)}
    print(f"| wrong reads of {args.reads}, CPU ms per read | {' | '.join(readers)} |")
    print("|---" * (len(readers) + 1) + "|")
    with friendly_errors("starts anew"), tempfile.TemporaryDirectory() as folder:
        for path, title in write_files(Path(folder), args.files or [*FILES, CUT, COUNT]):
            cells = [judge(reader, path, args.reads) for reader in readers.values()]
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


def ffmpeg(*arguments: str | Path) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def write_files(folder: Path, names: list[str]) -> list[tuple[Path, str]]:
    """Eight seconds in each encoding, a clip cut out of one, and one whose header counts too many frames."""
    source, titles = f"testsrc2=size={WIDTH}x{HEIGHT}:rate=25:duration=8", {}
    for name, (title, codec) in FILES.items():
        if name in names or (name == "h264.mp4" and CUT in names) or (name == "mpeg4.avi" and COUNT in names):
            ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-c:v", *codec, folder / name)
        titles[name] = title
    if CUT in names:
        ffmpeg("-ss", "2.3", "-i", folder / "h264.mp4", "-c", "copy", folder / CUT)
        titles[CUT] = "H.264, cut out without encoding"
    if COUNT in names:
        content = bytearray((folder / "mpeg4.avi").read_bytes())
        for tag, place in ((b"avih", 16), (b"strh", 32)):
            struct.pack_into("<I", content, content.find(tag) + 8 + place, 500)
        (folder / COUNT).write_bytes(content)
        titles[COUNT] = "the same AVI, its header counting 500 frames"
    return [(folder / name, title) for name, title in titles.items() if name in names]


def judge(reader: Callable, path: Path, reads: int) -> str:
    """A cell of the table. The reads have a process of their own, since some readers never end."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=measure, args=(reader, path, reads, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT) else f"still reading after {LIMIT} s"
    except EOFError:
        return "crashes"
    finally:
        process.kill()
        process.join()


def measure(reader: Callable, path: Path, reads: int, sender: Connection) -> None:
    pixels = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    truth = np.frombuffer(pixels, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)
    small, choose, results, seconds = truth[:, ::4, ::4].astype(np.int16), random.Random(0), Counter(), 0.0
    reader(path, list(range(FRAMES)))  # the first read loads the library
    for _ in range(reads):
        start = choose.randrange(len(truth) - FRAMES * INTERVAL)
        wanted = list(range(start, start + FRAMES * INTERVAL, INTERVAL))
        begun = time.process_time()
        count, frames = reader(path, wanted)
        seconds += time.process_time() - begun
        given = [int(np.abs(small - frame[::4, ::4]).mean((1, 2, 3)).argmin()) for frame in frames]
        results["wrong"] += given != wanted
    told = f"{results['wrong']}, {1000 * seconds / reads:.0f} ms"
    sender.send(told if count == len(truth) else f"{told}; counts {count} frames of {len(truth)}")


def by_pyav(path: Path, wanted: list[int]) -> tuple[int, list[np.ndarray]]:
    video = Video(path)
    step = wanted[1] - wanted[0]
    frames = video.read(range(wanted[0], wanted[-1] + 1, step))
    return len(video), [frame.permute(1, 2, 0).numpy() for frame in frames]


def by_torchcodec(path: Path, wanted: list[int]) -> tuple[int, list[np.ndarray]]:
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
    return len(video), list(video.get_frames_at(wanted).data.numpy())


def by_decord(path: Path, wanted: list[int]) -> tuple[int, list[np.ndarray]]:
    import decord

    video = decord.VideoReader(str(path), num_threads=1)
    return len(video), list(video.get_batch(wanted).asnumpy())


READERS = {
    "PyAV, in skipdit": ("av", by_pyav),
    "torchcodec": ("torchcodec", by_torchcodec),
    "decord": ("decord", by_decord),
}

if __name__ == "__main__":
    main()
