"""Checkpoints: whole or refused, whatever happens while they are written."""

from __future__ import annotations

import importlib
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlm.lm import checkpoint, files
from fastlm.lm.errors import CheckpointError, MissingExtra, OutOfSpace
from fastlm.lm.tokenizer import ByteTokenizer


def write(run: Path, step: int, value: float = 0.0) -> Path:
    path = checkpoint.folder(run) / checkpoint.name(step)
    tensors = {"weight": torch.full((64, 64), value + step)}
    state = {"config": {}, "counters": {"steps": step, "value": value}}
    checkpoint.write(path, tensors, {"hidden": torch.zeros(3)}, state, ByteTokenizer())
    return path


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_round_trip_and_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (9, 10, 2):
        write(tmp_path, step)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.state["counters"]["steps"] == 10 and not saved.skipped
    assert float(saved.tensors(checkpoint.MODEL)["weight"][0, 0]) == 10
    checkpoint.prune(tmp_path, 2, checkpoint.folder(tmp_path) / checkpoint.name(10))
    assert [p.name for p in checkpoint.all_in(tmp_path)] == ["step-00000010", "step-00000009"]


@pytest.mark.parametrize("damage, reason", [(truncate, "truncated"), (flip_a_bit, "sha256")])
@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.TRAINING, checkpoint.STATE])
def test_damage_is_named_and_an_older_one_is_used(
    tmp_path: Path, damage: Any, reason: str, name: str
) -> None:
    write(tmp_path, 1)
    newer = write(tmp_path, 2)
    damage(newer / name)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and saved.state["counters"]["steps"] == 1
    assert len(saved.skipped) == 1
    assert f"step-00000002/{name}" in saved.skipped[0] and reason in saved.skipped[0]
    with pytest.raises(CheckpointError, match=f"{name}: .*{reason}"):
        checkpoint.find(newer)


@pytest.mark.parametrize("name", [checkpoint.MODEL, files.MANIFEST])
def test_missing_file_and_no_whole_checkpoint(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        checkpoint.newest(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.find(tmp_path / "x")
    with pytest.raises(CheckpointError, match="no checkpoint in this folder"):
        checkpoint.find(tmp_path)


def test_other_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"

    def fill(folder: Path) -> None:
        (folder / checkpoint.STATE).write_text('{"format": 99}')

    files.write_folder(path, fill)
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.read(path)


@pytest.mark.parametrize("calls", range(1, 12))
def test_death_at_any_instant_leaves_a_whole_checkpoint(tmp_path: Path, calls: int) -> None:
    """A child process dies at its n-th sync or rename, while it replaces the only checkpoint."""
    write(tmp_path, 5, 0.0)
    child = os.fork()
    if child == 0:
        left = calls

        def dying(call: Any) -> Any:
            def wrapped(*args: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return call(*args)

            return wrapped

        files._sync = dying(files._sync)
        os.rename = dying(os.rename)
        try:
            write(tmp_path, 5, 0.5)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and not saved.skipped
    value = saved.state["counters"]["value"]
    assert float(saved.tensors(checkpoint.MODEL)["weight"][0, 0]) == 5 + value
    files.remove_leftovers(checkpoint.folder(tmp_path))
    assert not list(checkpoint.folder(tmp_path).glob(".*.tmp"))


def test_failure_while_writing_keeps_the_old_one(tmp_path: Path) -> None:
    path = write(tmp_path, 1)

    def fill(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        files.write_folder(path, fill)
    assert files.damage(path) is None
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_disk_full_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, 1)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutOfSpace, match="step-00000002: disk full: 16,525 bytes needed, 1,000 f"):
        write(tmp_path, 2)
    assert files.damage(path) is None and len(checkpoint.all_in(tmp_path)) == 1


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"safetensors; pip install 'fastlm\[lm\]'"):
        checkpoint.require()


def test_random_state_round_trip() -> None:
    tensors, state = checkpoint.random_state()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    checkpoint.restore_random_state(tensors, state)
    assert first == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
