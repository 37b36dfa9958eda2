"""Preferences that a rule makes between two texts of a model. Nobody judged them: the provenance of
each is synthetic:RULE, and what is learned from them is the rule."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from . import metrics
from .errors import UsageError
from .labelling import Question
from .preferences import Preference

_ENDED = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s*$")

# what each rule has more of in the better text
RULES: dict[str, Callable[[str], float]] = {
    # as many quotation marks closed as opened
    "quotes": lambda text: (
        -(text.count('"') % 2 + abs(text.count("\u201c") - text.count("\u201d")))
    ),
    "sentence": lambda text: float(_ENDED.search(text) is not None),  # ends with one
    "repetition": lambda text: -metrics.repetition([text]),  # few runs of 4 words that stood before
    "variety": lambda text: metrics.distinct([text], 1),  # different words, of all words
}


def prefer(questions: Sequence[Question], rule: str) -> list[Preference]:
    """What a rule prefers; questions whose texts are equal to it are left out.

    Raises:
        UsageError: there is no such rule.
    """
    if rule not in RULES:
        raise UsageError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    of, found = RULES[rule], []
    for question in questions:
        a, b = of(question.a), of(question.b)
        if a != b:
            better, worse = (question.a, question.b) if a > b else (question.b, question.a)
            found.append(Preference(question.prompt, better, worse, f"synthetic:{rule}"))
    return found
