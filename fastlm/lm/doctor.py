"""What is installed, what was built, and what each op runs here and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from typing import Any

import torch

import fastlm
from fastlm import extension

from . import files, machine

EXTRAS = (
    "tokenizers safetensors rich ftfy scikit-learn rouge-score datasets jinja2 matplotlib "
    "tensorboard triton".split()
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpus() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _logits() -> tuple[Any, ...]:
    return torch.randn(512, 1024), torch.arange(512)


def _linear() -> tuple[Any, ...]:
    return torch.randn(64, 128), torch.randn(1024, 128), torch.arange(64)


def _gru_weights(inputs: int, hidden: int) -> list[torch.Tensor]:
    cell = torch.nn.GRU(inputs, hidden)
    return [parameter.detach() for parameter in cell.parameters()]


def _embedding_gru() -> tuple[Any, ...]:
    return torch.randint(33, (2, 8)), torch.randn(33, 16), *_gru_weights(16, 16)


def _gru() -> tuple[Any, ...]:
    return torch.randn(3, 2, 16), torch.zeros(1, 2, 16), _gru_weights(16, 16)


def _attention() -> tuple[Any, ...]:
    return tuple(torch.randn(1, 4, 2, 16) for _ in range(3))


def _decode() -> tuple[Any, ...]:
    cache = torch.randn(2, 1, 8, 2, 16)
    return torch.randn(1, 2, 16), *cache, 4


# a call of every public function that runs an op, as small as the kernels take
CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "embedding_gru": _embedding_gru,
    "gru": _gru,
    "attention": _attention,
    "decode_attention": _decode,
    "linear": lambda: (torch.randn(64, 256), torch.randn(512, 256)),
    "cross_entropy": _logits,
    "linear_cross_entropy": _linear,
    "token_logprobs": _logits,
    "linear_token_logprobs": _linear,
    "entropy": lambda: (torch.randn(512, 1024),),
    "sample": lambda: (torch.randn(4, 33),),
    "policy_loss": lambda: (-torch.rand(2, 3), torch.randn(2)),
}


def _explain(name: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    try:
        steps = fastlm.explain(name, *arguments)
    except Exception as error:  # the report must show a broken op, not die of it
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "runs": [step.chosen for step in steps],
        "why_not": {
            backend: reason for step in steps for backend, reason in step.answers.items() if reason
        },
    }


def collect() -> dict[str, Any]:
    """The whole report as JSON."""
    state = torch.get_rng_state()
    ops = {name: _explain(name, make()) for name, make in CALLS.items() if name in fastlm.__all__}
    torch.set_rng_state(state)
    return {
        "fastlm": fastlm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "extras": {name: _version(name) for name in EXTRAS},
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": _cpus(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "built": extension.build_info(),
        "cpu_isa": extension.cpu_isa(),
        "tokens": extension.tokens_unavailable or "built",
        "gemm_gflops": machine.gemm_rate() / 1e9,
        "cache": str(files.cache_dir()),
        "backends": dict(fastlm.backends()),
        "ops": ops,
    }


def short(report: dict[str, Any]) -> list[str]:
    """Three lines for the head of another command's output."""
    runs = {
        name: "error" if "error" in op else "+".join(dict.fromkeys(map(str, op["runs"]))) or "torch"
        for name, op in report["ops"].items()
    }
    return [
        f"fastlm {report['fastlm']}, torch {report['torch']}, Python {report['python']}, "
        f"{report['threads']} threads of {report['cpus']} CPUs, "
        f"{report['gemm_gflops']:.0f} GFLOP/s in matrix products",
        f"kernels: {report['built']}; instruction set here: {report['cpu_isa']}",
        "runs: " + (", ".join(f"{name} {where}" for name, where in runs.items()) or "no op"),
    ]


def text(report: dict[str, Any]) -> str:
    extras = ", ".join(f"{name} {version}" for name, version in report["extras"].items())
    lines = [
        *short(report)[:2],
        f"system: {report['system']}, GPU: {report['gpu'] or 'none'}, numpy {report['numpy']}",
        f"extras: {extras}",
        f"cache: {report['cache']}",
        "",
        str(fastlm.backends()),
        "",
        "what a small float32 call runs here, and why not the others:",
    ]
    for name, op in report["ops"].items():
        if "error" in op:
            lines.append(f"{name}: fails: {op['error']}")
            continue
        lines.append(f"{name}: {', '.join(map(str, op['runs'])) or 'plain PyTorch'}")
        lines += [f"    {backend}: {reason}" for backend, reason in op["why_not"].items()]
    return "\n".join(lines)
