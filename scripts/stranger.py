"""Types documented commands and wrong ones in a clone, and looks at exit codes, lines and tracebacks.

Started by `try_as_a_user.sh`, which makes the clone: stranger.py CLONE [--short] [--only PATTERN]
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stranger_wrong_uses import WRONG_USES, Place, WrongUse

PAGES = ("README.md", "src_theo/README.md", "docs/inference.md", "docs/several_machines.md", "CONTRIBUTING.md")
# what of the documented things the short form types
_SHORT = r"train_config\.json 1 --dry-run"
# what a wrong use may print: its one line, and the usage of a launcher or the plan of a run
_MAX_LINES = 60


@dataclass
class Rule:
    """How commands that match `pattern` are typed: with `suffix` behind them, or not at all, for a `reason`."""

    pattern: str
    suffix: str = ""
    expect: str = ""
    reason: str = ""
    stdin: str = ""
    codes: tuple[int, ...] = (0,)


# the pages show several runs into one folder
_CUT = "--max_steps 2 --overwrite_output_dir true"
_ON_TINY = f"--model_path tiny {_CUT}"
# the first that matches counts; a documented command without a rule is an error, so that none goes untried
RULES = (
    Rule(
        r"NNODES=|^#SBATCH|^export |^srun|^set -euo|NODE_RANK=", reason="needs several machines; tests start two on one"
    ),
    Rule(r"scripts/test\.sh", reason="is what runs this"),
    Rule(r"scripts/(try_as_a_user|setup)\.sh", reason="is what runs this"),
    Rule(r"accelerate launch", reason="needs four devices; tests start two processes"),
    # a dry run too looks for an earlier run in its folder
    Rule(r"--dry-run", "--overwrite_output_dir true", expect="The plan"),
    Rule(r"train_config_tiny(_crop)?\.json", _CUT, expect="all 2 steps are done"),
    Rule(r"train_launch_lora\.sh.*--model_path tiny", expect="The adapter lies in"),
    Rule(r"train_launch_lora\.sh", _ON_TINY, expect="The adapter lies in"),
    Rule(r"train_(launch\.sh|theo\w*\.py)", _ON_TINY, expect="all 2 steps are done"),
    Rule(r"run_ovis2_5_sft\.sh.*--help", expect="usage"),
    Rule(r"run_ovis2_5_sft\.sh", _ON_TINY, expect="all 2 steps are done"),
    Rule(r"merge_lora_adapters\.py|ovis25 merge", expect="merged into"),
    Rule(r"ovis25 plan", expect="recommended"),
    Rule(r"ovis25 chat", stdin="/help\nHow much is 3+4?\n/exit\n", expect="/image PATH"),
    Rule(r"ovis25 infer .*--requests", expect="answered"),
    Rule(r"ovis25 infer", suffix="--max_new_tokens 8"),
    Rule(r"ovis25 --?\w+|ovis25 \w+ --help", expect=""),
    Rule(r"^source |^pip |^hf ", reason="prepares the shell"),
)


@dataclass
class Outcome:
    code: int | None
    text: str
    seconds: float
    problems: list[str] = field(default_factory=list)


@dataclass
class Typed:
    """What a page shows: a shell line, or all of its Python; `folder` is where one is by then, from the clone."""

    page: str
    language: str
    text: str
    folder: str


def documented(clone: Path) -> list[Typed]:
    """What the pages show: shell lines one by one, following `cd` within a block; all Python of a page as one script,
    because later blocks use the names of earlier ones.
    """
    found = []
    for page in PAGES:
        home = "src_theo" if page.startswith("src_theo") else "."
        snippets = []
        for language, block in re.findall(r"```(bash|python)\n(.*?)```", (clone / page).read_text("utf-8"), re.DOTALL):
            if language == "python":
                snippets.append(block)
                continue
            folder = home
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                text = re.sub(r"\s+# .*$", "", line).strip()
                if text.startswith("cd "):
                    folder = f"{folder}/{text[3:]}"
                elif text and not text.startswith("#"):
                    found.append(Typed(page, language, text, folder))
        if snippets:
            found.append(Typed(page, "python", "\n".join(snippets), home))
    return found


def type_in(
    command: str, folder: Path, stdin: str = "", seconds: int = 400, interrupt_at: str | None = None
) -> Outcome:
    """Run a line as a shell does; with `interrupt_at`, press Ctrl-C once a line that matches it was printed."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output, tempfile.TemporaryFile("w+") as keyboard:
        keyboard.write(stdin)
        keyboard.seek(0)
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=folder, stdin=keyboard, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        code = _wait(process, output, started + seconds, interrupt_at)
        output.seek(0)
        outcome = Outcome(code, output.read(), time.monotonic() - started)
    if code is None:
        outcome.problems.append(f"did not end within {seconds} s")
    return outcome


