"""The compiled library: loads, or says why not and gets out of the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from test_layout import project_files

import fastlm
from fastlm import dispatch, extension

ROOT = Path(__file__).resolve().parent.parent
built = pytest.mark.skipif(
    extension.unavailable is not None, reason=f"no compiled library: {extension.unavailable}"
)


def run(
    command: list[str], cwd: Path, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTLM_BACKEND")}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder that holds the package without its compiled library."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "assets", "_build_failure.txt")
    shutil.copytree(ROOT / "fastlm", tmp_path / "fastlm", ignore=ignore)
    return tmp_path


SMOKE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastlm.extension
ours = [w for w in caught if "fastlm" in str(w.message)]
assert len(ours) == 1 and ours[0].category is RuntimeWarning, ours
print(ours[0].message)

import torch
from fastlm import dispatch, extension
assert extension.cpu_isa() == "none" and extension.build_info() == extension.unavailable
for op in fastlm.backends():
    states = fastlm.backends()[op]
    assert "ready" in (states["reference"], states["torch"]), op
    assert states["cpu"] in ("-", extension.unavailable), states
logits = torch.randn(5, 7, requires_grad=True)
target = torch.tensor([0, 1, 2, 3, 6])
if hasattr(fastlm, "cross_entropy"):
    loss = fastlm.cross_entropy(logits, target)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, target))
    loss.backward()
if hasattr(fastlm, "sample"):
    tokens, logprobs = fastlm.sample(logits.detach())
    assert tokens.shape == logprobs.shape == (5,)
import numpy
assert extension.tokens is None and extension.tokens_unavailable, extension.tokens
for ids in (target, target.numpy().astype(numpy.uint16)):
    assert fastlm.token_plan(ids, 7).unique.tolist() == [0, 1, 2, 3, 6]
assert fastlm.pack_documents([[1, 2], [3]], 3).tokens.tolist() == [[1, 2, 3]]
if hasattr(fastlm, "embedding_gru"):
    weight, w_ih, w_hh = torch.randn(7, 4), torch.randn(12, 4), torch.randn(12, 4)
    output, h_n = fastlm.embedding_gru(target[None], weight, w_ih, w_hh)
    assert output.shape == (1, 5, 4) and output.isfinite().all()
"""


TOKENS = "from fastlm import extension; print(extension.tokens_unavailable)"


def test_without_the_library_one_warning_and_everything_works(package: Path) -> None:
    (package / "fastlm" / "_build_failure.txt").write_text("no C++ compiler: g++ was not found\n")
    result = run([sys.executable, "-c", SMOKE], package)
    assert result.returncode == 0, result.stderr
    warning = result.stdout.strip()
    assert "_C.so was not built (no C++ compiler: g++ was not found)" in warning
    assert "plain PyTorch runs instead" in warning and "pip install" in warning


def test_a_library_that_does_not_load_is_a_warning_with_the_reason(package: Path) -> None:
    (package / "fastlm" / "_C.so").write_bytes(b"not a library")
    (package / "fastlm" / f"_tokens{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a module")
    result = run([sys.executable, "-c", SMOKE], package)
    assert result.returncode == 0, result.stderr
    assert "fastlm/_C.so does not load: " in result.stdout
    reason = run([sys.executable, "-W", "ignore", "-c", TOKENS], package).stdout
    assert reason.startswith("fastlm/_tokens does not load: ")


@built
def test_the_loaded_library_tells_what_it_is() -> None:
    assert extension.cpu_isa() in ("base", "avx2", "avx512", "avx512_bf16")
    assert "torch stable ABI" in extension.build_info()


def test_a_library_of_older_sources_is_told() -> None:
    with pytest.raises(RuntimeError, match="_C.so has no kernel_of_tomorrow, .*pip install"):
        extension.raw("kernel_of_tomorrow")


FORCED = """
import os
from fastlm import extension
os.environ["FASTLM_CPU_ISA"] = "sse9"
try:
    extension.cpu_isa()
except RuntimeError as error:
    print(str(error).splitlines()[0])
os.environ["FASTLM_CPU_ISA"] = "base"
print(extension.cpu_isa())
"""


@built
def test_a_forced_instruction_set_is_used_and_an_unknown_one_is_an_error() -> None:
    result = run([sys.executable, "-c", FORCED], ROOT)
    assert result.stdout.splitlines() == [
        "FASTLM_CPU_ISA must be base, avx2, avx512 or avx512_bf16, got sse9",
        "base",
    ]


