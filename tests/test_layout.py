"""The layout holds: who imports whom, sizes, nothing of anybody's machine in the text."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRITON_FILES = tuple(
    f"triton_{name}.py" for name in ("kernels", "forward", "backward", "rows", "bias")
)
CORE_DEPENDENCIES = {"torch", "numpy", "fastlm", "__future__", *sys.stdlib_module_names}
CORE_DEPENDENCIES.add("typing_extensions")  # torch needs it too; only type checkers read it here
# what stands above the ops, so that nothing in ops/ or below may know it
ABOVE_OPS = ("fastlm.nn", "fastlm.lm", "fastlm.compat", "fastlm.swap", "fastlm.bench")
# style: files of 400 lines, functions of 60; a tenth and a quarter more are not worth an argument
FILE_LINES, FUNCTION_LINES = 440, 75
KERNEL_LINES = 150  # a Triton kernel names each of its pointers, and inlines what it does once
TEST_FILE_LINES = 800  # all tests of an op stand in one file, whatever their number
LARGEST_FILE = 1 << 20


@lru_cache(maxsize=1)
def project_files() -> tuple[Path, ...]:
    """What the repository holds, or would hold after `git add -A`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout to list")
    return tuple(p for name in listed.stdout.splitlines() if (p := ROOT / name).is_file())


def python_files(*folders: str) -> list[Path]:
    return [
        p for p in project_files() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in folders
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every imported module; `from a import b` counts as a.b when that is a
    module of ours."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = ROOT / Path(*name.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield node.lineno, f"{name}.{alias.name}" if is_module else name


def is_in(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def imports_triton(role: str) -> bool:
    return role in TRITON_FILES or re.fullmatch(r"gluon_\w+\.py", role) is not None


def complaints(path: Path) -> list[str]:
    """Imports of a file in fastlm/ that its layer may not have."""
    own = module_name(path)
    role = path.name
    bad = []
    for line, module in imports(path):
        if is_in(module, "triton") and not imports_triton(role):
            reason = f"only {' and '.join(TRITON_FILES)} and gluon_*.py import triton"
        elif is_in(module, "fastlm.lm") and not is_in(own, "fastlm.lm"):
            reason = "the core does not know the system"
        elif is_in(own, "fastlm.lm", "fastlm.compat", "fastlm.bench"):
            inner = is_in(module, "fastlm.ops", "fastlm.library")
            reason = "public names only" if inner else ""
        elif is_in(own, "fastlm.ops"):
            reason = _ops_complaint(role, module)
        elif own.count(".") == 1 and role not in ("__init__.py", "swap.py"):
            above = is_in(module, "fastlm.ops", *ABOVE_OPS)
            reason = "a module that every op uses knows no op" if above else ""
        else:
            reason = ""
        if reason:
            bad.append(f"{path.relative_to(ROOT)}:{line}: imports {module}: {reason}")
    return bad


def _ops_complaint(role: str, module: str) -> str:
    if module == "fastlm" or is_in(module, *ABOVE_OPS):
        return "an op knows nothing above it"
    if role in ("reference.py", "triton_config.py") or imports_triton(role):
        if is_in(module, "fastlm.dispatch", "fastlm.library", "fastlm.extension"):
            return "a kernel knows nothing of dispatch"
        if is_in(module, "fastlm.ops") and module.endswith(".op"):
            return "a kernel knows nothing of its op"
    return ""


def test_imports_go_down_only() -> None:
    assert not [line for path in python_files("fastlm") for line in complaints(path)]


def test_benchmarks_use_public_names() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for path in python_files("benchmarks")
        for line, module in imports(path)
        if is_in(module, "fastlm.ops", "fastlm.library")
    ]
    assert not found


def test_core_needs_torch_and_numpy_only() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}"
        for path in python_files("fastlm")
        if not is_in(module_name(path), "fastlm.lm", "fastlm.compat")
        for line, module in imports(path)
        if module.split(".")[0] not in CORE_DEPENDENCIES
        and not (imports_triton(path.name) and is_in(module, "triton"))
    ]
    assert not found


