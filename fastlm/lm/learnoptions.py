"""Options of `fastlm prefs`, `reward`, `rl` and `dpo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .outputoptions import UNSET, output_options

PREFERENCES = ("auto", "fastlm", "hh", "messages", "ultrafeedback")  # as preferences.FORMATS


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    """Of contexts from the corpus, and of what the model writes there."""
    parser.add_argument("--data", nargs="+", metavar="PATH", help="as the model was trained")
    parser.add_argument("--holdout", metavar="NAME", help="as the model was trained")
    parser.add_argument("--split", choices=("train", "held"), default="train")
    parser.add_argument("--prompt-tokens", type=int, default=24, metavar="N")
    parser.add_argument("--tokens", type=int, default=80, metavar="N", help="of each text")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T")
    parser.add_argument("--seed", type=int, default=0)
    output_options(parser)


def prefs_commands(commands: Any) -> None:
    prefs = commands.add_parser("prefs", help="preferences between two texts")
    steps = prefs.add_subparsers(dest="step", required=True, metavar="STEP")

    label = steps.add_parser("label", help="say which of two texts is better, key by key")
    label.add_argument("questions", type=Path, help="JSON lines with prompt, a and b")
    label.add_argument("--out", type=Path, required=True, metavar="FILE", help="answers, resumed")
    label.add_argument("--annotator", metavar="NAME", help="default: the user's name")
    label.add_argument("--seed", type=int, default=0, help="of which text stands first")
    output_options(label)

    made = steps.add_parser(
        "from-model", help="the author's text preferred to the model's; nobody judged these pairs"
    )
    made.add_argument("model", type=Path, help="run, checkpoint or model folder")
    made.add_argument("--out", type=Path, required=True, metavar="FILE")
    made.add_argument("--count", type=int, default=4000, metavar="N")
    _sampling_options(made)

    sample = steps.add_parser("sample", help="two texts of the model each, to be judged: label")
    sample.add_argument("model", type=Path, help="run, checkpoint or model folder")
    sample.add_argument("--out", type=Path, required=True, metavar="FILE")
    sample.add_argument("--count", type=int, default=50, metavar="N")
    _sampling_options(sample)

    rule = steps.add_parser(
        "synthetic", help="a rule chooses instead of a person; provenance synthetic:RULE"
    )
    rule.add_argument("questions", type=Path, help="as for label, of sample")
    rule.add_argument(
        "--rule",
        required=True,
        choices=("quotes", "sentence", "repetition", "variety"),
        help="balanced quotation marks, ends with a sentence, few repeated runs of 4 words, many "
        "different words",
    )
    rule.add_argument("--out", type=Path, required=True, metavar="FILE")
    output_options(rule)

    check = steps.add_parser("check", help="read preferences, count them by who chose")
    check.add_argument("paths", nargs="+", metavar="FILE")
    check.add_argument("--format", choices=PREFERENCES, default="auto")
    check.add_argument(
        "--provenance", metavar="KIND:NAME", help="of files without one, such as dataset:hh-rlhf"
    )
    check.add_argument("--out", type=Path, metavar="FILE", help="write them in fastlm's form")
    output_options(check)


def _preference_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preferences", nargs="+", metavar="FILE")
    parser.add_argument("--format", choices=PREFERENCES, default="auto")
    parser.add_argument("--provenance", metavar="KIND:NAME", help="of files without one")


def learning_commands(commands: Any) -> None:
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
    output_options(reward)

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
    output_options(rl)


def dpo_command(commands: Any) -> None:
    dpo = commands.add_parser("dpo", help="learn from preferences, without writing in between")
    dpo.add_argument("--model", type=Path, required=True, help="run, checkpoint or model folder")
    dpo.add_argument("--preferences", nargs="+", required=True, metavar="FILE")
    dpo.add_argument("--format", choices=("auto", "fastlm", "hh", "messages"), default="auto")
    dpo.add_argument("--provenance", metavar="KIND:NAME", help="of files without one")
    dpo.add_argument("--test", nargs="+", metavar="FILE", help="preferences to judge by")
    dpo.add_argument(
        "--holdout", type=float, default=0.1, metavar="SHARE",
        help="of the prompts, to judge by where there is no --test (0.1)",
    )  # fmt: skip
    dpo.add_argument("--out", type=Path, required=True, metavar="DIR")
    dpo.add_argument("--data", nargs="+", metavar="PATH", help="text to measure (the model's own)")
    dpo.add_argument("--data-holdout", metavar="NAME", help="of it, as the model was trained")
    dpo.add_argument("--resume", choices=("auto", "never"), default="auto")
    dpo.add_argument("--save-every", type=float, default=30.0, metavar="S", help="seconds (30)")

    def option(name: str, kind: Any, help: str, metavar: str = "N") -> None:
        dpo.add_argument(name, type=kind, default=UNSET, metavar=metavar, help=help)

    option("--loss", str, "dpo (default), ipo, hinge, simpo, orpo or cpo", "NAME")
    option("--beta", float, "strength (0.1; simpo 2)", "B")
    option("--gamma", float, "margin of simpo (0.5)", "G")
    option("--label-smoothing", float, "chance that a label is wrong: dpo, simpo, cpo (0)", "P")
    option("--budget", str, "such as 1epochs, 200steps or 60s (1epochs)", "B")
    option("--batch", int, "preferences of a step (16)")
    option("--lr", float, "peak learning rate (3e-4)", "LR")
    option("--longest", int, "tokens of a prompt and its text (512)")
    option("--end", str, "learn where a text ends: auto (not of human-over-model), yes, no", "E")
    option("--evals", int, "judgements during training (4)")
    option("--seed", int, "seed (0)")
    output_options(dpo)
