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


class OutOfSpace(LMError):
    """The disk is full; the message says how much was needed and how much is free."""

    exit_code = OUT_OF_SPACE


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


# of PyTorch, which has no type for them on a CPU
_TOO_LARGE = ("DefaultCPUAllocator", "Storage size calculation overflowed")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(error: BaseException) -> bool:
    """safetensors says so in an exception of its own, which is no OSError."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if type(error).__name__ == "SafetensorError":
        return any(f"(os error {number})" in str(error) for number in _FULL)
    return isinstance(error, OutOfSpace)


def out_of_space(error: BaseException) -> bool:
    """Memory or disk ran out, or a tensor is larger than any memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or disk_full(error):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _TOO_LARGE)
