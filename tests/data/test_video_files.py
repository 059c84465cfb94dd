"""Frames of video files: every codec and container gives the frames that the `ffmpeg` program decodes from beginning to
end, wherever reading begins, and as many; what cannot be decoded is named and soon done with.
"""

import random
import re
import struct
import subprocess
from collections import Counter
from pathlib import Path

import av
import imageio_ffmpeg
import psutil
import pytest
import torch
from PIL import Image

from skipdit.data.clip_folder import ClipFolder
from skipdit.data.settings import ClipData
from skipdit.data.video import Video, read_mp4
from skipdit.utils.errors import BrokenSample

HEIGHT, WIDTH, COUNT = 96, 128, 75
QUIET_X265 = "log-level=none"
CODECS = {
    "mp4": ["libx264", "-g", "20"],
    "open.mp4": ["libx264", "-x264-params", "open-gop=1:keyint=20:bframes=3:scenecut=0"],
    "open.mkv": ["libx264", "-x264-params", "open-gop=1:keyint=20:bframes=3:scenecut=0"],
    "refresh.mp4": ["libx264", "-x264-params", "intra-refresh=1:keyint=20"],
    "avi": ["libx264", "-g", "20", "-bf", "2"],
    "hevc.mp4": ["libx265", "-x265-params", f"keyint=20:{QUIET_X265}"],
    "hevc-open.mkv": ["libx265", "-x265-params", f"open-gop=1:keyint=20:bframes=4:{QUIET_X265}"],
    "hevc-10-bit.mp4": ["libx265", "-x265-params", f"keyint=20:{QUIET_X265}", "-pix_fmt", "yuv420p10le"],
    "mpeg4.mp4": ["mpeg4", "-bf", "2", "-g", "24", "-q:v", "3"],
    "mpeg4.avi": ["mpeg4", "-g", "24", "-q:v", "3"],
    "mpeg4-b.avi": ["mpeg4", "-bf", "2", "-g", "24", "-q:v", "3"],
    "xvid-b.avi": ["libxvid", "-bf", "2", "-g", "24", "-q:v", "3"],
    "mpeg1.mpg": ["mpeg1video", "-bf", "2", "-g", "15", "-q:v", "3"],
    "mpeg2.mpg": ["mpeg2video", "-bf", "2", "-g", "15", "-q:v", "3"],
    "mpeg2.mkv": ["mpeg2video", "-bf", "2", "-g", "15", "-q:v", "3"],
    "vp8.webm": ["libvpx", "-g", "30", "-b:v", "100k"],
    "vp9.webm": ["libvpx-vp9", "-g", "30", "-b:v", "100k", "-cpu-used", "8"],
    "av1.mp4": ["libsvtav1", "-g", "30", "-preset", "12"],
    "mjpeg.mov": ["mjpeg", "-q:v", "3"],
    "interlaced.mp4": ["libx264", "-g", "20", "-flags", "+ilme+ildct"],
}


