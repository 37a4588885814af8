"""Imports go one way: scripts -> attacks -> utils -> defenses -> data, models -> torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "models": {"models"},
    "data": {"data"},
    "defenses": {"defenses", "data", "models"},
    "utils": {"utils", "defenses", "data", "models"},
    "attacks": {"attacks", "utils", "data", "models"},
}
FILES = [path for package in ALLOWED for path in (ROOT / package).rglob("*.py")]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    own = {name for name in imports(path) if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()}
    assert own <= ALLOWED[package]


@pytest.mark.parametrize("path", sorted((ROOT / "defenses").glob("*.py")), ids=lambda path: path.name)
def test_the_algorithm_knows_no_files_and_no_printing(path):
    assert not {"pathlib", "os", "io", "argparse", "tqdm", "logging"} & set(imports(path))
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not {"print", "open"} & calls
