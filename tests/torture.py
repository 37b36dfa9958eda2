"""Kill training, fill its disk, damage its checkpoints: the final weights stay the same to the bit.

    make torture                              # 200 kills, 50 full disks, 50 damages, 20 signals
    python tests/torture.py --kills 20 --seed 7

One process imports everything once and forks a child for each run, which is the real command line.
A trial starts a run of the scenarios in turn, strikes it, lets it go on with the same command and
compares the sha256 of the final weights with that of the run nobody disturbed. Exit code 0: all of
them are equal.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # children are forked
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from strikes import Child, at_lines_that_save, die_at_line, die_in_write, do_not_look, limit_files

from fastlm.lm import checkpoint, cli, data, errors, files, machine

NEEDED = re.compile(r"[\d,]+ bytes needed, [\d,]+ free")
SMALL = "--tokenizer bytes --hidden 16 --layers 2 --batch 4 --seq 16 --eval-tokens 400 --lr 0.01"
TRAIN = f"train --budget 10steps --evals 3 --save-every 0 --quiet {SMALL}"
RL = "rl --budget 6steps --batch 8 --group 4 --length 8 --prompt 8 --save-every 0 --quiet"
SCENARIOS = {
    "gru": f"{TRAIN} --dropout 0.2 --patience 3",
    "transformer": f"{TRAIN} --model transformer --heads 2 --dropout 0.1",
    "rl gru": f"{RL} --algorithm grpo --updates 2",
    "rl transformer": f"{RL} --algorithm rloo",
}


def vowels(prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """The reward of the RL scenarios."""
    return [float(sum(c in "aeiou" for c in text)) for text in texts]


class Failed(Exception):
    """A promise that was not kept."""


def require(holds: object, text: str) -> None:
    if not holds:
        raise Failed(text)


@dataclass
class Scenario:
    name: str
    command: list[str]
    want: str = ""  # sha256 of the undisturbed weights
    seconds: float = 1.0
    lines: int = 0  # of Python while saving
    writes: int = 0  # of files of tensors
    size: int = 0  # bytes of a checkpoint
    steps: int = 0

    def arguments(self, out: Path) -> list[str]:
        return [*self.command, "--out", str(out)]

    def run(self, out: Path, before: Callable[[], None] | None = None) -> Child:
        return Child(self.arguments(out), before)

    def finish(self, out: Path, *, says: str = "") -> None:
        """Go on with the same command until the end; everything must be as if nothing happened."""
        child = self.run(out)
        code = child.wait()
        require(code == errors.OK, f"exit code {code} when going on: {child.text[-2000:]}")
        require(says in child.text, f"{says!r} not said: {child.text!r}")
        got = hashlib.sha256((out / "model" / checkpoint.MODEL).read_bytes()).hexdigest()
        require(got == self.want, f"other weights: {got[:16]}, not {self.want[:16]}")
        require(files.damage(out / "model") is None, "damaged model")
        left = [str(p) for p in out.rglob(".*")]
        require(not left, f"left behind: {left}")
        for line in (out / "metrics.jsonl").read_text().splitlines():
            json.loads(line)


def hidden(out: Path) -> list[Path]:
    return list(out.rglob(".*")) if out.exists() else []


def step_of(saved: checkpoint.Checkpoint | None) -> int:
    return 0 if saved is None else int(re.sub(r"\D", "", saved.path.name))


def whole_newest(out: Path) -> checkpoint.Checkpoint | None:
    """The newest checkpoint, all of which must be whole."""
    saved = checkpoint.newest(out)
    require(saved is None or not saved.skipped, f"damaged: {saved and saved.skipped}")
    return saved


def last_step(out: Path) -> int:
    """The last step that the run has reported."""
    try:
        text = (out / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    found = re.findall(r'"event": "step", "step": (\d+)|"iteration": (\d+)', text)
    return max((int(a or b) for a, b in found), default=0)


def wait_for_step(child: Child, out: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while last_step(out) < step and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.001)


# ---- trials: each returns how many strikes landed, and where -------------------------------------

Found = Counter[str]


def kill_trial(scenario: Scenario, draw: random.Random, out: Path) -> Found:
    """Up to three deaths of one run: at a random time, before a random line of the code that saves,
    in the middle of a file."""
    found: Found = Counter()
    for _ in range(draw.randint(1, 3)):
        how = draw.choice(("time", "time", "line", "write"))
        before: Callable[[], None] | None = None
        if how == "line":
            before = partial(die_at_line, draw.randint(1, scenario.lines))
        if how == "write":
            before = partial(die_in_write, draw.randint(1, scenario.writes), draw.random())
        newest = step_of(whole_newest(out))
        child = scenario.run(out, before)
        if how == "time":
            time.sleep(draw.uniform(0.0, scenario.seconds))
            child.kill(signal.SIGKILL)
        code = child.wait()
        require(code in (0, -signal.SIGKILL), f"exit code {code}: {child.text[-2000:]}")
        if code == 0:
            break
        found["strikes"] += 1
        found["while saving"] += bool(hidden(out)) or how != "time"
        saved = step_of(whole_newest(out))
        # every step is saved: what is lost is the one that was not saved yet
        require(saved >= max(newest, last_step(out) - 1), f"{saved} after step {last_step(out)}")
    scenario.finish(out)
    return found


def disk_trial(scenario: Scenario, draw: random.Random, out: Path, *, small: bool) -> Found:
    """A run on a full disk: exit code 5, bytes needed and free, the previous checkpoint whole.

    `small`: `out` is on a file system of its own that can be filled; else files are limited.
    """
    child = scenario.run(out)
    wait_for_step(child, out, draw.randint(0, 5))
    child.kill(signal.SIGKILL)
    child.wait()
    shutil.rmtree(out / "model", ignore_errors=True)
    filler, blind = out.parent / "filler", draw.random() < 0.5

    def before(room: int) -> None:
        if not small:
            limit_files(room)
        if blind:
            do_not_look()

    for _ in range(8):
        newest, room = step_of(whole_newest(out)), int(draw.random() * scenario.size)
        if small:
            left = shutil.disk_usage(out.parent).free - room
            filler.write_bytes(b"x" * max(0, left))
        child = scenario.run(out, partial(before, room))
        code = child.wait()
        filler.unlink(missing_ok=True)
        if code == errors.OK:  # it was enough after all: once more, from the start
            shutil.rmtree(out)
            continue
        require(code == errors.OUT_OF_SPACE, f"exit code {code}: {child.text[-2000:]}")
        require(NEEDED.search(child.text), f"no bytes needed and free in {child.text!r}")
        require(child.text.count("\n") == 1, f"not one line: {child.text!r}")
        require(step_of(whole_newest(out)) >= newest, "the previous checkpoint is gone")
        scenario.finish(out)
        where = "on a full tmpfs" if small else "by RLIMIT_FSIZE"
        return Counter({"strikes": 1, where: 1, "in the middle of writing": blind or not small})
    raise Failed("no full disk in 8 tries")


def damage_trial(scenario: Scenario, draw: random.Random, out: Path) -> Found:
    """A flipped bit, a cut or a missing file in the newest checkpoint: it is skipped, and said."""
    child = scenario.run(out)
    wait_for_step(child, out, draw.randint(3, 5))
    child.kill(signal.SIGKILL)
    child.wait()
    shutil.rmtree(out / "model", ignore_errors=True)
    saved = whole_newest(out)
    require(saved is not None and len(checkpoint.all_in(out)) > 1, "fewer than two checkpoints")
    assert saved is not None
    file = draw.choice(sorted(saved.path.iterdir()))
    raw = bytearray(file.read_bytes())
    how = draw.choice(("bits flipped", "bits flipped", "files cut", "files deleted"))
    if how == "bits flipped":
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        file.write_bytes(raw)
    elif how == "files cut":
        file.write_bytes(raw[: draw.randrange(len(raw))])
    else:
        file.unlink()
    scenario.finish(out, says=f"skipped a damaged checkpoint: {saved.path}")
    return Counter({"strikes": 1, how: 1})


def signal_trial(scenario: Scenario, draw: random.Random, out: Path) -> Found:
    """SIGTERM or Ctrl-C finishes the step and saves; a second one stops at once."""
    found: Found = Counter()
    child = scenario.run(out)
    wait_for_step(child, out, draw.randint(1, 4))
    seen, number = last_step(out), draw.choice((signal.SIGINT, signal.SIGTERM))
    child.kill(number)
    if twice := draw.random() < 0.5:
        time.sleep(draw.uniform(0.0, 0.02))
        child.kill(number)
    code = child.wait()
    require(code in (errors.OK, errors.INTERRUPTED), f"exit code {code}: {child.text[-2000:]}")
    if code == errors.INTERRUPTED:
        found["strikes"] += 1
        at_once = "stopped at once" in child.text
        found["at once" if at_once else "after a save"] += 1
        # a signal after the loop stops at once, too
        require(at_once or "resume with" in child.text, child.text)
        require(twice or not at_once or seen >= scenario.steps - 1, child.text)
        require(step_of(whole_newest(out)) >= seen - at_once, "less saved than was done")
    scenario.finish(out)
    return found


# ---- all of it -----------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A tmpfs at `folder`, in a mount namespace that ends with this process; False: not allowed."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def private_mounts() -> bool:
    """Whether this process may mount file systems that nobody else sees."""
    new_namespace = 0x00020000
    if ctypes.CDLL(None, use_errno=True).unshare(new_namespace) != 0:
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True).returncode == 0


def prepare(folder: Path) -> list[Scenario]:
    """Text, a model to fine-tune, and the undisturbed run of every scenario."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    text = folder / "text.txt"
    text.write_text(data.load().documents[0].text[5000:25000])
    torch.set_num_threads(1)
    checkpoint.require()
    machine.gemm_rate()  # measured here, once
    made = []
    given = ["--data", str(text)]
    for name in ("gru", "transformer"):
        # not in a child: torch imports at the first step what then takes longer than a run
        base = [*SCENARIOS[name].split(), *given, "--out", str(folder / f"base {name}")]
        require(cli.main(base) == errors.OK, "no model to fine-tune")
    for name, command in SCENARIOS.items():
        arguments = [*command.split(), *given]
        if name.startswith("rl "):
            base = folder / f"base {name[3:]}" / "model"
            arguments[1:1] = [str(base), "--reward", f"{__name__}:vowels"]
        scenario = Scenario(name, arguments)
        measure(scenario, folder / name)
        made.append(scenario)
    return made


