"""The options of every command, without importing what the commands need."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
    option("--hidden", int, "width (GRU 256, Transformer 128)")
    option("--embedding", int, "embedding width of a GRU (as --hidden)")
    option("--layers", int, "layers (GRU 1, Transformer 2)")
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
    option("--lr", float, "peak learning rate (4e-3)", "LR")
    option("--batch", int, "rows (GRU 32, Transformer 8)")
    option("--seq", int, "tokens per row and step (GRU 64, Transformer 128)")
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

    made = steps.add_parser(
        "from-model", help="the author's text preferred to the model's; nobody judged these pairs"
    )
    made.add_argument("model", type=Path, help="run, checkpoint or model folder")
    made.add_argument("--out", type=Path, required=True, metavar="FILE")
    made.add_argument("--data", nargs="+", metavar="PATH", help="default: six novels")
    made.add_argument("--holdout", metavar="NAME", help="as the model was trained")
    made.add_argument("--split", choices=("train", "held"), default="train")
    made.add_argument("--count", type=int, default=4000, metavar="N")
    made.add_argument("--prompt-tokens", type=int, default=24, metavar="N")
    made.add_argument("--tokens", type=int, default=80, metavar="N", help="of each text")
    made.add_argument("--temperature", type=float, default=1.0, metavar="T")
    made.add_argument("--seed", type=int, default=0)
    _output_options(made)

    check = steps.add_parser("check", help="read preferences, count them by who chose")
    check.add_argument("paths", nargs="+", metavar="FILE")
    check.add_argument("--format", choices=("auto", "fastlm", "hh", "messages"), default="auto")
    check.add_argument(
        "--provenance", metavar="KIND:NAME", help="of files without one, such as dataset:hh-rlhf"
    )
    check.add_argument("--out", type=Path, metavar="FILE", help="write them in fastlm's form")
    _output_options(check)


def _preference_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preferences", nargs="+", metavar="FILE")
    parser.add_argument("--format", choices=("auto", "fastlm", "hh", "messages"), default="auto")
    parser.add_argument("--provenance", metavar="KIND:NAME", help="of files without one")


def _learning_commands(commands: Any) -> None:
    reward = commands.add_parser("reward", help="train a reward model on preferences")
    _preference_options(reward)
    reward.add_argument("--model", type=Path, required=True, help="language model: its tokenizer")
    reward.add_argument("--test", nargs="+", metavar="FILE", help="preferences to judge it by")
    reward.add_argument("--out", type=Path, required=True, metavar="DIR")
    reward.add_argument("--kind", choices=("ngrams", "gru"), default="ngrams")
    reward.add_argument("--budget", default="20s", metavar="B")
    reward.add_argument("--hidden", type=int, default=128, metavar="N", help="GRU width")
    reward.add_argument("--batch", type=int, default=64, metavar="N")
    reward.add_argument("--lr", type=float, metavar="LR")
    reward.add_argument("--seed", type=int, default=0)
    _output_options(reward)

    rl = commands.add_parser("rl", help="policy gradient on a reward")
    rl.add_argument("model", type=Path, help="run, checkpoint or model folder")
    rl.add_argument("--out", type=Path, required=True, metavar="DIR")
    rl.add_argument(
        "--reward", required=True, metavar="DIR|MODULE:FUNCTION",
        help="a reward model, or a function of two lists: prompts and texts",
    )  # fmt: skip
    rl.add_argument(
        "--judge", type=Path, metavar="DIR", help="a second reward model that is never optimised"
    )
    rl.add_argument("--data", nargs="+", metavar="PATH", help="default: six novels")
    rl.add_argument("--holdout", metavar="NAME", help="as the model was trained")
    rl.add_argument("--resume", choices=("auto", "never"), default="auto")
    rl.add_argument("--save-every", type=float, default=30.0, metavar="S", help="seconds (30)")

    def option(name: str, kind: Any, help: str, metavar: str = "N") -> None:
        rl.add_argument(name, type=kind, default=UNSET, metavar=metavar, help=help)

    option("--algorithm", str, "reinforce (default), rloo, ppo or grpo", "NAME")
    option("--budget", str, "such as 60steps or 40s (60steps)", "B")
    option("--batch", int, "texts an iteration (64)")
    option("--group", int, "of them from one prompt (8)")
    option("--prompt", int, "tokens of a prompt (24)")
    option("--length", int, "tokens of a text (40)")
    option("--temperature", float, "of sampling (1)", "T")
    option("--lr", float, "learning rate (3e-4)", "LR")
    option("--updates", int, "of the weights on the same texts, PPO and GRPO (1)")
    option("--clip-eps", float, "PPO and GRPO (0.2)", "E")
    option("--kl-coef", float, "penalty on the divergence from the start (0.05)", "K")
    option("--until", float, "stop at this mean reward", "R")
    option("--largest-kl", float, "stop beyond this divergence, nats a text", "K")
    option("--seed", int, "seed (0)")
    _output_options(rl)


def _measuring_commands(commands: Any) -> None:
    evaluate = commands.add_parser("eval", help="bits per byte of text, document by document")
    evaluate.add_argument("model", type=Path, help="run, checkpoint or model folder")
    evaluate.add_argument(
        "paths", nargs="*", metavar="PATH", help="text (default: what was held out in training)"
    )
    evaluate.add_argument("--samples", type=int, default=64, metavar="N", help="texts to judge")
    evaluate.add_argument("--seed", type=int, default=0)
    _output_options(evaluate)

    cv = commands.add_parser("cv", help="cross-validation: each document held out once")
    cv.add_argument("--data", nargs="+", metavar="PATH", help="default: six novels")
    cv.add_argument("--model", default="gru", metavar="KIND,...", help="gru, transformer or both")
    cv.add_argument("--budget", default="20s", metavar="B", help="of each model and document (20s)")
    cv.add_argument("--folds", type=int, metavar="N", help="only the first documents")
    cv.add_argument("--out", type=Path, metavar="FILE", help="the same as JSON")
    cv.add_argument("--vocab", type=int, default=2048, metavar="N")
    cv.add_argument("--seed", type=int, default=0)
    _output_options(cv)

    summarize = commands.add_parser("summarize", help="the sentences that tell most of a text")
    summarize.add_argument("model", type=Path, help="run, checkpoint or model folder")
    summarize.add_argument("path", metavar="PATH", help="text, - for standard input")
    summarize.add_argument("--sentences", type=int, default=3, metavar="N")
    summarize.add_argument(
        "--reference", type=Path, metavar="FILE", help="a summary to compare with, by ROUGE"
    )
    _output_options(summarize)


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
    demo.add_argument(
        "--quick", action="store_true", help="smaller in everything, with bounds of its own"
    )
    demo.add_argument(
        "--budget",
        metavar="B",
        help="for the phases that learn, such as 10m; steps or epochs: for training alone",
    )
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
    _learning_commands(commands)
    _measuring_commands(commands)
    commands.add_parser("bench", help="benchmarks: model, recall; each has --help", add_help=False)

    report = commands.add_parser("report", help="one self-contained page of a run")
    report.add_argument("run", type=Path, metavar="RUN", help="folder of a demo or a training run")
    _output_options(report)

    doctor = commands.add_parser("doctor", help="what is installed, and what each op runs here")
    _output_options(doctor)
    return parser
