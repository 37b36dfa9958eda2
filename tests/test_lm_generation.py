"""Generation: seeds, stop strings, streaming, constant state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastlm
from fastlm.lm.generation import _StopText, generate
from fastlm.lm.model import GRULM, PlainGRULM
from fastlm.lm.tokenizer import ByteTokenizer
from fastlm.lm.transformer import TransformerLM

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
    hold = _StopText(["\n\n", "END"])
    assert hold.put("a\n") == ("a", False)
    assert hold.put("bE") == ("\nb", False)
    assert hold.put("N") == ("", False)
    assert hold.put("x") == ("ENx", False)
    assert hold.put("yENDz") == ("y", True)
    hold.put("E")
    assert _StopText(["END"]).finish() == ""


def test_caller_is_outside_inference_mode_and_training_state_returns() -> None:
    made = model().train()
    for _ in generate(made, TOKENIZER, "ab", max_new_tokens=3):
        assert not torch.is_inference_mode_enabled()
    assert made.training


def test_sampling_options_are_those_of_the_op() -> None:
    with pytest.raises(ValueError, match="fastlm.generate: temperature"):
        text(model(), temperature=-1.0)
    assert "generate" in fastlm.__all__
