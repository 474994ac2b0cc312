"""`ovis25 infer`, its file of requests, `ovis25 chat`, and the documentation's snippets."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ovis25 import Ovis25Inference, cli
from ovis25.cli import models
from ovis25.cli.terminal import run_chat
from ovis25.text import escape_controls

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "src_theo" / "sample_data" / "sample_small.png"
SHORT = ["--max_new_tokens", "4", "--temperature", "0"]


@pytest.fixture
def engine(tiny_folder, monkeypatch) -> Ovis25Inference:
    """Loaded once for the commands of a test."""
    engine = Ovis25Inference(tiny_folder)
    monkeypatch.setattr(models, "Ovis25Inference", lambda *arguments, **options: engine)
    return engine


def test_infer_prints_the_answer(tiny_folder):
    command = [
        sys.executable,
        "-m",
        "ovis25.cli",
        "infer",
        str(tiny_folder),
        "--image",
        str(PICTURE),
        "--prompt",
        "Read.",
    ]
    result = subprocess.run([*command, *SHORT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = Ovis25Inference(tiny_folder).single_image_inference(PICTURE, "Read.", max_new_tokens=4, temperature=0)
    assert result.stdout.strip() == escape_controls(expected).strip()


def test_infer_json_and_grounding(engine, capsys, tmp_path):
    options = ["--prompt", "Why?", "--budget", "3", "--json", *SHORT]
    assert cli.main(["infer", "tiny", *options]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["new_tokens"] > 3 and set(reply) >= {"answer", "thinking", "stop_reason", "tool_calls"}
    drawn = tmp_path / "drawn.png"
    where = ["--image", str(PICTURE), "--prompt", "the 3", "--ground", "box", "--draw", str(drawn), *SHORT]
    assert cli.main(["infer", "tiny", *where]) == 0 and drawn.is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt or --requests"),
        (["--requests", "r.jsonl"], "--requests and --output belong together"),
        (["--prompt", "a", "--draw", "b.png"], "--draw needs --ground"),
        (["--prompt", "a", "--ground", "box"], "--ground needs one --image; 0 were given"),
        (["--prompt", "a", "--image", "nowhere.png"], "image: nowhere.png does not exist"),
        (["--prompt", "a", "--tools", "Zoom"], "there is no tool Zoom"),
        (["--prompt", "a", "--temperature"], "--temperature: options are written --name value"),
        (["--prompt", "a", "--tmperature", "1"], "tmperature"),
        (["--requests", "nowhere.jsonl", "--output", "o.jsonl"], "nowhere.jsonl"),
    ],
)
def test_wrong_arguments(engine, capsys, arguments, message):
    assert cli.main(["infer", "tiny", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_file_of_requests_resumes(engine, capsys, tmp_path, monkeypatch):
    lines = [
        {"id": "a", "prompt": "What is 3 + 4?", "enable_thinking": True},
        {"prompt": "Read.", "image": "nowhere.png"},
        {"prompt": "Read.", "image": "a.png", "max_new_tokens": 2},
        {"prompt": " "},
        {"prompt": "Hello"},
    ]
    (tmp_path / "a.png").write_bytes(PICTURE.read_bytes())
    requests, output = tmp_path / "requests.jsonl", tmp_path / "out" / "replies.jsonl"
    requests.write_text("\n".join(map(json.dumps, lines)) + "\nno json\n", encoding="utf-8")
    command = ["infer", "tiny", "--requests", str(requests), "--output", str(output), "--batch_size", "2", *SHORT]
    assert cli.main(command) == 1
    assert "3 answered, 3 failed" in capsys.readouterr().out
    whole = output.read_text(encoding="utf-8")
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["index"] for record in records] == list(range(6)) and records[0]["id"] == "a"
    assert ["error" in record for record in records] == [False, True, False, True, False, True]
    assert records[2]["new_tokens"] <= 2

    # a torn line is answered again, the others are not
    output.write_text("".join(line + "\n" for line in whole.splitlines()[:4]) + '{"index": 4, "requ', encoding="utf-8")
    asked = []
    reply_to = engine.reply_to
    monkeypatch.setattr(engine, "reply_to", lambda prompts, *rest: asked.extend(prompts) or reply_to(prompts, *rest))
    assert cli.main(command) == 1
    assert output.read_text(encoding="utf-8") == whole and len(asked) == 1
    requests.write_text(json.dumps(lines[4]) + "\n", encoding="utf-8")
    assert cli.main(command) == 2
    assert "line 1 answers another request" in capsys.readouterr().err


def test_chat_in_the_terminal(engine, capsys):
    chat = engine.chat(max_new_tokens=3, temperature=0)
    lines = iter(["/help", "", "/image nowhere.png", f"/image {PICTURE}", "Read.", "/think on", "/budget 2", "/foo",
                  "Sum?", "/budget 0", "/think off", "/reset", "Hello", "/exit"])  # fmt: skip
    run_chat(chat, lambda prompt: next(lines))
    shown = capsys.readouterr().out
    for expected in (
        "/budget N|off",
        "nowhere.png: no such file",
        "goes with the next message",
        "/foo: no such command",
    ):
        assert expected in shown
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert "thinking_budget" not in chat.options and chat.options["enable_thinking"] is False


def test_the_documentation_runs(engine, monkeypatch):
    """Every Python block of docs/inference.md, in order."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(engine.core, "room", lambda options: 8)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "inference.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {"Ovis25Inference": lambda path: engine}
    assert len(blocks) == 4
    for block in blocks:
        exec(block.replace("from ovis25 import Ovis25Inference\n", ""), names)
    assert names["chat"].num_reused > 0
