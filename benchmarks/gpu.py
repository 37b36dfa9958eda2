"""`make gpu`: build, test and time on a machine that has a GPU and nothing else of ours.

Needs this Python to have torch with CUDA, pytest and pytest-benchmark; no network, no .venv. Prints
a short table last and writes benchmarks/results/<gpu>.json. Stays under ten minutes. Exit codes:
0 all well, 1 something failed, 2 no GPU to run on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ATTENTION_BENCHMARK = "benchmarks/gpu_attention.py"
FORCED_BENCHMARK = "benchmarks/bench_embedding_gru.py"
PEERS = ("flash_attn", "liger_kernel", "triton")


def run(
    title: str, command: Sequence[str], timeout: float, backend: str | None = None
) -> tuple[bool, float]:
    """Run a Python command in the repository, its output shown; whether it succeeded, seconds."""
    print(f"\n== {title}: python {' '.join(command)}", flush=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "FASTLM_CUDA": os.environ.get("FASTLM_CUDA", "auto"),
    }
    if backend is not None:
        environment["FASTLM_BACKEND"] = backend
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, timeout=timeout
        )
        succeeded = done.returncode == 0
    except subprocess.TimeoutExpired:
        print(f"== {title}: stopped after {timeout:.0f} s", flush=True)
        succeeded = False
    return succeeded, time.monotonic() - start


def no_gpu() -> str | None:
    """Why nothing can run here, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; name one that has: make gpu PY=python3"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return None


def installed(names: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    import importlib.metadata

    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name.replace("_", "-"))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def test_counts(report: Path) -> dict[str, int]:
    """Tests, failures (errors included) and skipped tests of a junit file."""
    if not report.exists():
        return {"run": 0, "failed": 0, "skipped": 0}
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for key in totals:
            totals[key] += int(suite.get(key, 0))
    return {
        "run": totals["tests"] - totals["skipped"],
        "failed": totals["failures"] + totals["errors"],
        "skipped": totals["skipped"],
    }


def run_tests(timeout: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = ["-m", "pytest", "-q", "tests", "-m", "gpu", f"--junitxml={report}"]
        passed, seconds = run("GPU tests", command, timeout)
        counts = test_counts(report)
    return {"passed": passed and counts["run"] > 0, **counts, "seconds": round(seconds, 1)}


def run_attention(seconds: float, no_compile: bool) -> bool:
    """Attention in Triton beside PyTorch's; a shape that started in time may still compile."""
    command = [ATTENTION_BENCHMARK, f"--seconds={max(10.0, seconds - 40):.0f}"]
    command += ["--no-compile"] if no_compile else []
    return run("attention in Triton", command, seconds + 40)[0]


def write(summary: dict[str, Any]) -> Path:
    """Add this run to the file that the benchmarks of this GPU are in."""
    path = RESULTS / f"{summary['slug']}.json"
    RESULTS.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    known["machine"] = summary["gpu"]
    known["gpu_run"] = summary
    path.write_text(json.dumps(known, indent=1) + "\n")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="time in all; default 9.5")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args(argv)
    start = time.monotonic()
    if (reason := no_gpu()) is not None:
        print(f"make gpu: needs a CUDA device, but {reason}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    import torch

    def left() -> float:
        return max(1.0, options.minutes * 60 - (time.monotonic() - start))

    built, build_seconds = run("build", ["setup.py", "-q", "build_ext", "--inplace"], left())
    tests = run_tests(min(left(), 260))
    timed_attention = run_attention(left() / 3, options.no_compile)
    # a case that started in time may still compile: keep two minutes for it and the table
    timing = ["-m", "pytest", "-q", "benchmarks", "--benchmark", "--device=cuda"]
    timing += ["--benchmark-max-time=0.3", f"--time-limit={max(10.0, left() - 120):.0f}"]
    timing += ["--no-compile"] if options.no_compile else []
    timed, bench_seconds = run("benchmarks", timing, left())
    # kernels that are not the default yet; a failure is shown, and counts through the GPU tests
    forced = [arg.replace("benchmarks", FORCED_BENCHMARK) for arg in timing]
    if built and left() > 60:
        run("benchmark of the CUDA kernels", forced, left() - 20, backend="cuda")

    from fastlm.bench import measure

    machine = measure.machine("cuda")
    summary = {
        "gpu": machine["name"],
        "slug": machine["slug"],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "peers": installed(PEERS),
        "built": built,
        "tests": tests,
        "benchmarks_passed": timed,
        "attention_passed": timed_attention,
        "seconds": {"build": round(build_seconds, 1), "benchmarks": round(bench_seconds, 1)},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    path = write(summary)
    say = {True: "ok", False: "FAILED"}
    print(f"\n{machine['name']}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"build       {say[built]}, {build_seconds:.0f} s")
    print(
        f"GPU tests   {say[tests['passed']]}, {tests['run']} run, {tests['failed']} failed, "
        f"{tests['skipped']} skipped, {tests['seconds']:.0f} s"
    )
    print(f"benchmarks  {say[timed]}, {bench_seconds:.0f} s, table above")
    print(f"attention   {say[timed_attention]}, in Triton beside PyTorch, table above")
    print(f"results     {path.relative_to(ROOT)}")
    return 0 if built and tests["passed"] and timed and timed_attention else 1


if __name__ == "__main__":
    sys.exit(main())
