"""Checkpoints: safetensors for tensors, JSON for the rest, and a manifest that proves both.

A run folder holds `checkpoints/step-N/`, each complete in itself:
    model.safetensors  training.safetensors  state.json  tokenizer.json  manifest.json
`model/` is the same without the training state. Nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import files
from .config import difference
from .errors import CheckpointError, MissingExtra, UsageError
from .suggest import nearest
from .tokenizer import Tokenizer

MODEL = "model.safetensors"
TRAINING = "training.safetensors"
STATE = "state.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1
KEPT = 2

Tensors = dict[str, Tensor]


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError:
        raise MissingExtra("a checkpoint", "safetensors") from None


def require() -> None:
    """Fail at the start of a run rather than at its first save."""
    _safetensors()


def own(tensors: Tensors) -> Tensors:
    """Copies in host memory that share nothing: safetensors refuses tied weights."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def size(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write(
    path: Path, model: Tensors, training: Tensors, state: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """One checkpoint, complete or not there at all."""
    library = _safetensors()
    text = json.dumps({"format": FORMAT, **state})
    need = size(model) + size(training) + len(text) + len(json.dumps(tokenizer.to_json()))

    def fill(folder: Path) -> None:
        library.save_file(own(model), folder / MODEL)
        if training:
            library.save_file(own(training), folder / TRAINING)
        (folder / STATE).write_text(text, encoding="utf-8")
        tokenizer.save(folder / TOKENIZER)

    files.write_folder(path, fill, need=need)


def write_step(
    run: Path,
    step: int,
    model: Tensors,
    training: Tensors,
    state: dict[str, Any],
    tokenizer: Tokenizer,
) -> Path:
    """A checkpoint of one step of a run, of which the newest `KEPT` stay."""
    path = folder(run) / name(step)
    write(path, model, training, state, tokenizer)
    prune(run, KEPT, path)
    return path


def require_free(path: Path) -> None:
    """Refuse, before the work, to replace what is no checkpoint.

    Raises:
        UsageError: there is a file, or a folder of something else.
    """
    ours = path.is_dir() and ((path / files.MANIFEST).is_file() or not any(path.iterdir()))
    if path.exists() and not ours:
        raise UsageError(f"{path}: is there already and no checkpoint; choose another --out")


@dataclass
class Checkpoint:
    """A verified folder. `skipped` says what is wrong with the newer ones, which are `damaged`."""

    path: Path
    state: dict[str, Any]
    skipped: list[str] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the training; nothing where the state has none."""
        found = self.state.get("settings") or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / STATE}: its settings are no table")
        return found

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Whatever is missing or of another type in a state that a stranger or a later version
        wrote is said as such."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(f"{self.path / STATE}: not the state expected ({what})") from None

    def tensors(self, name: str) -> Tensors:
        try:
            return _safetensors().load_file(self.path / name)
        except MissingExtra:
            raise
        except Exception as error:  # safetensors has its own exception type
            raise CheckpointError(f"{self.path / name}: {error}") from None


def read(path: Path) -> Checkpoint:
    """Verify one checkpoint folder and read its state."""
    path = files.present(path)
    reason = files.damage(path)
    if reason:
        raise CheckpointError(reason)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        known = state["format"] == FORMAT
        if "config" in state and not isinstance(state["config"], dict):
            raise TypeError("its config is no table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE}: not a checkpoint ({error})") from None
    if not known:
        raise CheckpointError(
            f"{path / STATE}: format {state['format']}, this fastlm reads {FORMAT}"
        )
    return Checkpoint(path, state)


def folder(run: Path) -> Path:
    return run / "checkpoints"


def name(step: int) -> str:
    return f"step-{step:08d}"


_NAME = re.compile(r"step-\d+|\.step-\d+\.old")


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def all_in(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    try:
        names = [name for name in os.listdir(folder(run)) if _NAME.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{folder(run)}: cannot be read ({error.strerror})") from None
    # ".step-N.old" is the one whose replacement was cut short
    found = {folder(run) / name.removeprefix(".").removesuffix(".old") for name in names}
    return sorted(found, key=_step, reverse=True)


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that verifies; None when there has never been one.

    Raises:
        CheckpointError: there are some and none is whole.
    """
    skipped: list[str] = []
    damaged: list[Path] = []
    for path in all_in(run):
        try:
            checkpoint = read(path)
        except CheckpointError as error:
            skipped.append(str(error))
            damaged.append(path)
            continue
        checkpoint.skipped, checkpoint.damaged = skipped, damaged
        return checkpoint
    if skipped:
        raise CheckpointError("; ".join(skipped))
    return None


