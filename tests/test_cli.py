"""The command line itself: quick to answer, one frame of errors around every command, one grammar of options."""

import importlib.util
import json
import subprocess
import sys

import pytest

from ovis25 import cli
from ovis25.cli.command import Command
from ovis25.cli.dispatch import COMMANDS
from ovis25.cli.errors import exit_code_of
from ovis25.data import DataError
from ovis25.inference import RequestError
from ovis25.options import read_options
from ovis25.training import finish
from ovis25.training.config import ConfigError
from ovis25.training.finish import FinishError

# what no answer needs that is not about a model
HEAVY = ("torch", "transformers", "numpy", "PIL", "rich", "huggingface_hub", "peft", "matplotlib", "ovis25.inference")
ANSWER = """
import resource, sys
try:
    from ovis25.cli import main
    main({words})
except SystemExit as end:
    print("code", end.code)
print("loaded", [name for name in {heavy} if name in sys.modules])
usage = resource.getrusage(resource.RUSAGE_SELF)
print("seconds", usage.ru_utime + usage.ru_stime)
"""


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--version"], 0, "ovis25 0.1.0"),
        (["--help"], 0, "talk to a model in the terminal"),
        (["trian", "config.json"], 2, "error: there is no command 'trian'; did you mean train?"),
        (["--verbose", "train"], 2, "error: unrecognized arguments: --verbose"),
        ([], 2, "error: a command is missing"),
    ],
)
def test_what_asks_for_no_command_loads_none(words, code, told):
    script = ANSWER.format(words=words, heavy=HEAVY)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert told in result.stdout + result.stderr and f"code {code}\nloaded []" in result.stdout
    # CPU time: a busy machine does not lengthen it much
    assert float(result.stdout.rpartition("seconds ")[2]) < 0.7


@pytest.mark.parametrize(
    ("word", "meant"), [("mrege", "merge"), ("inferr", "infer"), ("Chat", "chat"), ("plans", "plan")]
)
def test_an_unknown_command_names_the_nearest(word, meant, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([word, "--anything", "1"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: there is no command {word!r}; did you mean {meant}? (see ovis25 --help)"
    )


def test_a_word_that_is_near_no_command_lists_them(capsys):
    with pytest.raises(SystemExit):
        cli.main(["xyzzy"])
    assert capsys.readouterr().err.endswith(f"the commands are {', '.join(COMMANDS)} (see ovis25 --help)\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_argument_is_an_error_like_all_others(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and f" is missing (see ovis25 {name} --help)" in line


def command(**fields) -> Command:
    return Command(lambda parser: None, lambda parsed, options: 0, "", lambda program: "", **fields)


def raising(error: BaseException):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a key"), 2), (DataError("a row"), 2), (RequestError("a prompt"), 2),
        (FileNotFoundError("a file"), 2), (FloatingPointError("the loss"), 2), (FinishError("the exam"), 3),
    ],
)  # fmt: skip
def test_the_users_errors_are_one_line_and_a_code(error, code, capsys, monkeypatch, tmp_path):
    assert exit_code_of(command(), raising(error)) == code
    assert capsys.readouterr().err == f"error: {error}\n"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert exit_code_of(command(), raising(error)) == code
    assert capsys.readouterr().err == "", "one process speaks for all"
    assert json.loads((tmp_path / "error.json").read_text())["message"] == str(error)
    monkeypatch.setenv("OVIS25_DEBUG", "1")
    with pytest.raises(type(error)):
        exit_code_of(command(), raising(error))


def test_our_own_errors_show_their_stack():
    for error in (ValueError("ours"), KeyError("ours"), RuntimeError("ours")):
        with pytest.raises(type(error)):
            exit_code_of(command(), raising(error))


def test_a_command_may_say_what_else_its_user_can_mend(capsys):
    assert exit_code_of(command(user_errors=(ValueError,)), raising(ValueError("\x1b[2Ja shape"))) == 2
    assert capsys.readouterr().err == "error: \\x1b[2Ja shape\n"


def test_an_interrupt_says_how_it_goes_on(capsys):
    assert exit_code_of(command(interrupted="stopped; start it again"), raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "\nstopped; start it again\n"


def test_options_have_one_grammar():
    words = ["--a", "1", "--b-c=x", "--d", "TRUE", "--e", "none", "--f", '{"g": [1]}', "--h", "-2", "--i"]
    found = read_options(words, ConfigError, may_stand_alone=lambda name: name == "i")
    assert found == {"a": 1, "b_c": "x", "d": True, "e": None, "f": {"g": [1]}, "h": -2, "i": True}
    for wrong in (["a"], ["--"], ["--a"], ["--a="], ["--a", "--b", "1"], ["--a", "1", "--a=2"], ["--a", "9" * 5000]):
        with pytest.raises(RequestError):
            read_options(wrong, RequestError)


def test_without_matplotlib_a_run_ends_well_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    finish.draw(None, str(tmp_path), {})
    assert "note: no loss_curve.png" in (told := capsys.readouterr().err) and "pip install 'ovis25[report]'" in told
    assert not list(tmp_path.iterdir())
