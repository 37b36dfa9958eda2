"""What can go wrong for a user, and the exit code that says so."""

from __future__ import annotations

import errno

import torch

OK = 0
CRITERION_FAILED = 1
USAGE = 2
BAD_INPUT = 3
BAD_CHECKPOINT = 4
OUT_OF_SPACE = 5
INTERRUPTED = 130


class LMError(Exception):
    """One line for the user; `exit_code` is what the command line returns."""

    exit_code = CRITERION_FAILED


class UsageError(LMError):
    exit_code = USAGE


class InputError(LMError):
    exit_code = BAD_INPUT


class CheckpointError(LMError):
    exit_code = BAD_CHECKPOINT


class TrainingError(LMError):
    """Training cannot go on: the loss or its gradient is not finite."""


class OtherRank(LMError):
    """Another of several processes could not go on; its own message says why. `lost`: it cannot be
    reached, and nothing may be asked of the group any more."""

    def __init__(self, text: str, exit_code: int = CRITERION_FAILED, lost: bool = False) -> None:
        super().__init__(text)
        self.exit_code, self.lost = exit_code, lost


class MissingExtra(UsageError):
    def __init__(self, purpose: str, package: str, extra: str = "lm") -> None:
        super().__init__(f"{purpose} needs the package {package}; pip install 'fastlm[{extra}]'")


def out_of_space(error: BaseException) -> bool:
    """Memory or disk ran out; PyTorch's CPU allocator says so in a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
