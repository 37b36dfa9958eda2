"""The command `fastlm`. Heavy imports wait until a command needs them.

Exit codes: 0 ok, 1 a criterion failed, 2 usage, 3 bad input, 4 bad checkpoint, 5 out of memory or
disk, 130 interrupted (training state saved).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import errors, interrupt
from .options import build_parser


def _reporter(args: argparse.Namespace) -> Any:
    from . import progress

    # stdout carries the JSON object alone
    return progress.reporter(quiet=args.quiet, stream=sys.stderr if args.json else sys.stdout)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def _resume_command(out: Path) -> str:
    return f"fastlm train --out {shlex.quote(str(out))} --resume auto"


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    passed, report = demo.run(
        quick=args.quick, budget=args.budget, out=args.out, reporter=_reporter(args)
    )
    if report.get("interrupted"):
        print(f"interrupted and saved; resume with: {_resume_command(args.out)}", file=sys.stderr)
        return errors.INTERRUPTED
    if args.json:
        _print_json(report)
    return errors.OK if passed else errors.CRITERION_FAILED


def _saved(args: argparse.Namespace) -> Any:
    """The checkpoint to continue from, or None for a new run."""
    from . import checkpoint

    if args.resume not in ("auto", "never"):
        return checkpoint.find(Path(args.resume))
    if args.resume == "never":
        if checkpoint.all_in(args.out):
            raise errors.UsageError(f"{args.out}: has checkpoints; choose another --out")
        return None
    return checkpoint.newest(args.out)


def _train(args: argparse.Namespace) -> int:
    from . import checkpoint, preparation, recipe, trainer

    checkpoint.require()
    saved = _saved(args)
    reporter = _reporter(args)
    names = recipe.Recipe.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names}
    settings = saved.state.get("settings", {}) if saved is not None else {}
    chosen = recipe.Recipe.of(settings, given)
    config = chosen.train_config()  # what is wrong with it is said before any text is read
    data = preparation.prepare(chosen.data_config())
    for line in preparation.describe(data):
        reporter.line(line)
    run = trainer.Trainer(
        chosen.make_model(data.tokens),
        data.tokens,
        data.tokenizer,
        config,
        out=args.out,
        reporter=reporter,
        save_every=args.save_every,
        on_save_error=args.on_save_error,
        settings=chosen.to_json(),
    )
    if saved is not None:
        checkpoint.say_skipped(saved)
        run.resume(saved, allow=tuple(filter(None, args.allow_change.split(","))))
        reporter.line(f"resumed from {saved.path}")
        if run.finished():
            reporter.line(
                f"its budget of {chosen.budget} is used; for more: --budget B --allow-change budget"
            )
    result = run.fit()
    if args.json:
        _print_json(asdict(result))
    if result.stopped == "interrupted":
        print(f"interrupted and saved; resume with: {_resume_command(args.out)}", file=sys.stderr)
        return errors.INTERRUPTED
    reporter.line(f"held out: {result.score}\n{result.verdict}\nmodel: {args.out / 'model'}")
    return errors.OK


def _generate(args: argparse.Namespace) -> int:
    from . import generation

    model, tokenizer = generation.load(args.model)
    try:
        pieces = generation.generate(
            model,
            tokenizer,
            args.prompt,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            stop=args.stop,
        )
        if args.json:
            text = "".join(pieces)
            _print_json({"prompt": args.prompt, "text": text, "seed": args.seed})
            return errors.OK
        print(args.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except ValueError as error:  # an option that the sampler refuses, in its own words
        raise errors.UsageError(str(error)) from None
    return errors.OK


def _doctor(args: argparse.Namespace) -> int:
    from . import doctor

    report = doctor.collect()
    if args.json:
        _print_json(report)
    else:
        print(doctor.text(report))
    broken = any("error" in op for op in report["ops"].values())
    return errors.CRITERION_FAILED if broken else errors.OK


def _data(args: argparse.Namespace) -> int:
    from . import datacommand

    return datacommand.run(args, _reporter(args), _print_json)


def _prefs(args: argparse.Namespace) -> int:
    from . import learning

    return learning.PREFS[args.step](args, _reporter(args), _print_json)


def _reward(args: argparse.Namespace) -> int:
    from . import learning

    return learning.reward_command(args, _reporter(args), _print_json)


def _rl(args: argparse.Namespace) -> int:
    from . import learning

    return learning.policy_command(args, _reporter(args), _print_json)


def _measure(args: argparse.Namespace) -> int:
    from . import measuring

    return measuring.COMMANDS[args.command](args, _reporter(args), _print_json)


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "generate": _generate,
    "data": _data,
    "prefs": _prefs,
    "reward": _reward,
    "rl": _rl,
    "eval": _measure,
    "cv": _measure,
    "summarize": _measure,
    "doctor": _doctor,
}


def _run(argv: Sequence[str]) -> int:
    if argv[:2] == ["bench", "recall"]:
        return importlib.import_module("fastlm.lm.recall").main(list(argv[2:]))
    if argv[:1] == ["bench"]:
        return importlib.import_module("fastlm.bench").main(list(argv[1:]))
    args = build_parser().parse_args(argv)
    if args.threads is not None:
        import torch

        if args.threads < 1:
            raise errors.UsageError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    return _COMMANDS[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected failure is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with interrupt.terminable():
            code = _run(arguments)
        sys.stdout.flush()
        return code
    except errors.LMError as error:
        print(f"fastlm: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastlm: stopped at once; what was saved before is whole", file=sys.stderr)
        return errors.INTERRUPTED
    except ValueError as error:
        # of an op, about an argument that nothing here has checked before
        if not str(error).startswith("fastlm."):
            raise
        print(f"fastlm: error: {error}", file=sys.stderr)
        return errors.USAGE
    except BrokenPipeError:
        # the reader has what it wants; keep Python from failing again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return errors.OK
    except (MemoryError, RuntimeError, OSError) as error:
        if errors.out_of_space(error):
            print(f"fastlm: error: out of memory or disk: {error}", file=sys.stderr)
            return errors.OUT_OF_SPACE
        if isinstance(error, OSError) and error.filename is not None:
            print(f"fastlm: error: {error.filename}: {error.strerror}", file=sys.stderr)
            return errors.USAGE
        raise
