"""Training on two ranks is training in one process: DDP and FSDP2, checkpoints, stops, failures.

The cases run on two gloo ranks, once for all; `python test_lm_distributed.py 2 FOLDER` runs them.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Collectives, results_of, run_world

from fastlm.lm import checkpoint, cli, config, data, distributed, preparation, trainer
from fastlm.lm.errors import OtherRank, TrainingError, UsageError
from fastlm.lm.evaluation import evaluate
from fastlm.lm.model import GRULM
from fastlm.lm.progress import Reporter
from fastlm.lm.transformer import TransformerLM

ROOT = Path(__file__).resolve().parent.parent
WORLD = 2
# the norm of the gradient is above `clip` in every step, and an epoch has fewer steps than the run
SMALL = config.TrainConfig(
    budget="10steps", batch=6, seq=40, evals=2, eval_tokens=500, lr=1e-2, clip=0.1
)
KINDS = {
    "gru": (GRULM, {"num_layers": 2, "tied": True}),
    "transformer": (
        TransformerLM,
        {"num_heads": 2, "num_layers": 2, "context": 40, "z_loss": 1e-3},
    ),
}
EVERY = [(kind, way) for kind in KINDS for way in distributed.WAYS]
TEXT = data.load().documents[0].text[5000:7400]
FOLDER = Path()  # of the cases; set by the program


@functools.cache
def prepared() -> preparation.Prepared:
    choice = preparation.DataConfig((str(FOLDER / "text"),), tokenizer="bytes")
    return preparation.prepare(choice, FOLDER / "cache")


def make(kind: str, way: str | None = None, settings: config.TrainConfig = SMALL, **options: Any):
    """A small Trainer; of one process where `way` is None."""
    made, size = KINDS[kind]
    size = {"hidden_size": 24, "dropout": options.pop("dropout", 0.0), **size}
    if options.pop("recompute", False):
        size["recompute"] = True
    if kind == "transformer":
        size["end"] = prepared().tokenizer.end
    torch.manual_seed(3)
    model = made(prepared().tokens.vocab_size, **size)
    model.to(options.pop("dtype", torch.float32))
    ranks = None if way is None else distributed.Group(way, torch.device("cpu"))
    tokens, tokenizer = prepared().tokens, prepared().tokenizer
    return trainer.Trainer(model, tokens, tokenizer, settings, ranks=ranks, **options)


def parameters(run: trainer.Trainer) -> list[torch.Tensor]:
    state = run.ranks.whole(run.model.state_dict(), everywhere=True)
    return [value.clone() for value in state.values()]


def same_everywhere(value: Any) -> None:
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, value)
    assert every[0] == every[1], every


def together(kind: str, way: str) -> tuple[trainer.Trainer, trainer.Trainer]:
    """In float64, so that nothing but a mistake makes them differ."""
    double = {"dtype": torch.float64}
    return make(kind, **double), make(kind, way, **double)


def assert_same_parameters(alone: trainer.Trainer, ours: trainer.Trainer) -> None:
    for a, b in zip(parameters(alone), parameters(ours), strict=True):
        torch.testing.assert_close(b, a)


# ---- cases --------------------------------------------------------------------------------------


def losses(kind: str, way: str) -> None:
    """Ten steps over the end of an epoch, with a state carried by the GRU."""
    alone, ours = together(kind, way)
    assert alone.lanes.steps_per_epoch < 10
    start, first = parameters(alone), ours.model.state_dict()
    if way == "fsdp2":
        assert all(p.to_local().numel() < p.numel() for p in first.values())
    taken = [[run.step() for _ in range(10)] for run in (alone, ours)]
    found = torch.tensor(taken, dtype=torch.float64)
    torch.testing.assert_close(found[1], found[0])
    same_everywhere(found[1].tolist())
    assert_same_parameters(alone, ours)
    for before, now in zip(start, parameters(ours), strict=True):
        assert not torch.equal(before, now)

    single = [make(kind, each) for each in (None, way)]
    found = torch.tensor([[run.step() for _ in range(10)] for run in single])
    torch.testing.assert_close(found[1], found[0])
    assert_same_parameters(*single)


def recomputed_layers() -> None:
    runs = [make("transformer", way, recompute=True) for way in (None, *distributed.WAYS)]
    found = torch.tensor([[run.step() for _ in range(3)] for run in runs])
    torch.testing.assert_close(found[1:], found[:1].expand(2, -1))


class Masked:
    """Batches with targets that do not count: most of the first row, or all of the second rank's,
    or all; then last batches too small for the ranks to have a row each, or as many."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.state, self.at = batches, batches.state, 0

    def next(self) -> Any:
        tokens, targets, _ = self.batches.next()
        self.at += 1
        if self.at > 3:
            few = 1 if self.at == 4 else 3
            return tokens[:few], targets[:few], True
        masked = [(0, slice(30)), (slice(3, 6), slice(None)), (slice(6), slice(None))]
        targets[masked[self.at - 1]] = -100
        return tokens, targets, True


