"""Locks that a killed compilation leaves behind, on which torch would wait without end."""

import os

import pytest

from ovis25.training.extensions import remove_stale_locks


@pytest.fixture
def locks(tmp_path, monkeypatch):
    """An extensions folder with a left-over lock and one that this process holds, as torch's FileBaton does."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("left", "held"):
        (tmp_path / "py311_cpu" / name).mkdir(parents=True)
    left, held = (tmp_path / "py311_cpu" / name / "lock" for name in ("left", "held"))
    left.touch()
    handle = os.open(held, os.O_CREAT | os.O_EXCL)
    yield left, held
    os.close(handle)


def test_only_a_lock_that_nobody_holds_is_removed(locks):
    left, held = locks
    assert remove_stale_locks() == [left]
    assert held.exists() and not left.exists()
    assert remove_stale_locks() == []


def test_a_fresh_lock_may_be_another_machines(locks):
    left, _ = locks
    assert remove_stale_locks(is_only_machine=False) == []
    os.utime(left, (0, 0))
    assert remove_stale_locks(is_only_machine=False) == [left]


def test_no_extensions_no_work(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "nowhere"))
    assert remove_stale_locks() == []
    assert not (tmp_path / "nowhere").exists()
