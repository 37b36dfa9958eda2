"""Options of `fastlm train` and `fastlm plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .outputoptions import UNSET, output_options


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
    _pair_options(parser)
    option("--init", str, "start from this run or model, with its tokenizer", "DIR")
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
    option("--lr", float, "peak learning rate (4e-3; 1e-3 with --init)", "LR")
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
    option("--label-smoothing", float, "the loss that is shown has it too (0)", "E")
    option("--accumulate", int, "parts a batch goes through in, for less memory (1)")
    option("--precision", str, "float32 (default) or bf16: products in bfloat16", "P")
    option("--schedule", str, "cosine (default), linear, constant or wsd", "S")
    option("--decay", float, "share of the budget in which wsd comes down (0.2)", "P")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="these options as TOML: [data] [model] [train]",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one key of it, such as train.lr=1e-3; over the file, under the options here",
    )


def _pair_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=UNSET,
        metavar="FILE",
        help="prompts and targets instead of text: JSON lines or CSV; only targets are learned",
    )
    parser.add_argument(
        "--format",
        choices=("pairs", "qa", "translation", "summary"),
        default=UNSET,
        help="their columns: prompt target, question answer, source target, text summary (pairs)",
    )
    parser.add_argument(
        "--group",
        default=UNSET,
        metavar="COLUMN",
        help="pairs equal in it are held out together (equal prompts are)",
    )
    parser.add_argument(
        "--longest", type=int, default=UNSET, metavar="N", help="tokens of a pair (512)"
    )
    parser.add_argument(
        "--learn", choices=("targets", "all"), default=UNSET, help="all: the prompts too"
    )


def training_commands(commands: Any) -> None:
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
    train.add_argument(
        "--on-save-error",
        choices=("stop", "warn"),
        default="stop",
        help="what a full disk does to a run between two saves",
    )
    train.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that read text ahead (0)"
    )
    train.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU where there is one; under torchrun one for each rank",
    )
    train.add_argument("--dry-run", action="store_true", help="the settings and the plan, no more")
    train.add_argument(
        "--tensorboard", action="store_true", help="event files beside metrics.jsonl, in --out"
    )
    train.add_argument(
        "--log-every",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds between two lines (5)",
    )
    train.add_argument(
        "--parallel",
        choices=("ddp", "fsdp2"),
        help="under torchrun: whole parameters on every rank (ddp, the default) or parts",
    )
    _train_options(train)
    output_options(train)

    plan = commands.add_parser(
        "plan", help="parameters, memory and time of a training run", allow_abbrev=False
    )
    plan.add_argument(
        "--memory",
        metavar="SIZE",
        help="such as 8GiB: choose width and depth that fit into it and into --budget",
    )
    plan.add_argument(
        "--measure", action="store_true", help="run a few steps and say what they took"
    )
    _train_options(plan)
    output_options(plan)
