"""Builds fastlm/_C.so: all C++ and CUDA kernels in one library on torch's stable ABI.

Flags per source, in one ninja file (without ninja the same commands run directly): every
`*_cpu.cpp` is compiled once per instruction set, every `.cu` for its architectures, only the
bindings see torch's headers. The library holds no Python symbol and needs no particular torch
version from 2.10 on. Environment: FASTLM_CUDA=auto|0|1, FASTLM_CUDA_ARCH (for example "80;90"),
CUDA_HOME, CXX, MAX_JOBS.

And fastlm/_tokens, a pybind11 module for data loaders that knows no torch. An install goes on
without either, and keeps the reason next to where it would stand.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TORCH_TARGET = "0x020a000000000000"  # the oldest torch the library runs on: 2.10

CXX_FLAGS = (
    "-O3 -g0 -fPIC -std=c++17 -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra "
    "-Wno-unused-parameter -Wno-psabi -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast"
)
# the vectoriser gives full width only with the math flags above; 512 must be asked for
ISA_FLAGS = {
    "base": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
# only for sources that have products of bfloat16 pairs, by a compiler that knows the instruction
BF16_FLAGS = f"{ISA_FLAGS['avx512']} -mavx512bf16"
BF16_SOURCES = ("matmul_cpu", "embedding_gru_cpu")
NVCC_FLAGS = (
    "-O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden --Werror all-warnings "
    "-Xptxas -v,-warn-spills,-warn-lmem-usage"
)


def require_sources():
    if not (ROOT / "csrc").is_dir():
        sys.exit(f"\nfastlm: {ROOT} has no csrc/: it is no whole source of fastlm.\n")


def require_torch():
    try:
        import torch
    except ImportError:
        sys.exit(
            "\nfastlm: the build needs the torch it will run with.\n"
            "Install torch first, then:  pip install --no-build-isolation .\n"
        )
    return torch


def find_nvcc(torch):
    """CUDA kernels are built when torch has CUDA, or when FASTLM_CUDA=1 asks for it."""
    mode = os.environ.get("FASTLM_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"fastlm: FASTLM_CUDA must be auto, 0 or 1, got {mode!r}")
    if mode == "0" or (mode == "auto" and torch.version.cuda is None):
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = Path(home) / "bin" / "nvcc"
    if nvcc.exists():
        return nvcc
    if mode == "1":
        sys.exit(f"fastlm: FASTLM_CUDA=1 but {nvcc} does not exist; set CUDA_HOME")
    return None


def find_pybind11(torch):
    """The folder of its headers: of the package, or of the copy that comes with torch."""
    try:
        import pybind11
    except ImportError:
        folder = Path(torch.__file__).parent / "include"
    else:
        folder = Path(pybind11.get_include())
    return folder if (folder / "pybind11" / "numpy.h").exists() else None


class FreshBuild(build_py):
    def run(self):
        # an earlier build may have left modules there that are gone by now
        out = Path(self.build_lib).resolve() / "fastlm"
        if not self.editable_mode and out != ROOT / "fastlm":
            shutil.rmtree(out, ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):
    def get_ext_filename(self, name):
        filename = super().get_ext_filename(name)
        # a library of torch ops belongs to no particular Python
        return filename.removesuffix(SUFFIX) + ".so" if name.endswith("_C") else filename

    def run(self):
        # setuptools clears `inplace` while it builds
        self.in_tree = bool(self.inplace)
        super().run()

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        if self.in_tree:
            out = ROOT / "fastlm" / out.name
        out.parent.mkdir(parents=True, exist_ok=True)
        name = ext.name.removeprefix("fastlm.")
        note = out.with_name({"_C": "_build_failure.txt"}.get(name, f"{name}_build_failure.txt"))
        note.unlink(missing_ok=True)
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx.split()[0]) is None:
            return self.go_without(note, f"no C++ compiler: {cxx} was not found at install")
        require_sources()
        torch = require_torch()
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-torch{torch.__version__}"
        # elsewhere a compiler that nobody has tried may warn of something new
        warnings = "-Werror" if self.in_tree and os.environ.get("CI") else ""
        try:
            if name == "_C":
                steps = plan(torch, cxx, find_nvcc(torch), folder, out, warnings)
            elif isinstance(steps := plan_tokens(torch, cxx, folder, out, warnings), str):
                return self.go_without(note, steps)
            compile_library(steps, folder, out)
        except subprocess.CalledProcessError:
            if self.in_tree:  # a developer's build must not hide an error
                raise
            self.go_without(note, f"the C++ build failed at install with {cxx}")

    def go_without(self, note, reason):
        note.write_text(reason + "\n")
        lost = "compiled kernels" if note.name == "_build_failure.txt" else "the module for loaders"
        print(f"fastlm: {reason}; installing without {lost}", file=sys.stderr)

    def copy_extensions_to_source(self):
        """Nothing to copy: an in-tree build writes to the final place."""


class Step(NamedTuple):
    target: Path
    sources: list
    command: str
    depfile: str = ""  # where the compiler lists the headers it read


def compile_library(steps, folder, out):
    folder.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count())
    program = find_ninja()
    if program is None:
        return run_directly(steps, jobs)
    text = ninja_file(steps)
    path = folder / f"build-{zlib.crc32(str(out).encode())}.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    subprocess.run([program, "-C", str(folder), "-f", str(path), "-j", str(jobs)], check=True)


def find_ninja():
    try:
        import ninja
    except ImportError:  # without build isolation nobody installed the build requirements
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def run_directly(steps, jobs):
    """Everything from the start, for an install without ninja."""

    def run(step):
        subprocess.run(step.command, shell=True, check=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, steps[:-1]))
    run(steps[-1])


def ninja_file(steps):
    lines = ["ninja_required_version = 1.3", "rule run", "  command = $command"]
    for step in steps:
        lines.append(f"build {step.target}: run {' '.join(map(str, step.sources))}")
        lines.append("  command = " + step.command.replace("$", "$$"))
        if step.depfile:
            lines += [f"  depfile = {step.depfile}", "  deps = gcc"]
    return "\n".join([*lines, ""])


def compiles(cxx, flags):
    """Whether the compiler takes these flags."""
    command = f"{cxx} {flags} -fsyntax-only -x c++ -"
    run = subprocess.run(command, shell=True, input=b"int main() {}", capture_output=True)
    return run.returncode == 0


def plan(torch, cxx, nvcc, folder, out, warnings):
    """Every compilation, then the link."""
    torch_home = Path(torch.__file__).parent
    steps = []

    def add(compiler, source, extra, suffix="", quiet=False):
        name = "_".join(source.relative_to(ROOT / "csrc").parts)
        target = folder / f"{name}{suffix}.o"
        command = f"{compiler} -MF {target}.d -I{ROOT}/csrc {extra} -c {source} -o {target}"
        if quiet:
            command += f" > {target}.log 2>&1 || (cat {target}.log; exit 1)"
        steps.append(Step(target, [source], command, f"{target}.d"))

    compiler = f"{cxx} -MMD {CXX_FLAGS} {warnings}"
    link = (
        f"-L{torch_home}/lib -ltorch_cpu -Wl,--no-as-needed -ltorch -Wl,--as-needed "
        "-Wl,--exclude-libs,ALL -Wl,-z,defs"
    )
    knows_torch = f"-isystem {torch_home}/include -DTORCH_TARGET_VERSION={TORCH_TARGET}"
    if nvcc:
        knows_torch += f" -DUSE_CUDA -DFASTLM_CUDA -isystem {nvcc.parent.parent}/include"
        link += f" {nvcc.parent.parent}/lib64/libcudart_static.a -ldl -lrt -lpthread"
        add_cuda(add, nvcc)
    x86 = platform.machine() in ("x86_64", "AMD64")
    bf16 = x86 and compiles(cxx, "-mavx512bf16")
    if bf16:
        compiler += " -DFASTLM_AVX512_BF16"
    for source in sorted((ROOT / "csrc").glob("*/*_cpu.cpp")):
        for isa in ISA_FLAGS if x86 else ("base",):
            add(compiler, source, f"-DFASTLM_ISA={isa} {ISA_FLAGS[isa]}", f".{isa}")
        if bf16 and source.stem in BF16_SOURCES:
            add(compiler, source, f"-DFASTLM_ISA=avx512_bf16 {BF16_FLAGS}", ".avx512_bf16")
    for source in sorted((ROOT / "csrc").glob("*/*.cpp")):
        if not source.stem.endswith(("_cpu", "_module")):
            add(compiler, source, knows_torch)
    objects = [step.target for step in steps]
    command = f"{cxx} -shared {' '.join(map(str, objects))} -o {out} {link}"
    return [*steps, Step(out, objects, command)]


def plan_tokens(torch, cxx, folder, out, warnings):
    """The steps for fastlm/_tokens, or why there are none."""
    headers, python = find_pybind11(torch), Path(sysconfig.get_paths()["include"])
    if headers is None:
        return "pybind11 was not found at install"
    if not (python / "Python.h").exists():
        return "the headers of Python (Python.h) were not found at install"
    flags = f"{cxx} -MMD {CXX_FLAGS} {warnings} -I{ROOT}/csrc -isystem {headers} -isystem {python}"
    steps = []
    for source in sorted((ROOT / "csrc" / "tokens").glob("*.cpp")):
        target = folder / f"tokens_{source.name}{SUFFIX}.o"
        command = f"{flags} -MF {target}.d -c {source} -o {target}"
        steps.append(Step(target, [source], command, f"{target}.d"))
    objects = [step.target for step in steps]
    command = f"{cxx} -shared {' '.join(map(str, objects))} -o {out} -Wl,--exclude-libs,ALL"
    return [*steps, Step(out, objects, command)]


def add_cuda(add, nvcc):
    compiler = f"{nvcc} -MD {NVCC_FLAGS}"
    wanted = os.environ.get("FASTLM_CUDA_ARCH", "80;90").replace(",", ";").split(";")
    generic = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in wanted)
    newest = max(wanted, key=int)
    generic += f" -gencode arch=compute_{newest},code=compute_{newest}"
    for source in sorted((ROOT / "csrc").glob("*/*.cu")):
        hopper = source.stem.endswith("_sm90")
        flags = "-gencode arch=compute_90a,code=sm_90a" if hopper else generic
        add(compiler, source, flags, quiet=True)


require_torch()
setup(
    ext_modules=[Extension("fastlm._C", []), Extension("fastlm._tokens", [])],
    cmdclass={"build_py": FreshBuild, "build_ext": NinjaBuild},
)