def _wait(process: subprocess.Popen, output, deadline: float, interrupt_at: str | None) -> int | None:
    """The exit code; None where the process had to be killed."""
    is_interrupted = interrupt_at is None
    while process.poll() is None:
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        if not is_interrupted:
            with open(output.fileno(), errors="replace", closefd=False) as printed:
                printed.seek(0)
                is_interrupted = bool(re.search(interrupt_at, printed.read()))
                if is_interrupted:
                    os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.1)
    return process.returncode


def try_documented(shown: Typed, clone: Path) -> Outcome | str:
    """The outcome, or why it is not tried."""
    folder = clone / shown.folder
    if shown.language == "python":
        return judge(type_in(f"python - <<'END_OF_SNIPPET'\n{shown.text}\nEND_OF_SNIPPET", folder), (0,), "")
    rule = next((rule for rule in RULES if re.search(rule.pattern, shown.text)), None)
    if rule is None:
        return Outcome(None, "", 0.0, ["no rule in scripts/stranger.py says how to try it"])
    if rule.reason:
        return rule.reason
    return judge(type_in(f"{shown.text} {rule.suffix}".strip(), folder, rule.stdin), rule.codes, rule.expect)


def try_wrong(use: WrongUse, place: Place) -> Outcome:
    """A wrong use ends with its exit code, says what is wrong in one line, and leaves no traceback."""
    if use.prepare:
        use.prepare(place)
    command = use.command.format(work=f"'{place.work}'", model=f"'{place.work / 'model'}'")
    outcome = judge(type_in(command, place.clone, use.stdin, interrupt_at=use.interrupt_at), use.codes, use.says)
    num_errors = sum(line.startswith("error:") for line in outcome.text.splitlines())
    if use.codes == (2,) and num_errors != 1:
        outcome.problems.append(f"{num_errors} lines begin with 'error:', not one")
    if len(outcome.text.splitlines()) > _MAX_LINES:
        outcome.problems.append(f"{len(outcome.text.splitlines())} lines")
    return outcome


def judge(outcome: Outcome, codes: tuple[int, ...], says: str) -> Outcome:
    """Note what is wrong with an outcome."""
    if outcome.code is not None and outcome.code not in codes:
        outcome.problems.append(f"exit code {outcome.code}, not {' or '.join(map(str, codes))}")
    if not re.search(says, outcome.text):
        outcome.problems.append(f"does not say {says!r}")
    if "Traceback (most recent call last)" in outcome.text:
        outcome.problems.append("a Python traceback")
    return outcome


def tries(clone: Path, is_short: bool, pattern: str) -> Iterator[tuple[str, Outcome | str]]:
    """(what is tried, how it went), documented things first."""
    # a file that docs/inference.md speaks of
    (clone / "requests.jsonl").write_text('{"prompt": "Hello"}\n{"prompt": "What is 3+4?", "max_new_tokens": 8}\n')
    for shown in documented(clone):
        if re.search(pattern, shown.text) and (not is_short or re.search(_SHORT, shown.text)):
            yield f"{shown.page}: {shown.text.splitlines()[0]}", try_documented(shown, clone)
    with tempfile.TemporaryDirectory(prefix="stranger ä ") as work:
        place = Place(clone, Path(work), type_in)
        for use in WRONG_USES:
            if (use.is_short or not is_short) and re.search(pattern, f"{use.name} {use.command}"):
                yield f"wrong: {use.name}", try_wrong(use, place)


def main() -> int:
    parser = argparse.ArgumentParser(description="Try documented commands and wrong uses in a clone.")
    parser.add_argument("clone", type=Path)
    parser.add_argument("--short", action="store_true", help="a few of each kind")
    parser.add_argument("--only", default="", metavar="PATTERN", help="commands and names that match")
    parsed = parser.parse_args()
    num_tried, failed = 0, []
    for name, outcome in tries(parsed.clone.resolve(), parsed.short, parsed.only):
        if isinstance(outcome, str):
            print(f"  --     {name} (not tried: {outcome})", flush=True)
            continue
        num_tried += 1
        print(f"  {'FAILED' if outcome.problems else 'ok':<6} {name} ({outcome.seconds:.0f} s)", flush=True)
        if outcome.problems:
            failed.append(name)
            print("".join(f"         {problem}\n" for problem in outcome.problems), end="")
            print("".join(f"         | {line}\n" for line in outcome.text.splitlines()[-30:]), end="", flush=True)
    print(f"{num_tried - len(failed)} of {num_tried} as a user would wish")
    return 1 if failed or not num_tried else 0


if __name__ == "__main__":
    sys.exit(main())
