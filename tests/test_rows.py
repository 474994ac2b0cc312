"""Rows as strangers write them: each form equals the documented one; what would train on something else is refused."""

import base64
import copy
import gzip
import io
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import ovis25.data.checks as checks_module
from ovis25.constants import IGNORE_INDEX
from ovis25.data import ConversationDataset, DataError
from ovis25.data.errors import SampleError
from ovis25.data.schema import parse_sample
from ovis25.data.source import read_rows
from ovis25.files import REPOSITORY_ROOT
from ovis25.tools import ToolError
from ovis25.training.plan import _describe_notable

SAMPLE_DATA = REPOSITORY_ROOT / "src_theo" / "sample_data"
SMALL = {
    f"{kind}_{bound}_pixels": pixels
    for kind in ("single_image", "multiple_image", "video")
    for bound, pixels in (("min", 32 * 32), ("max", 128 * 128))
}


def human(value):
    return {"from": "human", "value": value}


def gpt(value, role="gpt"):
    return {"from": role, "value": value}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(value):
    return {"from": "system", "value": value}


FRUIT = [human("Name a fruit."), gpt("Stone.", "ignored_gpt"), human("That is no fruit. Try again."), gpt("Apple.")]
ROOF = [human("<image>\nWhat colour is the roof?"), gpt("The roof is red.")]
DOCUMENTED = {
    "sample_llama_factory.json": [
        {"image": "sample_small.png", "conversations": [system("You answer in one sentence."), *ROOF]},
        {"video": "sample_video.mp4",
         "conversations": [human("<video>\nWhat happens?"), gpt("A red ball rolls from left to right.")]},
        {"conversations": [system("You are a calculator."), human("What is 1 + 1?"), gpt("2."),
                           human("Add the numbers.\n17 and 25"), gpt("42.")]},
    ],
    "sample_ms_swift.jsonl": [
        {"image": "sample_chart.png",
         "conversations": [system("You answer in one word."), human("<image>On which day were the most apples sold?"),
                           gpt("Tuesday.")]},
        {"conversations": FRUIT},
        {"video": "sample_video.mp4",
         "conversations": [human("<video>Which way does the ball roll?"), gpt("To the right.")]},
        {"conversations": [human("What is 6 times 7?"), gpt("42.")]},
    ],
    "sample_trl.jsonl": [
        {"image": "sample_small.png", "conversations": ROOF},
        {"image": "sample_small.png", "conversations": [human("<image>\nIs there a tree?"), gpt("Yes, on the right.")]},
        {"conversations": [human("What is 2 + 2?"), gpt("5.", "ignored_gpt"), human("Sure?"), gpt("No, it is 4.")]},
        {"conversations": [human("What is 17 + 25?"), gpt("42.")]},
    ],
    "sample_openai.jsonl": [
        {"image": "sample_small.png",
         "conversations": [system("You answer in one word."), human("What stands to the right of the house?\n<image>"),
                           gpt("A tree.")]},
        {"conversations": FRUIT},
        {"conversations": [human("A box holds 6 eggs. How many eggs are in 7 boxes?"),
                           gpt("<think>\n6 times 7 is 42.\n</think>\n\n42 eggs.")]},
    ],
}  # fmt: skip


def items_equal(first: dict, second: dict) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in ((first[key], second[key]) for key in first))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_form_gives_the_tokens_of_the_documented_one(processor, name):
    found = ConversationDataset(SAMPLE_DATA / name, processor, **SMALL)
    documented = ConversationDataset(DOCUMENTED[name], processor, SAMPLE_DATA, **SMALL)
    assert len(found) == len(documented)
    assert all(items_equal(found[index], documented[index]) for index in range(len(found)))
    assert found.statistics().num_empty_thinking == (name == "sample_ms_swift.jsonl")
    assert found.statistics().num_placed == (name == "sample_trl.jsonl")


