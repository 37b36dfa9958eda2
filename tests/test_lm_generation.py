"""Generation: seeds, stop strings, streaming, constant state."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

import fastlm
from fastlm import extension
from fastlm.bench import measure
from fastlm.lm import writing
from fastlm.lm.decoding import window_start
from fastlm.lm.errors import UsageError
from fastlm.lm.generation import generate, generate_batch, pieces
from fastlm.lm.model import GRULM, PlainGRULM
from fastlm.lm.tokenizer import ByteTokenizer
from fastlm.lm.transformer import TransformerLM
from fastlm.lm.writing import StopText

TOKENIZER = ByteTokenizer()


def model(kind: Any = GRULM) -> Any:
    torch.manual_seed(1)
    made = kind(TOKENIZER.vocab_size, 16)
    with torch.no_grad():
        made.head.bias[TOKENIZER.end] = -100.0
        made.head.bias[128:256] = -100.0
    return made


def transformer() -> Any:
    torch.manual_seed(1)
    size: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "context": 12}
    made = TransformerLM(TOKENIZER.vocab_size, end=TOKENIZER.end, **size)
    with torch.no_grad():
        made.head.bias[TOKENIZER.end] = made.head.bias[128:256] = -100.0
    return made


def text(made: Any, prompt: str = "ab", **options: Any) -> str:
    return "".join(generate(made, TOKENIZER, prompt, **{"max_new_tokens": 30, **options}))


@pytest.mark.parametrize("make", [model, transformer])
def test_a_seed_decides_the_text(make: Any) -> None:
    made = make()
    assert text(made, seed=1) == text(made, seed=1)
    assert text(made, seed=1) != text(made, seed=2)
    assert len(text(made, seed=1)) == 30


def test_both_models_write_the_same() -> None:
    ours, plain = model(), model(PlainGRULM)
    plain.load_state_dict(ours.state_dict())
    assert text(ours, temperature=0.7, top_k=20, top_p=0.9) == text(
        plain, temperature=0.7, top_k=20, top_p=0.9
    )


def test_top_k_one_is_the_likeliest_token() -> None:
    made = model().eval()
    ids = TOKENIZER.encode("ab")
    tokens = torch.tensor(ids)[None]
    for _ in range(5):
        with torch.no_grad():
            best = made(tokens)[0][0, -1].argmax()
        tokens = torch.cat([tokens, best[None, None]], 1)
    assert text(made, max_new_tokens=5, top_k=1) == TOKENIZER.decode(tokens[0, 2:].tolist())


def test_long_prompt_is_read_in_pieces() -> None:
    made = model(PlainGRULM)
    prompt = "abcdefg " * 400
    with torch.no_grad():
        best = made.eval()(torch.tensor(TOKENIZER.encode(prompt))[None])[0][0, -1].argmax()
    assert text(made, prompt, max_new_tokens=1, top_k=1) == TOKENIZER.decode([int(best)])


@pytest.mark.parametrize("size", [5, 12, 30])
def test_a_transformer_reads_a_prompt_as_if_it_had_made_it(size: int) -> None:
    """Past the context of 12, and over the pieces in which text is made."""
    made = transformer()
    whole = text(made, "a", max_new_tokens=60, temperature=0.0)
    prompt = "a" + whole[:size]
    assert text(made, prompt, max_new_tokens=60 - size, temperature=0.0) == whole[size:]


def test_stop_string_ends_the_text_and_is_not_part_of_it() -> None:
    made = model()
    whole = text(made, max_new_tokens=200)
    stop = whole[20:23]
    cut = text(made, max_new_tokens=200, stop=[stop, ""])
    assert cut == whole[: whole.index(stop)]


def test_end_of_document_ends_the_text() -> None:
    made = model()
    with torch.no_grad():
        made.head.bias[TOKENIZER.end] = 100.0
    assert text(made) == ""


@pytest.mark.parametrize("new", [0, 1])
def test_no_or_one_token_and_an_empty_prompt(new: int) -> None:
    assert len(text(model(), "", max_new_tokens=new)) == new


def test_stop_text_holds_back_only_a_possible_beginning() -> None:
    hold = StopText(["\n\n", "END"])
    assert hold.put("a\n") == ("a", False)
    assert hold.put("bE") == ("\nb", False)
    assert hold.put("N") == ("", False)
    assert hold.put("x") == ("ENx", False)
    assert hold.put("yENDz") == ("y", True)
    hold.put("E")
    assert StopText(["END"]).finish() == ""


@pytest.mark.parametrize(
    "stops, text, want",
    [
        (["bc", "abcd"], "abcd", "a"),  # complete before the one that begins earlier
        (["bc", "abc"], "xabc", "x"),
        (["abcd", "c"], "xabce", "xab"),
    ],
)
def test_stop_text_is_the_same_however_tokens_cut_it(
    stops: list[str], text: str, want: str
) -> None:
    for size in range(1, len(text) + 1):
        hold, found, stopped = StopText(stops), "", False
        for start in range(0, len(text), size):
            if not stopped:
                piece, stopped = hold.put(text[start : start + size])
                found += piece
        assert (found, stopped) == (want, True)


def test_caller_is_outside_inference_mode_and_training_state_returns() -> None:
    made = model().train()
    for _ in generate(made, TOKENIZER, "ab", max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
    assert made.training


def test_sampling_options_are_those_of_the_op() -> None:
    with pytest.raises(ValueError, match="fastlm.generate: temperature"):
        text(model(), temperature=-1.0)
    assert "generate" in fastlm.__all__


PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
BATCH = ["ab", "", "the cat sat on the mat and would not leave", "x", "ab"]


@pytest.mark.parametrize("make", [model, transformer])
@pytest.mark.parametrize("how", [{"top_p": 0.9}, {"min_p": 0.05, **PENALTIES}], ids=str)
def test_each_text_of_a_batch_is_that_written_alone(
    make: Any, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    with torch.no_grad():
        made.head.bias[TOKENIZER.end] = 0.0  # rows end at different places
    how = {"max_new_tokens": 50, "seed": 5, "stop": [*"etonq05", "a#"], **how}
    alone = [generate_batch(made, TOKENIZER, [prompt], samples=3, **how) for prompt in BATCH]
    assert [one[0].text for one in alone] == [text(made, prompt, **how) for prompt in BATCH]
    for rows in (64, 6, 2):  # several prompts at once, two, and not even the samples of one
        monkeypatch.setattr(writing, "ROWS", rows)
        together = generate_batch(made, TOKENIZER, BATCH, samples=3, **how)
        assert together == [found for one in alone for found in one]
    assert together[:3] == together[12:] and len({found.text for found in together[:3]}) > 1
    assert {found.stopped for found in together} >= {"end", "stop"}
    assert not any(set("etonq05") & set(found.text) for found in together)


@pytest.mark.skipif(extension.unavailable is not None, reason="the C++ kernels are not built")
def test_states_of_a_batch_are_those_of_rows_alone_to_the_bit() -> None:
    made = model()
    ids = [torch.from_numpy(TOKENIZER.encode(prompt)) for prompt in BATCH if prompt]
    draws = torch.zeros(len(ids), dtype=torch.int64)
    together = fastlm.generate(
        made.decoder(), torch.stack([i[-1:] for i in ids]), 20, rows=draws,
        state=writing._read(made, ids), return_logprobs=True,
    )  # fmt: skip
    for row, one in enumerate(ids):
        alone = fastlm.generate(
            made.decoder(), one[-1:], 20, state=made.read(one[None, :-1]), return_logprobs=True
        )
        assert torch.equal(alone.tokens, together.tokens[row])
        assert torch.equal(alone.logprobs, together.logprobs[row])
        assert torch.equal(alone.state[:, 0], together.state[:, row])


def test_penalties_are_over_prompt_and_text_whatever_the_pieces() -> None:
    """As fastlm.generate over the whole row at once; 200 tokens are 13 pieces."""
    made, prompt = model(), "abcabcabc"
    ids = torch.from_numpy(TOKENIZER.encode(prompt))
    how: dict[str, Any] = {"temperature": 0.3, "seed": 2, **PENALTIES}
    want = fastlm.generate(made.decoder(), ids, 200, **how).tokens
    assert text(made, prompt, max_new_tokens=200, **how) == TOKENIZER.decode(want.tolist())
    assert text(made, prompt, max_new_tokens=200, temperature=0.3, seed=2) != text(
        made, prompt, max_new_tokens=200, **how
    )


@pytest.mark.parametrize("make", [model, transformer])
def test_stop_strings_over_several_tokens_are_never_printed_in_part(make: Any) -> None:
    """A token is a byte here: every stop string spans as many tokens as it is long."""
    made = make()
    whole = text(made, max_new_tokens=120)
    for start in (15, 16, 30, 47):  # on both sides of the pieces of 16
        stop = whole[start : start + 5]
        shown = list(generate(made, TOKENIZER, "ab", max_new_tokens=120, stop=[stop, "\0\0"]))
        assert "".join(shown) == whole[: whole.index(stop)]
    (found,) = generate_batch(made, TOKENIZER, ["ab"], max_new_tokens=120, stop=[whole[30:35]])
    assert found.stopped == "stop" and found.tokens == whole.index(whole[30:35]) + 5


def test_characters_over_several_tokens_are_never_printed_in_part() -> None:
    told = "naïve 日本語 🙂 ende"
    for size in range(1, 20):
        data = told.encode()
        writer = writing._Writer(TOKENIZER, ["語 🙂 en", "nothing"])
        shown = [writer.put(data[at : at + size]) for at in range(0, len(data), size)]
        assert "".join(shown) == "naïve 日本" and writer.stopped == "stop"
    for cut in range(len(data) + 1):
        writer = writing._Writer(TOKENIZER, [])
        shown_text = writer.put(data[:cut]) + writer.finish("length")
        assert told.startswith(shown_text) and len(shown_text.encode()) > cut - 4
    writer = writing._Writer(TOKENIZER, ["xyz"])
    assert writer.put([*b"ab\xe6x", TOKENIZER.end, *b"no"]) == "ab\ufffdx"
    assert (writer.stopped, writer.tokens) == ("end", 5)


@pytest.mark.parametrize("count", [3, 12, 13, 18, 19, 24, 40])
def test_beyond_its_context_a_transformer_forgets_the_older_half(count: int) -> None:
    """What comes after `count` tokens is what comes after those that are left, read as a row."""
    made = transformer()
    whole = "a" + text(made, "a", max_new_tokens=60, temperature=0.0)
    start = window_start(count, 12)
    assert 0 <= start < count and 12 >= count - start > (0 if count < 12 else 5)
    kept = whole[start:count]
    assert text(made, kept, max_new_tokens=1, temperature=0.0) == whole[count]
    tokens = torch.tensor(TOKENIZER.encode(kept))[None]
    with torch.no_grad():
        assert int(made.eval()(tokens)[0][0, -1].argmax()) == ord(whole[count])


@pytest.mark.skipif(not measure.has_peak(), reason="no memory of a process on this system")
@pytest.mark.parametrize("make", [GRULM, TransformerLM])
def test_five_thousand_tokens_at_constant_memory_and_time(make: Any) -> None:
    size: dict[str, Any] = {"context": 64, "num_layers": 1} if make is TransformerLM else {}
    made, count = make(257, hidden_size=256, **size), 5000
    with torch.no_grad():
        made.head.bias[TOKENIZER.end] = -100.0
    list(generate(made, TOKENIZER, "ab", max_new_tokens=200))
    seconds, memory, before = [], [], time.thread_time()
    for index, _ in enumerate(pieces(made, TOKENIZER, ["ab"], max_new_tokens=count)):
        now = time.thread_time()
        seconds.append(now - before)
        before = now
        if index % 50 == 12:
            memory.append(measure.resident())
    tokens = len(seconds) * writing.PIECE
    assert tokens >= count and len(memory) > 5
    thousand = 1000 // writing.PIECE
    ratio = statistics.median(seconds[-thousand:]) / statistics.median(seconds[:thousand])
    assert ratio < 1.5
    # the states alone would be 1 KiB a token
    assert max(memory) - memory[0] < 2 << 20


@pytest.mark.parametrize("how", [{"samples": 0}, {"max_new_tokens": -1}])
def test_numbers_that_make_no_sense(how: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        generate_batch(model(), TOKENIZER, ["a"], **how)
    assert generate_batch(model(), TOKENIZER, []) == []
