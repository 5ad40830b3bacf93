"""Walls between the rooms, checked without running anything."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import optuna_greedyhg

PACKAGE = Path(optuna_greedyhg.__file__).parent
HYPERGRAD = sorted(PACKAGE.glob("hypergrad/**/*.py"))

ROOMS = ("hypergrad", "trials", "report", "tasks", "cli")
FLOORS = (
    {"trees", "cost", "clock", "devices", "peak_memory", "graphs", "second_derivatives", "likeness", "outer"},
    {"domains", "randomness", "product_modes"},
    {"batches"},
    {"recordings"},
    {"problem", "update_rules"},
    {"episodes"},
    {"stacking"},
    {"products"},
    {"prices"},
    {"curvature"},
    {"propagators"},
    {"spectral"},
    {"estimators"},
    {"recorded"},
    {"work"},
    {"evaluation"},
    {"audit"},
    {"descent"},
    {"replicas"},
)
"""The mathematics from top to bottom; files of one floor do not see each other."""


def imports(file: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, wherever in it; of each name, for a package of our own."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively, which these tests do not resolve"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(file: Path) -> Iterator[tuple[str, ...]]:
    """The parts after ``optuna_greedyhg`` of what a file imports from the package itself."""
    for name in imports(file):
        package, *parts = name.split(".")
        if package == "optuna_greedyhg":
            yield tuple(parts)


def floor_of(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def part_of(file: Path) -> str:
    """The name of a file of the mathematics, or of the package that it is in."""
    return file.relative_to(PACKAGE / "hypergrad").with_suffix("").parts[0]


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", HYPERGRAD, ids=name_of)
def test_the_mathematics_needs_torch_alone(file):
    third_party = {name.split(".")[0] for name in imports(file)} - set(sys.stdlib_module_names) - {"optuna_greedyhg"}
    assert third_party <= {"torch"}
    assert {parts[0] for parts in own(file)} <= {"hypergrad"}


@pytest.mark.parametrize("file", [file for file in HYPERGRAD if file.name != "__init__.py"], ids=name_of)
def test_a_file_of_the_mathematics_imports_only_from_floors_above(file):
    here = part_of(file)
    for _, *parts in own(file):
        if parts[0] == here:
            continue  # a floor of several files, beside their common base
        assert floor_of(parts[0]) < floor_of(here), f"{here} imports {parts[0]}"


@pytest.mark.parametrize("file", HYPERGRAD, ids=name_of)
def test_only_products_and_curvature_call_autograd(file):
    # The last two define operators by it, and walk over its graphs.
    if part_of(file) in ("products", "product_modes", "curvature", "second_derivatives", "graphs"):
        return
    attributes = {node.attr for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
    assert not attributes & {"autograd", "backward", "jvp", "vjp", "jacrev", "jacfwd", "hessian"}


@pytest.mark.parametrize(
    "file",
    [file for file in sorted(PACKAGE.glob("**/*.py")) if file.parent != PACKAGE or file.stem == "cli"],
    ids=name_of,
)
def test_a_room_imports_only_from_rooms_above(file):
    here = ROOMS.index(file.relative_to(PACKAGE).with_suffix("").parts[0])
    for parts in own(file):
        if parts[0] in ROOMS:  # the rest are the public names, defined above
            assert ROOMS.index(parts[0]) <= here, f"{file.name} imports {'.'.join(parts)}"


def test_there_are_files_to_check():
    assert {floor_of(file.stem) for file in (PACKAGE / "hypergrad").glob("*.py") if file.stem != "__init__"}
    assert len(HYPERGRAD) > 10
