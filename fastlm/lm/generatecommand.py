"""`fastlm generate`: prompts from the command line, a file or standard input; text as it comes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import checkpoint, errors, generation, sources

_SAMPLING = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "seed", "stop",
)  # fmt: skip


def _utf8(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise errors.InputError(
            f"{source}: not UTF-8: {error.reason} at byte {error.start}"
        ) from None


def _standard_input() -> str:
    return _utf8("standard input", sys.stdin.buffer.read())


def _prompt_of(source: str, number: int, line: str) -> str:
    try:
        value = sources.parsed(line)
    except ValueError as error:
        raise errors.InputError(f"{source}, line {number}: no JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise errors.InputError(
            f"{source}, line {number}: a string, or an object with a string prompt, was expected"
        )
    return prompt


def _from_file(name: str) -> list[str]:
    """One prompt a line, blank ones left out; of *.jsonl JSON strings or objects with `prompt`."""
    if name == "-":
        source, text = "standard input", _standard_input()
    else:
        try:
            source, text = name, _utf8(name, Path(name).read_bytes())
        except OSError as error:
            raise errors.InputError(f"{name}: {error.strerror}") from None
    lines = [
        (i, line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()
    ]
    if name.endswith(".jsonl"):
        found = [_prompt_of(source, number, line) for number, line in lines]
    else:
        found = [line for _, line in lines]
    if not found:
        raise errors.InputError(f"{source}: no prompt in it")
    return found


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is not None:
        return _from_file(args.prompts)
    if args.prompt == "-":
        # a shell ends what it writes with a line end that nobody meant
        return [_standard_input().removesuffix("\n").removesuffix("\r")]
    # bytes that the locale could not read are in it as they came
    return [_utf8("--prompt", os.fsencode(args.prompt))]


def _warn_of_context(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    for number, prompt in enumerate(prompts, 1):
        count, lost = generation.forgotten(model, tokenizer, prompt)
        if lost:
            which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
            print(
                f"fastlm generate: {which} has {count} tokens, the model's context is "
                f"{model.config.context}: its first {lost} do not count",
                file=sys.stderr,
            )


def _stream(pieces: Any, prompt: str) -> None:
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()


def _print_all(pieces: Any, prompts: list[str], samples: int) -> None:
    """Each text as soon as it and all before it are complete."""
    texts = [""] * (len(prompts) * samples)
    ended: set[int] = set()
    shown = 0
    for piece in pieces:
        texts[piece.row] += piece.text
        if piece.stopped:
            ended.add(piece.row)
        while shown in ended:
            prompt, sample = divmod(shown, samples)
            name = f"prompt {prompt + 1}" if len(prompts) > 1 else ""
            name += ", " * (bool(name) and samples > 1)
            name += f"sample {sample + 1}" if samples > 1 else ""
            print(f"==> {name} <==\n{prompts[prompt]}{texts[shown]}\n", flush=True)
            texts[shown] = ""
            shown += 1


def run(args: argparse.Namespace, print_json: Callable[[Any], None]) -> int:
    prompts = _prompts(args)
    saved = checkpoint.find(args.model)
    checkpoint.say_skipped(saved)
    model, tokenizer = generation.load_checkpoint(saved)
    if not args.quiet:
        _warn_of_context(model, tokenizer, prompts)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8
    one = args.prompts is None and args.samples == 1
    options = {name: getattr(args, name) for name in _SAMPLING} | {"samples": args.samples}
    try:
        if args.json:
            made = generation.generate_batch(model, tokenizer, prompts, **options)
            texts = [asdict(text) for text in made]
            print_json(
                texts[0] | {"seed": args.seed} if one else {"seed": args.seed, "texts": texts}
            )
        else:
            pieces = generation.pieces(model, tokenizer, prompts, **options)
            if one:
                _stream(pieces, prompts[0])
            else:
                _print_all(pieces, prompts, args.samples)
    except ValueError as error:  # an option that the sampler refuses, in its own words
        raise errors.UsageError(str(error)) from None
    return errors.OK
