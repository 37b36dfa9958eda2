"""`fastlm bench model`, and what the files under benchmarks/ are timed with."""

from __future__ import annotations

from .model import main

__all__ = ["main"]