def masks(kind: str, way: str, accumulate: int = 1) -> None:
    settings = replace(SMALL, accumulate=accumulate)
    alone, ours = (make(kind, each, settings, dtype=torch.float64) for each in (None, way))
    alone.lanes = Masked(alone.lanes)
    ours.lanes = ours.ranks.rows_of(Masked(ours.lanes._batches), 6)
    found = [[run.step() for _ in range(5)] for run in (alone, ours)]
    assert found[0][2] == found[1][2] == 0.0  # no target at all: nothing is skipped, no rank waits
    assert alone.counters.skipped == ours.counters.skipped == 0
    torch.testing.assert_close(*torch.tensor(found, dtype=torch.float64))
    assert_same_parameters(alone, ours)


def parts_are_summed_once(kind: str, way: str) -> None:
    """Over the ranks, as a batch in one part is; behind the last target that counts too."""
    calls = []
    for accumulate, counted in [(1, 6), (3, 6), (3, 4)]:
        ours = make(kind, way, replace(SMALL, accumulate=accumulate))
        real = ours.lanes.next

        def read(real: Callable[[], Any] = real, counted: int = counted) -> Any:
            tokens, targets, fresh = real()
            targets[counted // WORLD :] = distributed.IGNORED
            return tokens, targets, fresh

        ours.lanes.next = read
        ours.step()  # DDP chooses what it sums together in the first one
        with Collectives() as seen:
            ours.step()
        assert ours.counters.skipped == 0
        calls.append({name: seen.calls[name] for name in ("allreduce_", "_reduce_scatter_base_")})
    assert calls[0] == calls[1] == calls[2] and sum(calls[0].values()) > 0


def not_finite(kind: str, way: str, where: str) -> None:
    """On rank 1, in the second step: no rank moves, and the third step is a good one."""
    ours = make(kind, way)
    target = ours.model
    real, calls = target.loss, 0

    def loss(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        value, state = real(*args)
        if calls == 2 and dist.get_rank() == 1:
            if where == "loss":
                return value * math.nan, state
            value.register_hook(lambda d: d * math.inf)
        return value, state

    target.loss = loss
    ours.step()
    kept = parameters(ours)
    ours.step()
    assert ours.counters.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(kept, parameters(ours), strict=True))
    ours.step()
    assert ours.counters.skipped == 1 and math.isfinite(ours.counters.loss_ema)
    assert not any(torch.equal(a, b) for a, b in zip(kept, parameters(ours), strict=True))
    same_everywhere(ours.counters.loss_ema)


def three_bad_steps_end_all_ranks() -> None:
    ours = make("gru", "ddp", out=FOLDER / "run-bad")
    if dist.get_rank() == 1:
        with torch.no_grad():
            ours.model.head.bias.fill_(math.nan)
    with pytest.raises(TrainingError, match="not finite in 3 steps in a row"):
        ours.fit()


def rank_of_signal(rank: int, step: int) -> Callable[[int], None]:
    def on_step(steps: int) -> None:
        if steps == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def saved_in(out: Path) -> checkpoint.Checkpoint:
    saved = checkpoint.newest(out)
    assert saved is not None
    return saved


def resume(kind: str, way: str) -> None:
    """A signal to one rank stops both; what they go on with is the run that nobody stopped."""
    out = FOLDER / f"run-{kind}-{way}"
    # the best parameters are part of a checkpoint
    settings = replace(SMALL, patience=9, accumulate=3)
    whole = make(kind, way, settings, dropout=0.3)
    assert whole.fit().stopped == "budget"
    part = make(kind, way, settings, dropout=0.3, out=out, on_step=rank_of_signal(1, 7))
    result = part.fit()
    assert (result.stopped, result.steps) == ("interrupted", 7)
    dist.barrier()
    torch.rand(7)  # whoever resumes has another random state
    rest = make(kind, way, settings, dropout=0.3, out=out)
    rest.resume(saved_in(out))
    assert rest.fit().steps == 10
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(rest), strict=True))
    assert whole.scores == rest.scores
    dist.barrier()
    events = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 11))
    # one process, and ranks that share parameters in the other way, take the checkpoint too
    told, other = Lines(), {"ddp": "fsdp2", "fsdp2": "ddp"}[way]
    for where, note in [
        (None, f"note: ranks: {WORLD} -> 1 since the checkpoint; dropout takes other places"),
        (other, f"note: parallel: {way} -> {other} since the checkpoint; the last bits may differ"),
    ]:
        taken = make(kind, where, settings, dropout=0.3, reporter=told)
        taken.resume(saved_in(out))
        assert dist.get_rank() or note in told.lines
        saved, whole_of = saved_in(out), functools.partial(taken.ranks.whole, everywhere=True)
        written = saved.tensors(checkpoint.MODEL) | saved.tensors(checkpoint.TRAINING)
        found = whole_of(taken.model.state_dict() | checkpoint.optimizer_tensors(taken.optimizer))
        assert len(found) > 20 and all(torch.equal(found[name], written[name]) for name in found)
    # the model of the run, as anybody loads it
    finished = checkpoint.find(out)
    assert finished.path.name == "model"
    plain = make(kind, dropout=0.3).model
    checkpoint.load_parameters(plain, finished)
    for a, b in zip(plain.state_dict().values(), parameters(rest), strict=True):
        assert torch.equal(a, b)


