"""AUC-ROC, calibration, ROUGE, repetition: against counting by hand."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest

from fastlm.lm import metrics
from fastlm.lm.errors import InputError, MissingExtra


def pairs(high: list[float], low: list[float]) -> float:
    """The definition, pair by pair."""
    total = sum((a > b) + (a == b) / 2 for a in high for b in low)
    return total / len(high) / len(low)


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_ordered_pairs(seed: int) -> None:
    draw = random.Random(seed)
    high = [draw.randrange(8) + 1.0 for _ in range(17)]  # few values: many ties
    low = [float(draw.randrange(8)) for _ in range(23)]
    labels = [True] * len(high) + [False] * len(low)
    assert abs(metrics.auc_roc(high + low, labels) - pairs(high, low)) < 1e-12
    false, true = metrics.roc_curve(high + low, labels)
    area = float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))
    assert abs(area - pairs(high, low)) < 1e-12
    found = metrics.auc_interval(high, low, seed=seed)
    assert found.low <= found.value <= found.high and found.value == metrics.auc_roc(
        high + low, labels
    )


def test_few_labels_give_a_wide_interval() -> None:
    draw = np.random.default_rng(0)
    few = metrics.auc_interval(draw.normal(1, 1, 10).tolist(), draw.normal(0, 1, 10).tolist())
    many = metrics.auc_interval(draw.normal(1, 1, 1000).tolist(), draw.normal(0, 1, 1000).tolist())
    assert few.high - few.low > 4 * (many.high - many.low) and many.low < 0.76 < many.high


def test_intervals_cover_the_truth() -> None:
    """95% intervals of 60 draws: 50 and fewer hits would have a chance below 0.001."""
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(60):
        found = metrics.mean_interval(draw.normal(3.0, 2.0, 80).tolist(), draws=300)
        hits += found.low <= 3.0 <= found.high
    assert hits > 50


@pytest.mark.parametrize(
    "scores, labels, reason",
    [
        ([1.0, 2.0], [True, True], "positives and negatives"),
        ([1.0, float("nan")], [True, False], "score 1 is nan"),
        ([1.0], [True, False], "1 scores and 2 labels"),
    ],
)
def test_auc_refuses(scores: list[float], labels: list[bool], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        metrics.auc_roc(scores, labels)


def test_calibration_by_hand() -> None:
    error, bins = metrics.calibration([0.05, 0.05, 0.95, 1.0], [False, True, True, True], 10)
    assert [(b.count, b.observed) for b in bins] == [(2, 0.5), (2, 1.0)]
    assert abs(error - (0.5 * 0.45 + 0.5 * 0.025)) < 1e-12
    draw = np.random.default_rng(0)
    p = draw.random(20000)
    assert metrics.calibration(p.tolist(), (draw.random(20000) < p).tolist())[0] < 0.02


def test_repetition_and_distinct() -> None:
    assert metrics.repetition(["a b c d e"]) == 0.0 and metrics.distinct(["a b c"]) == 1.0
    assert metrics.repetition(["a b a b a b a b"], 4) == 3 / 5
    assert metrics.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert metrics.repetition(["one"]) == 0.0 and metrics.distinct([]) == 1.0


def test_rouge() -> None:
    scores = metrics.rouge(["the cat sat", "x"], ["the cats sat down", "y"])
    assert abs(scores["rouge1"] - (2 * 1.0 * 0.75 / 1.75) / 2) < 1e-9  # with stemming
    assert abs(scores["rougeL"] - scores["rouge1"]) < 1e-9
    # both pairs of words of the first, of the three of the second
    assert abs(scores["rouge2"] - (2 * 1.0 * (2 / 3) / (5 / 3)) / 2) < 1e-9
    # the longest common subsequence of "a b c d" and "d c b a" is one word
    assert metrics.rouge(["a b c d"], ["d c b a"]) == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 0.25}
    with pytest.raises(InputError, match="2 candidates and 1 references"):
        metrics.rouge(["a", "b"], ["a"])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingExtra, match=r"scikit-learn; pip install 'fastlm\[eval\]'"):
        metrics.auc_roc([1.0, 0.0], [True, False])
    with pytest.raises(MissingExtra, match="rouge-score"):
        metrics.rouge(["a"], ["a"])
