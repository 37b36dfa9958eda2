"""Checkpoints: whole or refused, whatever happens while they are written."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import pickle
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strikes
import torch

from fastlm.lm import checkpoint, files
from fastlm.lm.errors import CheckpointError, MissingExtra, OutOfSpace, UsageError
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


def deaths(folder: Path, act: Any, look: Any, step: int) -> int:
    """Let a child die before every `step`-th line that saves, one after the other, each time from a
    copy of `folder`; returns how many lines there are."""
    for line in itertools.count(1, step):
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        child = os.fork()
        if child == 0:
            strikes.die_at_line(line)
            try:
                act(copy)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        look(copy)
        files.remove_leftovers(checkpoint.folder(copy))
        assert not list(checkpoint.folder(copy).glob(".*.tmp"))
        shutil.rmtree(copy)
        if code == 0:
            return line
        assert code == -signal.SIGKILL
    raise AssertionError


@pytest.mark.parametrize(
    "before, step", [("the same step", 1), ("its old version only", 3), ("two others", 4)]
)
def test_death_at_any_line_leaves_a_whole_checkpoint(
    tmp_path: Path, before: str, step: int
) -> None:
    """The parts of a save: files, their sync, manifest, rename, what is dropped afterwards."""
    run = tmp_path / "run"
    path = write(run, 5, 0.0)
    if before == "its old version only":  # a death between the two renames
        path.rename(path.with_name(f".{path.name}.old"))
    if before == "two others":
        write(run, 4)
        write(run, 3)
    values = []

    def act(copy: Path) -> None:
        checkpoint.prune(copy, 2, write(copy, 5, 0.5))

    def look(copy: Path) -> None:
        saved = checkpoint.newest(copy)
        assert saved is not None and not saved.skipped
        values.append(saved.state["counters"]["value"])
        assert float(saved.tensors(checkpoint.MODEL)["weight"][0, 0]) == 5 + values[-1]

    assert deaths(run, act, look, step) > 60
    # first the old one, then the new one
    assert values == sorted(values) and set(values) == {0.0, 0.5}


def test_everything_is_on_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def synced(handle: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def renamed(call: Any) -> Any:
        def wrapped(source: Any, target: Any) -> None:
            done.append(("rename", str(target)))
            call(source, target)

        return wrapped

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(os, "replace", renamed(replace))
    path = write(tmp_path / "run", 7)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    at = done.index(("rename", str(path)))
    for file in path.iterdir():
        name = f".manifest.json.{os.getpid()}.tmp" if file.name == files.MANIFEST else file.name
        assert ("sync", str(temporary / name)) in done[:at]
    manifest = done.index(("rename", str(temporary / files.MANIFEST)))
    assert manifest < done.index(("sync", str(temporary)), manifest) < at
    # and the names in the folders above, the new ones of this run among them
    assert ("sync", str(path.parent)) in done[at:]
    for folder in (path.parent.parent, tmp_path):
        assert ("sync", str(folder)) in done[:at]


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    for step in (3, 8, 9):
        write(tmp_path, step)
    for step in (8, 9):
        truncate(checkpoint.folder(tmp_path) / checkpoint.name(step) / checkpoint.MODEL)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and len(saved.skipped) == 2
    checkpoint.set_aside(tmp_path / "another run", saved)
    assert len(checkpoint.all_in(tmp_path)) == 3
    checkpoint.set_aside(tmp_path, saved)
    assert [p.name for p in checkpoint.all_in(tmp_path)] == [checkpoint.name(3)]
    checkpoint.prune(tmp_path, 2, write(tmp_path, 4))
    assert sorted(p.name for p in checkpoint.folder(tmp_path).iterdir()) == [
        checkpoint.name(3),
        checkpoint.name(4),
    ]
    # nor do newer ones of another continuation
    write(tmp_path, 8)
    write(tmp_path, 9)
    checkpoint.prune(tmp_path, 1, write(tmp_path, 5))
    steps = [int(p.name[5:]) for p in checkpoint.all_in(tmp_path)]
    assert steps == [9, 8, 5]


def test_leftovers_of_the_dead_alone_are_removed(tmp_path: Path) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    left = [f".step-1.{dead}.tmp", f".model.{os.getpid()}.tmp"]
    kept = [".thesis.tmp", f".step-1.{os.getppid()}.tmp", "step.1.tmp"]
    for name in left + kept:
        (tmp_path / name).mkdir()
    (tmp_path / f".report.json.{dead}.tmp").write_text("x")
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_names_that_are_no_checkpoint_and_many_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    for name in ("step-", "step-new", "steps-3"):
        (checkpoint.folder(tmp_path) / name).mkdir()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None and not saved.skipped
    assert saved.state["counters"]["steps"] == 100_000_000


@pytest.mark.parametrize("torn", ["", '{"a"', "x" * 200_000])
def test_a_torn_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    lines = files.Lines(path)
    lines.write("1")
    lines.close()
    with path.open("a") as file:
        file.write(torn)
    lines = files.Lines(path)
    lines.write("2")
    assert path.read_text() == "1\n2\n"
    lines.close()
    path.write_text(torn)
    files.Lines(path).close()
    assert path.read_text() == ""


def test_one_process_writes_to_a_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = files.Lines(path)

    def other() -> int:
        """What another process hears."""
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        try:
            files.Lines(path).write("2")
        except UsageError as error:
            os._exit(7 if "another process writes to it" in str(error) else 8)
        os._exit(0)

    lines.write("1")
    assert other() == 7 and path.read_text() == "1\n"
    lines.close()
    assert other() == 0 and path.read_text() == "1\n2\n"


def test_nothing_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    banned = {"pickle", "cPickle", "_pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    calls = {("torch", "load"), ("torch", "save"), ("jit", "load")}
    for path in Path(files.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            names.append(getattr(node, "module", None) or "")
            assert not banned & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
                assert (owner, node.attr) not in calls, path
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("unpickled")

    write(tmp_path, 1)
    monkeypatch.setattr(pickle, "load", never)
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(pickle, "Unpickler", never)
    monkeypatch.setattr(torch, "load", never)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    assert saved.tensors(checkpoint.MODEL) and saved.tensors(checkpoint.TRAINING)
    # a pickle in the place of a file of tensors is refused as such
    bomb = saved.path / checkpoint.MODEL
    bomb.write_bytes(pickle.dumps({"weight": [1]}))
    with pytest.raises(CheckpointError, match=checkpoint.MODEL):
        saved.tensors(checkpoint.MODEL)


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
