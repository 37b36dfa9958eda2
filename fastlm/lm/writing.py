"""Many texts written at once: each as it becomes certain, and those that have ended make room.

Sample number j of a prompt is drawn as row j, whatever is written beside it, so a text depends on
its prompt, its number and the options alone: to the bit where the model runs as a `GRUDecoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastlm

from .decoding import Cache
from .kinds import LanguageModel
from .tokenizer import Tokenizer

# text appears after this many tokens: far less than a second of work, and few calls from Python
PIECE = 16
ROWS = 64  # written at once


class StopText:
    """Passes text on, except what may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def put(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string was completed)."""
        self._held += text
        hits = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:  # the first that is complete, wherever tokens were cut
            return self._held[: min(hits)[1]], True
        keep = 0
        for stop in self._stops:
            for size in range(1, min(len(stop), len(self._held) + 1)):
                if self._held.endswith(stop[:size]):
                    keep = max(keep, size)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready, False

    def finish(self) -> str:
        return self._held


class Piece(NamedTuple):
    """What a row has written since its last piece."""

    row: int  # number of the prompt * samples + number of the sample
    text: str
    tokens: int  # of the row so far, a stop string and the end of a document counted
    stopped: str | None  # "end" of the document, "stop" string, "length"; None: it goes on


class _Writer:
    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._end, self._stream = tokenizer.end, tokenizer.stream()
        self._stop = StopText(stops)
        self.tokens = 0
        self.stopped: str | None = None

    def put(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens."""
        found = ""
        for token in tokens:
            self.tokens += 1
            if token == self._end:
                return found + self.finish("end")
            text, stopped = self._stop.put(self._stream.put(token))
            found += text
            if stopped:
                self.stopped = "stop"
                return found
        return found

    def finish(self, reason: str) -> str:
        """What was held back; not the first bytes of a character that did not come."""
        self.stopped = reason
        return self._stop.finish()


def _rows_of(state: Any, chosen: Tensor) -> Any:
    if isinstance(state, Cache):
        return state.rows(chosen)
    if hasattr(state, "seen"):  # with the counts of penalties
        return state._replace(state=_rows_of(state.state, chosen), seen=state.seen[chosen])
    return state[:, chosen]


def _read(model: LanguageModel, prompts: Sequence[Tensor]) -> Any:
    """The state after all but the last token of each prompt. One by one: the bits of a product can
    depend on how many rows it has."""
    states: list[Any] = []
    for prompt in prompts:
        state = model.read(prompt[None, :-1])
        if state is None:
            config: Any = model.config
            like = next(model.parameters())
            state = like.new_zeros(config.num_layers, 1, config.hidden_size)
        states.append(state)
    return Cache.join(states) if isinstance(states[0], Cache) else torch.cat(states, 1)


def write(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Tensor],
    samples: int,
    max_new_tokens: int,
    stop: Sequence[str],
    sampling: dict[str, Any],
) -> Iterator[Piece]:
    """Pieces of all texts, the rows of a block in turn; every row has one last piece.

    `sampling` are options of `fastlm.generate`. The model is in eval mode until the iterator ends.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            decoder = model.decoder()
        share = max(1, ROWS // samples)
        for first in range(0, len(prompts), share):
            part = prompts[first : first + share]
            for begin in range(0, samples, ROWS):
                numbers = range(begin, min(begin + ROWS, samples))
                block = _Block(model, tokenizer, part, numbers, stop)
                for piece in block.write(decoder, max_new_tokens, sampling):
                    prompt, sample = divmod(piece.row, len(numbers))
                    yield piece._replace(row=(first + prompt) * samples + begin + sample)
    finally:
        model.train(was_training)


class _Block:
    """Samples of those numbers of each prompt, at once."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: Sequence[Tensor],
        numbers: range,
        stop: Sequence[str],
    ) -> None:
        self.end, count = tokenizer.end, len(numbers)
        device = prompts[0].device
        with torch.inference_mode():
            each = torch.arange(len(prompts), device=device).repeat_interleave(count)
            self.state = _rows_of(_read(model, prompts), each)
            self.last = torch.stack([prompt[-1:] for prompt in prompts])[each]
            read = [prompt[:-1] for prompt in prompts]
            self.history = torch.nn.utils.rnn.pad_sequence(read, True, -100.0)[each]
            numbered = torch.arange(numbers.start, numbers.stop, device=device)
            self.draws = numbered.repeat(len(prompts))
        self.rows = list(range(len(each)))
        self.writers = [_Writer(tokenizer, stop) for _ in self.rows]

    def write(self, decoder: Any, limit: int, sampling: dict[str, Any]) -> Iterator[Piece]:
        history: Tensor | None = self.history
        for index in range(0, limit, PIECE):
            count = min(PIECE, limit - index)
            # not around the yield: the caller's code must not run in inference mode
            with torch.inference_mode():
                made = fastlm.generate(
                    decoder, self.last, count, step=index, rows=self.draws, state=self.state,
                    stop=self.end, history=history, **sampling,
                )  # fmt: skip
            history = None
            lengths = made.lengths.tolist()
            texts = [
                self.writers[row].put(tokens[:length])
                for row, tokens, length in zip(
                    self.rows, made.tokens.tolist(), lengths, strict=True
                )
            ]
            rows = self.rows
            self._keep(made)
            for row, text in zip(rows, texts, strict=True):
                writer = self.writers[row]
                if text or writer.stopped:
                    yield Piece(row, text, writer.tokens, writer.stopped)
            if not self.rows:
                return
        for row in self.rows:
            writer = self.writers[row]
            yield Piece(row, writer.finish("length"), writer.tokens, "length")

    def _keep(self, made: Any) -> None:
        """What follows goes on from here, in the rows that have not ended."""
        going = [i for i, row in enumerate(self.rows) if self.writers[row].stopped is None]
        self.state, self.last = made.state, made.tokens[:, -1:]
        if len(going) == len(self.rows):
            return
        with torch.inference_mode():
            chosen = torch.tensor(going, dtype=torch.int64, device=self.last.device)
            self.state, self.last = _rows_of(self.state, chosen), self.last[chosen]
            self.draws = self.draws[chosen]
        self.rows = [self.rows[i] for i in going]
