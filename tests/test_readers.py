"""Readers of pictures: what strangers' files do to them. Nothing but ValueError comes out, and sizes agree."""

import base64
import io
import random
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin
from test_pixels import encoded

from ovis25.data.dataset import ConversationDataset
from ovis25.processing import Ovis2_5Processor, VisualLimits
from ovis25.processing import image as image_module
from ovis25.processing.image import image_size, open_image, patchify_bytes, smart_resize
from ovis25.reduced import full_size
from ovis25.tools import toolbox
from ovis25.training.build import visual_limits
from ovis25.training.config import load_config

pytestmark = pytest.mark.filterwarnings("ignore")

ORIENTATION = 0x0112
# format: options; each can be written and read by Pillow alone
FORMATS = {
    "AVIF": {}, "BLP": {}, "BMP": {}, "DDS": {}, "DIB": {}, "GIF": {}, "ICNS": {}, "ICO": {}, "IM": {}, "JPEG": {},
    "JPEG2000": {}, "MPO": {}, "MSP": {}, "PCX": {}, "PNG": {}, "PPM": {}, "QOI": {}, "SGI": {}, "SPIDER": {},
    "TGA": {}, "TIFF": {}, "WEBP": {}, "XBM": {},
}  # fmt: skip
MODES = {"BLP": "P", "MSP": "1", "XBM": "1", "SPIDER": "F"}


