"""What a training run goes on from: taken of a Trainer, and given back to one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint, distributed
from .config import TrainConfig, difference
from .evaluation import Score

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclass
class Counters:
    """Everything scalar that a resumed run continues from."""

    steps: int = 0
    seconds: float = 0.0
    evals: int = 0
    skipped: int = 0
    loss_ema: float = 0.0
    best: float = float("inf")
    since_best: int = 0
    evaluated: int = -1  # the step of the last evaluation


def described(model: Any, config: TrainConfig, tokenizer: Any, store: Any) -> dict[str, Any]:
    """What a resumed run must share with the run that wrote the checkpoint."""
    return {
        "model": {"kind": type(model).__name__, **model.config_dict()},
        "train": asdict(config),
        "data": {"tokenizer": tokenizer.sha256, "tokens": store.sha256},
    }


def require_same(saved: checkpoint.Checkpoint, now: dict[str, Any], allow: tuple[str, ...]) -> None:
    """Raises:
    UsageError: what is to be resumed is another run; the message lists the differences.
    """
    before = saved.state["config"]
    # a checkpoint does not name the options that came after it
    before["train"] = {**asdict(TrainConfig()), **before["train"]}
    checkpoint.require_same(saved, now, allow)


def _same_rows(saved: checkpoint.Checkpoint, now: dict[str, Any]) -> bool:
    """Whether a cursor stands for the rows that it stood for, and a state for theirs."""
    before = saved.state["config"]
    names = ("batch", "seq", "seed")
    return before["data"] == now["data"] and all(
        before["train"][name] == now["train"][name] for name in names
    )


def _machine(run: Trainer) -> dict[str, Any]:
    threads = torch.get_num_threads()
    return {"torch": torch.__version__, "threads": threads, **run.ranks.described()}


def capture(run: Trainer) -> tuple[checkpoint.Tensors, dict[str, Any]]:
    """(tensors beside the parameters, the rest as JSON), of all ranks for rank 0."""
    tensors = run.ranks.whole(checkpoint.optimizer_tensors(run.optimizer))
    if (hidden := run.ranks.together(run.hidden)) is not None:
        tensors["hidden"] = hidden
    if run.best_model is not None:
        tensors |= {f"best.{name}": value for name, value in run.best_model.items()}
    generators, random_json = run.ranks.random_state()
    best = run.counters.best
    state = {
        "config": run.described(),
        "settings": run.settings,
        # JSON has no infinity
        "counters": {**asdict(run.counters), "best": best if math.isfinite(best) else None},
        "cursor": run.lanes.state(),
        "scores": [asdict(score) for score in run.scores],
        "train_curve": run.train_curve,
        "random": random_json,
        "machine": _machine(run),
    }
    return tensors | generators, state


def restore(run: Trainer, saved: checkpoint.Checkpoint, allow: tuple[str, ...]) -> None:
    """As `Trainer.resume`."""
    with saved.understood():
        _restore(run, saved, allow)


def _restore(run: Trainer, saved: checkpoint.Checkpoint, allow: tuple[str, ...]) -> None:
    require_same(saved, run.described(), allow)
    tensors = checkpoint.load_training(saved, run.model, run.optimizer)
    cursor = saved.state["cursor"]
    if _same_rows(saved, run.described()):
        hidden = run.ranks.own(tensors.get("hidden"))
        run.hidden = None if hidden is None else hidden.to(run.device)
    elif cursor["step"]:
        cursor = {"epoch": cursor["epoch"] + 1, "step": 0}
        run.reporter.line("note: other rows than in the checkpoint; the next epoch begins")
    best = {
        name.removeprefix("best."): value
        for name, value in tensors.items()
        if name.startswith("best.")
    }
    run.best_model = best or None
    run.counters = Counters(**{k: v for k, v in saved.state["counters"].items() if v is not None})
    if run.ranks.chief:
        checkpoint.set_aside(run.out, saved)
    run.lanes.restore(cursor)
    run.scores = [Score(**score) for score in saved.state["scores"]]
    run.train_curve = list(saved.state.get("train_curve", ()))
    if not run.ranks.restore_random_state(tensors, saved.state["random"]):
        run.seed()
    before = {**distributed.Ranks().described(), **saved.state["machine"]}
    for line in difference(before, _machine(run)):
        anew = line.startswith("ranks") and run.model.config.dropout
        effect = "dropout takes other places" if anew else "the last bits may differ"
        run.reporter.line(f"note: {line} since the checkpoint; {effect}")
