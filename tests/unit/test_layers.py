"""The layering: imports go down the wings only, nothing is circular, serving knows nothing of video."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

PACKAGE = REPOSITORY / "ltx2_pool"
WINGS = ("words", "model", "processes", "caches", "serving", "fleet", "gateway", "tools", "programs")
"""From the bottom up: a wing imports from those before it, and from itself."""
VIDEO = {"torch", "numpy", "av", "fastvideo", "transformers"}
LINES = 400
IN_CHILDREN = {"ltx2_pool.tools.imaginary"}
"""Programs that are shape processes themselves, with an engine of their own: they run the model's child."""
TOOLS = (
    "httpx",
    "matplotlib",
    "rich",
    "safetensors",
    "hypothesis",
    "s3fs",
    "PIL",
    "sqlalchemy",
    "starlette",
    "uvicorn",
)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def wing(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST, inside: bool, typing: bool) -> list[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """Every import below a node; whether it is in a function, and whether only type checkers read it."""
    found: list[tuple[ast.Import | ast.ImportFrom, bool, bool]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            found.append((child, inside, typing))
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            found += statements(child, inside or function, typing or is_type_checking(child))
    return found


def imports(module: str, *, in_functions: bool = True, for_types: bool = True) -> set[str]:
    """Modules that a module imports, by their full names; of this package, down to the module."""
    found = set()
    for node, inside, typing in statements(ast.parse(MODULES[module].read_text()), False, False):
        if (inside and not in_functions) or (typing and not for_types):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{module}: relative imports hide which way they go"
            source = node.module or ""
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in MODULES else source for a in node.names}
    return found


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name in MODULES and wing(name)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    if wing(module):
        allowed = WINGS[: WINGS.index(wing(module)) + 1]
        assert {name for name in ours(imports(module)) if wing(name) not in allowed} == set()


@pytest.mark.parametrize("module", MODULES)
def test_the_model_is_imported_by_itself_alone(module):
    """Everything else starts it by name in a child, or imports it when it has become one."""
    if wing(module) != "model" and module not in IN_CHILDREN:
        found = ours(imports(module, in_functions=False, for_types=False))
        assert {name for name in found if wing(name) == "model"} == set()


def test_nothing_is_circular():
    edges = {module: ours(imports(module, in_functions=False, for_types=False)) - {module} for module in MODULES}
    while leaves := {module for module, below in edges.items() if not below}:
        edges = {module: below - leaves for module, below in edges.items() if module not in leaves}
    assert edges == {}, "these import each other, or what does"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_can_be_read_at_once_and_says_what_it_is_for(module):
    text = MODULES[module].read_text()
    lines = text.count("\n")
    assert lines <= LINES
    document = ast.get_docstring(ast.parse(text))
    assert document
    assert document.splitlines()[0].endswith((".", "?", ":"))


@pytest.mark.parametrize("module", [module for module in MODULES if wing(module) == "serving"])
def test_serving_knows_nothing_of_tensors_and_files_of_video(module):
    assert {name.partition(".")[0] for name in imports(module)} & VIDEO == set()


@pytest.mark.parametrize("module", [module for module in MODULES if wing(module) == "gateway"])
def test_the_gateway_speaks_http_to_the_others_and_shares_words_only(module):
    assert {wing(name) for name in ours(imports(module))} <= {"gateway", "words"}


DISTRIBUTIONS = packages_distributions()


def requirements(lines: list[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!;\[]", line)[0]).lower() for line in lines}


PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
RUNTIME = requirements(PROJECT["dependencies"])
EXTRAS = {name: requirements(lines) for name, lines in PROJECT["optional-dependencies"].items()}


def distributions(names: set[str]) -> dict[str, set[str]]:
    """Which distribution each import that is not ours or Python's comes from."""
    tops = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"ltx2_pool"}
    return {top: {re.sub(r"[-_.]+", "-", d).lower() for d in DISTRIBUTIONS.get(top, [top])} for top in tops}


@pytest.mark.parametrize("module", MODULES)
def test_every_package_that_is_imported_is_a_dependency(module):
    """Directly, not because another package happens to bring it; what only tools need may be an extra."""
    extras = {"gateway": ("gateway",), "tools": tuple(EXTRAS), "programs": tuple(EXTRAS)}
    allowed = RUNTIME.union(*(EXTRAS[name] for name in extras.get(wing(module), ())))
    missing = {top: found for top, found in distributions(imports(module)).items() if not found & allowed}
    assert missing == {}


def test_every_dependency_is_imported_or_used_by_name():
    used: set[str] = set().union(*(f for m in MODULES for f in distributions(imports(m)).values()))
    # What torch compiles with; what fsspec and SQLAlchemy find by a URL's scheme; what uvicorn and Starlette look for.
    by_name = {"triton", "s3fs", "aiosqlite", "asyncpg", "greenlet", "httptools", "python-multipart"}
    assert (RUNTIME | set().union(*EXTRAS.values())) - used - by_name == set()
    assert not RUNTIME & set().union(*EXTRAS.values())


BLOCKED = f"""
import importlib, json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {TOOLS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
print(sorted({VIDEO!r} & set(sys.modules)))
"""


def test_what_serves_needs_no_tools_and_the_parent_imports_no_model():
    serving = [m for m in MODULES if wing(m) in ("words", "processes", "caches", "serving")]
    names = [*serving, "ltx2_pool.programs.worker", "ltx2_pool.programs.warmup"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(names)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("worker", ["doctor", "--model", "/model"]),
        ("worker", ["status"]),
        ("benchmark", ["--help"]),
        ("demo", ["--help"]),
        ("serve", ["--help"]),
        ("gateway", ["--help"]),
    ],
)
def test_a_tool_without_its_packages_says_what_to_install(program, arguments):
    script = BLOCKED.partition("for name in")[0] + (
        f"from importlib import import_module\nsys.argv[1:] = {arguments!r}\n"
        f"sys.exit(import_module('ltx2_pool.programs.{program}').main())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2)
    (line,) = done.stderr.splitlines()
    needed = "gateway" if program == "gateway" else "tools"
    assert line.endswith(f": pip install 'ltx2-pool[{needed}]'")