TURNS = [human("Hi"), gpt("Ho")]
PICTURE = [human("<image>\nWhat?"), gpt("A dog.")]
SAME = {
    "user and assistant as from": ({"conversations": [{"from": "user", "value": "Hi"},
                                                      {"from": "assistant", "value": "Ho"}]}, TURNS),
    "roles in conversations": ({"conversations": [user("Hi"), assistant("Ho")]}, TURNS),
    "both and equal": ({"conversations": TURNS, "messages": [user("Hi"), assistant("Ho")]}, TURNS),
    "system twice and equal": ({"system": "Be brief.", "conversations": [system("Be brief."), *TURNS]},
                               [system("Be brief."), *TURNS]),
    "empty system": ({"system": "", "conversations": TURNS}, TURNS),
    "nulls of a table": ({"conversations": TURNS, "messages": None, "images": None, "videos": [], "weight": None,
                          "tools": "[]"}, TURNS),
    "weight 1": ({"weight": 1.0, "conversations": TURNS}, TURNS),
    "query and response": ({"query": "Hi", "response": "Ho", "history": []}, TURNS),
    "instruction without input": ({"instruction": "Hi", "input": "", "output": "Ho"}, TURNS),
    "input without instruction": ({"input": "Hi", "output": "Ho"}, TURNS),
    "thinking beside": ({"conversations": [human("Hi"), {**gpt("Ho"), "thinking": "Hm."}]},
                        [human("Hi"), gpt("<think>\nHm.\n</think>\n\nHo")]),
    "reasoning of a row": ({"prompt": "Hi", "completion": "Ho", "reasoning": "Hm."},
                           [human("Hi"), gpt("<think>\nHm.\n</think>\n\nHo")]),
    "empty reasoning": ({"messages": [user("Hi"), assistant("Ho", reasoning_content="")]}, TURNS),
    "a prompt that the messages hold": ({"prompt": "Hi", "messages": [user("Hi"), assistant("Ho")]}, TURNS),
    "loss false in conversations": ({"conversations": [*TURNS, human("And?"), {**gpt("No."), "loss": False}]},
                                    [*TURNS, human("And?"), gpt("No.", "ignored_gpt")]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_other_spellings_say_the_same(name):
    row, turns = SAME[name]
    assert parse_sample(row).conversations == turns


VISUALS = {
    "image and images agree": {"image": "a.png", "images": ["a.png"], "conversations": PICTURE},
    "a dict of a data set": {"images": [{"bytes": None, "path": "a.png"}], "conversations": PICTURE},
    "row and parts agree": {"images": ["a.png"], "messages": [
        user([{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]), assistant("A dog.")]},
    "a known path said twice": {"image": "a.png", "image_path": "a.png", "conversations": PICTURE},
}  # fmt: skip


@pytest.mark.parametrize("name", VISUALS)
def test_other_spellings_of_visuals_name_the_same(name):
    sample = parse_sample(VISUALS[name])
    assert (sample.images, sample.conversations) == (["a.png"], PICTURE)


def test_frames_of_a_video_in_every_spelling():
    turns = [human("<video>\nWhat?"), gpt("A ball.")]
    for row in ({"video": ["0.png", "1.png"]}, {"videos": [["0.png", "1.png"]]}, {"video_frames": ["0.png", "1.png"]}):
        assert parse_sample({**row, "conversations": turns}).video == ["0.png", "1.png"]
    assert parse_sample({"videos": ["v.mp4"], "conversations": turns}).video == "v.mp4"
    placed = parse_sample({"videos": ["v.mp4"], "messages": [user("What?"), assistant("A ball.")]})
    assert placed.conversations == turns and placed.num_placed == 1


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_data_urls_stand_wherever_an_image_may(processor, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    text = base64.b64encode(png()).decode()
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    urls = [f"data:image/png;base64,{code}" for code in (text, wrapped, text.translate(str.maketrans("+/", "-_")))]
    rows = [
        {"image": "a.png", "conversations": PICTURE},
        *({"image": url, "conversations": PICTURE} for url in urls),
        {"images": [urls[1]], "conversations": PICTURE},
        {"messages": [user([{"type": "image_url", "image_url": {"url": urls[2]}}, {"type": "text", "text": "What?"}]),
                      assistant("A dog.")]},
        {"images": [{"bytes": png()}], "conversations": PICTURE},
    ]  # fmt: skip
    dataset = ConversationDataset(rows, processor, tmp_path, **SMALL)
    assert all(items_equal(dataset[0], dataset[index]) for index in range(1, len(rows)))


def row_of(*turns, **more):
    return {"conversations": list(turns), **more}


BROKEN = {
    # two ways of saying one thing
    "two systems": (row_of(system("A."), *TURNS, system="B."), r"system and conversations\[0\]\.value: they disagree"),
    "both texts": (row_of(*TURNS, messages=[user("Hi"), assistant("No")]),
        "conversations and messages: both hold text"),
    "image and images": (row_of(*PICTURE, image="a.png", images=["b.png"]), "image and images: they disagree"),
    "parts and row": ({"images": ["b.png"], "messages": [user([{"type": "image", "image": "a.png"}]), assistant("A.")]},
                      "images and messages: they name different files"),
    "weight and loss": ({"messages": [user("Hi"), assistant("Ho", weight=1, loss=False)]}, "weight and loss: they"),
    "from and role": (row_of({"from": "human", "role": "assistant", "value": "Hi"}, gpt("Ho")), "from and role: they"),
    "thinking twice": ({"messages": [user("Hi"), assistant("<think>a</think>b", reasoning="c")]}, "block as well"),
    # what is not learned, or not read
    "a share": (row_of(human("Hi"), {**gpt("Ho"), "weight": 0.5}),
        r"conversations\[1\]\.weight: it is 0\.5\. An answer is"),
    "loss as text": (row_of(human("Hi"), {**gpt("Ho"), "loss": "false"}), r"conversations\[1\]\.loss: it is 'false'"),
    "nothing learned": (row_of(*TURNS, weight=0), "weight: it has no learned token: the whole row"),
    "a question learned": (row_of({**human("Hi"), "loss": True}, gpt("Ho")), "turns of human are never learned"),
    "tool role": ({"messages": [user("Hi"), {"role": "tool", "content": "4"}]}, r"messages\[1\]\.role: the role"),
    "tool calls": ({"messages": [user("Hi"), assistant(None, tool_calls=[{"id": "1"}])]}, r"calls: tool calls are not"),
    "observation": (row_of(human("Hi"), gpt("4", "observation")), "the role observation is not read. Write the call"),
    "tools": (row_of(*TURNS, tools=[{"name": "f"}]), "tools: it is not read. Describe the tools"),
    "preferences": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "completion: it is missing"),
    "rejected": (row_of(*TURNS, rejected_response="b"), "rejected_response: preference pairs are not trained on"),
    "boxes of ms-swift": (row_of(*TURNS, objects={"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}), "objects: it is not read"),
    "sound": (row_of(*TURNS, audios=["a.wav"]), "audios: the model hears nothing"),
    # keys that were meant as another one
    "image_path": (row_of(*TURNS, image_path="a.png"),
        r"image_path: no key of this name is read\. Did you mean image\?"),
    "Image": (row_of(*TURNS, Image="a.png"), "Image: .*Did you mean image"),
    "imgae": (row_of(*TURNS, imgae=["a.png"]), "imgae: .*Did you mean images?"),
    "sytem": (row_of(*TURNS, sytem="Be brief."), "sytem: .*Did you mean system"),
    "wieght": (row_of(*TURNS, wieght=0), "wieght: .*Did you mean weight"),
    "loss_mask": (row_of(*TURNS, loss_mask=[0, 1]), "loss_mask: .*Did you mean loss"),
    "a file": (row_of(*TURNS, cover="a/b.JPG"), "cover: .*Did you mean image"),
    "a clip": (row_of(*TURNS, record=["a/b.mp4"]), "record: .*Did you mean video"),
    "a list of messages": (row_of(*TURNS, dialogue_2=[user("Hi")]), "dialogue_2: .*Did you mean conversations"),
    "key of a turn": (row_of(human("Hi"), {**gpt("Ho"), "wight": 0}),
        r"conversations\[1\]\.wight: .*Did you mean weight"),
    "picture of a turn": (row_of({**human("Hi"), "image": "a.png"}, gpt("Ho")),
        r"conversations\[0\]\.image: it is not read"),
    "reasoning of a row": (row_of(*TURNS, reasoning="Hm."), "reasoning: it stands beside the turns"),
    # who speaks when
    "picture in an answer": (row_of(human("Draw."), gpt("<image>Here."), image="a.png"), "<image> stands in an answer"),
    "clip in an answer": (row_of(human("Show."), gpt("<video>"), video="a.mp4"), "<video> stands in an answer"),
    "two questions": (row_of(human("Hi"), human("You"), gpt("Ho")),
        r"conversations\[1\]\.value: two questions stand in a"),
    "two answers": (row_of(human("Hi"), gpt("Ho"), gpt("Hu")), "two answers stand in a row"),
    "unanswered": (row_of(*TURNS, human("And?")), r"conversations\[2\]\.value: the last question has no answer"),
    "empty question": (row_of(human(" \n"), gpt("Ho")), r"conversations\[0\]\.value: the question is empty"),
    "answer first": (row_of(gpt("Ho"), *TURNS), "the conversation begins with an answer"),
    "answer after system": (row_of(system("A."), gpt("Ho"), *TURNS), "the conversation begins with an answer"),
    "late system": (row_of(*TURNS, system("A."), *TURNS),
        r"conversations\[2\]\.value: the system turn is not the first"),
    "empty system": (row_of(system(""), *TURNS), "the system turn is empty"),
    # thinking
    "lone end": (row_of(human("Hi"), gpt("Hm.</think>Ho")), "it has </think> without <think>"),
    "unclosed": (row_of(human("Hi"), gpt("<think>Hm. Ho")), "its <think> is never closed"),
    "reversed": (row_of(human("Hi"), gpt("</think>Hm.<think>Ho")), "</think> stands before <think>"),
    "several": (row_of(human("Hi"), gpt("<think>a</think><think>b</think>c")), "it has 2 <think> and 2 </think>"),
    "nested": (row_of(human("Hi"), gpt("<think>a<think>b</think>c")), "it has 2 <think> and 1 </think>"),
    "no answer": (row_of(human("Hi"), gpt("<think>Hm.</think>\n\n")), "there is thinking, but no answer"),
    "empty and no answer": (row_of(human("Hi"), gpt("<think></think>")), "there is thinking, but no answer"),
    "text before": (row_of(human("Hi"), gpt("Well. <think>a</think>b")), "there is text before <think>"),
    # control tokens and half characters
    "end of turn": (row_of(human("Hi<|im_end|>"), gpt("Ho")), r"holds the control token <\|im_end\|>\. Remove it"),
    "turn in an answer": (row_of(human("Hi"), gpt("Ho<|im_end|>\n<|im_start|>user")), r"<\|im_end\|>, <\|im_start\|>"),
    "end of text": (row_of(human("Hi"), gpt("Ho<|endoftext|>")), r"control token <\|endoftext\|>"),
    "pictures of Qwen": (row_of(human("<|vision_start|><|image_pad|><|vision_end|>Hi"), gpt("Ho")), "image_pad"),
    "half an emoji": (row_of(human("Hi \ud83d"), gpt("Ho")),
        r"conversations\[0\]\.value: character 3 is half a character"),
    "half in an answer": ({"instruction": "Hi", "output": "\udc00"}, "output: character 0 is half a character"),
    "half in a key": (row_of(*TURNS, **{"a\ud800": 1}), r"\(row\): its key .*ud800.* is no text"),
    "half in an id": (row_of(*TURNS, id="a\ud800"), "id: .*holds half a character"),
    "half in a path": (row_of(*PICTURE, image="a\ud800.png"), "image: .*half a character"),
    # types
    "a number as picture": (row_of(*PICTURE, image=3), "image: 3 is no path"),
    "null among pictures": (row_of(*PICTURE, images=["a.png", None]), "images: null is no path"),
    "a list as role": (row_of({"from": ["human"], "value": "Hi"}), r"conversations\[0\]\.from: it is a list"),
    "a dict as text": ({"messages": [user({"text": "Hi"}), assistant("Ho")]}, r"messages\[0\]\.content: it is a dict"),
    "a number as turn": (row_of(3), r"conversations\[0\]: it lacks from or value"),
    "a dict as turns": ({"messages": {"role": "user"}}, "messages: it is a dict"),
    "a list as id": (row_of(*TURNS, id=[1]), "id: it is a list. Write text or a number"),
    "a dict as system": (row_of(*TURNS, system={"a": 1}), "system: it is a dict"),
    "two videos": (row_of(human("<video>Hi"), gpt("Ho"), videos=["a.mp4", "b.mp4"]), "videos: it names 2 videos"),
    "broken base64": (row_of(*PICTURE, image="data:image/png;base64,A"), "image: its data: URL cannot be read"),
    "a web address": (row_of(*PICTURE, images=["https://a.org/a.png"]), "images: https://a.org/a.png lies on the web"),
    "a wrong part": ({"messages": [user([{"type": "audio", "audio": "a"}])]}, r"\[0\]: unknown part: it is of type"),
    "history": ({"instruction": "Hi", "output": "Ho", "history": [["a"]]}, r"history\[0\]: it is a list. Give pairs"),
    "text alone": ({"text": "Once upon a time"}, "conversations: it is missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_would_train_on_something_else_is_a_defect(name):
    row, message = BROKEN[name]
    with pytest.raises(SampleError, match=message) as caught:
        parse_sample(row)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_defects_of_every_kind_are_listed_together(processor, tmp_path):
    rows = [{**BROKEN[name][0], "id": name} for name in ("lone end", "two questions", "tools", "image_path")]
    (tmp_path / "data.json").write_text(json.dumps([row_of(*TURNS), *rows]))
    with pytest.raises(DataError, match="4 of 5 samples have defects") as caught:
        ConversationDataset(tmp_path / "data.json", processor, **SMALL)
    for index, row in enumerate(rows, start=1):
        assert f'data.json[{index}] (id "{row["id"]}"), field ' in str(caught.value)


def test_an_explicit_empty_block_is_the_inserted_one(processor):
    blocks = ("", "<think>\n\n</think>\n\n", "<think></think>", "\n<think> \t\n</think>\n")
    rows = [
        row_of(human("Hi"), gpt(f"{block}Ho"), human("And?"), gpt("<think>\nHm.\n</think>\n\nNo")) for block in blocks
    ]
    dataset = ConversationDataset(rows, processor, **SMALL)
    assert all(items_equal(dataset[0], dataset[index]) for index in range(1, 4))
    labels = dataset[1]["labels"]
    assert processor.tokenizer.decode(labels[labels != IGNORE_INDEX]) == (
        "Ho<|im_end|><think>\nHm.\n</think>\n\nNo<|im_end|>"
    )
    assert dataset.statistics().num_empty_thinking == 3


def test_metadata_is_counted_once_and_shown_in_the_plan(processor):
    # fmt: off
    about = {"source": "web", "image_id": "12", "conversation_id": "c1", "height": 3, "story": "s",
             "competition": "c", "chart": "c", "chat_id": 4, "prompt_id": "p",
             "score": 0.5, "tags": ["a"], "meta": {"from": "x"}, "turn": 3, "split": "train", "url": "http://a/b.png"}
    # fmt: on
    rows = [row_of(human("Hi"), {**gpt("Ho"), "name": "bot"}, id=str(number), **about) for number in range(3)]
    statistics = ConversationDataset([*rows, row_of(*TURNS, source="b")], processor, **SMALL).statistics()
    assert statistics.unused_keys == {"source": 4, "conversations[].name": 3, **dict.fromkeys(list(about)[1:], 3)}
    ((name, line),) = _describe_notable({"unused_keys": statistics.unused_keys}, "samples")
    assert name == "samples" and line.startswith("keys that nothing reads: source (4), conversations[].name (3)")


# -- files that rows name


def test_the_neighbour_of_a_missing_file_is_named(processor, tmp_path):
    (tmp_path / "Photo 1.png").write_bytes(png())
    for name in ("photo 1.PNG", "Photo%201.png", "other\\Photo 1.png", " Photo 1.png "):
        with pytest.raises(
            DataError, match=r"does not exist; did you mean .*Photo 1\.png\? Looked in .*set image_folder"
        ):
            ConversationDataset([row_of(*PICTURE, image=name)], processor, tmp_path, **SMALL)
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("a" * 300, r"'aaa.*\(300 characters\) is no name that a file can have"),
        (base64.b64encode(png()).decode(), r"looks like base64: write data:image/png;base64, before it"),
        ("folder.png", "folder.png is a folder, not a file"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            ConversationDataset([row_of(*PICTURE, image=name)], processor, tmp_path, **SMALL)
        assert len(str(caught.value)) < 600
    url = (tmp_path / "Photo 1.png").as_uri()
    assert len(ConversationDataset([row_of(*PICTURE, image=url)], processor, "/", **SMALL)) == 1


class Anything:
    """A tool of the user that raises or returns what it likes."""

    def __init__(self, result):
        self.result = result

    def run_strictly(self, call, images):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (OverflowError("cannot convert"), "fails: OverflowError: cannot convert"),
        (KeyError("name"), "fails: KeyError: 'name'"),
        (ZeroDivisionError("division"), "fails: ZeroDivisionError"),
        (ToolError("no box"), "fails: no box"),
        (None, "gives a NoneType, no image"),
        ("text", "gives a text, no image"),
        (Image.new("RGB", (1, 6000)), "too long and thin"),
        (Image.new("RGB", (0, 5)), "nothing to show"),
    ],
)
def test_whatever_a_tool_does_is_a_defect(processor, tmp_path, monkeypatch, result, message):
    monkeypatch.setattr(checks_module, "_TOOLS", Anything(result))
    (tmp_path / "a.png").write_bytes(png())
    call = "<tool_call>Crop [0, 0, 1, 1]</tool_call><image>A dog."
    row = row_of(human("<image>\nWhat?"), gpt(call), image="a.png")
    with pytest.raises(DataError, match=rf"samples\[0\], field .*{message}"):
        ConversationDataset([row], processor, tmp_path, **SMALL)
    unchecked = ConversationDataset(
        [row, row_of(*TURNS)], processor, tmp_path, check=False, on_bad_sample="skip", **SMALL
    )
    assert unchecked[0]["labels"].eq(IGNORE_INDEX).all()


@pytest.mark.parametrize(
    "call", ["Crop [1e400, 0, 1, 1]", "Crop [10, 0, 11, 6000]", "Crop [0, 0, 1, 1] image " + "9" * 5000]
)
def test_calls_with_extreme_numbers_are_defects(processor, tmp_path, call):
    Image.new("RGB", (64, 8000)).save(tmp_path / "a.png")
    row = row_of(human("<image>\nWhat?"), gpt(f"<tool_call>{call}</tool_call><image>A dog."), image="a.png")
    with pytest.raises(DataError, match=r"samples\[0\], field ") as caught:
        ConversationDataset([row], processor, tmp_path, **SMALL)
    assert len(str(caught.value)) < 600


# -- data files

ROWS = [row_of(*TURNS, id="é"), row_of(*PICTURE, image="a.png")]
AS_LIST, AS_LINES = json.dumps(ROWS, ensure_ascii=False), "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", AS_LIST.encode()),
        ("a.json", AS_LINES.encode()),
        ("a.JSONL", AS_LINES.replace("\n", "\r\n").encode()),
        ("a.ndjson", AS_LINES.encode()),
        ("a", json.dumps(ROWS, indent=2).encode()),
        ("a.json.gz", gzip.compress(AS_LIST.encode())),
        ("a.jsonl", gzip.compress(AS_LINES.encode())),
        ("a.json", AS_LIST.encode("utf-16")),
        ("a.jsonl", AS_LINES.encode("utf-16")),
        ("a.jsonl", AS_LINES.encode("utf-32")),
        ("a.jsonl", AS_LINES.encode("utf-8-sig")),
        ("a.jsonl.GZ", gzip.compress(AS_LINES.encode("utf-16"))),
    ],
)
def test_what_a_file_holds_decides_and_not_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_rows(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "holds no sample"),
        ("a.jsonl", b"\n \n", "holds no sample"),
        ("a.json", "图片里有什么？这是一只狗。".encode("gbk"), "looks like GBK; change it: iconv -f GBK"),
        ("a.json", '[{"a": "café très élégant"}]'.encode("latin-1"), "is not UTF-8 text: .*looks like CP1252"),
        ("a.json", '[{"a": "é"}]'.encode("utf-16-le"), "no valid JSON|UTF-16LE"),
        ("a.json", b"\xff\xfe[", "begins as utf-16 and is broken"),
        ("a.csv", b"image,question,answer\na.png,What?,A dog\n", "looks like a table .CSV.; convert it: python -c"),
        ("a.json", b"image\tquestion\na.png\tWhat?\n", "looks like a table"),
        ("a.json", b"PK\x03\x04rest", "a zip archive or an Excel sheet; unpack it"),
        ("a.json", b"\xfd7zXZ\x00", "compressed with xz"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("a.json", b"<html><body>404</body></html>", "XML or HTML"),
        ("a.json", b"samples:\n  - a\n", "line 1, column 1: no valid JSON: it begins with 'samples:'"),
        ("a.json", gzip.compress(AS_LIST.encode())[:40], "compressed with gzip, and broken"),
        ("a.parquet", b"PAR1 cut", "is a Parquet file that cannot be read"),
        ("a.json", b'{"data": [{"a": 1}]}', "holds a dict; it must be a list of samples; its key 'data' holds one"),
        ("a.json", b"[" * 100_000, "nested too deep|no valid JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2: its lists and objects are"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"1" * 5000 + b"}", "line 2: no valid JSON: Exceeds the limit"),
    ],
)  # fmt: skip
def test_what_a_file_looks_like_is_said(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(tmp_path / name)
    assert len(str(caught.value)) < 500 and str(caught.value).startswith(str(tmp_path / name))


def test_a_folder_names_the_files_in_it(tmp_path):
    (tmp_path / "train.jsonl").write_text(AS_LINES)
    with pytest.raises(DataError, match="is a folder, not a data file; it holds train.jsonl"):
        read_rows(tmp_path)


def test_parquet_is_read_where_pyarrow_is(tmp_path, monkeypatch, processor):
    table = pytest.importorskip("pyarrow").Table.from_pylist([
        {"images": [{"bytes": png(), "path": None}], "messages": [user("What?"), assistant("A dog.")]},
        {"images": None, "messages": [user("Hi"), assistant("Ho")]},
    ])  # fmt: skip
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.png").write_bytes(png())
    found = ConversationDataset(tmp_path / "a.parquet", processor, **SMALL)
    plain = ConversationDataset([row_of(*PICTURE, image="a.png"), row_of(*TURNS)], processor, tmp_path, **SMALL)
    assert all(items_equal(found[index], plain[index]) for index in range(2))
    import ovis25.data.source as module

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(DataError, match="is a Parquet file; to read it: pip install pyarrow"):
        read_rows(tmp_path / "a.parquet")


def test_a_very_long_line_is_refused_before_the_tokenizer_sees_it(tmp_path, processor, monkeypatch):
    long = "word " * 4_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps(row_of(human(long), gpt("Ho"))) + "\n")
    monkeypatch.setattr(checks_module, "tokenize", lambda *_: pytest.fail("tokenized"))
    with pytest.raises(DataError, match=r"its text has 20,000,\d+ characters, far more than text_max_length 4096"):
        ConversationDataset(tmp_path / "a.jsonl", processor, **SMALL)


# -- mutations

JUNK = [None, True, 0, -1, 0.5, float("nan"), "", " ", "x", "a.png", "\ud800", "<think>", "<image>", "<video>",
        "<|im_end|>", [], {}, [None], [[]], {"a": 1}, "gpt", "human", "data:,", "data:image/png;base64,AAAA",
        "x" * 5000, b"\x89PNG", 10**400, ["a.png"], [{"role": "user"}], {"type": "image"}, [{"type": "text"}],
        "0" * 300]  # fmt: skip


NEW_KEYS = ["images", "videos", "system", "weight", "messages", "Image", "a\ud800", "id", "_origin", 3]


def deep(levels: int):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def mutate(value, rng: random.Random):
    """The row with one thing in it replaced, removed, renamed or repeated."""
    places = [(value, key) for key in value]
    for holder, key in places:
        inner = holder[key]
        if isinstance(inner, (dict, list)) and len(places) < 200:
            places += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
    holder, key = rng.choice(places)
    action = rng.randrange(5)
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[
            rng.choice(["images", "videos", "system", "weight", "messages", "Image", "a\ud800", "id", "_origin", 3])
        ] = rng.choice(JUNK)
    elif action == 2 and isinstance(holder, list):
        holder.insert(key, rng.choice(holder))
    elif action == 3 and rng.random() < 0.05:
        holder[key] = deep(10_000)
    else:
        holder[key] = rng.choice(JUNK)


def test_mutated_rows_raise_nothing_but_defects(processor):
    rng = random.Random(5)
    seeds = [row for rows in DOCUMENTED.values() for row in rows]
    seeds += [row for name in DOCUMENTED for row in read_rows(SAMPLE_DATA / name)]
    rows, num_refused = [], 0
    for _ in range(4000):
        row = copy.deepcopy(rng.choice(seeds))
        for _ in range(rng.randint(1, 3)):
            if row:
                mutate(row, rng)
        rows.append(row)
        try:
            sample = parse_sample(row)
            assert sample.conversations[-1]["from"] in ("gpt", "ignored_gpt")
        except SampleError:
            num_refused += 1
    assert 1000 < num_refused < 3900
    dataset = ConversationDataset(rows[:600], processor, SAMPLE_DATA, on_bad_sample="skip", **SMALL)
    assert len(dataset) + len(dataset.skipped) == 600
    with pytest.raises(DataError, match="of 600 samples have defects"):
        ConversationDataset(rows[:600], processor, SAMPLE_DATA, **SMALL)
    for index in range(0, len(dataset), 7):
        assert (dataset[index]["labels"] != IGNORE_INDEX).any()


def test_records_of_rows_with_half_characters_can_be_written(processor, tmp_path):
    rows = [
        row_of(*TURNS),
        row_of(human("\ud83d"), gpt("Ho"), id="\ud83d"),
        row_of(*PICTURE, image="\ud83d.png", id=[1]),
    ]
    dataset = ConversationDataset(rows, processor, on_bad_sample="skip", **SMALL)
    for _ in range(2):
        dataset.write_skipped(tmp_path / "skipped.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["index"] for record in listed] == [1, 2], "each once"