class Lines(Reporter):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)

    def update(self, progress: Any) -> None:
        pass


def other_number_of_ranks(kind: str, way: str, first: int) -> None:
    """From `first` ranks to the other number: the losses are those of one process all along."""
    out = FOLDER / f"run-{first}-{kind}-{way}"
    reference, told = make(kind), Lines()
    reference.fit()

    def run(several: bool, **options: Any) -> trainer.Trainer | None:
        if several or dist.get_rank() == 0:
            return make(kind, way if several else None, out=out, **options)
        return None

    part = run(first == 2, on_step=rank_of_signal(0, 4))
    if part is not None:
        part.fit()
    dist.barrier()
    rest = run(first == 1, reporter=told)
    if rest is not None:
        rest.resume(saved_in(out))
        assert rest.counters.steps == 4
        assert rest.fit().steps == 10
        assert_same_parameters(reference, rest)
        note = f"note: ranks: {first} -> {3 - first} since the checkpoint"
        assert dist.get_rank() or any(line.startswith(note) for line in told.lines), told.lines
    dist.barrier()


def evaluation(kind: str, way: str) -> None:
    alone, ours = make(kind), make(kind, way)
    store, tokenizer = prepared().tokens, prepared().tokenizer
    for limit in (None, 160, 30):  # 30 tokens are one row, of which rank 1 has none
        both = [
            evaluate(r.model, store, tokenizer, limit=limit, ranks=r.ranks) for r in (alone, ours)
        ]
        assert both[1].nats_per_token == pytest.approx(both[0].nats_per_token, rel=1e-6)
        assert both[1].tokens == both[0].tokens and both[1].bytes == both[0].bytes
        same_everywhere(both[1].nats_per_token)


def the_clock_of_rank_0_decides() -> None:
    """The clock of rank 1 is slower by a factor of 1000."""
    settings = replace(SMALL, budget="6s", evals=3)
    ours, ticks = make("gru", "ddp", settings), 0

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            nonlocal ticks
            ticks += 1
            return ticks / (4 if dist.get_rank() == 0 else 4000)

    real, trainer.time = trainer.time, Clock  # type: ignore[assignment]
    try:
        result = ours.fit()
    finally:
        trainer.time = real
    assert result.stopped == "budget" and result.steps < 24
    same_everywhere((result.steps, result.seconds, len(ours.scores), ours.counters.best))


def patience_is_one_decision() -> None:
    settings = replace(SMALL, patience=1, lr=0.5, clip=0.0, evals=10)
    ours = make("gru", "ddp", settings)
    assert ours.fit().stopped == "patience"
    same_everywhere(ours.counters.steps)


def every_rank_drops_out_differently() -> None:
    ours = make("gru", "ddp", dropout=0.5)
    ours.seed()
    drawn: list[Any] = [None] * WORLD
    dist.all_gather_object(drawn, torch.rand(3).tolist())
    assert drawn[0] != drawn[1]
    torch.manual_seed(SMALL.seed)  # rank 0 draws as one process would
    assert drawn[0] == torch.rand(3).tolist()


def what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch must be a multiple of .*ranks \(2\), got 5"):
        make("gru", "ddp", replace(SMALL, batch=5))
    with pytest.raises(UsageError, match="parallel must be one of ddp, fsdp2, got 'tp'"):
        make("gru", "tp")
    ours = make("gru", "ddp", replace(SMALL, seed=dist.get_rank()))
    with pytest.raises(UsageError, match="rank 1 has other data, options or another checkpoint"):
        ours.fit()


