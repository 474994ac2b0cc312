"""The stranger's run in its short form, and that every documented command has a way to be tried."""

import os
import re
import subprocess
import sys

from ovis25.files import REPOSITORY_ROOT

sys.path.insert(0, str(REPOSITORY_ROOT / "scripts"))

import stranger  # noqa: E402


def test_every_documented_command_has_a_rule():
    shown = [one for one in stranger.documented(REPOSITORY_ROOT) if one.language == "bash"]
    assert len(shown) > 20
    assert not [one.text for one in shown if not any(re.search(rule.pattern, one.text) for rule in stranger.RULES)]
    # a run that is cut short must be one that the rules cut
    assert [one.text for one in shown if "train_launch.sh" in one.text and "--dry-run" not in one.text]


def test_a_stranger_in_a_clone(tmp_path):
    """Documented commands and wrong uses, in a clone in a folder with blanks and an umlaut in its name."""
    if not (REPOSITORY_ROOT / ".git").exists():
        # an unpacked archive has nothing to clone
        return
    result = subprocess.run(
        [REPOSITORY_ROOT / "scripts" / "try_as_a_user.sh", "--short"],
        env={**os.environ, "OVIS25_PYTHON": sys.executable, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"(\d+) of \1 as a user would wish", result.stdout)
