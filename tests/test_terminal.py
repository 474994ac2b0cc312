"""What reaches a terminal, and what a chat in it does with bad input."""

import io
import sys

import pytest
from conftest import Scripted
from PIL import Image

from ovis25 import Ovis25Inference, cli
from ovis25.inference.terminal import run_chat, speak_utf8
from ovis25.processing.chat import tokenize
from ovis25.text import escape_controls

GREEDY = {"do_sample": False, "repetition_penalty": 1.0}
SMALL = {"min_pixels": 32 * 32, "max_pixels": 96 * 96}
EVIL = "\x1b]0;owned\x07\rA\x9b2J\u202eb\u2066\x7f"


@pytest.fixture(scope="module")
def engine(tiny_folder) -> Ovis25Inference:
    return Ovis25Inference(tiny_folder)


@pytest.fixture
def talk(engine, capsys):
    """Say lines to a chat; gives what it printed and what the model was asked."""

    def say(*lines, **options):
        chat = engine.chat(max_new_tokens=2, **SMALL, **GREEDY, **options)
        asked, stream, waiting = [], chat.stream, iter([*lines, "/exit"])

        def read(prompt):
            line = next(waiting)
            if isinstance(line, Exception):
                raise line
            return line

        chat.stream = lambda line, images, video: (
            asked.append((line, list(images), video)) or stream(line, images, video)
        )
        run_chat(chat, read)
        return capsys.readouterr().out, asked

    return say


@pytest.fixture
def folder(tmp_path, monkeypatch):
    Image.linear_gradient("L").save(tmp_path / "my cat.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "spelling", ['"my cat.png"', "'my cat.png'", r"my\ cat.png", "file://{}/my%20cat.png", " my cat.png  "]
)
def test_pasted_paths_are_found(talk, folder, spelling):
    shown, asked = talk(f"/image {spelling.format(folder)}", "Read.")
    assert "goes with the next message" in shown and asked == [("Read.", [str(folder / "my cat.png")], None)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/image My Cat.png", "did you mean"),
        (r"/image C:\pictures\my cat.png", "did you mean"),
        ("/image ~/nowhere.png", "no such file"),
        ("/image .", "is a folder"),
        ("/image", "no path"),
        ("/image " + "x" * 300, "is no name that a file can have"),
        ("/video my cat.png.mp4", "no such file"),
        ("/image broken.png", "broken.png"),
    ],
)
def test_no_question_is_asked_without_its_picture(talk, folder, line, told):
    (folder / "broken.png").write_bytes(b"no picture")
    shown, asked = talk(line, "Read.", "Read it!", "/image none", "Well?")
    assert told in shown and shown.count("not sent, because") == 2
    assert asked == [("Well?", [], None)]
    assert talk(line, "/image my cat.png", "Read.")[1] == [("Read.", [str(folder / "my cat.png")], None)]


def test_a_picture_that_fails_when_sent_stays(talk, folder):
    whole = (folder / "my cat.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    shown, asked = talk("/image cut.png", "Read.", "Read.", "/image none", "Well?")
    assert shown.count("error: image") == 2 and "still goes with the next message" in shown
    assert [len(images) for _, images, _ in asked] == [1, 1, 0]


def test_bytes_that_are_no_text_do_not_end_the_chat(talk):
    broken = UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "unexpected end of data")
    shown, asked = talk("caf\udce9", broken, "half \ud83d", "Hello")
    assert shown.count("not sent") == 3 and asked == [("Hello", [], None)]


def test_piped_latin_1_is_told(engine, monkeypatch, capsys):
    monkeypatch.setattr(cli, "Ovis25Inference", lambda *arguments: engine)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHello\n"), encoding="utf-8"))
    assert cli.main(["chat", "tiny", "--max_new_tokens", "2"]) == 0
    assert "was not sent" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    speak_utf8()


def test_controls_of_a_reply_are_shown(engine, monkeypatch, capsys):
    monkeypatch.setattr(cli, "Ovis25Inference", lambda *arguments: engine)
    ids = tokenize(engine.processor.tokenizer, f"<think>{EVIL}</think>\n\n{EVIL}<|im_end|>", [])[0]
    stream = engine.stream
    monkeypatch.setattr(
        engine, "stream", lambda *parts, **options: stream(*parts, **options, logits_processor=[Scripted(ids)])
    )
    for arguments in ([], ["--json"]):
        assert cli.main(["infer", "tiny", "--prompt", "a", "--max_new_tokens", "90", *arguments]) == 0
        printed = capsys.readouterr()
        assert not set(EVIL) - set("AbJ]0;owned2") & set(printed.out + printed.err.replace("\x1b[2m", ""))
        assert ("\\u001b" if arguments else "\\x1b]0;owned\\x07\\x0dA\\x9b2J\\u202eb\\u2066\\x7f") in printed.out


def test_what_is_shown_and_what_stays():
    assert escape_controls(EVIL) == r"\x1b]0;owned\x07\x0dA\x9b2J\u202eb\u2066\x7f"
    assert escape_controls("tab\tline\nقطة 😀") == "tab\tline\nقطة 😀"
