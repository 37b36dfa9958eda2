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

from . import errors

UNSET: Any = argparse.SUPPRESS  # so that a resumed run knows what was typed


def _output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")


def _train_options(parser: argparse.ArgumentParser) -> None:
    def option(name: str, kind: Any, help: str, metavar: str = "N") -> None:
        parser.add_argument(name, type=kind, default=UNSET, metavar=metavar, help=help)

    parser.add_argument(
        "--data",
        nargs="+",
        default=UNSET,
        metavar="PATH",
        help="text files or folders (default: six novels by Jane Austen)",
    )
    option("--holdout", str, "document to hold out, or a share such as 0.1", "NAME")
    parser.add_argument(
        "--tokenizer", choices=("auto", "bpe", "bytes"), default=UNSET, help="default: auto"
    )
    option("--vocab", int, "vocabulary size of BPE (2048)")
    parser.add_argument(
        "--no-clean", dest="clean", action="store_false", default=UNSET, help="keep text as it is"
    )
    parser.add_argument(
        "--model", choices=("gru", "transformer"), default=UNSET, help="kind of model (gru)"
    )
    option("--hidden", int, "width (256)")
    option("--embedding", int, "embedding width of a GRU (as --hidden)")
    option("--layers", int, "layers (GRU 1, Transformer 4)")
    option("--heads", int, "attention heads of a Transformer (4)")
    option("--kv-heads", int, "heads of keys and values (as --heads)")
    option("--ffn", int, "width inside its feed-forward part (8/3 of --hidden)")
    option("--context", int, "tokens a prediction can depend on (as --seq)")
    option("--z-loss", float, "weight of the squared log-sum-exp, Transformer (0)", "W")
    parser.add_argument(
        "--recompute",
        action="store_true",
        default=UNSET,
        help="Transformer: less memory, layers run again in the backward",
    )
    option("--dropout", float, "dropout (0)", "P")
    parser.add_argument("--tied", action="store_true", default=UNSET, help="tie head and embedding")
    option("--budget", str, "90s, 10m, 500steps or 2epochs (90s)", "B")
    option("--lr", float, "peak learning rate (GRU 4e-3, Transformer 2e-3)", "LR")
    option("--batch", int, "rows (GRU 32, Transformer 8)")
    option("--seq", int, "tokens per row and step (GRU 64, Transformer 256)")
    option("--warmup", float, "share of the budget (0.02)", "P")
    option("--floor", float, "last learning rate over the peak (0.05)", "P")
    option("--weight-decay", float, "of matrices (0.01)", "W")
    option("--clip", float, "largest gradient norm, 0 for none (1)", "NORM")
    option("--patience", int, "evaluations without progress before stopping (never)")
    option("--evals", int, "evaluations during training (10)")
    option("--eval-tokens", int, "held-out tokens of each but the last (32768)")
    option("--seed", int, "seed (0)")


def _reading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files and folders of text, HTML, JSON lines or CSV, also gzipped; - is standard "
        "input; none: six novels by Jane Austen",
    )
    parser.add_argument("--format", choices=("auto", "text", "html", "jsonl", "csv"))
    parser.add_argument("--column", metavar="NAME", help="field of JSON and CSV records (text)")
    parser.add_argument("--encoding", metavar="NAME", help="of files without a mark (utf-8)")
    parser.add_argument("--no-clean", action="store_true", help="keep text as it is")
    parser.add_argument(
        "--fix-encoding", action="store_true", help="repair wrongly decoded text (needs ftfy)"
    )
    parser.add_argument("--drop-punctuation", action="store_true", help="hurts generation")
    parser.add_argument(
        "--stop-words",
        metavar="FILE|english",
        help="words to remove, one a line; english needs scikit-learn; hurts generation",
    )
    parser.add_argument(
        "--near-duplicates",
        default="0.8",
        metavar="R|off",
        help="leave out what shares this much of its runs of 5 words with a document before it",
    )
    parser.add_argument("--min-characters", type=int, default=1, metavar="N")
    _output_options(parser)


def _data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="clean text, count it, describe it, make tokens of it")
    steps = data.add_subparsers(dest="step", required=True, metavar="STEP")

    clean = steps.add_parser("clean", help="cleaned documents into a folder, and what was removed")
    clean.add_argument("--out", type=Path, required=True, metavar="DIR")
    _reading_options(clean)

    stats = steps.add_parser("stats", help="sizes, words, and what cleaning would remove")
    _reading_options(stats)

    card = steps.add_parser("card", help="a data card in Markdown: composition, removals, limits")
    card.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    card.add_argument("--license", default="", metavar="TEXT", help="terms of the text")
    card.add_argument("--title", default="", metavar="TEXT")
    _reading_options(card)

    tokenize = steps.add_parser("tokenize", help="train a tokenizer and store the tokens")
    tokenize.add_argument("--out", type=Path, required=True, metavar="DIR")
    tokenize.add_argument("--tokenizer", choices=("auto", "bpe", "bytes"), default="auto")
    tokenize.add_argument("--vocab", type=int, default=2048, metavar="N")
    tokenize.add_argument("--holdout", metavar="NAME", help="document, or a share such as 0.1")
    _reading_options(tokenize)


