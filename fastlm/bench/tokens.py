"""Tokens as language has them: few words are frequent, most are rare."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np

_CORPUS = Path(__file__).parent.parent / "lm" / "assets"


@lru_cache(maxsize=1)
def _ranks() -> np.ndarray | None:
    """The shipped corpus as frequency ranks, in reading order; None where it is not installed."""
    files = sorted(_CORPUS.rglob("*.txt.gz"))
    if not files:
        return None
    text = " ".join(gzip.decompress(f.read_bytes()).decode("utf-8", "replace") for f in files)
    words = re.findall(r"\w+|[^\w\s]", text)
    rank = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    return np.fromiter((rank[w] for w in words), np.int64, len(words))


def zipf_tokens(count: int, vocab: int, *, seed: int = 0) -> np.ndarray:
    """`count` token ids in [0, vocab), 0 the most frequent, as int64.

    Consecutive words of the shipped corpus numbered by frequency, starting at a random place and
    wrapping around; a word that `vocab` has no room for becomes the last id. Without the corpus,
    independent draws from Zipf-Mandelbrot, p(rank) ~ 1 / (rank + 2.7).
    """
    random = np.random.default_rng(seed)
    ranks = _ranks()
    if ranks is None:
        weight = 1.0 / (np.arange(1, vocab + 1) + 2.7)
        return random.choice(vocab, size=count, p=weight / weight.sum())
    start = int(random.integers(len(ranks)))
    return np.minimum(np.take(ranks, np.arange(start, start + count), mode="wrap"), vocab - 1)


def token_source() -> str:
    """What `zipf_tokens` draws from here, in words."""
    return "Zipf-Mandelbrot draws" if _ranks() is None else "words of the shipped corpus by rank"
