"""Boxes and points: read as they stand, placed in the picture or named as a problem, and drawn in any script."""

import time

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from ovis25.inference import fonts
from ovis25.inference.grounding import parse_grounding
from ovis25.processing.boxes import parse_regions


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (1000, 500), "grey")


def box(text: str) -> str:
    return f"<box>{text}</box>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(1e-05,+0.1),(0.5,0.6)", (0.01, 50, 500, 300)),
        ("( 0 , 0 ) , ( 1 , 1 )", (0, 0, 1000, 500)),
        ("(.25,0.5),(5e-1,1.)", (250, 250, 500, 500)),
        ("[0.1, 0.2, 0.3, 0.4]", (100, 100, 300, 200)),
        ("0.1 0.2 0.3 0.4", (100, 100, 300, 200)),
        ("(0.1,0.2),\n(0.3,0.4)", (100, 100, 300, 200)),
    ],
)
def test_numbers_in_every_spelling(picture, text, expected):
    found = parse_grounding(box(text), picture)
    assert found.boxes == [pytest.approx(expected)] and found.problems == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(250,0),(500,0.5)", "box 1 has x1 = 250, x2 = 500: no share of the picture; it looks like 0-1000"),
        ("(0.1,0.2),(1500,300)", "it looks like pixels"),
        ("(0,0),(2,2)", "x2 = 2, y2 = 2: no share of the picture"),
        ("(-5,0.1),(0.2,0.3)", "x1 = -5: no share"),
        ("(1.2,0.1),(1.4,0.3)", "x1 = 1.2, x2 = 1.4: no share of the picture"),
        ("(1e400,0),(1,1)", "no coordinates"),
        ("(nan,0),(1,1)", "no coordinates"),
        ("(0.1,0.2)", "no coordinates"),
        ("somewhere", "'somewhere': no coordinates"),
        ("0." + "1" * 60000 + ",0,1,1", "no coordinates"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_share_is_a_problem_and_no_box(picture, text, problem):
    found = parse_grounding("<point>(0.5,0.5)</point>" + box(text), picture)
    assert found.boxes == [] and len(found.problems) == 1 and problem in found.problems[0]
    assert len(found.problems[0]) < 300 and found.points == [(500, 250)]


def test_swapped_corners_are_put_in_order(picture):
    found = parse_grounding(box("(0.5,0.8),(0.1,0.2)") + box("(0.1,0.8),(0.5,0.2)"), picture)
    assert found.boxes == [pytest.approx((100, 100, 500, 400))] * 2
    assert found.problems == [
        "box 1 has x2 < x1 and y2 < y1: its corners are put in order",
        "box 2 has y2 < y1: its corners are put in order",
    ]


def test_a_box_that_sticks_out_is_cut_and_said(picture):
    found = parse_grounding(box("(0.1,-0.02),(0.5,1.2)"), picture)
    assert found.boxes == [pytest.approx((100, 0, 500, 500))]
    assert found.problems == ["box 1 has y1 = -0.02, y2 = 1.2: cut at the edge of the picture"]


@pytest.mark.parametrize(
    ("coordinates", "expected"), [("pixels", (250, 100, 500, 400)), ("thousandths", (250, 50, 500, 200))]
)
def test_coordinates_say_the_unit(picture, coordinates, expected):
    found = parse_grounding(box("(250,100),(500,400)") + "<point>(2000,5000)</point>", picture, coordinates)
    assert found.boxes == [pytest.approx(expected)] and found.points == []
    assert "outside the picture" in found.problems[0]


def test_labels_and_pieces(picture):
    answer = "<ref> a cat </ref>" + box("(0,0),(1,1)") + "<ref>b<point>(0.1,0.1)</point>" + box("(0.2,")[:-6]
    regions = parse_regions(answer)
    assert [(region.kind, region.label, region.is_closed) for region in regions] == [
        ("box", "a cat", True), ("point", "a cat", True), ("box", "a cat", False),
    ]  # fmt: skip
    assert "the reply ends inside it" in parse_grounding(answer, picture).problems[0]


@pytest.mark.parametrize("piece", ["<ref>", "<box>", "<box>(", "<box>(1", "1", "<ref>a</ref>", "<box></box>"])
def test_reading_is_linear(picture, piece):
    begin = time.process_time()
    parse_regions(piece * 60000)
    assert time.process_time() - begin < 5


# -- drawing
LABELS = ["a cat", "кошка", "قطة", "猫と犬", "고양이", "😀🦖", "y" * 300, "\x1b[2J\u202e", " "]
EDGES = ["0,0,1,1", "0,0,0.05,0.05", "0.95,0.95,1,1", "0.95,0,1,0.05", "0.4,0.4,0.6,0.6"]


@pytest.mark.parametrize("size", [(64, 64), (1000, 30), (20, 700), (1, 1)])
def test_labels_are_drawn_in_every_size(size):
    for index, label in enumerate(LABELS):
        picture = Image.new("RGB", size, "white")
        drawn = parse_grounding(f"<ref>{label}</ref>" + box(EDGES[index % len(EDGES)]), picture).draw()
        assert drawn.size == size and drawn.getcolors(1) != [(size[0] * size[1], (255, 255, 255))]
        if size == (64, 64) and label.strip():
            # letters, whose edges are blends of white and the frame's colour
            assert len(drawn.getcolors(64 * 64)) > 3, label


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("label", ["cat", "猫と犬", "y" * 300])
def test_labels_stay_inside(edges, label):
    """The label's field is as wide as it was measured: nothing of it is cut off at an edge."""
    picture = Image.new("RGB", (300, 200), "black")
    drawn = np.asarray(parse_grounding(f"<ref>{label}</ref>" + box(edges), picture).draw())
    letters = (drawn > 200).all(axis=-1)
    rows, columns = np.nonzero(letters)
    assert len(rows) > 10 and rows.min() > 0 and rows.max() < 199 and columns.min() > 0 and columns.max() < 299


def test_letters_grow_with_the_picture():
    answer = "<ref>cat</ref>" + box("(0.5,0.5),(0.9,0.9)")

    def height_of_label(height: int) -> int:
        drawn = np.asarray(parse_grounding(answer, Image.new("RGB", (height, height), "black")).draw())
        column = drawn[: height // 2 - 1, height // 2 + 1]
        return int((column != 0).any(axis=-1).sum())

    assert 8 <= height_of_label(64) <= 21
    assert height_of_label(400) * 5 < height_of_label(4000) < 400


@pytest.fixture
def only_fonts(monkeypatch):
    """Fonts in these folders alone, beside the one that comes with matplotlib."""

    def use(*folders):
        for cached in (fonts.font_files, fonts.file_with, fonts._has):
            cached.cache_clear()
        monkeypatch.setattr(fonts, "font_folders", lambda: list(folders))

    yield use
    monkeypatch.undo()
    for cached in (fonts.font_files, fonts.file_with, fonts._has):
        cached.cache_clear()


def test_a_letter_without_font_is_drawn_as_its_code_point_and_said(picture, only_fonts):
    only_fonts()
    assert fonts.runs("кот 猫")[0][-1][1].endswith("[U+732B]") and fonts.runs("кот 猫")[1] == ["猫"]
    found = parse_grounding("<ref>猫</ref>" + box("(0.1,0.2),(0.5,0.6)"), picture)
    assert found.problems == []
    found.draw(), found.draw()
    assert len(found.problems) == 1 and "no installed font has 猫 (U+732B)" in found.problems[0]


def make_font(path, letter: str) -> None:
    """A font that has one letter, a square, and draws nothing for the others."""
    pen = TTGlyphPen(None)
    for number, corner in enumerate([(0, 0), (0, 900), (900, 900), (900, 0)]):
        pen.lineTo(corner) if number else pen.moveTo(corner)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(letter): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Square", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_an_installed_font_that_has_the_letter_is_found(picture, only_fonts, tmp_path):
    make_font(tmp_path / "square.ttf", "猫")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    only_fonts(tmp_path, tmp_path / "nowhere")
    pieces, missing = fonts.runs("cat 猫 кот")
    assert missing == [] and [text for _, text in pieces] == ["cat ", "猫 ", "кот"] or len(pieces) == 3
    assert pieces[1][0] == tmp_path / "square.ttf"
    found = parse_grounding("<ref>猫</ref>" + box("(0.1,0.5),(0.5,0.6)"), picture)
    white = (np.asarray(found.draw()) == 255).all(axis=-1).sum()
    assert found.problems == [] and white > 100
