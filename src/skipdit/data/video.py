"""Frames of video files by number: frame k is the k-th that decoding from the beginning shows, upright, in RGB.

PyAV reads them. It is imported with the first video: training on latents, pictures or folders of frames does without.
"""

from __future__ import annotations  # without PyAV its types are names only

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from skipdit.data.files import check_size
from skipdit.utils.errors import BrokenSample, UserError
from skipdit.utils.video import write_gif

if TYPE_CHECKING:
    import av

_BOTH_TIMES = {"flv", "matroska", "mov", "mpeg", "mpegts"}  # formats that say when frames are decoded and when shown


class _Missed(Exception):
    """Decoding did not give the frame that was to come."""


def load_av() -> ModuleType:
    """PyAV. Raises ValueError without it: were every video called broken, nobody would look for a package."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"video files need the PyAV library: `pip install av` ({error})") from error
    return av


class Video:
    """A video file, open.

    The timestamps of its packets tell how many frames it has and when each is shown. Where they may not - some are
    missing or double, the format does not say when reordered frames are shown, the file begins with frames that need
    earlier ones - all of it is decoded once to learn that. Decoded frames are told by their timestamps: none is ever
    given in place of another one.

    Every read ends. It decodes on from the one before, or from a key frame or two before, or from the beginning; where
    that misses frames, all of the file is decoded once more, to number its frames anew.

    Args:
        path: of the file.
        decode: learn the number of frames by decoding all of them, whatever the packets say.
        file: its bytes, if they lie elsewhere; `path` is then its name in messages.

    Raises BrokenSample, here and in `read`, naming the file, if it cannot be opened or is cut short, or if a frame that
    is asked for is damaged or missing. Raises ValueError without PyAV.
    """

    def __init__(self, path: Path, decode: bool = False, file: BinaryIO | None = None):
        self.path, self._file, self._av = path, file, load_av()
        with self._named():
            self._open()
            times, self._keys = self._scan()
            self._number(self._decode_all() if decode or not self._can_trust(times) else sorted(times))

    def __len__(self) -> int:
        return len(self._times)

    def read(self, frames: range) -> list[Tensor]:
        """Frames by number, ascending; each uint8 (3, H, W)."""
        with self._named():
            try:
                return self._read(frames)
            except (_Missed, self._av.FFmpegError):
                times = self._decode_all()  # raises what is wrong with the file, if something is
                if len(times) != len(self):
                    raise _Missed(f"of its {len(self)} frames {len(times)} can be decoded") from None
                self._number(times)
                return self._read(frames)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Give whatever is wrong with the file its name."""
        try:
            yield
        except Exception as error:  # damaged files make decoders raise nearly anything
            raise BrokenSample(f"{self.path}: {getattr(error, 'strerror', None) or error}") from error

    def _open(self) -> None:
        if self._file is not None:
            self._file.seek(0)
        elif self.path.exists() and not self.path.is_file():
            raise _Missed("it is no file")
        self._container = self._av.open(self._file or str(self.path), metadata_errors="replace")
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            raise _Missed("there is no video in it")
        self._stream.codec_context.thread_count = 1  # there are as many loading processes as are of use
        check_size(self._stream.width, self._stream.height)

    def _scan(self) -> tuple[list[int | None], list[int]]:
        """When the frames of all packets are shown, in the order of the packets, and when those that decoding can begin
        with.
        """
        count, times, keys = 0, [], []
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt:
                raise _Missed(f"it is cut short or damaged after {count} frames")
            count += packet.size > 0  # the last one has none, and ends the file
            if packet.is_keyframe and packet.pts is not None:
                keys.append(packet.pts)
            if packet.size and not packet.is_discard:  # as edit lists want it
                times.append(packet.pts)
        if "mov" in self._container.format.name and self._stream.frames > count:
            raise _Missed(f"it is cut short: of {self._stream.frames} frames in its table {count} are there")
        return times, keys

    def _can_trust(self, times: list[int | None]) -> bool:
        """Whether there is a frame for every packet, shown at its time."""
        if None in times or len(set(times)) < len(times) or not self._keys or min(times) < self._keys[0]:
            return False
        codec, formats = self._stream.codec_context, self._container.format.name.split(",")
        if codec.name == "vp8":  # which has frames that are not shown, in packets of their own
            return False
        return not (codec.has_b_frames and _BOTH_TIMES.isdisjoint(formats))

    def _number(self, times: list[int | None]) -> None:
        """Number frames that are shown at these times, in this order."""
        self._times, self._numbers = times, None  # None: frames can only be counted
        if None not in times and all(a < b for a, b in pairwise(times)):
            self._numbers = {time: number for number, time in enumerate(times)}
        self._coming, self._next = iter(()), len(times)  # what is being decoded, and the number of its next frame

    def _decode_all(self) -> list[int | None]:
        """When the frames are shown that decoding all of the file gives."""
        times = []
        for frame in self._decode(None):
            if frame.is_corrupt:
                raise _Missed(f"frame {len(times)} is damaged")
            times.append(frame.pts)
        if not times:
            raise _Missed("none of its frames can be decoded")
        return times

    def _decode(self, key: int | None) -> Iterator[av.VideoFrame]:
        """Frames from the one shown at `key`, which decoding can begin with, or from the beginning of the file on."""
        if key is None:
            self._open()
        else:
            self._container.seek(key, stream=self._stream)
        begun = False
        for packet in self._container.demux(self._stream):
            begun = begun or not self._keys or (packet.is_keyframe if key is None else packet.pts == key)
            if begun:
                yield from packet.decode()

    def _read(self, frames: range) -> list[Tensor]:
        for _ in self._ways(frames[0]):
            try:
                return self._take(frames)
            except (_Missed, self._av.FFmpegError) as error:
                missed = error
        raise missed

    def _ways(self, first: int) -> Iterator[None]:
        """Go to where decoding leads to a frame: on from here, or from one of two key frames, or from the beginning."""
        keys = [] if self._numbers is None else self._keys[: bisect_right(self._keys, self._times[first])]
        if self._next <= first and not (keys and keys[-1] > self._times[self._next]):
            yield
        for key in (*keys[:-3:-1], None):
            self._coming = self._frames(key)
            yield

    def _frames(self, key: int | None) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames and their numbers, as `_decode` gives them; not those that are shown before the key frame."""
        for count, frame in enumerate(self._decode(key)):
            number = count if self._numbers is None else self._numbers.get(frame.pts)
            if number is None:
                raise _Missed("it shows a frame when there should be none")
            if key is not None and frame.pts < key:  # it may need frames from before
                continue
            if frame.is_corrupt:
                raise _Missed(f"frame {number} is damaged")
            yield number, frame

    def _take(self, frames: range) -> list[Tensor]:
        pictures, expected, self._next, picture = [], frames[0], len(self), _Converter()
        for number, frame in self._coming:
            if number < frames[0]:
                continue
            if number != expected:
                break
            if number in frames:
                pictures.append(picture(frame))
            if number == frames[-1]:
                self._next = number + 1
                return pictures
            expected += 1
        raise _Missed(f"frame {expected} cannot be decoded")


class _Converter:
    """Converts frames to RGB as the `ffmpeg` program does it, and turns them upright.

    It lives for one read: a process that is forked must not inherit its threads.
    """

    def __init__(self):
        self._settings, self._graph = None, None

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        """uint8 (3, H, W)."""
        if (settings := (frame.format.name, frame.width, frame.height)) != self._settings:
            self._settings, self._graph = settings, self._build(frame)
        self._graph.push(frame)
        return torch.from_numpy(np.ascontiguousarray(self._graph.pull().to_ndarray())).permute(2, 0, 1)

    @staticmethod
    def _build(frame: av.VideoFrame) -> av.filter.Graph:
        graph = load_av().filter.Graph()
        with suppress(AttributeError):  # older PyAV takes as many as it likes
            graph.threads = 1
        size = {"width": frame.width, "height": frame.height, "time_base": frame.time_base}
        source = graph.add_buffer(format=frame.format, **size)
        filters = [graph.add(name, value) for name, value in _turns(frame)] + [graph.add("format", "rgb24")]
        graph.link_nodes(source, *filters, graph.add("buffersink")).configure()
        return graph


def _turns(frame: av.VideoFrame) -> list[tuple[str, str]]:
    """Filters that do what a frame's display matrix says: telephones film lying on their side."""
    matrices = [data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    if not matrices:
        return []
    a, b, _, c, d = np.frombuffer(bytes(matrices[0]), np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    swapped = abs(b) > abs(a)
    across, down = (c, b) if swapped else (a, d)
    turns = [("transpose", "cclock_flip")] * swapped + [("hflip", "")] * (across < 0) + [("vflip", "")] * (down < 0)
    return turns


def read_mp4(path: Path) -> Tensor:
    """All frames of a video file, uint8 (F, 3, H, W). Raises ValueError, naming the file, if one cannot be read."""
    try:
        video = Video(path)
        return torch.stack(video.read(range(len(video))))
    except BrokenSample as error:
        raise UserError(str(error)) from error


def add_gifs(clips: Iterable[Path], fps: float) -> None:
    """Beside every video file a GIF of the same name. One that is newer than its video is kept."""
    for clip in clips:
        gif = clip.with_suffix(".gif")
        if not gif.exists() or gif.stat().st_mtime_ns < clip.stat().st_mtime_ns:
            write_gif(gif, read_mp4(clip), fps)
