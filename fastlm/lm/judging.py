"""Rewards from somebody else's code: found by name, asked, and checked before they are used."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, LMError, UsageError

# texts of the prompts and of the continuations -> one number each
Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
SHOWN = 60  # characters of a text in a message


class RewardError(InputError):
    """A reward that cannot be used; `sample` is the number of the text it is about, or None."""

    def __init__(
        self, message: str, prompts: Sequence[str], texts: Sequence[str], sample: int | None
    ) -> None:
        self.sample = sample
        self.prompt = None if sample is None else prompts[sample]
        self.text = None if sample is None else texts[sample]
        shown = "" if sample is None else f"; text {sample} is {_short(texts[sample])}"
        super().__init__(message + shown)


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")


def _nearest(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def reward_function(name: str) -> Reward:
    """MODULE:FUNCTION, a function of two lists of texts: prompts and continuations. Modules are
    also looked for in the current folder.

    Raises:
        UsageError: there is no such function, with the nearest name; or its module raised.
    """
    module, _, function = name.partition(":")
    wrong = f"--reward must be MODULE:FUNCTION or a folder with a reward model, {name!r}: "
    if not (module and function):
        raise UsageError(f"{wrong}no such folder")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        near = ""
        if error.name == module:
            near = _nearest(module, (path.stem for path in Path().glob("*.py")))
        raise UsageError(f"{wrong}{error}{near}") from None
    except Exception as error:  # of somebody else's module
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UsageError(f"{wrong}importing it raised {told}") from error
    if not hasattr(found, function):
        near = _nearest(function, (n for n in dir(found) if callable(getattr(found, n))))
        raise UsageError(f"{wrong}{module} has no {function}{near}")
    judge: Any = getattr(found, function)
    if not callable(judge):
        raise UsageError(f"{wrong}no function but {type(judge).__name__}")
    return judge


def _told(error: BaseException) -> str:
    """In one line, with the place in the function that was called."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without our own
    where = f" ({Path(frames[0].filename).name}, line {frames[0].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _alone(reward: Reward, prompts: Sequence[str], texts: Sequence[str]) -> int | None:
    """The first text for which the function raises when it is asked about that one only."""
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        try:
            reward([prompt], [text])
        except Exception:  # of somebody else's function
            return number
    return None


def _ask(reward: Reward, prompts: Sequence[str], texts: Sequence[str]) -> list[Any]:
    try:
        given: Any = reward(prompts, texts)
    except LMError:
        raise
    except Exception as error:  # of somebody else's function
        at = _alone(reward, prompts, texts)
        raise RewardError(
            f"the reward function raised {_told(error)}",
            prompts, texts, at if at is not None or not texts else 0,
        ) from error  # fmt: skip
    try:
        return given.tolist() if isinstance(given, Tensor) else list(given)
    except TypeError:
        raise RewardError(
            f"the reward function gave {type(given).__name__}, not a list of numbers",
            prompts, texts, None,
        ) from None  # fmt: skip


def judged(reward: Reward, prompts: Sequence[str], texts: Sequence[str]) -> Tensor:
    """Rewards [B], checked.

    Raises:
        RewardError: the function raised, gave another number of rewards, something that is no
        number, or one that is not finite; with the text.
    """
    given = _ask(reward, prompts, texts)
    if len(given) != len(texts):
        without = len(given) if len(given) < len(texts) else None
        raise RewardError(
            f"the reward function gave {len(given)} rewards for {len(texts)} texts",
            prompts, texts, without,
        )  # fmt: skip
    values = []
    for number, reward_of in enumerate(given):
        try:
            value = math.nan if isinstance(reward_of, str) else float(reward_of)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise RewardError(
                f"the reward of text {number} must be a finite number, got {reward_of!r}",
                prompts, texts, number,
            )  # fmt: skip
        values.append(value)
    return torch.tensor(values, dtype=torch.float32)
