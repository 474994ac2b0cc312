"""Images and videos to pixels: bit-equal to the golden ones, and every kind of file is read upright and whole."""

import io
import random
import struct

import av
import numpy as np
import pytest
import torch
from conftest import CASE_IMAGES, VISUAL_CASES
from make_golden_subset import digest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from ovis25.constants import PIXEL_TABLE, SINGLE_IMAGE_PIXELS, SIZE_FACTOR
from ovis25.processing.image import image_size, open_image, patchify, patchify_bytes, smart_resize
from ovis25.processing.video import load_video, sample_frames, sample_indices, video_info

# Lossy coding of a flat colour moves it by 2 at most in these files.
COLOUR_TOLERANCE = 6


@pytest.mark.parametrize("case", CASE_IMAGES)
def test_pixels_are_bit_equal_to_the_golden_ones(golden, case):
    assert digest(golden.pixels(case)) == golden.json("pixel_digests")[f"{case}/pixel_values"]


@pytest.mark.parametrize("case", CASE_IMAGES)
def test_pixels_are_bit_equal_to_the_whole_golden_set(whole_golden, case):
    assert whole_golden.pixels(case).equal(whole_golden.tensors[f"{case}/pixel_values"])


def test_real_images_are_bit_equal(any_golden):
    cases = {key: value for key, value in any_golden.json("meta").items() if key.startswith("preprocess_real/")}
    assert len(cases) in (2, 5)
    for key, case in cases.items():
        image = open_image(any_golden.folder / "images" / case["file"])
        pixels, grid = patchify([image], case["min_pixels"], case["max_pixels"])
        assert [list(grid)] == any_golden.tensors[f"{key}/grid_thws"].tolist()
        assert len(pixels) == case["num_patches"]
        rows = torch.from_numpy(pixels[:: case["row_stride"]])
        assert rows.equal(any_golden.tensors[f"{key}/sample"])
        # the golden mean was summed in another order and precision
        statistics = [pixels.mean(dtype=np.float64), pixels.std(dtype=np.float64)]
        assert np.allclose(statistics, any_golden.tensors[f"{key}/mean_std"], rtol=1e-6, atol=1e-6)


def test_patch_rows_run_block_by_block():
    """Each pixel of a 64 x 96 picture names its patch; blocks of 2 x 2 patches come one after the other."""
    patch_of_pixel = np.kron(np.arange(24).reshape(4, 6), np.ones((16, 16), dtype=int))
    image = Image.fromarray(np.repeat(patch_of_pixel[..., None], 3, axis=2).astype(np.uint8))
    pixels, grid = patchify([image, image], 32 * 32, 64 * 96)
    assert grid == (2, 4, 6)
    order = np.rint((pixels[:, 0] + 1) * 127.5).astype(int).tolist()
    one_frame = [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    assert order == one_frame * 2


def test_a_row_runs_channel_by_channel():
    values = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) % 251
    pixels, _ = patchify([Image.fromarray(values.astype(np.uint8))], 1024, 1024)
    row = np.rint((pixels[1] + 1) * 127.5).astype(int)
    assert row.tolist() == values[:16, 16:].transpose(2, 0, 1).flatten().tolist()


def test_the_first_frame_fixes_the_size_of_all():
    frames = [Image.new("RGB", (64, 32)), Image.new("RGB", (100, 300))]
    pixels, grid = patchify(frames, 1024, 4096)
    assert grid == (2, 2, 4) and pixels.shape == (16, 768) and pixels.dtype == np.float32


# -- bytes instead of float32