def ffmpeg(*arguments: str | Path) -> bytes:
    """What the program writes. Skips the test where it has not got what it is asked for."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True)
    if b"Unknown encoder" in done.stderr:
        pytest.skip(f"this ffmpeg has no {arguments}")
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def film(path: Path, codec: list[str], *options: str) -> Path:
    """Three seconds of a moving test picture."""
    source = f"testsrc2=size={WIDTH}x{HEIGHT}:rate=25:duration=3"
    ffmpeg("-f", "lavfi", "-i", source, "-pix_fmt", "yuv420p", "-c:v", *codec, *options, path)
    return path


def decoded(path: Path, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """All frames, uint8 (F, 3, H, W), as the program decodes them."""
    pixels = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, height, width, 3).permute(0, 3, 1, 2)


def assert_right(path: Path, expected: torch.Tensor) -> None:
    """The frames of a file are these, wherever reading begins, in a file just opened and in one read before."""
    assert (expected[1:] != expected[:-1]).flatten(1).any(1).all(), "frames that are alike show no mistake"
    used, choose = Video(path), random.Random(0)
    assert len(used) == len(Video(path, decode=True)) == len(expected)
    assert torch.equal(torch.stack(used.read(range(len(expected)))), expected)
    for _ in range(8):
        step = choose.choice([1, 1, 3])
        start = choose.randrange(len(expected) - 6 * step)
        stretch = range(start, start + 6 * step, step)
        for video in (used, Video(path)):
            assert torch.equal(torch.stack(video.read(stretch)), expected[stretch.start : stretch.stop : step]), stretch
    last = len(expected) - 1
    assert torch.equal(Video(path).read(range(last, last + 1))[0], expected[last])


@pytest.mark.slow
@pytest.mark.parametrize("name", CODECS)
def test_frames_are_those_of_decoding_all(tmp_path, name):
    path = film(tmp_path / f"a.{name}", CODECS[name])
    expected = decoded(path)
    assert len(expected) in (COUNT, COUNT - 2)  # Xvid packs frames, and leaves two out
    assert_right(path, expected)


def test_frames_at_uneven_times(tmp_path):
    """A reader of a constant rate would repeat some."""
    path = film(tmp_path / "a.mp4", CODECS["mp4"], "-vf", "select='not(mod(n,7))+not(mod(n,3))'", "-fps_mode", "vfr")
    expected = decoded(path)
    assert len(expected) == 32
    assert_right(path, expected)
    assert torch.equal(read_mp4(path), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mp4", "open.mp4", "open.mkv", "hevc-open.mkv", "mpeg4.mp4", "mpeg2.mpg", "vp8.webm"])
def test_clips_cut_out_without_encoding(tmp_path, name):
    """An edit list hides what is before the first frame, or the first ones need others that were cut away."""
    whole, path = film(tmp_path / f"whole.{name}", CODECS[name]), tmp_path / f"a.{name}"
    ffmpeg("-ss", "1.3", "-i", whole, "-c", "copy", path)
    expected = decoded(path)
    assert 20 < len(expected) < COUNT
    assert_right(path, expected)


@pytest.mark.slow
def test_vp8_has_packets_without_frames(tmp_path):
    """What they hold is shown by later ones only."""
    options = ["-auto-alt-ref", "1", "-lag-in-frames", "25", "-passlogfile", str(tmp_path / "log")]
    for number in ("1", "2"):
        path = film(tmp_path / "a.webm", CODECS["vp8.webm"], *options, "-pass", number)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) > COUNT
    assert_right(path, decoded(path))


@pytest.mark.parametrize(("rotation", "flips"), [(90, []), (180, []), (270, []), (0, ["-display_hflip"])])
def test_frames_are_upright(tmp_path, rotation, flips):
    plain, path = film(tmp_path / "plain.mp4", CODECS["mp4"]), tmp_path / "a.mp4"
    ffmpeg("-display_rotation", str(rotation), *flips, "-i", plain, "-c", "copy", path)
    size = (WIDTH, HEIGHT) if rotation in (90, 270) else (HEIGHT, WIDTH)
    assert_right(path, decoded(path, *size))


@pytest.mark.parametrize("count", [30, 500])
def test_a_header_that_counts_wrong(tmp_path, count):
    path = film(tmp_path / "a.avi", CODECS["mpeg4.avi"])
    content = bytearray(path.read_bytes())
    for tag, place in ((b"avih", 16), (b"strh", 32)):
        struct.pack_into("<I", content, content.find(tag) + 8 + place, count)
    path.write_bytes(content)
    assert_right(path, decoded(path))


def test_frames_of_two_sizes(tmp_path):
    """Two films, one after the other in one file."""
    film(tmp_path / "1.mpg", CODECS["mpeg2.mpg"])
    film(tmp_path / "2.mpg", CODECS["mpeg2.mpg"], "-vf", "scale=96:64")
    (tmp_path / "clips").mkdir()
    joined = tmp_path / "clips/a.mpg"
    joined.write_bytes((tmp_path / "1.mpg").read_bytes() + (tmp_path / "2.mpg").read_bytes())
    sizes = Counter(tuple(frame.shape[1:]) for frame in Video(joined).read(range(len(Video(joined)))))
    assert sizes.keys() == {(HEIGHT, WIDTH), (64, 96)}
    clip = ClipFolder(ClipData("videos", str(tmp_path / "clips"), num_frames=4, image_size=16))[0]["image"]
    assert clip.shape == (sum(sizes.values()), 3, 16, 16)


def test_the_film_and_not_its_cover(tmp_path):
    plain, path = film(tmp_path / "plain.mp4", CODECS["mp4"]), tmp_path / "a.mp4"
    Image.new("RGB", (300, 300)).save(tmp_path / "cover.png")
    inputs = ["-i", tmp_path / "cover.png", "-i", plain, "-map", "0", "-map", "1", "-c", "copy"]
    ffmpeg(*inputs, "-disposition:v:0", "attached_pic", path)
    assert_right(path, decoded(plain))


# ---------------------------------------------------------------------------------------------------------------------
# Files that are broken


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])


@pytest.mark.parametrize("name", ["mp4", "mpeg4.mp4", "hevc.mp4", "avi", "mpeg4.avi", "mjpeg.mov"])
def test_a_file_that_is_cut_short_is_named(tmp_path, name):
    """Its table of frames comes first, where the format may have it there, and promises all of them."""
    path = film(tmp_path / f"a.{name}", CODECS[name], *["-movflags", "+faststart"] * (not name.endswith("avi")))
    cut_short(path)
    with pytest.raises(BrokenSample, match=rf"{re.escape(str(path))}: it is cut short"):
        Video(path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: it is cut short"):
        read_mp4(path)


@pytest.mark.parametrize("name", ["open.mkv", "vp9.webm"])
def test_of_a_stream_that_is_cut_short_the_whole_frames_are_read(tmp_path, name):
    """Such a file has no table of its frames: it is a shorter one, but for a frame that lacks a part."""
    path = film(tmp_path / f"a.{name}", CODECS[name])
    cut_short(path)
    expected = decoded(path)
    assert 30 < len(expected) < COUNT
    whole = Video(path).read(range(len(expected) - 2))
    assert torch.equal(torch.stack(whole), expected[:-2])


@pytest.mark.parametrize("name", ["mp4", "mpeg4-b.avi"])
def test_damaged_frames_are_named_and_others_are_right(tmp_path, name):
    path = film(tmp_path / f"a.{name}", CODECS[name])
    expected, content = decoded(path), bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = sorted((packet.pos, packet.size) for packet in container.demux(video=0) if packet.size)
    place, size = packets[30]
    content[place + size // 4 : place + size] = bytes(size - size // 4)
    path.write_bytes(content)
    found = {}
    for start in range(0, COUNT - 5, 5):
        stretch = range(start, start + 5)
        try:
            found[start] = torch.equal(torch.stack(Video(path).read(stretch)), expected[start : start + 5])
        except BrokenSample as error:
            assert str(error).startswith(f"{path}: ")
            found[start] = "named"
    assert set(found.values()) <= {True, "named"}
    assert "named" in found.values()
    assert name.endswith("avi") or found[0] is True, "its beginning does not need what is damaged"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "Invalid data"), (b"no video\n" * 99, "Invalid data"), (b"#EXTM3U\n#EXTINF:1,\na.mp4\n", "Invalid data")],
)
def test_no_video_at_all(tmp_path, content, said):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(BrokenSample, match=rf"a\.mp4: {said}"):
        Video(tmp_path / "a.mp4")


def test_sound_without_pictures(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac", tmp_path / "a.mp4")
    with pytest.raises(BrokenSample, match="there is no video in it"):
        Video(tmp_path / "a.mp4")


def test_frames_larger_than_pictures_may_be(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mp4", CODECS["mp4"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(BrokenSample, match=r"a\.mp4: 128 x 96 pixels are more than"):
        Video(path)


@pytest.fixture
def work(monkeypatch) -> Counter:
    """How often the decoding of a file begins, and how many frames it gives."""
    counted, decode = Counter(), Video._decode

    def watched(self, key):
        counted["begun"] += 1
        for frame in decode(self, key):
            counted["frames"] += 1
            yield frame

    monkeypatch.setattr(Video, "_decode", watched)
    return counted


def test_reading_goes_on_where_it_was(tmp_path, work):
    """All of a clip, stretch by stretch, is decoded once, though it has one key frame only."""
    video = Video(film(tmp_path / "a.mp4", ["libx264", "-g", "250"]))
    for start in range(0, COUNT, 8):
        video.read(range(start, min(start + 8, COUNT)))
    assert work == {"begun": 1, "frames": COUNT}


def test_reading_begins_at_the_key_frame_before(tmp_path, work):
    path = film(tmp_path / "a.mp4", ["libx264", "-g", "10", "-bf", "0", "-sc_threshold", "0"])
    Video(path).read(range(63, 66))
    assert work == {"begun": 1, "frames": 6}


def test_damage_costs_little(tmp_path, work):
    """Every frame of the file is decoded a few times at most."""
    path = film(tmp_path / "a.mp4", CODECS["mp4"])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(content)
    with pytest.raises(BrokenSample):
        Video(path).read(range(COUNT))
    assert work["frames"] <= 4 * COUNT


def test_no_thread_outlives_a_read(tmp_path):
    """A loading process that is forked then has not got it, and would wait for it for ever."""
    video = Video(film(tmp_path / "a.mp4", CODECS["hevc.mp4"]))
    before = psutil.Process().num_threads()
    video.read(range(10, 20))
    assert psutil.Process().num_threads() == before
    with pytest.raises(BrokenSample):
        video.read(range(COUNT - 3, COUNT + 3))
    assert psutil.Process().num_threads() == before