def test_the_import_rule_sees_a_violation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fastlm" / "ops" / "thing"
    folder.mkdir(parents=True)
    (tmp_path / "fastlm" / "dispatch.py").touch()
    (tmp_path / "fastlm" / "nn").mkdir()
    (folder / "reference.py").write_text("from ... import dispatch\nfrom ...nn import GRU\n")
    (folder / "op.py").write_text("import triton\nfrom . import reference\nfrom fastlm import nn\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    lines = [*complaints(folder / "reference.py"), *complaints(folder / "op.py")]
    assert [line.split(": ", 1)[0].rsplit("/", 1)[1] for line in lines] == [
        "reference.py:1",
        "reference.py:2",
        "op.py:1",
        "op.py:3",
    ]


def test_ops_folders_have_an_empty_init() -> None:
    folders = {p.parent for p in python_files("fastlm") if p.parent.parent.name == "ops"}
    for folder in folders:
        init = folder / "__init__.py"
        assert init.exists() and not init.read_text(), f"{init.relative_to(ROOT)} must be empty"


def test_kernels_do_not_know_torch() -> None:
    """Sources compiled per instruction set include almost nothing: an inline function of the
    standard library compiled there could be the copy that the whole process uses."""
    found = []
    for path in project_files():
        if path.suffix not in (".cpp", ".cu", ".cuh", ".h") or path.parent.parent.name != "csrc":
            continue
        for include in re.findall(r"^#include\s+([<\"].+?[>\"])", path.read_text(), re.MULTILINE):
            knows_torch = path.stem.endswith("_binding") or path.name == "binding.h"
            if "torch/" in include and not knows_torch:
                found.append(f"{path.relative_to(ROOT)}: {include}")
            if path.stem.endswith("_cpu") and include.startswith("<") and include != "<cstdint>":
                found.append(f"{path.relative_to(ROOT)}: {include}")
    assert not found


def test_kernels_take_what_not_every_compiler_has_from_one_place() -> None:
    """GCC 11 has no __builtin_shufflevector, clang no __builtin_shuffle."""
    sources = (p for p in project_files() if p.suffix in (".cpp", ".h") and "csrc" in p.parts)
    found = {p.name for p in sources if "__builtin_shuffle" in p.read_text()}
    assert found == {"vec.h"}


def test_files_and_functions_are_short() -> None:
    found = []
    for path in python_files("fastlm", "benchmarks", "tests", "setup.py"):
        text = path.read_text()
        lines = text.count("\n")
        is_test = path.name.startswith("test_")
        if lines > (TEST_FILE_LINES if is_test else FILE_LINES):
            found.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                first = node.body[0]
                # a docstring is the contract of a public function, not its length
                documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
                contract = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
                length = node.end_lineno - node.lineno + 1 - contract
                is_kernel = imports_triton(path.name) and node.decorator_list
                if length > (KERNEL_LINES if is_kernel else FUNCTION_LINES):
                    found.append(f"{path.relative_to(ROOT)}: {node.name}, {length} lines")
    found += [
        f"{p.relative_to(ROOT)}: {n} lines"
        for p in project_files()
        if p.suffix in (".cpp", ".cu", ".cuh", ".h")
        and (n := p.read_text().count("\n")) > FILE_LINES
    ]
    assert not found


def test_no_large_files() -> None:
    found = [
        f"{p.relative_to(ROOT)}: {p.stat().st_size} bytes"
        for p in project_files()
        if p.stat().st_size > LARGEST_FILE and "assets" not in p.parts
    ]
    assert not found


def test_no_path_of_a_machine() -> None:
    """Text that only means something on the machine it was written on."""
    somewhere = re.compile(r"(?<![\w.<>)\]-])/(?:home|Users|root|tmp|work|scratch|mnt)/\w")
    found = []
    for path in project_files():
        if path == Path(__file__).resolve() or path.suffix in (".gz", ".png", ".svg"):
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if somewhere.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found
