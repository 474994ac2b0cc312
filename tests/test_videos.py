"""Videos: every display matrix, headers that count wrong, clips that end too early, damaged files."""

import base64
import random
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from test_pixels import grey_clip, grey_levels
from test_readers import corners, mutated, quarters

from ovis25.processing import video as video_module
from ovis25.processing.video import load_video, video_info

ONE = 1 << 16
# (a, b, c, d) of the display matrix, and what a picture stored as red, green / blue, yellow shows then
MATRICES = [
    ((ONE, 0, 0, ONE), "rgby"),
    ((-ONE, 0, 0, ONE), "gryb"),
    ((-ONE, 0, 0, -ONE), "ybgr"),
    ((ONE, 0, 0, -ONE), "byrg"),
    ((0, ONE, ONE, 0), "rbgy"),
    ((0, ONE, -ONE, 0), "bryg"),
    ((0, -ONE, -ONE, 0), "ygbr"),
    ((0, -ONE, ONE, 0), "gyrb"),
]


def write(path: Path, frames: list[Image.Image], codec: str = "mpeg4", format: str | None = None, **options) -> Path:
    with av.open(str(path), "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate, stream.gop_size = 10**6, 4
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return path


def greys(num_frames: int, size=(64, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, (10 * i % 250,) * 3) for i in range(num_frames)]


def with_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    content = bytearray(path.read_bytes())
    identity = struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


# -- the display matrix


@pytest.mark.parametrize(("matrix", "expected"), MATRICES)
def test_the_whole_display_matrix_is_honoured(tmp_path, matrix, expected):
    path = with_matrix(write(tmp_path / "clip.mp4", [quarters(48, 64)] * 3), *matrix)
    frames = load_video(path, 1, 2)
    assert [corners(frame) for frame in frames] == [expected] * 2
    assert video_info(path) == (3, *frames[0].size[::-1])
    assert frames[0].size == ((64, 48) if matrix[0] else (48, 64))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((65000, 3000, -3000, 65000), "rgby"),  # nearly upright
        ((-3000, 65000, -65000, -3000), "bryg"),
        ((2 * ONE, 0, 0, -2 * ONE), "byrg"),  # scaled
        ((0, 0, 0, 0), "rgby"),
    ],
)
def test_other_matrices_count_as_the_nearest(tmp_path, matrix, expected):
    path = with_matrix(write(tmp_path / "clip.mp4", [quarters(48, 64)] * 3), *matrix)
    assert corners(load_video(path, 1, 1)[0]) == expected


# -- how many frames there are


@pytest.mark.parametrize("flags", ["frag_keyframe", "frag_keyframe+empty_moov", "frag_every_frame+default_base_moof"])
def test_frames_of_a_fragmented_file_are_taken_over_the_whole_clip(tmp_path, flags):
    path = write(tmp_path / "clip.mp4", greys(20), movflags=flags)
    assert video_info(path) == (20, 48, 64)
    assert grey_levels(load_video(path, 1, 4)) == [2, 7, 12, 17]


@pytest.mark.parametrize("promised", [1, 3, 800, 2**31 - 1])
def test_a_count_in_a_header_is_checked(tmp_path, promised):
    path = tmp_path / "clip.avi"
    grey_clip(path, 8, codec="mjpeg")
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"strh") + 8 + 32, promised)
    path.write_bytes(content)
    assert video_info(path)[0] == 8
    assert grey_levels(load_video(path, 1, 4)) == [1, 3, 5, 7]


@pytest.mark.parametrize("promised", [5, 90])
def test_a_table_of_mp4_that_disagrees_is_not_trusted(tmp_path, promised):
    path = write(tmp_path / "clip.mp4", greys(8))
    content = bytearray(path.read_bytes())
    at = content.index(b"stts") + 12
    assert struct.unpack_from(">I", content, at) == (8,)
    struct.pack_into(">I", content, at, promised)
    path.write_bytes(content)
    assert video_info(path)[0] == 8
    assert grey_levels(load_video(path, 1, 4)) == [1, 3, 5, 7]


def test_a_header_that_can_be_trusted_is_all_that_is_read(tmp_path, monkeypatch):
    path = write(tmp_path / "clip.mp4", greys(12))
    monkeypatch.setattr(video_module, "_num_packets", lambda container: pytest.fail("counted"))
    assert video_info(path) == (12, 48, 64)
    assert grey_levels(load_video(path, 1, 4)) == [1, 4, 7, 10]


@pytest.mark.parametrize(
    ("name", "format", "codec"),
    [
        ("clip.m4v", "m4v", "mpeg4"),
        ("clip.mjpeg", "mjpeg", "mjpeg"),
        ("clip.mpg", "mpeg1video", "mpeg1video"),
        ("clip.ts", "mpegts", "mpeg1video"),
    ],
)
def test_a_stream_without_a_container_is_read(tmp_path, name, format, codec):
    frames = greys(16) if codec == "mjpeg" else greys(16, (96, 64))
    if codec == "mpeg1video":
        with av.open(str(tmp_path / name), "w", format=format) as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 10**6
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode(None))
    else:
        write(tmp_path / name, frames, codec, format)
    info = video_info(tmp_path / name)
    assert info == (16, *frames[0].size[::-1])
    assert grey_levels(load_video(tmp_path / name, 1, 4)) == [2, 6, 10, 14]


