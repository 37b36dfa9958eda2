"""The command `fastlm`. Heavy imports wait until a command needs them.

Exit codes: 0 ok, 1 a criterion failed, 2 usage, 3 bad input, 4 bad checkpoint, 5 out of memory or
disk, 130 interrupted (training state saved).
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import config, errors, files, interrupt
from .options import build_parser


def _reporter(args: argparse.Namespace) -> Any:
    from . import progress

    interval = getattr(args, "log_every", 5.0)
    config.require_not_negative(**{"--log-every": interval})
    # stdout carries the JSON object alone
    stream = sys.stderr if args.json else sys.stdout
    return progress.reporter(quiet=args.quiet, stream=stream, interval=interval)


def _print_json(value: Any) -> None:
    try:
        print(files.dumps(value, indent=1, default=str))
    except BrokenPipeError:  # whether somebody reads it changes no exit code
        pass


def _say(text: str) -> None:
    """One line on stderr, as `_print_json`."""
    rank, _ = _ranks()
    name = f"fastlm: rank {rank}" if rank else "fastlm"
    try:
        print(f"{name}: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)
    except OSError:
        pass


def _resume_command(out: Path) -> str:
    return f"fastlm train --out {shlex.quote(str(out))} --resume auto"


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    passed, report = demo.run(
        quick=args.quick, budget=args.budget, out=args.out, reporter=_reporter(args)
    )
    if args.json:
        _print_json(report)
    if phase := report.get("interrupted"):
        _say(f"interrupted in {phase!r}; what exists is in {args.out}")
        if phase == "train":
            _say(f"the training alone goes on with: {_resume_command(args.out)}")
        return errors.INTERRUPTED
    return errors.OK if passed else errors.CRITERION_FAILED


def _saved(args: argparse.Namespace) -> Any:
    """The checkpoint to continue from, or None for a new run."""
    from . import checkpoint

    if (args.out / checkpoint.STATE).exists():
        raise errors.UsageError(f"{args.out}: is a saved model itself; choose another --out")
    if args.resume not in ("auto", "never"):
        return checkpoint.find(Path(args.resume))
    if args.resume == "never":
        if checkpoint.all_in(args.out):
            raise errors.UsageError(f"{args.out}: has checkpoints; choose another --out")
        return None
    return checkpoint.newest(args.out)


def _train(args: argparse.Namespace) -> int:
    from . import distributed

    with distributed.connected(args.parallel, args.device) as ranks:
        if not ranks.chief:
            args.quiet, args.json = True, False
        return _train_on(ranks, args)


def _train_on(ranks: Any, args: argparse.Namespace) -> int:
    from . import checkpoint, files, planning, sinks, starting, trainer
    from . import settings as named

    if args.dry_run:
        return planning.dry_run(args, _saved(args), _reporter(args), _print_json)
    checkpoint.require()
    if args.tensorboard:
        sinks.tensorboard()  # a missing package is said at once
    saved = _saved(args)
    reporter = _reporter(args)
    found = starting.choose(named.given(args), saved)
    chosen, start = found.recipe, found.start
    data = ranks.first(found.prepare)
    for line in starting.describe(data):
        reporter.line(line)
    model = chosen.make_model(data.tokens)
    if start is not None:
        start.load_into(model)
        reporter.line(f"starting from {start.saved.path}")
    run = trainer.Trainer(
        model.to(ranks.device),
        data.tokens,
        data.tokenizer,
        chosen.train_config(),
        out=args.out,
        reporter=reporter,
        save_every=args.save_every,
        on_save_error=args.on_save_error,
        settings=chosen.to_json(),
        ranks=ranks,
        workers=args.workers,
    )
    if saved is not None:
        if ranks.chief:
            checkpoint.say_skipped(saved)
        run.resume(saved, allow=tuple(filter(None, args.allow_change.split(","))))
        reporter.line(f"resumed from {saved.path}")
        if run.finished():
            reporter.line(
                f"its budget of {chosen.budget} is used; for more: --budget B --allow-change budget"
            )
    if ranks.chief:
        if args.tensorboard:
            run.sinks.append(sinks.TensorBoard(args.out / "tensorboard", run.counters.steps))
        files.write_text(args.out / "config.toml", named.dump(chosen))
    result = run.fit()
    if args.json:
        _print_json(asdict(result))
    if result.stopped == "interrupted":
        if ranks.chief:
            _say(f"interrupted and saved; resume with: {_resume_command(args.out)}")
        return errors.INTERRUPTED
    reporter.line(f"held out: {result.score}\n{result.verdict}\nmodel: {args.out / 'model'}")
    return errors.OK


def _plan(args: argparse.Namespace) -> int:
    from . import planning

    return planning.plan_command(args, _reporter(args), _print_json)


def _generate(args: argparse.Namespace) -> int:
    from . import generatecommand

    return generatecommand.run(args, _print_json)


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


def _dpo(args: argparse.Namespace) -> int:
    from . import dpocommand

    return dpocommand.command(args, _reporter(args), _print_json)


def _measure(args: argparse.Namespace) -> int:
    from . import measuring

    return measuring.COMMANDS[args.command](args, _reporter(args), _print_json)


def _report(args: argparse.Namespace) -> int:
    from . import report

    return report.command(args, _reporter(args), _print_json)


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "plan": _plan,
    "generate": _generate,
    "data": _data,
    "prefs": _prefs,
    "reward": _reward,
    "rl": _rl,
    "dpo": _dpo,
    "eval": _measure,
    "cv": _measure,
    "summarize": _measure,
    "report": _report,
    "doctor": _doctor,
}


def _ranks() -> tuple[int, int]:
    """(rank, ranks) of torchrun; (0, 1) without it."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1
    try:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError:
        return 0, 1