def measure(scenario: Scenario, out: Path) -> None:
    started = time.perf_counter()
    child = scenario.run(out)
    code = child.wait()
    require(code == 0, f"{scenario.name}: {child.text}")
    scenario.seconds = time.perf_counter() - started
    scenario.want = hashlib.sha256((out / "model" / checkpoint.MODEL).read_bytes()).hexdigest()
    newest = checkpoint.all_in(out)[0]
    scenario.size = sum(p.stat().st_size for p in newest.iterdir())
    scenario.steps = step_of(checkpoint.newest(out))
    scenario.writes = 2 * scenario.steps + 1
    shutil.rmtree(out)
    reader, writer = os.pipe()
    child = scenario.run(out, lambda: at_lines_that_save(lambda: os.write(writer, b"x") and None))
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        scenario.lines = len(file.read())
    require(child.wait() == 0, child.text)
    scenario.finish(out)  # a run that was complete changes nothing
    shutil.rmtree(out)


def trial(kind: str, scenario: Scenario, draw: random.Random, folder: Path, disk: bool) -> Found:
    out = folder / "run"
    if kind == "kills":
        return kill_trial(scenario, draw, out)
    if kind == "damages":
        return damage_trial(scenario, draw, out)
    if kind == "signals":
        return signal_trial(scenario, draw, out)
    if not disk or draw.random() < 0.5:
        return disk_trial(scenario, draw, out, small=False)
    with small_disk(folder, 12 * scenario.size) as mounted:
        return disk_trial(scenario, draw, out, small=mounted)


