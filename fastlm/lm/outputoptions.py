"""What every command of the command line takes."""

from __future__ import annotations

import argparse
from typing import Any

UNSET: Any = argparse.SUPPRESS  # so that a resumed run knows what was typed


def output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