def one_rank_does_it_first() -> None:
    group, order = distributed.Group("ddp", torch.device("cpu")), []
    started = time.monotonic()

    def slow() -> int:
        if group.rank == 0:
            time.sleep(0.2)
        order.append(time.monotonic() - started)
        return group.rank

    assert group.first(slow) == group.rank
    assert order[0] >= 0.2 * 0.9

    def fail() -> int:
        raise UsageError("no such text")

    expected = UsageError if group.rank == 0 else OtherRank
    with pytest.raises(expected, match="no such text") as caught:
        group.first(fail)
    assert caught.value.exit_code == UsageError.exit_code


def of(case: Callable[..., None], *args: Any) -> tuple[str, Callable[[], None]]:
    return "-".join([case.__name__, *map(str, args)]), functools.partial(case, *args)


CASES: dict[str, Callable[[], None]] = dict(
    [
        *(of(losses, *each) for each in EVERY),
        of(recomputed_layers),
        *(of(masks, *each) for each in EVERY),
        *(of(masks, *each, 3) for each in EVERY),
        *(of(parts_are_summed_once, *each) for each in EVERY),
        of(not_finite, "gru", "ddp", "loss"),
        of(not_finite, "gru", "ddp", "gradient"),
        of(not_finite, "transformer", "fsdp2", "loss"),
        of(not_finite, "transformer", "fsdp2", "gradient"),
        of(three_bad_steps_end_all_ranks),
        *(of(resume, *each) for each in EVERY),
        of(other_number_of_ranks, "gru", "fsdp2", 2),
        of(other_number_of_ranks, "gru", "fsdp2", 1),
        of(other_number_of_ranks, "gru", "ddp", 2),
        of(other_number_of_ranks, "gru", "ddp", 1),
        of(other_number_of_ranks, "transformer", "fsdp2", 1),
        *(of(evaluation, *each) for each in EVERY),
        of(the_clock_of_rank_0_decides),
        of(patience_is_one_decision),
        of(every_rank_drops_out_differently),
        of(what_cannot_be_shared_is_refused),
        of(one_rank_does_it_first),
    ]
)


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
    """What it printed; where it takes too long it is asked to end, and ends its own."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise AssertionError(process.communicate(timeout=60)) from None


# ---- the tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text").mkdir()
    (folder / "text" / "book.txt").write_text(TEXT)
    return results_of(__file__, WORLD, folder)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(results: list[dict[str, str]], case: str) -> None:
    for rank, found in enumerate(results):
        assert case in found, f"rank {rank} did not come to it"
        assert not found[case], f"rank {rank}: {found[case]}"


def steps_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["event"] == "step"]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`fastlm train` of a tiny model, its folder of runs being the current one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    options = "--data book.txt --tokenizer bytes --hidden 16 --batch 4 --seq 16 --evals 2"
    return ["train", *options.split()]


def test_torchrun(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command += ["--budget", "9steps", "--model", "transformer", "--layers", "2"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
    start += ["--standalone", "-m", "fastlm.lm", *command, "--parallel", "fsdp2"]
    started = subprocess.Popen(
        [*start, "--out", "ranks"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, error = ended(started, 120)
    assert started.returncode == 0, error
    assert cli.main([*command, "--out", "one"]) == 0
    # rank 1 says nothing
    told, expected = out.splitlines(), capsys.readouterr().out.splitlines()
    assert len(told) == len(expected) and told[0] == expected[0]
    both = [[step["loss"] for step in steps_of(Path(run))] for run in ("ranks", "one")]
    assert len(both[0]) == 9
    torch.testing.assert_close(torch.tensor(both[0]), torch.tensor(both[1]))


def test_a_killed_rank_ends_the_others(command: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    start = [sys.executable, "-m", "fastlm.lm", *command, "--budget", "5m", "--quiet"]
    ranks = [
        subprocess.Popen(
            [*start, "--out", "run", "--save-every", "0"],
            env={**os.environ, **together, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        limit = time.monotonic() + 60
        while len(steps_of(Path("run"))) < 3:
            assert ranks[0].poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        ranks[1].kill()
        _, error = ranks[0].communicate(timeout=20)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == OtherRank.exit_code, error
    assert error.startswith("fastlm: error: another rank ended"), error
    assert error.count("\n") == 1
    saved = saved_in(Path("run"))
    assert saved.state["machine"]["ranks"] == WORLD and not saved.skipped


def test_without_torchrun(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main([*command, "--parallel", "ddp"]) == UsageError.exit_code
    assert "--parallel ddp is for several processes: torchrun" in capsys.readouterr().err
    # what would be done twice, to the same files
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["demo"]) == UsageError.exit_code
    expected = "fastlm: rank 1: error: demo runs in one process; torchrun is for train"
    assert expected in capsys.readouterr().err


if __name__ == "__main__":
    FOLDER = Path(sys.argv[2])
    sys.exit(run_world(CASES, int(sys.argv[1]), sys.argv[2]))
