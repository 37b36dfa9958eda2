"""One variant of the plain model in a process of its own, driven step by step through pipes.

Reads one JSON object a line: first the settings, then commands; answers each with one line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import fastlm
import fastlm.nn

from . import measure
from .tokens import zipf_tokens

PHASES = ("embedding + GRU", "head + loss", "backward", "optimizer")


class Plain(nn.Module):
    """Embedding -> GRU -> Linear -> cross-entropy on flattened logits."""

    def __init__(self, vocab: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocab)
        self.loss_function = nn.CrossEntropyLoss()

    def body(self, tokens: Tensor) -> Tensor:
        return self.gru(self.embedding(tokens))[0]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        logits = self.head(output)
        return self.loss_function(logits.view(-1, logits.shape[-1]), target.reshape(-1))


class Ours(nn.Module):
    """The same parameters through fastlm."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        vocab, hidden = plain.embedding.weight.shape
        self.embedding_gru = fastlm.nn.EmbeddingGRU(vocab, hidden, hidden, batch_first=True)
        self.head = plain.head
        before = [*plain.embedding.parameters(), *plain.gru.parameters()]
        with torch.no_grad():
            for new, old in zip(self.embedding_gru.parameters(), before, strict=True):
                new.copy_(old)

    def body(self, tokens: Tensor) -> Tensor:
        return self.embedding_gru(tokens)[0]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return fastlm.linear_cross_entropy(
            output, self.head.weight, target, linear_bias=self.head.bias
        )


class Trainer:
    """Model, optimizer and tokens of one variant."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.manual_seed(spec["seed"])
        plain = Plain(spec["vocab"], spec["hidden"])
        self.model: Plain | Ours = Ours(plain) if spec["ours"] else plain
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=spec["fused"])
        batch, seq, steps = spec["batch"], spec["seq"], spec["steps"]
        ids = zipf_tokens(batch * (steps * seq + 1), spec["vocab"], seed=spec["seed"])
        self.stream = torch.from_numpy(ids).view(batch, -1)  # each row reads on where it stopped
        self.seq, self.done = seq, 0

    def step(self) -> dict[str, Any]:
        """One training step: its loss and the seconds of each phase."""
        first = self.done * self.seq
        tokens = self.stream[:, first : first + self.seq].contiguous()
        target = self.stream[:, first + 1 : first + 1 + self.seq].contiguous()
        self.done += 1
        marks = [time.perf_counter()]
        self.optimizer.zero_grad()
        output = self.model.body(tokens)
        marks.append(time.perf_counter())
        loss = self.model.loss(output, target)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        self.optimizer.step()
        marks.append(time.perf_counter())
        phases = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        return {"loss": loss.item(), "phases": phases, "unique": int(tokens.unique().numel())}

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "step":
            return self.step()
        if command["do"] == "memory":
            return {"bytes": measure.peak() if measure.has_peak() else None}
        if command["do"] == "save":
            torch.save([p.detach() for p in self.parameters()], command["path"])
            return {}
        raise ValueError(f"fastlm.bench: unknown command {command['do']!r}")

    def parameters(self) -> list[Tensor]:
        """In the order of the plain model."""
        return list(self.model.parameters())


def main() -> None:
    # answers go through the original stdout; whatever a library prints goes to stderr
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = json.loads(sys.stdin.readline())
    torch.set_num_threads(spec["threads"])
    # a step of a tiny model brings in every library, so that the memory is the model's
    Trainer({**spec, "vocab": 8, "hidden": 8, "batch": 1, "seq": 2, "steps": 1}).step()
    empty = measure.resident() if measure.has_peak() else 0
    trainer = Trainer(spec)
    print(json.dumps({"empty": empty}), file=answers)
    for line in sys.stdin:
        print(json.dumps(trainer.answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