def plain_patchify(frames: list[Image.Image], min_pixels: int, max_pixels: int) -> np.ndarray:
    """The released arithmetic, step by step, by plain numpy."""
    width, height = frames[0].size
    height, width = smart_resize(height, width, min_pixels, max_pixels)
    resized = [np.asarray(frame.resize((width, height), Image.Resampling.BILINEAR)) for frame in frames]
    pixels = (np.stack(resized).astype(np.float64) * 0.00392156862745098).astype(np.float32)
    pixels = ((pixels - np.float32(0.5)) / np.float32(0.5)).transpose(0, 3, 1, 2)
    patches = pixels.reshape(len(frames), 3, height // 32, 2, 16, width // 32, 2, 16)
    return patches.transpose(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 768)


@pytest.mark.parametrize(
    "sizes",
    [
        [(64, 96)],  # fits as it is: not resized
        [(33, 97)],
        [(17, 31)],
        [(1080, 1920)],
        [(96, 64)] * 3,
        [(64, 96), (50, 70), (64, 96)],  # only the second frame is resized
        [(61, 45), (200, 10)],
    ],
)
def test_bytes_and_floats_are_the_released_pixels(sizes):
    generator = np.random.default_rng(0)
    frames = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    before = [frame.tobytes() for frame in frames]
    for budget in ((1024, 128 * 128), SINGLE_IMAGE_PIXELS):
        expected = plain_patchify(frames, *budget)
        floats, grid = patchify(frames, *budget)
        patches, same_grid = patchify_bytes(frames, *budget)
        assert patches.dtype == np.uint8 and patches.flags.c_contiguous and grid == same_grid
        assert floats.dtype == np.float32 and np.array_equal(floats, expected)
        assert np.array_equal(PIXEL_TABLE[patches], expected)
    assert [frame.tobytes() for frame in frames] == before


@pytest.mark.parametrize("case", CASE_IMAGES)
def test_the_model_gives_the_same_for_bytes(golden, model, case):
    images, meta = golden.images(case), golden.json("meta")["preprocess"]
    inputs = [images] if case == "video" else [[image] for image in images]
    both = [
        cut(frames, meta["min_pixels"], meta["max_pixels"]) for frames in inputs for cut in (patchify, patchify_bytes)
    ]
    grids = torch.tensor([grid for _, grid in both[::2]])
    floats, patches = (torch.from_numpy(np.concatenate([pixels for pixels, _ in both[k::2]])) for k in (0, 1))
    with torch.no_grad():
        assert model.get_visual_embeddings(patches, grids).equal(model.get_visual_embeddings(floats, grids))
        if case in VISUAL_CASES:
            batch = golden.inputs(case)
            assert batch["pixel_values"].equal(floats) and patches.dtype == torch.uint8
            expected = model(**batch)
            got = model(**{**batch, "pixel_values": patches})
            assert got.logits.equal(expected.logits) and got.loss.equal(expected.loss)


# -- smart_resize


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        ((480, 640), SINGLE_IMAGE_PIXELS, (480, 640)),
        # half to even: 48 / 32 = 1.5 -> 2, 80 / 32 = 2.5 -> 2, 112 / 32 = 3.5 -> 4
        ((48, 80), (1024, 10**6), (64, 64)),
        ((112, 80), (1024, 10**6), (128, 64)),
        # a side below 32: 17 x 31 is first 32 x 58, then too small
        ((17, 31), SINGLE_IMAGE_PIXELS, (352, 608)),
        ((31, 17), SINGLE_IMAGE_PIXELS, (608, 352)),
        ((16, 16), (1024, 10**6), (32, 32)),
        # 5 x 900 is first 32 x 5760, whose ratio is not looked at any more
        ((5, 900), (1024, 10**6), (32, 5760)),
        # ratio above 200: the long side becomes 200 times the short one
        ((32, 32 * 300), (1024, 10**6), (32, 6400)),
        ((32 * 300, 32), (1024, 10**6), (6400, 32)),
        ((32, 6400), (1024, 10**6), (32, 6400)),
        # over the budget: sqrt(1000 * 2000 / 100000), sides rounded down
        ((1000, 2000), (1024, 100_000), (192, 416)),
        # under the budget: sides rounded up
        ((100, 200), (200_000, 10**6), (320, 640)),
    ],
)
def test_smart_resize_follows_the_specification(size, budget, expected):
    assert smart_resize(*size, *budget) == expected


