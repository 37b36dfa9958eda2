"""The options of every command, without importing what the commands need."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastlm import __version__

from .learnoptions import dpo_command, learning_commands, prefs_commands
from .outputoptions import output_options
from .suggest import Parser
from .trainoptions import training_commands


def _reading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files and folders of text, HTML, JSON lines or CSV, also gzipped; - is standard "
        "input, hf:NAME[:CONFIG][@SPLIT] a published collection; none: six novels by Jane Austen",
    )
    parser.add_argument("--format", choices=("auto", "text", "html", "jsonl", "csv"))
    parser.add_argument("--column", metavar="NAME", help="field of JSON and CSV records (text)")
    parser.add_argument("--encoding", metavar="NAME", help="of files without a mark (utf-8)")
    parser.add_argument("--no-clean", action="store_true", help="keep text as it is")
    parser.add_argument(
        "--keep",
        metavar="STEP,...",
        help="steps to leave out: line-endings, control, nfc, spaces (they matter in program "
        "text), blank-lines",
    )
    parser.add_argument(
        "--strip-html", action="store_true", help="records and text files hold HTML, take its text"
    )
    parser.add_argument(
        "--skip-unusable",
        action="store_true",
        help="leave out files that are no text, and say so, instead of stopping",
    )
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
    output_options(parser)


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


def _measuring_commands(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval", help="bits per byte of text by document; a reward model on preferences"
    )
    evaluate.add_argument("model", type=Path, help="run, checkpoint, model or reward folder")
    evaluate.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="text (default: what was held out in training); preferences for a reward model",
    )
    evaluate.add_argument("--samples", type=int, default=64, metavar="N", help="texts to judge")
    evaluate.add_argument("--seed", type=int, default=0)
    output_options(evaluate)

    cv = commands.add_parser("cv", help="cross-validation: each document held out once")
    cv.add_argument("--data", nargs="+", metavar="PATH", help="default: six novels")
    cv.add_argument(
        "--compare",
        "--model",
        dest="compare",
        default="gru",
        metavar="KIND[:NAME=VALUE]...,...",
        help="models, each with the same budget: gru,transformer or gru:hidden=512,gru:layers=2",
    )
    cv.add_argument("--budget", default="20s", metavar="B", help="of each model and fold (20s)")
    cv.add_argument("--folds", type=int, metavar="K", help="folds of several documents each")
    cv.add_argument("--first", type=int, metavar="N", help="stop after N folds")
    cv.add_argument("--out", type=Path, metavar="FILE", help="the same as JSON, after every fold")
    cv.add_argument("--vocab", type=int, default=2048, metavar="N")
    cv.add_argument("--seed", type=int, default=0)
    output_options(cv)

    summarize = commands.add_parser("summarize", help="the sentences that tell most of a text")
    summarize.add_argument("model", type=Path, help="run, checkpoint or model folder")
    summarize.add_argument("path", nargs="?", metavar="PATH", help="text, - for standard input")
    summarize.add_argument("--sentences", type=int, metavar="N", help="(3; 1 of --pairs)")
    summarize.add_argument(
        "--abstractive",
        action="store_true",
        help="in the model's own words: one trained with --pairs FILE --format summary",
    )
    summarize.add_argument("--max-new-tokens", type=int, default=48, metavar="N")
    summarize.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token"
    )
    summarize.add_argument("--seed", type=int, default=0)
    summarize.add_argument(
        "--reference", type=Path, metavar="FILE", help="a summary to compare with, by ROUGE"
    )
    summarize.add_argument(
        "--pairs", nargs="+", metavar="FILE",
        help="texts with summaries: ROUGE of those held out, beside that of the first sentence",
    )  # fmt: skip
    summarize.add_argument("--group", metavar="COLUMN", help="as in training (default: as there)")
    summarize.add_argument("--holdout", metavar="SHARE", help="as in training (default: as there)")
    summarize.add_argument("--split", choices=("held", "train", "all"), default="held")
    summarize.add_argument("--count", type=int, metavar="N", help="only the first of them")
    output_options(summarize)


def _generate_command(commands: Any) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        epilog="A GRU writes any length. A Transformer forgets the older half of its context "
        "whenever that is full, in the prompt too.",
    )
    generate.add_argument("model", type=Path, help="run, checkpoint or model folder")
    given = generate.add_mutually_exclusive_group()
    given.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="text to continue (default: none, a document begins); - is standard input, without "
        "its last line end",
    )
    given.add_argument(
        "--prompts",
        metavar="FILE",
        help="many: one a line, or of *.jsonl strings or objects with prompt; - is standard input",
    )

    def option(name: str, kind: Any, default: Any, help: str, metavar: str) -> None:
        generate.add_argument(name, type=kind, default=default, help=help, metavar=metavar)

    generate.add_argument(
        "-n", "--samples", type=int, default=1, metavar="N", help="texts of each prompt (1)"
    )
    option("--max-new-tokens", int, 200, "at most (200)", "N")
    option("--temperature", float, 0.8, "0 takes the likeliest token (0.8)", "T")
    option("--top-k", int, None, "only the K likeliest tokens", "K")
    option("--top-p", float, 0.95, "only the likeliest tokens with this mass (0.95)", "P")
    option("--min-p", float, None, "only tokens this likely, beside the likeliest", "P")
    option(
        "--repetition-penalty", float, 1.0,
        "divides logits above 0, multiplies those below, of tokens in prompt and text (1: none)",
        "R",
    )  # fmt: skip
    option("--presence-penalty", float, 0.0, "taken from logits of tokens in the text (0)", "R")
    option("--frequency-penalty", float, 0.0, "the same, times how often they are there (0)", "R")
    option("--seed", int, 0, "sample j is drawn with (seed, j) (0)", "N")
    generate.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    output_options(generate)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastlm",
        description="Train, sample and measure language models on fused kernels.",
        epilog="exit codes: 0 ok, 1 criterion failed, 2 usage, 3 bad input, 4 bad checkpoint, "
        "5 out of memory or disk, 130 interrupted and saved",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastlm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole job on real text, with its own criteria")
    demo.add_argument(
        "--quick", action="store_true", help="smaller in everything, with bounds of its own"
    )
    demo.add_argument(
        "--budget",
        metavar="B",
        help="for the phases that learn, such as 10m; steps or epochs: for training alone",
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR")
    output_options(demo)

    training_commands(commands)

    _generate_command(commands)
    _data_commands(commands)
    prefs_commands(commands)
    learning_commands(commands)
    dpo_command(commands)
    _measuring_commands(commands)
    commands.add_parser("bench", help="benchmarks: model, recall; each has --help", add_help=False)

    report = commands.add_parser("report", help="one self-contained page of a run")
    report.add_argument("run", type=Path, metavar="RUN", help="folder of a demo or a training run")
    output_options(report)

    doctor = commands.add_parser("doctor", help="what is installed, and what each op runs here")
    output_options(doctor)
    return parser
