"""Fonts for labels in any script: the installed fonts are looked through for those that have the letters."""

import importlib.util
import os
import sys
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

from PIL import ImageFont

_FONT_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# no font has a letter for it: what a font draws here is what it draws for all that it lacks
_NO_LETTER = "\uffff"
_PROBE_SIZE = 16
# what takes no place of its own: marks, joiners, directions, blanks
_WITHOUT_SHAPE = ("Mn", "Me", "Cf", "Cc", "Zs", "Zl", "Zp")


def font_folders() -> list[Path]:
    """Where this system keeps its fonts."""
    home = Path.home()
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts"]
    data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [*(Path(folder) / "fonts" for folder in data.split(":")), home / ".local/share/fonts", home / ".fonts"]


@cache
def font_files() -> tuple[Path, ...]:
    """DejaVu Sans, which matplotlib brings, then the system's fonts: plain ones before bold and slanted ones."""
    files = [file for folder in font_folders() if folder.is_dir() for file in folder.rglob("*")]
    files = [file for file in files if file.suffix.lower() in _FONT_SUFFIXES]
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is not None:
        files.append(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
    return tuple(sorted(dict.fromkeys(files), key=_rank))


def _rank(file: Path) -> tuple:
    name = file.stem.lower()
    styles = sum(word in name for word in ("bold", "italic", "oblique", "light", "thin", "black", "mono", "serif"))
    return (name != "dejavusans", styles, name, str(file))


@lru_cache(maxsize=256)
def load(file: Path | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """A font in a size; Pillow's own for None; None where Pillow cannot use the file so."""
    if file is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(str(file), size)
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=4096)
def file_with(letter: str) -> Path | None:
    """The first font file that has the letter, or None."""
    return next((file for file in font_files() if _has(file, letter)), None)


@lru_cache(maxsize=4096)
def _has(file: Path, letter: str) -> bool:
    font = load(file, _PROBE_SIZE)
    return font is not None and _shape(font, letter) not in (None, _shape(font, _NO_LETTER))


def _shape(font, letter: str) -> tuple | None:
    try:
        mask, offset = font.getmask2(letter)
    except (OSError, ValueError):
        return None
    return (mask.size, offset, bytes(mask))


def runs(text: str) -> tuple[list[tuple[Path | None, str]], list[str]]:
    """The text in pieces of one font each, and the letters that no font has.

    Those stand in the pieces as their code points, like `[U+732B]`.
    """
    base = font_files()[0] if font_files() else None
    pieces: list[tuple[Path | None, str]] = []
    missing: list[str] = []
    for letter in text:
        file = pieces[-1][0] if pieces else base
        if unicodedata.category(letter) not in _WITHOUT_SHAPE and not (file and _has(file, letter)):
            file = file_with(letter)
            if file is None:
                file, code = base, f"[U+{ord(letter):04X}]"
                missing.append(letter)
                letter = code
        if pieces and pieces[-1][0] == file:
            pieces[-1] = (file, pieces[-1][1] + letter)
        else:
            pieces.append((file, letter))
    return pieces, missing
