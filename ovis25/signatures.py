"""What a file is, by its first bytes: byte order marks of text, and the words for files that are no text of ours."""

import codecs

# the longest first: UTF-32's mark begins as UTF-16's does
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_DECOMPRESS = "decompress it, or use gzip"
_EXPORT = "export its rows as JSON lines"
_NOT_DATA = "name the file with the samples"
_FETCH = "download it again, or convert it to JSON lines"
# (where, bytes, what it looks like, the cure where samples are wanted)
_SIGNATURES = (
    (0, b"\x1f\x8b", "compressed with gzip", "decompress it (gunzip)"),
    (0, b"PK\x03\x04", "a zip archive or an Excel sheet", "unpack it, or save the sheet as JSON lines"),
    (0, b"PK\x05\x06", "an empty zip archive", "pack it again"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"BZh", "compressed with bzip2", "decompress it (bunzip2), or use gzip"),
    (0, b"\xfd7zXZ", "compressed with xz", "decompress it (unxz), or use gzip"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it (unzstd), or use gzip"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4", _DECOMPRESS),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (0, b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (0, b"PAR1", "a Parquet file", _EXPORT),
    (0, b"ARROW1", "an Arrow file", "save it as Parquet or JSON lines: dataset.to_json(PATH)"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", "save it as Parquet or JSON lines: dataset.to_json(PATH)"),
    (0, b"ORC", "an ORC file", _EXPORT),
    (0, b"Obj\x01", "an Avro file", _EXPORT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
    (0, b"\x93NUMPY", "a NumPy array", _EXPORT),
    (0, b"SQLite", "an SQLite database", _EXPORT),
    (0, b"\xd0\xcf\x11\xe0", "an old Excel sheet or Word text", "save it as JSON lines"),
    (0, b"\x80\x04", "a Python pickle", "write its rows as JSON lines"),
    (0, b"\x80\x05", "a Python pickle", "write its rows as JSON lines"),
    (0, b"\x89PNG", "a PNG picture", _NOT_DATA),
    (0, b"\xff\xd8\xff", "a JPEG picture", _NOT_DATA),
    (0, b"GIF8", "a GIF picture", _NOT_DATA),
    (0, b"8BPS", "a Photoshop picture", _NOT_DATA),
    (0, b"RIFF", "a WebP picture, or an AVI or WAV file", _NOT_DATA),
    (4, b"ftypheic", "a HEIC picture", _NOT_DATA),
    (4, b"ftypheix", "a HEIC picture", _NOT_DATA),
    (4, b"ftypmif1", "a HEIC picture", _NOT_DATA),
    (4, b"ftyp", "a video (MP4)", _NOT_DATA),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)", _NOT_DATA),
    (0, b"%PDF", "a PDF document", "write its text as JSON lines"),
    (0, b"{\\rtf", "an RTF text", "write it as JSON lines"),
    (0, b"\x7fELF", "a program", _NOT_DATA),
    (0, b"MZ\x90", "a program", _NOT_DATA),
    (0, b"version https://git-lfs", "a pointer of git-lfs, without the data", "fetch it: git lfs pull"),
    (0, b"<svg", "an SVG drawing", _NOT_DATA),
    (0, b"<", "XML or HTML, maybe the page of a failed download", _FETCH),
)  # fmt: skip
_LOOKED_AT = 2**16


def signature(content: bytes) -> tuple[str, str] | None:
    """(what it looks like, the cure where samples are wanted) by its first bytes; None where nothing is known."""
    start = content[:_LOOKED_AT]
    for text in (start, start.lstrip()):
        for place, begin, what, cure in _SIGNATURES:
            if text.startswith(begin, place):
                return what, cure
    return None


def looks_binary(content: bytes) -> str | None:
    """What bytes that are surely no text look like: UTF-16 without its mark, or binary data.

    No text file holds a null byte.
    """
    start = content[:_LOOKED_AT]
    if b"\0" not in start:
        return None
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        # of Latin letters every other byte is null
        if 2 * start[first::2].count(0) > len(start) // 2 and start[1 - first :: 2].count(0) * 8 < len(start):
            return name
    return "binary data"


def decoded_by_mark(content: bytes) -> str | None:
    """The text of a file that begins with a byte order mark; None without one.

    Raises:
        UnicodeDecodeError: it is no such text; `error.encoding` begins with what the mark says.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    return None if encoding is None else content.decode(encoding)