def test_raw_h264_is_read():
    path = Path(__file__).parent / "data" / "raw.h264"
    assert video_info(path) == (20, 64, 96)
    frames = load_video(path, 1, 4)
    assert len(frames) == 4 and {frame.size for frame in frames} == {(96, 64)}


# -- clips that end too early


@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {"movflags": "faststart"}),
        ("clip.mkv", {}),
        ("clip.avi", {}),
        ("fragments.mp4", {"movflags": "frag_keyframe"}),
    ],
)
def test_a_cut_clip_is_an_error(tmp_path, name, options, share):
    chance = np.random.default_rng(0)
    noise = [Image.fromarray(chance.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(20)]
    path = write(tmp_path / name, noise, **options)
    content = path.read_bytes()
    assert len(load_video(path, 8, 8)) == 8
    path.write_bytes(content[: int(share * len(content))])
    for read in (video_info, lambda path: load_video(path, 8, 8)):
        with pytest.raises(ValueError, match=rf"{name} is cut: \d+ (of \d+ )?frames can be decoded") as caught:
            read(path)
    if name == "clip.mp4":
        num_decoded = int(str(caught.value).split("cut: ")[1].split()[0])
        assert "of 20 frames" in str(caught.value) and num_decoded <= share * 20 + 1


def test_what_follows_the_last_box_does_not_matter(tmp_path):
    for name in ("clip.mp4", "clip.avi", "clip.mkv"):
        path = write(tmp_path / name, greys(8))
        path.write_bytes(path.read_bytes() + b"\xff\xff\xff\xffjunk" * 9)
        assert grey_levels(load_video(path, 1, 4)) == [1, 3, 5, 7]


# -- errors


def test_an_unknown_codec_is_named(tmp_path):
    path = write(tmp_path / "clip.mov", greys(8), "mjpeg")
    content = path.read_bytes()
    assert content.count(b"jpeg") == 1
    path.write_bytes(content.replace(b"jpeg", b"zzzz"))
    for read in (video_info, lambda path: load_video(path, 1, 4)):
        with pytest.raises(ValueError, match="clip.mov is in a codec that FFmpeg does not decode here; convert it"):
            read(path)


@pytest.mark.parametrize("source", [None, 5, "a" * 5000, "data:video/mp4;base64,AAAA", {"path": "x"}])
def test_what_is_no_video_is_a_short_error(source):
    for read in (video_info, lambda source: load_video(source, 1, 4)):
        with pytest.raises(ValueError) as caught:
            read(source)
        assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError, av.error.MemoryError, AttributeError, MemoryError, UnicodeDecodeError])
def test_any_error_of_pyav_names_the_file(tmp_path, monkeypatch, error):
    path = write(tmp_path / "clip.mp4", greys(8))
    made = {UnicodeDecodeError: lambda: error("utf-8", b"", 0, 1, "x"), av.error.MemoryError: lambda: error(12, "x")}

    def fail(*_, **__):
        raise made.get(error, error)()

    monkeypatch.setattr(video_module, "_turn", fail)
    for read in (video_info, lambda path: load_video(path, 1, 4)):
        with pytest.raises(ValueError, match="clip.mp4 cannot be decoded: "):
            read(path)
    monkeypatch.setattr(video_module.av, "open", fail)
    with pytest.raises(ValueError, match="clip.mp4 is no readable video: "):
        video_info(path)


def test_a_playlist_opens_no_address(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match="clip.mp4"):
        load_video(path, 1, 4)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "fragments.mp4"])
def test_damaged_videos_raise_nothing_but_valueerror(tmp_path, name):
    options = {"movflags": "frag_keyframe"} if name == "fragments.mp4" else {}
    content = write(tmp_path / name, greys(12), **options).read_bytes()
    chance, num_read = random.Random(3), 0
    for _ in range(25):
        (tmp_path / name).write_bytes(mutated(content, chance))
        try:
            _, height, width = video_info(tmp_path / name)
            frames = load_video(tmp_path / name, 4, 4)
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error)
        else:
            num_read += 1
            assert len(frames) == 4 and frames[0].size == (width, height)
    assert num_read


def test_a_video_in_memory(tmp_path):
    for name in ("clip.mkv", "clip.mp4"):
        content = write(tmp_path / name, greys(8)).read_bytes()
        assert grey_levels(load_video(content, 1, 4)) == [1, 3, 5, 7]
        address = "data:video/mp4;base64," + base64.b64encode(content).decode()
        assert video_info(address) == video_info(content) == (8, 48, 64)
    content = write(tmp_path / "cut.mkv", greys(8)).read_bytes()
    with pytest.raises(ValueError, match="a video of .* bytes is cut"):
        load_video(content[: len(content) // 2], 1, 4)