@built
def test_code_of_one_instruction_set_stays_out_of_the_others() -> None:
    """A weak symbol compiled with AVX could be the copy that the linker keeps for everybody."""
    objects = sorted((ROOT / "build").glob("ninja-*/*_cpu.cpp.avx*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of a build in this folder, or no nm")
    listed = subprocess.run(
        ["nm", "--defined-only", *map(str, objects)], check=True, capture_output=True, text=True
    ).stdout
    assert not re.findall(r"^\w+ [WVu] .*$", listed, re.MULTILINE)


@pytest.fixture
def source(package: Path) -> Path:
    """What a source distribution holds."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, package / name)
    shutil.copytree(ROOT / "csrc", package / "csrc")
    return package


# setup.py needs no torch until it compiles
SETUP = """
import sys, types
sys.modules["torch"] = types.ModuleType("torch")
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py"})
"""


def test_a_source_distribution_holds_all_sources_and_nothing_built(tmp_path: Path) -> None:
    result = run([sys.executable, "-c", SETUP, "-q", "egg_info", "--egg-base", str(tmp_path)], ROOT)
    assert result.returncode == 0, result.stderr
    made = tmp_path / "fastlm.egg-info"
    assert f"\nVersion: {fastlm.__version__}\n" in (made / "PKG-INFO").read_text("utf-8")
    held = {ROOT / name for name in (made / "SOURCES.txt").read_text().splitlines()}
    needed = {p for p in project_files() if p.parent != ROOT or p.suffix == ".toml"}
    assert {p for p in needed - held if p.parts[len(ROOT.parts)] != ".ci"} == set()
    assert not {p for p in held if p.suffix in (".so", ".pyc") or "failure" in p.name}


def test_a_source_without_its_kernels_is_an_error(source: Path) -> None:
    shutil.rmtree(source / "csrc")
    result = run([sys.executable, "-c", SETUP, "-q", "build", "--build-lib", "out"], source)
    assert result.returncode == 1 and "has no csrc/" in result.stderr


def test_install_without_a_compiler_keeps_the_reason(source: Path) -> None:
    build = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "out"]
    # left by an earlier install, and by one of another Python in place
    old = [source / "out/fastlm/gone.py", source / "fastlm/_tokens.cpython-39-x86_64.so"]
    old[0].parent.mkdir(parents=True)
    for path in old:
        path.touch()
    result = run(build, source, CXX="missing-compiler")
    assert not {path.name for path in old} & {p.name for p in (source / "out/fastlm").iterdir()}
    assert result.returncode == 0, result.stderr
    assert "installing without compiled kernels" in result.stderr
    note = (source / "out" / "fastlm" / "_build_failure.txt").read_text()
    assert note == "no C++ compiler: missing-compiler was not found at install\n"
    assert (source / "out" / "fastlm" / "_tokens_build_failure.txt").read_text() == note
    assert not (source / "out" / "fastlm" / "_C.so").exists()


def test_install_with_a_compiler_that_fails_keeps_the_reason(source: Path) -> None:
    build = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", "out"]
    result = run(build, source, CXX="false")
    assert result.returncode == 0, result.stderr
    note = (source / "out" / "fastlm" / "_build_failure.txt").read_text()
    assert note == "the C++ build failed at install with false\n"
    assert (source / "out" / "fastlm" / "_tokens_build_failure.txt").read_text() == note
    assert "installing without the module for loaders" in result.stderr


def test_a_developer_sees_the_failed_build(source: Path) -> None:
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    assert run(build, source, CXX="false").returncode != 0


def test_without_torch_the_build_stops_with_the_remedy(source: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'build']\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
    )
    result = run([sys.executable, "-c", code], source, timeout=30)
    assert result.returncode == 1
    assert "Install torch first, then:  pip install --no-build-isolation ." in result.stderr
    assert "Traceback" not in result.stderr


MODULE = """
import importlib.util, sys
import numpy
spec = importlib.util.spec_from_file_location("_tokens", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(list(module.plan(numpy.array([3, 2, 3], numpy.uint16), 9)))
assert "torch" not in sys.modules
"""


@built
def test_builds_without_ninja(source: Path) -> None:
    """Only the smallest of the sources: what is tested is that the commands run."""
    for folder in (source / "csrc").iterdir():
        if folder.name not in ("common", "tokens"):
            shutil.rmtree(folder)
    code = (
        "import shutil, sys; sys.modules['ninja'] = None\n"
        "which = shutil.which; shutil.which = lambda c: None if c == 'ninja' else which(c)\n"
        "sys.argv = ['setup.py', '--quiet', 'build_ext', '--inplace']\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
    )
    result = run([sys.executable, "-c", code], source)
    assert result.returncode == 0, result.stderr
    assert (source / "fastlm" / "_C.so").stat().st_size > 0
    (module,) = (source / "fastlm").glob("_tokens*")
    result = run([sys.executable, "-c", MODULE, str(module)], source)
    assert (
        result.stdout == "[array([2, 3]), array([1, 0, 1]), array([0, 1, 3]), array([1, 0, 2])]\n"
    )


def test_without_pybind11_the_rest_is_built(source: Path) -> None:
    """Neither the package nor the copy that comes with torch."""
    for folder in (source / "csrc").iterdir():
        if folder.name != "common":
            shutil.rmtree(folder)
    code = (
        "import pathlib, sys; sys.modules['pybind11'] = None; exists = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda p, **k: 'pybind11' not in str(p) and exists(p, **k)\n"
        "sys.argv = ['setup.py', '--quiet', 'build_ext', '--inplace']\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py'})"
    )
    result = run([sys.executable, "-c", code], source)
    assert result.returncode == 0, result.stderr
    assert (source / "fastlm" / "_C.so").stat().st_size > 0
    (note,) = (source / "fastlm").glob("_tokens*")
    assert note.read_text() == "pybind11 was not found at install\n"


def test_the_tree_under_test_has_its_kernels() -> None:
    """Without them every test of the cpu backend would quietly not be there."""
    assert extension.unavailable is None
    assert extension.tokens_unavailable is None
    for op in ("row_statistics", "embedding_gru", "gru", "sample", "linear_cross_entropy"):
        assert "cpu" in dispatch.ready(op)