def _run(argv: Sequence[str]) -> int:
    if argv[:2] == ["bench", "recall"]:
        return importlib.import_module("fastlm.lm.recall").main(list(argv[2:]))
    if argv[:1] == ["bench"]:
        return importlib.import_module("fastlm.bench").main(list(argv[1:]))
    args = build_parser().parse_args(argv)
    if _ranks()[1] > 1 and args.command != "train":
        raise errors.UsageError(f"{args.command} runs in one process; torchrun is for train")
    if args.threads is not None:
        from . import machine

        machine.use_threads(args.threads)
    return _COMMANDS[args.command](args)


def _streams() -> None:
    """Streams that were closed (`>&-`) lead nowhere, and a character that a terminal cannot show or
    type becomes a question mark: neither is a reason to end."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace" if name == "stderr" else "replace")


def _failed(error: Exception) -> int:
    """Say what was expected to go wrong for some; what was not is raised again."""
    code = errors.USAGE
    if isinstance(error, errors.LMError):
        told, code = str(error), error.exit_code
    elif errors.out_of_space(error):
        told, code = f"out of memory or disk: {error}", errors.OUT_OF_SPACE
    elif isinstance(error, OSError) and error.filename is not None:
        told = f"{error.filename}: {error.strerror}"
    elif str(error).startswith("fastlm."):
        # of an op, about an argument that nothing here has checked, or that no backend takes
        told = str(error)
    else:
        raise error
    _say(f"error: {told}")
    if isinstance(error, errors.OtherRank) and error.lost:
        os._exit(code)  # a group without all its members aborts, or waits for them
    return code


def _flushed(code: int) -> int:
    """The exit code when all of stdout is written: Python would fail with its own at the exit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError:  # no stream of this process
            pass
        if code == errors.OK and not isinstance(error, BrokenPipeError):
            return _failed(error)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected failure is one line on stderr."""
    _streams()
    interrupt.Interrupt.alone = argv is None
    try:
        with interrupt.terminable():
            code = _run(list(sys.argv[1:] if argv is None else argv))
    except SystemExit:  # of --help, and of argparse for what it does not know
        _flushed(errors.OK)
        raise
    except KeyboardInterrupt:
        if argv is None:
            interrupt.deaf()
        _say("stopped at once; what was saved before is whole")
        code = errors.INTERRUPTED
    except BrokenPipeError:  # the reader has what it wants
        code = errors.OK
    except Exception as error:
        code = _failed(error)
    if code == errors.INTERRUPTED and argv is None:
        interrupt.deaf()  # to an impatient second Ctrl-C: what is left is to end
    return _flushed(code)