def test_smart_resize_gives_multiples_of_32_within_the_budget():
    chance = random.Random(0)
    for _ in range(2000):
        height, width = chance.randint(32, 4000), chance.randint(32, 4000)
        low = chance.randint(1, 40) * 10_000
        # one step of 32 on a side may jump over a narrow budget; twice the minimum leaves room for it
        high = low * chance.randint(4, 20)
        if max(height, width) / min(height, width) > 8:
            continue
        target_height, target_width = smart_resize(height, width, low, high)
        assert target_height % SIZE_FACTOR == target_width % SIZE_FACTOR == 0
        assert low <= target_height * target_width <= high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 1, 100), "0 x 10"),
        ((10, 10, 0, 100), "min_pixels 0"),
        ((10, 10, 200, 100), "min_pixels 200.*max_pixels 100"),
        ((32, 6400, 1, 2048), "too long and thin"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        smart_resize(*arguments)


# -- opening images


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixel(image: Image.Image, at=(0, 0)) -> tuple[int, int, int]:
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_a_path_a_string_bytes_and_a_picture_give_the_same(golden):
    path = golden.folder / "images" / "0.png"
    expected = np.asarray(Image.open(path).convert("RGB"))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        assert np.array_equal(np.asarray(open_image(source)), expected)
        assert image_size(source) == expected.shape[:2]


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored picture must be turned clockwise by 90 degrees
    source = encoded(image, "PNG", exif=exif)
    upright = open_image(source)
    assert upright.size == (20, 40) and image_size(source) == (40, 20)
    assert pixel(upright, (10, 5)) == (255, 0, 0) and pixel(upright, (10, 35)) == (0, 0, 255)


def test_the_size_of_a_png_is_known_without_its_pixels(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    plain, turned = encoded(image, "PNG"), encoded(image, "PNG", exif=exif)
    start = turned.index(b"eXIf") - 4
    end = start + 12 + struct.unpack_from(">I", turned, start)[0]
    # some programs write the chunk behind the pixels; only then are these decoded
    at_end = turned[:start] + turned[end:-12] + turned[start:end] + turned[-12:]
    for source in (turned, at_end):
        assert image_size(source) == (90, 40) and open_image(source).size == (40, 90)
    (tmp_path / "cut.png").write_bytes(plain[: len(plain) // 2])
    assert image_size(tmp_path / "cut.png") == (40, 90), "whether it can be decoded is another question"
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert image_size(plain) == (40, 90) and image_size(turned) == (90, 40)
    with pytest.raises(pytest.fail.Exception, match="decoded"):
        image_size(at_end)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    for source in (encoded(image, "PNG"), image):
        opened = open_image(source)
        assert pixel(opened) == (255, 255, 255) and pixel(opened, (1, 0)) == (10, 20, 30)
    half = open_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))
    assert pixel(half) == (127, 127, 127)
    assert pixel(open_image(Image.new("LA", (1, 1), (0, 0)))) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_is_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 0), 1)
    opened = open_image(encoded(image, "PNG", transparency=0))
    assert pixel(opened) == (255, 255, 255) and pixel(opened, (1, 0)) == (0, 0, 200)
    assert pixel(open_image(encoded(image, "PNG"))) == (200, 0, 0)


