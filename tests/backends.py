"""A test on several backends, both passes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

import fastlm

REFUSED = "no backend takes this"


def on_backends(*names: str | None) -> Callable[[Any], Any]:
    """Forces each backend for the whole test, backward included; None is the usual choice. Where
    the backend refuses a call the test is skipped with what it says."""

    def decorated(test: Any) -> Any:
        @pytest.mark.parametrize("backend", names)
        @functools.wraps(test)
        def run(*args: Any, backend: str | None, **given: Any) -> None:
            try:
                with fastlm.use_backend(backend):
                    test(*args, backend=backend, **given)
            except RuntimeError as error:
                if REFUSED not in str(error):
                    raise
                pytest.skip(str(error))

        return run

    return decorated
