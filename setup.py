"""Builds fastlm/_C.so: all C++ and CUDA kernels in one library on torch's stable ABI.

One ninja file with flags per source: every `*_cpu.cpp` is compiled once per instruction set, every
`.cu` for its architectures, only the bindings see torch's headers. The library holds no Python
symbol and needs no particular torch version from 2.10 on. Environment: FASTLM_CUDA=auto|0|1,
FASTLM_CUDA_ARCH (for example "80;90"), CUDA_HOME, CXX, MAX_JOBS.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
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
NVCC_FLAGS = (
    "-O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden --Werror all-warnings "
    "-Xptxas -v,-warn-spills,-warn-lmem-usage"
)


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


class NinjaBuild(build_ext):
    def get_ext_filename(self, name):
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return super().get_ext_filename(name).removesuffix(suffix) + ".so"

    def run(self):
        # setuptools clears `inplace` while it builds
        self.in_tree = bool(self.inplace)
        super().run()

    def build_extension(self, ext):
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        if self.in_tree:
            out = ROOT / "fastlm" / out.name
        out.parent.mkdir(parents=True, exist_ok=True)
        note = out.with_name("_build_failure.txt")
        note.unlink(missing_ok=True)
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx.split()[0]) is None:
            return self.go_without(note, f"no C++ compiler: {cxx} was not found at install")
        try:
            run_ninja(require_torch(), cxx, out, strict=self.in_tree)
        except subprocess.CalledProcessError:
            if self.in_tree:  # a developer's build must not hide an error
                raise
            self.go_without(note, f"the C++ build failed at install with {cxx}")

    def go_without(self, note, reason):
        note.write_text(reason + "\n")
        print(f"fastlm: {reason}; installing without compiled kernels", file=sys.stderr)

    def copy_extensions_to_source(self):
        """Nothing to copy: an in-tree build writes to the final place."""


def run_ninja(torch, cxx, out, strict):
    import ninja

    tag = f"{sysconfig.get_platform()}-torch{torch.__version__}"
    folder = ROOT / "build" / f"ninja-{tag}"
    folder.mkdir(parents=True, exist_ok=True)
    text = ninja_file(torch, cxx, find_nvcc(torch), folder, out, "-Werror" if strict else "")
    path = folder / f"build-{abs(hash_text(str(out)))}.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    program = Path(ninja.BIN_DIR) / "ninja"
    subprocess.run([str(program), "-C", str(folder), "-f", str(path), "-j", jobs], check=True)


def hash_text(text):
    import zlib

    return zlib.crc32(text.encode())


def ninja_file(torch, cxx, nvcc, folder, out, warnings):
    torch_home = Path(torch.__file__).parent
    lines = [
        "ninja_required_version = 1.3",
        f"cxx = {cxx}",
        f"flags = {CXX_FLAGS} {warnings} -I{ROOT}/csrc",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in -o $out $link",
    ]
    objects = []

    def add(rule, source, extra, suffix=""):
        name = "_".join(source.relative_to(ROOT / "csrc").parts)
        target = folder / f"{name}{suffix}.o"
        objects.append(str(target))
        lines.extend([f"build {target}: {rule} {source}", f"  extra = {extra}"])

    link = (
        f"-L{torch_home}/lib -ltorch_cpu -Wl,--no-as-needed -ltorch -Wl,--as-needed "
        "-Wl,--exclude-libs,ALL -Wl,-z,defs"
    )
    knows_torch = f"-isystem {torch_home}/include -DTORCH_TARGET_VERSION={TORCH_TARGET}"
    if nvcc:
        knows_torch += f" -DUSE_CUDA -DFASTLM_CUDA -isystem {nvcc.parent.parent}/include"
        link += f" {nvcc.parent.parent}/lib64/libcudart_static.a -ldl -lrt -lpthread"
        add_cuda(lines, add, nvcc)
    x86 = platform.machine() in ("x86_64", "AMD64")
    for source in sorted((ROOT / "csrc").glob("*/*_cpu.cpp")):
        for isa in ISA_FLAGS if x86 else ("base",):
            add("cxx", source, f"-DFASTLM_ISA={isa} {ISA_FLAGS[isa]}", f".{isa}")
    for source in sorted((ROOT / "csrc").glob("*/*.cpp")):
        if not source.stem.endswith("_cpu"):
            add("cxx", source, knows_torch)
    lines += [f"build {out}: link {' '.join(objects)}", f"  link = {link}", ""]
    return "\n".join(lines)


def add_cuda(lines, add, nvcc):
    lines += [
        f"nvcc = {nvcc}",
        "rule nvcc",
        f"  command = $nvcc -MD -MF $out.d {NVCC_FLAGS} -I{ROOT}/csrc $extra -c $in -o $out "
        "> $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    wanted = os.environ.get("FASTLM_CUDA_ARCH", "80;90").replace(",", ";").split(";")
    generic = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in wanted)
    newest = max(wanted, key=int)
    generic += f" -gencode arch=compute_{newest},code=compute_{newest}"
    for source in sorted((ROOT / "csrc").glob("*/*.cu")):
        hopper = source.stem.endswith("_sm90")
        add("nvcc", source, "-gencode arch=compute_90a,code=sm_90a" if hopper else generic)


require_torch()
setup(ext_modules=[Extension("fastlm._C", [])], cmdclass={"build_ext": NinjaBuild})
