"""Files that data and requests name: what is found, and what the message says of what is not."""

import base64
import unicodedata

import pytest

from ovis25.files import data_url_bytes, locate_file, unquoted_path
from ovis25.text import lone_surrogate, nearest, shorten


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Pictures").mkdir()
    for name in ("my cat.jpg", unicodedata.normalize("NFC", "äpfel.png")):
        (tmp_path / "Pictures" / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize("name", ["Pictures/my cat.jpg", "file://{}/Pictures/my%20cat.jpg", "{}/Pictures/my cat.jpg"])
def test_files_are_found(folder, name):
    assert locate_file(name.format(folder), folder) == folder / "Pictures" / "my cat.jpg"


def test_home_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert locate_file("~/Pictures/my cat.jpg", "/nowhere") == folder / "Pictures" / "my cat.jpg"


@pytest.mark.parametrize(
    "name",
    [
        "Pictures\\my cat.jpg",
        "C:\\data\\Pictures\\my cat.jpg",
        "Pictures/my%20cat.jpg",
        "pictures/MY CAT.JPG",
        "Pictures/my cat.jpg ",
        "'Pictures/my cat.jpg'",
        "/mnt/old/Pictures/my cat.jpg",
    ],
)
def test_a_wrong_spelling_names_the_file_that_is_there(folder, name):
    with pytest.raises(FileNotFoundError, match="does not exist; did you mean .*Pictures/my cat.jpg"):
        locate_file(name, folder)


def test_unicode_forms_differ(folder):
    decomposed = unicodedata.normalize("NFD", "äpfel.png")
    with pytest.raises(FileNotFoundError, match="did you mean"):
        locate_file(f"Pictures/{decomposed}", folder)


@pytest.mark.parametrize(
    "name, words",
    [
        ("Pictures", "is a folder, not a file"),
        ("nothing.png", "nothing.png' does not exist$"),
        ("https://example.org/cat.jpg", "lies on the web; download it"),
        ("a" * 5000, r"is no name that a file can have \(File name too long\)"),
        ("a\0b", "is no name that a file can have"),
    ],
)
def test_what_is_no_file_says_why(folder, name, words):
    with pytest.raises(FileNotFoundError, match=words) as caught:
        locate_file(name, folder)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_pasted_paths():
    assert {unquoted_path(text) for text in ("my\\ cat.jpg", "'my cat.jpg'", '"my cat.jpg" ')} == {"my cat.jpg"}
    assert unquoted_path("C:\\temp\\cat.jpg") == "C:\\temp\\cat.jpg"


def test_words():
    assert shorten("short") == "'short'"
    assert shorten("a" * 1000).endswith("(1,000 characters)") and len(shorten("a" * 10**6)) < 100
    assert nearest("imges", ["images", "videos"]) == "images" and nearest("zzz", ["images"]) is None
    assert lone_surrogate("a\ud83d") == 1 and lone_surrogate("a😀") is None


def test_data_urls_give_their_bytes():
    content = bytes(range(256)) * 3
    plain = base64.b64encode(content).decode()
    wrapped = "\n".join(plain[start : start + 76] for start in range(0, len(plain), 76))
    safe = base64.urlsafe_b64encode(content).decode().rstrip("=")
    for body in (plain, wrapped, safe):
        assert data_url_bytes(f"data:image/png;base64,{body}") == content
    assert data_url_bytes("data:text/plain,a%20b") == b"a b"


@pytest.mark.parametrize(
    "url", ["data:image/png;base64", "data:image/png;base64,a", "data:image/png;base64," + "ä" * 9999]
)
def test_a_broken_data_url_is_told_in_short(url):
    with pytest.raises(ValueError, match="no comma|no base64") as caught:
        data_url_bytes(url)
    assert len(str(caught.value)) < 200
