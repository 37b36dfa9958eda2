"""Numbers about scores and texts: AUC-ROC, calibration, ROUGE, repetition."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, MissingExtra

Floats = NDArray[np.float64]
DRAWS = 1000


def _library(name: str, purpose: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingExtra(purpose, package, "eval") from None


def require() -> None:
    """Fail at the start of a run rather than at its first AUC-ROC."""
    _library("sklearn.metrics", "AUC-ROC", "scikit-learn")


@dataclass(frozen=True)
class Interval:
    """A value with the 95% interval of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} (95% {self.low:.3f} to {self.high:.3f})"

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def auc_roc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Chance that a positive has the higher score than a negative; a tie is half.

    Raises:
        InputError: only one of the two classes is there, or a score is not finite.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if values.shape != truth.shape:
        raise InputError(f"AUC-ROC: {values.size} scores and {truth.size} labels")
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"AUC-ROC: score {at} is {values[at]}")
    if truth.all() or not truth.any():
        raise InputError("AUC-ROC: needs positives and negatives")
    sklearn = _library("sklearn.metrics", "AUC-ROC", "scikit-learn")
    return float(sklearn.roc_auc_score(truth, values))


def roc_curve(scores: Sequence[float], labels: Sequence[bool]) -> tuple[Floats, Floats]:
    """(false positive rate, true positive rate), from (0, 0) to (1, 1)."""
    sklearn = _library("sklearn.metrics", "the ROC curve", "scikit-learn")
    false, true, _ = sklearn.roc_curve(np.asarray(labels, dtype=bool), np.asarray(scores))
    return false, true


def _places(seed: int, sizes: Sequence[int], draws: int) -> Any:
    """Draws with replacement, from each group for itself so that none is ever empty."""
    generator = np.random.default_rng(seed % 2**64)
    for _ in range(draws):
        yield [generator.integers(0, size, size) for size in sizes]


def auc_interval(
    positives: Sequence[float], negatives: Sequence[float], *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """AUC-ROC with a bootstrap over positives and negatives, each for itself."""
    high, low = np.asarray(positives, np.float64), np.asarray(negatives, np.float64)
    labels = np.r_[np.ones(len(high), bool), np.zeros(len(low), bool)]
    value = auc_roc(np.r_[high, low].tolist(), labels.tolist())
    order = np.sort(low)
    # the same statistic from ranks: how many negatives lie below, a tie half
    below = (np.searchsorted(order, high, "left") + np.searchsorted(order, high, "right")) / 2
    found = []
    for rows, columns in _places(seed, [len(high), len(low)], draws):
        drawn = np.sort(low[columns])
        chosen = high[rows]
        count = np.searchsorted(drawn, chosen, "left") + np.searchsorted(drawn, chosen, "right")
        found.append(float(count.mean()) / 2 / len(low))
    assert abs(float(below.mean()) / len(low) - value) < 1e-9
    return Interval(value, *np.quantile(found, [0.025, 0.975]).tolist())


def mean_interval(values: Sequence[float], *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """The mean with its bootstrap."""
    array = np.asarray(values, np.float64)
    if not array.size:
        raise InputError("no value to average")
    found = [float(array[rows].mean()) for (rows,) in _places(seed, [array.size], draws)]
    return Interval(float(array.mean()), *np.quantile(found, [0.025, 0.975]).tolist())


@dataclass(frozen=True)
class Bin:
    """Predictions between `low` and `high`: how many, their mean, and how often they were right."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


def calibration(
    probabilities: Sequence[float], outcomes: Sequence[bool], bins: int = 10
) -> tuple[float, list[Bin]]:
    """(expected calibration error, bins of equal width that are not empty)."""
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    if not p.size:
        raise InputError("calibration: no prediction")
    which = np.minimum((p * bins).astype(int), bins - 1)
    found, error = [], 0.0
    for index in range(bins):
        inside = which == index
        count = int(inside.sum())
        if count:
            mean, right = float(p[inside].mean()), float(y[inside].mean())
            found.append(Bin(index / bins, (index + 1) / bins, count, mean, right))
            error += count / p.size * abs(mean - right)
    return error, found


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Share of runs of n words that are unlike each other, over all texts; 1 says no repetition."""
    runs: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        runs.update(zip(*(words[i:] for i in range(n)), strict=False))
    total = runs.total()
    return len(runs) / total if total else 1.0


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of the runs of n words that stood earlier in the same text; 0 says no repetition."""
    repeated = total = 0
    for text in texts:
        words = text.split()
        runs = Counter(zip(*(words[i:] for i in range(n)), strict=False))
        repeated += runs.total() - len(runs)
        total += runs.total()
    return repeated / total if total else 0.0


def rouge_scores(candidates: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of each pair, stemmed, by the package rouge-score."""
    if len(candidates) != len(references) or not candidates:
        raise InputError(f"ROUGE: {len(candidates)} candidates and {len(references)} references")
    library = _library("rouge_score.rouge_scorer", "ROUGE", "rouge-score")
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = library.RougeScorer(names, use_stemmer=True)
    found: dict[str, list[float]] = {name: [] for name in names}
    for candidate, reference in zip(candidates, references, strict=True):
        for name, score in scorer.score(reference, candidate).items():
            found[name].append(score.fmeasure)
    return found


def means(scores: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in scores.items()}


def rouge(candidates: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The means of `rouge_scores`."""
    return means(rouge_scores(candidates, references))