def test_a_transparent_colour_of_an_rgb_file_is_laid_on_white():
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (1, 2, 3))
    opened = open_image(encoded(image, "PNG", transparency=(9, 9, 9)))
    assert pixel(opened) == (255, 255, 255) and pixel(opened, (1, 0)) == (1, 2, 3)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_greyscale_and_bilevel_become_rgb(mode):
    assert pixel(open_image(encoded(Image.new(mode, (1, 1), 255), "PNG"))) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(values), "PNG"))
    assert np.asarray(opened)[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_a_cmyk_jpeg_keeps_its_colours():
    source = encoded(Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(source)).mode == "CMYK"
    assert np.abs(np.subtract(pixel(open_image(source)), (200, 40, 40))).max() <= COLOUR_TOLERANCE


def test_an_animated_file_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    source = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(open_image(source)) == (255, 0, 0)


def test_unreadable_images_are_named(tmp_path, golden):
    with pytest.raises(ValueError, match="missing.png does not exist"):
        open_image(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png is no readable image"):
        open_image(tmp_path / "text.png")
    whole = (golden.folder / "images" / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.png cannot be decoded"):
        open_image(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="an image of 3 bytes"):
        open_image(b"abc")


# -- videos


def grey_clip(path, num_frames: int, codec: str = "mpeg4", size=(64, 48)) -> None:
    """A video whose frame i is grey of level 10 * i."""
    write_clip(path, [Image.new("RGB", size, (10 * i,) * 3) for i in range(num_frames)], codec)


def write_clip(path, frames: list[Image.Image], codec: str = "mpeg4") -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 10**6
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def grey_levels(frames: list[Image.Image]) -> list[int]:
    """The number of each frame, read off its grey."""
    return [round(pixel(frame, (20, 20))[0] / 10) for frame in frames]


@pytest.mark.parametrize(
    ("num_frames", "low", "high", "expected"),
    [
        (4, 2, 8, [0, 1, 2, 3]),
        (10, 1, 4, [1, 3, 6, 8]),
        (16, 8, 8, [1, 3, 5, 7, 9, 11, 13, 15]),
        (2, 4, 8, [0, 0, 1, 1]),
        (1, 3, 3, [0, 0, 0]),
        (9, 1, 1, [4]),
    ],
)
def test_frames_are_the_middles_of_equal_strides(num_frames, low, high, expected):
    assert sample_indices(num_frames, low, high) == expected
    assert sample_frames(list(range(num_frames)), low, high) == expected


def test_frame_limits_are_checked():
    with pytest.raises(ValueError, match="no frames"):
        sample_indices(0, 1, 8)
    with pytest.raises(ValueError, match="min_frames 5.*max_frames 4"):
        sample_indices(10, 5, 4)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_a_video_gives_the_chosen_frames(tmp_path, name):
    grey_clip(tmp_path / name, 20)
    assert video_info(tmp_path / name) == (20, 48, 64)
    frames = load_video(tmp_path / name, 1, 4)
    assert grey_levels(frames) == [2, 7, 12, 17]
    assert {frame.size for frame in frames} == {(64, 48)}


def test_a_short_video_repeats_frames(tmp_path):
    grey_clip(tmp_path / "clip.mp4", 2)
    assert grey_levels(load_video(tmp_path / "clip.mp4", 4, 8)) == [0, 0, 1, 1]


def test_a_header_that_promises_too_many_frames_is_not_believed(tmp_path):
    path = tmp_path / "clip.avi"
    grey_clip(path, 8, codec="mjpeg")
    content = bytearray(path.read_bytes())
    length_at = content.index(b"strh") + 8 + 32
    assert struct.unpack_from("<I", content, length_at) == (8,)
    struct.pack_into("<I", content, length_at, 800)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 800
    assert grey_levels(load_video(path, 1, 4)) == [1, 3, 5, 7]


def test_a_video_that_was_filmed_sideways_is_turned_upright(tmp_path):
    """The track's matrix says: turn clockwise by 90 degrees, so what is stored on the left is shown on top."""
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 32, 32))
    path = tmp_path / "clip.mp4"
    write_clip(path, [image] * 3)
    content = bytearray(path.read_bytes())
    one, minus_one, last = 1 << 16, -(1 << 16), 1 << 30
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, last)
    matrix_at = content.index(identity, content.index(b"tkhd"))
    content[matrix_at : matrix_at + 36] = struct.pack(">9i", 0, one, 0, minus_one, 0, 0, 0, 0, last)
    path.write_bytes(content)
    assert video_info(path) == (3, 64, 32)
    upright = load_video(path, 1, 1)[0]
    assert upright.size == (32, 64)
    assert pixel(upright, (16, 8))[0] > 200 and pixel(upright, (16, 56))[2] > 200


def test_unreadable_videos_are_named(tmp_path):
    with pytest.raises(ValueError, match="missing.mp4 does not exist"):
        load_video(tmp_path / "missing.mp4", 1, 4)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="text.mp4 is no readable video"):
        load_video(tmp_path / "text.mp4", 1, 4)
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match="sound.wav has no video stream"):
        video_info(tmp_path / "sound.wav")