def find(path: Path) -> Checkpoint:
    """From a checkpoint or model folder, or from a run folder: its finished model if there is one,
    else its newest whole checkpoint."""
    try:
        here = files.present(path)
        if not here.is_dir():
            what = "a file, not a folder" if here.exists() else "no such folder"
            raise CheckpointError(f"{path}: {what}")
        alone = (here / STATE).exists() or (here / files.MANIFEST).exists()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if alone:
        return read(path)
    skipped: list[str] = []
    if files.present(path / "model").is_dir():
        try:
            return read(path / "model")
        except CheckpointError as error:
            skipped.append(str(error))
    checkpoint = newest(path)
    if checkpoint is None:
        raise CheckpointError("; ".join(skipped) or f"{path}: no checkpoint in this folder")
    checkpoint.skipped = skipped + checkpoint.skipped
    return checkpoint


def say_skipped(saved: Checkpoint) -> None:
    for reason in saved.skipped:
        print(f"fastlm: skipped a damaged checkpoint: {reason}", file=sys.stderr)


def set_aside(run: Path | None, saved: Checkpoint) -> None:
    """Of the run that goes on from `saved`: what was skipped must not count as newer any more."""
    for path in saved.damaged:
        here = files.present(path)
        if run is not None and path.parent == folder(run) and here.exists():
            aside = path.with_name(f".{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(here, aside)


def prune(run: Path, keep: int, written: Path) -> None:
    """Drop all but the newest `keep` up to the one just `written`, and what was set aside."""
    older = [path for path in all_in(run) if _step(path) <= _step(written)]
    for path in older[keep:]:
        files.remove_folder(path)
    for path in folder(run).glob(".step-*.damaged"):
        shutil.rmtree(path, ignore_errors=True)


def require_same(saved: Checkpoint, now: dict[str, Any], allow: tuple[str, ...]) -> None:
    """Refuse to continue with another configuration, but for the keys in `allow`.

    Raises:
        UsageError: the message lists the differences.
    """
    if saved.state["config"].keys() != now.keys():
        raise UsageError(f"{saved.path} is of another command; use another --out")
    known = {key for part in now.values() for key in part}
    for name in allow:
        if name not in known:
            raise UsageError(f"--allow-change: nothing is called {name!r}{nearest(name, known)}")
    lines = difference(saved.state["config"], now)
    refused = [line for line in lines if line.split(":")[0].split(".")[-1] not in allow]
    if refused:
        raise UsageError(
            f"{saved.path} was written with another configuration: {'; '.join(refused)}. "
            "Use another --out, or --allow-change"
        )


def load_training(
    saved: Checkpoint, module: nn.Module, optimizer: torch.optim.Optimizer
) -> Tensors:
    """Parameters and optimizer; the tensors that were written beside the parameters."""
    load_parameters(module, saved)
    tensors = saved.tensors(TRAINING)
    load_optimizer(optimizer, tensors)
    return tensors


def load_parameters(module: nn.Module, checkpoint: Checkpoint) -> None:
    try:
        module.load_state_dict(checkpoint.tensors(MODEL))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path / MODEL}: {reason}") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    return {
        f"optimizer.{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """From `optimizer_tensors` among others."""
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)


def random_state() -> tuple[Tensors, dict[str, Any]]:
    """The generators of torch, numpy and Python, as tensors and JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    tensors = {
        "random.torch": torch.get_rng_state(),
        "random.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    state = {
        "numpy": [str(kind), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }
    return tensors, state


def restore_random_state(tensors: Tensors, state: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    kind, position, has_gauss, gauss = state["numpy"]
    keys = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