def quarters(height: int = 40, width: int = 60) -> Image.Image:
    """Red, green above blue, yellow."""
    image = Image.new("RGB", (width, height), "red")
    image.paste((0, 255, 0), (width // 2, 0, width, height))
    image.paste("blue", (0, height // 2, width // 2, height))
    image.paste("yellow", (width // 2, height // 2, width, height))
    return image


def corners(image: Image.Image) -> str:
    """The colours of the four quarters, row by row."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 0): "y"}
    (width, height), found = image.size, ""
    for x, y in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        found += names[tuple(int(value > 127) for value in image.getpixel((int(x * width), int(y * height))))]
    return found


def written(name: str, **options) -> bytes:
    image = quarters(64, 64) if name == "ICNS" else quarters()
    image = image.convert(MODES[name]) if name in MODES else image
    return encoded(image, name, **{**FORMATS[name], **options})


# -- sizes and orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["AVIF", "JPEG", "MPO", "PNG", "TIFF", "TIFF deflate", "WEBP"])
def test_turned_pictures_stand_upright_and_the_header_tells_their_size(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    name, *compression = name.split()
    options = {"compression": "tiff_adobe_deflate"} if compression else {}
    if name in ("AVIF", "JPEG", "MPO", "WEBP"):
        options["quality"] = 95
    source = encoded(quarters(), name, exif=exif, **options)
    (tmp_path / "picture").write_bytes(source)
    expected = ["rgby", "gryb", "ybgr", "byrg", "rbgy", "bryg", "ygbr", "gyrb"][orientation - 1]
    for file in (source, tmp_path / "picture"):
        upright = open_image(file)
        assert corners(upright) == expected
        assert upright.size == ((60, 40) if orientation < 5 else (40, 60))
        assert image_size(file) == upright.size[::-1]
    lazy = Image.open(io.BytesIO(source))
    assert image_size(lazy) == upright.size[::-1]
    assert open_image(lazy).size == upright.size
    assert image_size(lazy) == upright.size[::-1] or name != "TIFF", "Pillow has turned it meanwhile"


def test_an_orientation_in_xmp_counts(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for source in (encoded(quarters(), "JPEG", xmp=xmp), encoded(quarters(), "WEBP", xmp=xmp)):
        assert image_size(source) == open_image(source).size[::-1] == (60, 40)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    assert image_size(encoded(quarters(), "PNG", pnginfo=info)) == (60, 40)
    tiff = encoded(quarters(), "TIFF", tiffinfo={700: xmp})
    assert image_size(tiff) == open_image(tiff).size[::-1]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_tells_its_size(name):
    source = written(name)
    opened = open_image(source)
    assert opened.mode == "RGB" and image_size(source) == opened.size[::-1]


def test_an_icon_whose_directory_lies_about_its_size():
    source = bytearray(encoded(quarters(32, 32), "ICO", sizes=[(32, 32)]))
    source[6], source[7] = 48, 16
    assert image_size(bytes(source)) == open_image(bytes(source)).size[::-1] == (32, 32)


# -- what a picture may be given as


def test_a_data_url_is_a_picture():
    content = encoded(quarters(), "PNG")
    text = base64.b64encode(content).decode()
    wrapped = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    url_safe = base64.urlsafe_b64encode(content).decode().rstrip("=")
    for body in (text, wrapped, url_safe):
        source = f"data:image/png;base64,{body}"
        assert image_size(source) == (40, 60) and corners(open_image(source)) == "rgby"
    assert image_size(bytearray(content)) == image_size(memoryview(content)) == (40, 60)


def test_a_data_url_is_a_picture_of_a_request(processor):
    source = "data:image/png;base64," + base64.b64encode(encoded(quarters(), "PNG")).decode()
    budget = {"min_pixels": 1024, "max_pixels": 4096}
    direct = processor(images=quarters(), text="<image>", **budget)
    assert processor(images=source, text="<image>", **budget)["pixel_values"].equal(direct["pixel_values"])
    frames = processor(videos=[source] * 8, text="<video>", **budget)
    assert frames["grid_thws"].tolist() == [[8, *direct["grid_thws"][0, 1:].tolist()]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("iVBORw0KGgo" * 500, r"\(5,500 characters\).*base64 belongs behind data:image/png;base64,"),
        ("data:image/png;base64,iVBO*", "no base64"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "is no readable image"),
        ("data:image/png;base64," + "AAAA" * 5000, r"\(20,022 characters\) is no readable image"),
        ("a/" * 3000, r"\(6,000 characters\)"),
        ("a\0b.png", "null byte"),
        ("", "a folder"),
        (None, r"None \(NoneType\) is no picture"),
        ({"url": "x" * 9000}, r"\(dict\) is no picture"),
        (7, r"7 \(int\)"),
        (b"", "an image of 0 bytes"),
    ],
)
def test_what_is_no_picture_is_a_short_error(source, message):
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=message) as caught:
            read(source)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_closed_picture_is_an_error():
    image = Image.open(io.BytesIO(encoded(quarters(), "JPEG")))
    image.close()
    with pytest.raises(ValueError, match="a PIL image cannot be decoded"):
        open_image(image)


# -- errors of Pillow


@pytest.mark.parametrize(
    "error",
    [
        AssertionError, AttributeError, EOFError, IndexError, KeyError, MemoryError, NotImplementedError, OSError,
        OverflowError, RecursionError, RuntimeError, SyntaxError, TypeError, ValueError, ZeroDivisionError, zlib.error,
        Image.DecompressionBombWarning, PngImagePlugin.struct.error,
    ],
)  # fmt: skip
def test_any_error_of_a_reader_names_the_file(tmp_path, monkeypatch, error):
    quarters().save(tmp_path / "a.gif")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (_ for _ in ()).throw(error("odd\nthing")))
    with pytest.raises(ValueError, match="a.gif cannot be decoded: ") as caught:
        open_image(tmp_path / "a.gif")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(image_module.Image, "open", lambda file: (_ for _ in ()).throw(error("odd\nthing")))
    with pytest.raises(ValueError, match="a.gif is no readable image: "):
        image_size(tmp_path / "a.gif")


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A damaged copy: cut, bytes changed (most of them near the header), a part doubled or lost."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = min(int(chance.expovariate(1 / 60)) if chance.random() < 0.7 else 10**9, len(content) - 1)
        place = place if place < len(content) - 1 else chance.randrange(len(content))
        kind = chance.random()
        if kind < 0.6:
            content[place] = chance.choice([0, 255, 127, 128, chance.randrange(256)])
        elif kind < 0.75:
            content[place : place + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
        elif kind < 0.85:
            del content[place : place + chance.randint(1, 20)]
        elif kind < 0.95:
            content[place:place] = content[place : place + chance.randint(1, 20)]
        else:
            del content[max(place, 1) :]
        if len(content) < 2:
            break
    return bytes(content)


def sources() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    extra = {
        "JPEG exif": encoded(quarters(), "JPEG", exif=exif),
        "PNG exif": encoded(quarters(), "PNG", exif=exif),
        "PNG 16": encoded(Image.fromarray(np.full((9, 7), 999, np.uint16)), "PNG"),
        "TIFF exif": encoded(quarters(), "TIFF", exif=exif, compression="tiff_lzw"),
        "TIFF float": encoded(Image.fromarray(np.ones((9, 7), np.float32)), "TIFF"),
        "WEBP exif": encoded(quarters(), "WEBP", exif=exif),
    }
    return {**{name: written(name) for name in FORMATS}, **extra}


def test_damaged_pictures_raise_nothing_but_valueerror():
    chance, num_read = random.Random(5), 0
    for name, content in sources().items():
        for _ in range(20):
            damaged = mutated(content, chance)
            try:
                opened = open_image(damaged, max_megapixels=4)
            except ValueError as error:
                assert "\n" not in str(error)
                try:
                    image_size(damaged, max_megapixels=4)
                except ValueError:
                    continue
            else:
                num_read += 1
                assert image_size(damaged, max_megapixels=4) == full_size(opened), name
    assert num_read > 100


# -- PNG whose texts are large


def png_with(*chunks: tuple[bytes, bytes], behind: bool = False, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(quarters(), "PNG", exif=exif)
    at = len(content) - 12 if behind else 33
    made = b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )
    return content[:at] + made + content[at:]


LARGE = zlib.compress(b"{}" * 2**20)


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"workflow\0\0" + LARGE)],
        [(b"iTXt", b"workflow\0\1\0\0\0" + LARGE)],
        [(b"iCCP", b"profile\0\0" + LARGE)],
        [(b"zTXt", b"a\0\0" + LARGE), (b"tEXt", b"b\0text"), (b"iTXt", b"c\0\1\0\0\0" + LARGE)],
        [(b"tEXt", b"b\0" + b"x" * 3000)],
        [(b"zTXt", b"broken\0\0nothing"), (b"iCCP", b"profile\0\0" + LARGE)],
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_a_png_with_large_texts_is_read(chunks, behind, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 2000)
    for orientation, expected in ((1, "rgby"), (6, "bryg")):
        source = png_with(*chunks, behind=behind, orientation=orientation)
        opened = open_image(source)
        assert corners(opened) == expected and image_size(source) == opened.size[::-1]


# -- values that are not finite


def floats(*values: float) -> bytes:
    return encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 100, 200, np.nan), [0, 128, 255, 0]),
        ((0, 100, 200, np.inf), [0, 128, 255, 255]),
        ((0, 100, 200, -np.inf), [0, 128, 255, 0]),
        ((-5, 0.5, 1, np.nan), [0, 128, 255, 0]),
        ((np.nan, np.inf, 0, 0), [0, 255, 0, 0]),
    ],
)
def test_floats_are_scaled_over_the_finite_ones(values, expected):
    assert np.asarray(open_image(floats(*values)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values", [(np.nan, np.nan), (np.inf, np.inf), (np.nan, -np.inf)])
def test_floats_without_a_finite_one_are_an_error(values):
    with pytest.raises(ValueError, match="an image of .* each of its values is NaN or infinite"):
        open_image(floats(*values))


# -- strips


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F", "RGBA", "LA", "P", "RGB"])
def test_strips_give_what_the_whole_gives(mode, monkeypatch):
    generator = np.random.default_rng(0)
    if mode in ("I;16", "I;16B"):
        data = generator.integers(0, 2**16, (67, 41), dtype=np.uint16)
        image = Image.frombytes(mode, (41, 67), data.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    elif mode in ("I", "F"):
        dtype = np.int32 if mode == "I" else np.float32
        image = Image.fromarray((generator.normal(size=(67, 41)) * 40_000).astype(dtype))
    elif mode in ("P", "RGB"):
        picture = Image.fromarray(generator.integers(0, 256, (67, 41, 3), dtype=np.uint8))
        options = {"transparency": 3} if mode == "P" else {"transparency": picture.getpixel((0, 0))}
        image = Image.open(io.BytesIO(encoded(picture.quantize(16) if mode == "P" else picture, "PNG", **options)))
    else:
        image = Image.fromarray(generator.integers(0, 256, (67, 41, len(mode)), dtype=np.uint8), mode=None)
    whole = np.asarray(open_image(image.copy()))
    monkeypatch.setattr("ovis25.processing.colour._STRIP_PIXELS", 300)
    assert np.array_equal(np.asarray(open_image(image.copy())), whole) and whole.std() > 10


# -- large pictures


@pytest.fixture(scope="module")
def jpeg(tmp_path_factory):
    """A function that writes a JPEG of 2.4 megapixels, red, green / blue, yellow."""
    folder = tmp_path_factory.mktemp("jpeg")

    def write(**options):
        path = folder / f"{len(list(folder.iterdir()))}.jpg"
        quarters(1200, 2000).save(path, quality=95, **options)
        return path

    return write


def test_a_jpeg_beyond_the_limit_is_decoded_reduced(jpeg):
    path = jpeg()
    for limit, budget, size in [
        (2, 100_000, (500, 300)),  # 1/4 of the sides is 1.5 times the budget, 1/2 six times
        (2, 30_000, (500, 300)),
        (2, 9_000, (250, 150)),
        (0.2, 100_000, (500, 300)),
        (3, 1000, (2000, 1200)),
    ]:
        image = open_image(path, limit, budget)
        assert corners(image) == "rgby" and image_size(path, limit, budget) == full_size(image) == (1200, 2000)
        if budget != 100_000:
            assert image.size == size
        patches, grid = patchify_bytes([image], 1024, max(budget, 9000))
        height, width = smart_resize(1200, 2000, 1024, max(budget, 9000))
        assert grid == (1, height // 16, width // 16) and len(patches) == grid[1] * grid[2]


def test_a_reduced_jpeg_looks_like_the_whole_one(jpeg):
    whole, reduced = open_image(jpeg()), open_image(jpeg(), 2, 9000)
    (first, _), (second, _) = patchify_bytes([whole], 1024, 9000), patchify_bytes([reduced], 1024, 9000)
    assert np.abs(first.astype(int) - second).mean() < 1


def test_a_turned_jpeg_beyond_the_limit(jpeg):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = jpeg(exif=exif)
    image = open_image(path, 2, 9000)
    assert corners(image) == "bryg" and image.size == (150, 250)
    assert full_size(image) == image_size(path, 2, 9000) == (2000, 1200)
    assert full_size(open_image(image)) == image_size(image) == (2000, 1200), "opened once more"
    assert full_size(image.crop((0, 0, 10, 20))) == (20, 10), "a part is no reduced picture"


@pytest.mark.parametrize(
    ("limit", "budget"),
    [
        (2, 2_000_000),  # it would be smaller than what is needed
        (0.03, 1000),  # even 1/8 is larger
    ],
)
def test_a_jpeg_that_cannot_be_reduced_is_refused(jpeg, limit, budget):
    path = jpeg()
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=f"{path.name} cannot be decoded: it has 2.4 megapixels"):
            read(path, limit, budget)


def test_a_progressive_jpeg_needs_the_memory_of_the_whole(jpeg):
    path = jpeg(progressive=True)
    assert open_image(path, 1.3, 9000).size == (250, 150)
    with pytest.raises(ValueError, match="more than max_image_megapixels 1;"):
        open_image(path, 1, 9000)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "WEBP", "BMP", "GIF"])
def test_other_pictures_beyond_the_limit_are_refused_with_both_cures(name):
    source = encoded(quarters(1000, 1100), name)
    assert image_size(source, 1.1) == (1000, 1100)
    cures = (
        r"1.1 megapixels \(1,000 x 1,100\), more than max_image_megapixels 1; raise max_image_megapixels, or .* JPEG"
    )
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match=cures):
            read(source, 1)


def test_the_default_limit_and_pillows_own(monkeypatch):
    """Beyond twice its limit Pillow refuses to open a file at all; ours decides."""
    sources = {name: encoded(quarters(), name) for name in ("PNG", "TIFF", "GIF", "JPEG")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for source in sources.values():
        assert image_size(source) == (40, 60) and corners(open_image(source)) == "rgby"
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(ValueError, match="more than max_image_megapixels 0.0005"):
        open_image(sources["PNG"], 0.0005)
    header = bytearray(sources["PNG"])
    header[16:24] = (20_000).to_bytes(4, "big") + (10_000).to_bytes(4, "big")
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match="it has 200.0 megapixels .*more than max_image_megapixels 178"):
        image_size(bytes(header))


def test_a_crop_of_a_reduced_picture_is_where_it_belongs(jpeg):
    image = open_image(jpeg(), 2, 9000)
    tools = toolbox()
    part = tools.run_strictly("Crop [1000, 600, 2000, 1200]", [image])
    assert full_size(part) == (600, 1000) and part.size == (125, 75)
    assert set(corners(part)) == {"y"}
    assert full_size(tools.run_strictly("Crop [0.5, 0, 1, 0.5]", [image])) == (600, 1000)


def test_the_limit_reaches_processor_and_datasets(jpeg, processor, golden, tmp_path):
    path, budget = jpeg(), {"min_pixels": 1024, "max_pixels": 9000}
    own = Ovis2_5Processor.from_pretrained(golden.tokenizer_folder, max_image_megapixels=2)
    assert own.max_image_megapixels == 2 and processor.max_image_megapixels == 178
    expected = processor(images=path, text="<image>", **budget)
    got = own(images=path, text="<image>", **budget)
    assert got["grid_thws"].equal(expected["grid_thws"])
    assert 0 < (got["pixel_values"] - expected["pixel_values"]).abs().mean() < 0.01, "of the reduced picture"
    own.save_pretrained(tmp_path)
    assert Ovis2_5Processor.from_pretrained(tmp_path).max_image_megapixels == 2
    own.max_image_megapixels = 0.01
    with pytest.raises(ValueError, match="max_image_megapixels 0.01"):
        own(images=path, text="<image>", **budget)
    with pytest.raises(ValueError, match="max_image_megapixels 0 must be a number above 0"):
        own.max_image_megapixels = 0

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
    crop = "<tool_call>Crop [1000, 600, 2000, 1200]</tool_call>"
    called = [turns[0], {"from": "gpt", "value": f"{crop}<image>A."}]
    rows = [{"conversations": turns, "image": str(path)}, {"conversations": called, "image": str(path)}]
    small = {f"{kind}_{bound}_pixels": p for kind in ("single_image", "multiple_image")
             for bound, p in (("min", 1024), ("max", 9000))}  # fmt: skip
    dataset = ConversationDataset(rows, processor, max_image_megapixels=2, **small)
    for index in range(len(dataset)):
        assert len(dataset[index]["input_ids"]) == dataset.lengths[index]
    with pytest.raises(ValueError, match="raise max_image_megapixels, or give a smaller or a JPEG copy"):
        ConversationDataset(rows, processor, max_image_megapixels=0.02, **small)


def test_the_limit_is_a_key_of_the_config(write_config):
    assert visual_limits(load_config(write_config())).max_image_megapixels == 178
    assert visual_limits(load_config(write_config(), ["--max_image_megapixels", "2.5"])).max_image_megapixels == 2.5
    with pytest.raises(ValueError, match="max_image_megapixels -1.0 must be a number above 0"):
        visual_limits(load_config(write_config(max_image_megapixels=-1)))


# -- a maximum below the default minimum


def test_the_default_minimum_follows_a_lower_maximum(processor, golden):
    assert VisualLimits(single_image_max_pixels=5000).budget("single_image") == (5000, 5000)
    assert VisualLimits(video_max_pixels=5000).budget("multiple_image") == VisualLimits().budget("multiple_image")
    assert VisualLimits(multiple_image_max_pixels=10**6).budget("multiple_image") == (448 * 448, 10**6)
    lowered = VisualLimits().changed(video_max_pixels=5000)
    assert lowered.budget("video") == (5000, 5000) and lowered.changed(video_max_pixels=9).budget("video") == (9, 9)
    loaded = Ovis2_5Processor.from_pretrained(golden.tokenizer_folder, single_image_max_pixels=5000)
    assert loaded.limits.budget("single_image") == (5000, 5000)
    batch = processor(images=quarters(), text="<image>", max_pixels=64 * 64)
    assert batch["grid_thws"].tolist() == [[1, 4, 6]], "sides are rounded up to reach the minimum"
    kinds = {"single_image_min_pixels": 5001, "single_image_max_pixels": 5000}
    with pytest.raises(ValueError, match="single_image_min_pixels 5001 .* single_image_max_pixels 5000"):
        VisualLimits(**kinds)
    for explicit in (partial(VisualLimits().changed, **kinds), partial(VisualLimits, single_image_min_pixels=10**8)):
        with pytest.raises(ValueError, match="single_image_min_pixels"):
            explicit()
    with pytest.raises(ValueError, match="min_pixels 5001 .* max_pixels 5000"):
        processor(images=quarters(), text="<image>", min_pixels=5001, max_pixels=5000)


def test_the_default_minimum_follows_in_a_config(tmp_path, data_dir):
    path = tmp_path / "config.json"
    path.write_text(f'{{"model_path": "tiny", "data_path": "{data_dir}/train.json", "single_image_max_pixels": 5000}}')
    config = load_config(path, ["--video_max_pixels", "4096"])
    limits = visual_limits(config)
    assert limits.budget("single_image") == (5000, 5000) and limits.budget("video") == (4096, 4096)
    assert config.single_image_min_pixels == 5000 and config.multiple_image_min_pixels == 448 * 448
    with pytest.raises(ValueError, match="single_image_min_pixels 6000"):
        visual_limits(load_config(path, ["--single_image_min_pixels", "6000"]))