def torture(wanted: dict[str, int], seed: int) -> tuple[dict[str, Found], list[str]]:
    """What landed, by kind, and what failed."""
    totals: dict[str, Found] = {kind: Counter() for kind in wanted}
    failures: list[str] = []
    disk = private_mounts()
    if wanted["disks"] and not disk:
        print("may not mount a tmpfs: every full disk is a limit of the size of files", flush=True)
    with tempfile.TemporaryDirectory(prefix="torture.") as name:
        scenarios = prepare(Path(name))
        for kind, count in wanted.items():
            number = 0
            while totals[kind]["strikes"] < count and len(failures) < 10:
                scenario = scenarios[number % len(scenarios)]
                draw = random.Random(f"{seed}/{kind}/{number}")
                folder = Path(tempfile.mkdtemp(dir=name))
                try:
                    totals[kind] += trial(kind, scenario, draw, folder, disk)
                except Failed as error:
                    failures.append(f"{kind} {seed}/{number} ({scenario.name}): {error}")
                    print("FAILED", failures[-1], flush=True)
                shutil.rmtree(folder)
                totals[kind]["runs"] += 1
                number += 1
    return totals, failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    for kind, count in {"kills": 200, "disks": 50, "damages": 50, "signals": 20}.items():
        parser.add_argument(f"--{kind}", type=int, default=count, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    wanted = {kind: getattr(args, kind) for kind in ("kills", "disks", "damages", "signals")}
    started = time.perf_counter()
    totals, failures = torture(wanted, args.seed)
    for kind, found in totals.items():
        where = ", ".join(
            f"{n} {what}" for what, n in found.items() if what not in ("runs", "strikes")
        )
        print(f"{found['strikes']:4} {kind:8} in {found['runs']:3} runs  {where}")
    runs = sum(found["runs"] for found in totals.values())
    print(
        f"{runs - len(failures)} of {runs} runs end with the weights of the undisturbed run; "
        f"seed {args.seed}, {time.perf_counter() - started:.0f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