def _prefs_commands(commands: Any) -> None:
    prefs = commands.add_parser("prefs", help="preferences between two texts")
    steps = prefs.add_subparsers(dest="step", required=True, metavar="STEP")

    label = steps.add_parser("label", help="say which of two texts is better, key by key")
    label.add_argument("questions", type=Path, help="JSON lines with prompt, a and b")
    label.add_argument("--out", type=Path, required=True, metavar="FILE", help="answers, resumed")
    label.add_argument("--annotator", metavar="NAME", help="default: the user's name")
    label.add_argument("--seed", type=int, default=0, help="of which text stands first")
    _output_options(label)

    check = steps.add_parser("check", help="read preferences, count them by who chose")
    check.add_argument("paths", nargs="+", metavar="FILE")
    check.add_argument("--format", choices=("auto", "fastlm", "hh", "messages"), default="auto")
    check.add_argument(
        "--provenance", metavar="KIND:NAME", help="of files without one, such as dataset:hh-rlhf"
    )
    check.add_argument("--out", type=Path, metavar="FILE", help="write them in fastlm's form")
    _output_options(check)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastlm",
        description="Train, sample and measure language models on fused kernels.",
        epilog="exit codes: 0 ok, 1 criterion failed, 2 usage, 3 bad input, 4 bad checkpoint, "
        "5 out of memory or disk, 130 interrupted and saved",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole job on real text, with its own criteria")
    demo.add_argument("--quick", action="store_true", help="a smaller model for half a minute")
    demo.add_argument("--budget", metavar="B", help="training budget, such as 10m or 2epochs")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    _output_options(demo)

    train = commands.add_parser("train", help="train a model on text", allow_abbrev=False)
    train.add_argument("--out", type=Path, default=Path("runs/train"), metavar="DIR")
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto: continue what is in --out (default); options not given are taken from there",
    )
    train.add_argument(
        "--allow-change",
        default="",
        metavar="NAME,...",
        help="options that may differ from the checkpoint, such as budget or lr",
    )
    train.add_argument("--save-every", type=float, default=30.0, metavar="S", help="seconds (30)")
    _train_options(train)
    _output_options(train)

    generate = commands.add_parser("generate", help="continue a prompt with a trained model")
    generate.add_argument("model", type=Path, help="run, checkpoint or model folder")
    generate.add_argument("--prompt", default="", help="text to continue (default: none)")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8, metavar="T")
    generate.add_argument("--top-k", type=int, metavar="K")
    generate.add_argument("--top-p", type=float, default=0.95, metavar="P")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT")
    _output_options(generate)

    _data_commands(commands)
    _prefs_commands(commands)
    commands.add_parser("bench", help="benchmarks; see fastlm bench --help", add_help=False)

    doctor = commands.add_parser("doctor", help="what is installed, and what each op runs here")
    _output_options(doctor)
    return parser


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
    data = preparation.prepare(chosen.data_config())
    for line in preparation.describe(data):
        reporter.line(line)
    run = trainer.Trainer(
        chosen.make_model(data.tokens),
        data.tokens,
        data.tokenizer,
        chosen.train_config(),
        out=args.out,
        reporter=reporter,
        save_every=args.save_every,
        settings=chosen.to_json(),
    )
    if saved is not None:
        for reason in saved.skipped:
            print(f"fastlm train: skipped a damaged checkpoint: {reason}", file=sys.stderr)
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
    from . import checkpoint, generation

    saved = checkpoint.find(args.model)
    for reason in saved.skipped:
        print(f"fastlm generate: skipped a damaged folder: {reason}", file=sys.stderr)
    model, tokenizer = generation.load_checkpoint(saved)
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
    from . import labelling, preferences

    if args.step == "label":
        answers = labelling.Answers(args.out)
        questions = labelling.read_questions(args.questions)
        with labelling.keyboard() as key:
            count = labelling.label(
                questions,
                answers,
                annotator=args.annotator,
                seed=args.seed,
                key=key,
                out=sys.stderr if args.json else sys.stdout,
            )
        result: dict[str, Any] = {
            "answered": count,
            "answers": len(answers.records),
            "file": str(args.out),
        }
    else:
        found = preferences.load(args.paths, args.format, args.provenance)
        if args.out is not None:
            preferences.save(args.out, found)
        result = {"preferences": len(found), "by": preferences.origins(found)}
        by = ", ".join(f"{count:,} {kind}" for kind, count in result["by"].items())
        _reporter(args).line(f"{len(found):,} preferences: {by}")
    if args.json:
        _print_json(result)
    return errors.OK


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "generate": _generate,
    "data": _data,
    "prefs": _prefs,
    "doctor": _doctor,
}


def _run(argv: Sequence[str]) -> int:
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
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except errors.LMError as error:
        print(f"fastlm: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastlm: stopped at once; the last checkpoint is whole", file=sys.stderr)
        return errors.INTERRUPTED
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
