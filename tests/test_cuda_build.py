"""The CUDA sources as a user builds them: no spills, tensor-core instructions, one library for all.

Needs nvcc (CUDA_HOME, as setup.py looks for it) and no GPU. Without nvcc the emulated device still
runs the kernels: test_emulated_gru.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / "nvcc"

pytestmark = pytest.mark.skipif(not NVCC.exists(), reason=f"no CUDA compiler at {NVCC}")

# registers of a thread, by tiling (parts, groups, tiles of a warp, tiles held in registers): what
# was found with CUDA 13.0, and a few more; a block has 256 threads and its device to itself
REGISTERS = {
    (1, 2, 4, 4): 160, (1, 2, 8, 8): 200, (1, 2, 16, 12): 255, (1, 1, 16, 12): 255,
    (2, 1, 2, 2): 168, (2, 1, 4, 4): 224, (2, 1, 8, 5): 255,
    (3, 1, 2, 2): 168, (3, 1, 4, 4): 232, (3, 1, 8, 6): 255,
    (1, 4, 8, 8): 176, (1, 4, 16, 12): 240, (1, 4, 24, 12): 240,
    (3, 2, 4, 4): 200, (3, 2, 8, 6): 255,
}  # fmt: skip
# instructions that must be in the code of each kernel, by what its name holds
INSTRUCTIONS = {
    "forward_kernel": ("HMMA.16816.F32.BF16", "LDSM", "LD.E.128.STRONG.GPU|LDG.E.128.STRONG.GPU"),
    "backward_kernel": ("HMMA.16816.F32.BF16", "LDSM", "LD.E.128.STRONG.GPU|LDG.E.128.STRONG.GPU"),
    "forward_cluster_kernel": ("HMMA.16816.F32.BF16", "ST.*ASYNC|STAS", "SYNCS"),
    "backward_cluster_kernel": ("HMMA.16816.F32.BF16", "LDSM", "ST.*ASYNC|STAS", "SYNCS"),
}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library, built with CUDA from the sources that CUDA kernels need."""
    folder = tmp_path_factory.mktemp("cuda")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("common", "embedding_gru", "tokens"):
        shutil.copytree(ROOT / "csrc" / name, folder / "csrc" / name)
    (folder / "fastlm").mkdir()
    shutil.copy(ROOT / "fastlm" / "__init__.py", folder / "fastlm")  # it has the version
    kept = {k: v for k, v in os.environ.items() if k not in ("FASTLM_CUDA_ARCH", "FASTLM_BACKEND")}
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env={**kept, "FASTLM_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return folder


def reports(build: Path) -> dict[tuple[str, str], dict[str, int]]:
    """What ptxas says of each kernel and architecture."""
    found = {}
    for log in build.glob("build/ninja-*/*.log"):
        text = log.read_text()
        pattern = (
            r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?(\d+) bytes stack frame, "
            r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n"
        )
        for kernel, arch, stack, stores, loads, registers, rest in re.findall(pattern, text, re.S):
            shared = re.search(r"(\d+) bytes smem", rest)
            found[kernel, arch] = {
                "local": int(stack) + int(stores) + int(loads),
                "registers": int(registers),
                "shared": int(shared[1]) if shared else 0,  # all of it is chosen at the launch
            }
    return found


def family(kernel: str) -> str:
    """forward_kernel and the like, from a mangled name."""
    match = re.search(r"\d+((?:forward|backward)(?:_cluster)?_kernel)I", kernel)
    assert match, kernel
    return match[1]


def tiling(kernel: str) -> tuple[int, ...]:
    match = re.search(r"TilingI((?:Li\d+E)+)E", kernel)
    assert match, kernel
    return tuple(map(int, re.findall(r"Li(\d+)E", match[1])))


def test_every_kernel_is_compiled_for_its_devices(build: Path) -> None:
    counts = Counter((family(kernel), arch) for kernel, arch in reports(build))
    want = {}
    for way in ("forward", "backward"):
        want |= {(f"{way}_kernel", arch): 10 for arch in ("sm_80", "sm_90")}
        want |= {(f"{way}_cluster_kernel", "sm_90a"): 5}
    assert counts == want


def test_nothing_spills_and_everything_fits(
    build: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = reports(build)
    too_much = {
        key: report
        for key, report in found.items()
        if report["local"] or report["shared"] or report["registers"] > REGISTERS[tiling(key[0])]
    }
    assert found and not too_much, too_much
    with capsys.disabled():
        most = max(report["registers"] for report in found.values())
        print(f" [{len(found)} kernels, at most {most} registers]", end="", flush=True)


def cuobjdump() -> Path | None:
    """From the toolkit, or the copy that comes with triton."""
    spec = importlib.util.find_spec("triton")
    folders = [NVCC.parent]
    if spec and spec.origin:
        folders.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    return next((f / "cuobjdump" for f in folders if (f / "cuobjdump").exists()), None)


@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, in the toolkit or with triton")
def test_kernels_use_the_instructions_they_are_written_for(build: Path) -> None:
    kernels = 0
    for target in build.glob("build/ninja-*/*.cu.o"):
        code = subprocess.run(
            [str(cuobjdump()), "-sass", str(target)], check=True, capture_output=True, text=True
        ).stdout
        for part in code.split("Function : ")[1:]:
            name = part.split(maxsplit=1)[0]
            kernels += 1
            for instruction in INSTRUCTIONS[family(name)]:
                assert re.search(instruction, part), f"{name}: no {instruction}"
    assert kernels == len(reports(build))


LOADED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.fastlm_C
print(ops.has_cuda_kernels(), torch.version.cuda is not None)
try:
    ops.gru_forward_cuda(*[torch.zeros(3, 3)], None, None, torch.zeros(3, 1), None, None, 1, False,
                         True, False, torch.zeros(3, 8), torch.zeros(3, 1), None)
except NotImplementedError as error:
    print("CUDA" in str(error))
print("with CUDA kernels" in ops.build_info())
"""


def test_the_same_library_loads_without_cuda(build: Path) -> None:
    """Its CUDA entry points are weak: a torch without CUDA leaves them empty."""
    library = build / "fastlm" / "_C.so"
    result = subprocess.run(
        [sys.executable, "-c", LOADED, str(library)], cwd=build, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    has_kernels, has_cuda = result.stdout.split()[:2]
    assert has_kernels == has_cuda and result.stdout.split()[2:] == ["True", "True"]
