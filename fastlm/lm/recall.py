"""What attention is for: recalling, far behind, what was said of a thing.

    (k3 is v9) (k0 is v2) ...   (distance tokens of noise)   k0? k3? ...

A row tells some facts, one token each, then noise, then asks for each of them; only the answers are
predicted and counted, and none is shown. A Transformer looks the fact up, however far it is; a GRU
has to carry all of them in its state through the noise. Both train for the same time, on distances
up to a limit that grows to the tested one over the first half of it. A guess is right in 1 of
`values`, one among the values that were told in 1 of `pairs`.

Source: associative recall, Arora et al. 2023 (arXiv:2312.04927).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import files, machine
from .budget import Budget, learning_rate
from .errors import UsageError
from .kinds import LanguageModel
from .model import GRULM, parameter_count
from .optimizer import make_optimizer
from .pairs import IGNORED
from .suggest import Parser
from .transformer import TransformerLM


@dataclass(frozen=True)
class Task:
    pairs: int = 8
    keys: int = 16
    values: int = 16
    noise: int = 16  # different tokens between facts and questions
    distance: int = 512
    batch: int = 16

    def __post_init__(self) -> None:
        for name, least in {"pairs": 1, "distance": 0, "batch": 1}.items():
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.pairs > self.keys:
            raise UsageError(f"pairs must be at most {self.keys}, got {self.pairs}")

    @property
    def vocabulary(self) -> int:
        """Facts, questions, values, noise."""
        return self.keys * self.values + self.keys + self.values + self.noise

    @property
    def length(self) -> int:
        return 2 * self.pairs + self.distance

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and targets [B, length]; a target is -100 where nothing is asked."""

        def ints(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        def shuffled(count: int) -> Tensor:
            return torch.rand(self.batch, count, generator=generator).argsort(1)

        keys, asked = shuffled(self.keys)[:, : self.pairs], shuffled(self.pairs)
        values = ints(self.values, self.batch, self.pairs)
        question = self.keys * self.values
        answer = question + self.keys
        noise = answer + self.values + ints(self.noise, self.batch, self.distance)
        facts = keys * self.values + values
        tokens = torch.cat([facts, noise, question + keys.gather(1, asked)], 1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -self.pairs :] = answer + values.gather(1, asked)
        return tokens, targets


@dataclass(frozen=True)
class Contestant:
    """A model and how it is trained."""

    model: LanguageModel
    lr: float


def contestants(task: Task, seed: int, *, gru: int = 128, transformer: int = 64) -> dict[str, Any]:
    """Of about as many parameters, each with the learning rate that suits it."""
    torch.manual_seed(seed)
    looks = TransformerLM(
        task.vocabulary, hidden_size=transformer, num_layers=2, num_heads=2, context=task.length
    )
    return {
        "transformer": Contestant(looks, 3e-3),
        "gru": Contestant(GRULM(task.vocabulary, gru), 3e-3),
    }


def train(contestant: Contestant, task: Task, budget: Budget, *, seed: int) -> tuple[int, float]:
    """(steps, seconds) of training; the rate falls with the part of the budget that is used."""
    model, generator = contestant.model.train(), torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, contestant.lr, 0.0)
    steps, started = 0, time.perf_counter()
    while (share := budget.share(steps, time.perf_counter() - started)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(contestant.lr, share, 0.05, 0.05)
        limit = round(task.distance * min(1.0, 2.0 * share))
        distance = int(torch.randint(limit + 1, (), generator=generator))
        tokens, targets = replace(task, distance=distance).draw(generator)
        loss, _ = model.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
    return steps, time.perf_counter() - started


@torch.no_grad()
def accuracy(model: LanguageModel, task: Task, *, batches: int = 16, seed: int = 10**6) -> float:
    """Share of the questions whose likeliest value is the right one, on sequences of their own."""
    model.eval()
    generator, right, asked = torch.Generator().manual_seed(seed), 0, 0
    for _ in range(batches):
        tokens, targets = task.draw(generator)
        kept = targets != IGNORED
        hidden, _ = model.hidden(tokens)
        guess = model.head(hidden[kept]).argmax(1)
        right, asked = right + int((guess == targets[kept]).sum()), asked + int(kept.sum())
    return right / asked


def run(task: Task, budget: Budget, *, seed: int = 0, only: str | None = None) -> dict[str, Any]:
    """Train and test both, one after the other, or one of them."""
    found: dict[str, Any] = {}
    for name, contestant in contestants(task, seed).items():
        if only not in (None, name):
            continue
        before = accuracy(contestant.model, task)
        steps, seconds = train(contestant, task, budget, seed=seed + 1)
        found[name] = {
            "parameters": parameter_count(contestant.model),
            "lr": contestant.lr,
            "steps": steps,
            "seconds": seconds,
            "accuracy_before": before,
            "accuracy": accuracy(contestant.model, task),
        }
    return {
        "task": asdict(task),
        "budget": str(budget),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "chance": 1 / task.values,
        "seed": seed,
        "models": found,
    }


def report(result: dict[str, Any]) -> str:
    task = result["task"]
    lines = [
        f"recall of {task['pairs']} facts over {task['distance']} tokens, {result['budget']} of "
        f"training each, {result['threads']} threads; chance is {result['chance']:.1%}"
    ]
    for name, row in result["models"].items():
        lines.append(
            f"{name:12} {row['accuracy']:6.1%} right   {row['parameters']:,} parameters, "
            f"{row['steps']} steps in {row['seconds']:.0f} s"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command `fastlm bench recall`."""
    parser = Parser(prog="fastlm bench recall", description=__doc__)
    parser.add_argument("--budget", default="120s", metavar="B", help="for each (120s)")
    parser.add_argument("--distance", type=int, default=Task.distance, metavar="N")
    parser.add_argument("--pairs", type=int, default=Task.pairs, metavar="N")
    parser.add_argument("--batch", type=int, default=Task.batch, metavar="N")
    parser.add_argument("--only", choices=("transformer", "gru"), help="one of the two")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON there")
    options = parser.parse_args(argv)
    machine.use_threads(options.threads)
    if options.save is not None:
        files.require_place(options.save)
    task = Task(pairs=options.pairs, distance=options.distance, batch=options.batch)
    result = run(task, Budget.parse(options.budget), seed=options.seed, only=options.only)
    if options.save is not None:
        files.write_json(options.save, result)
    print(files.dumps(result, indent=1) if options.json else report(result))
    return 0
