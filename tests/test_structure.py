"""Imports go one way, and a defender has neither trigger nor test set within reach."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"tables"},
    {"benchmarks"},
    {"attacks", "defenses"},
    {"formats"},
    {"engine"},
    {"data", "models"},
    {"utils"},
]  # each may import what follows
SCRIPTS = [
    ROOT / f"{name}.py"
    for name in (
        "train_backdoor_cifar",
        "optimize_mask_cifar",
        "prune_neuron_cifar",
        "evaluate_cifar",
        "model_zoo",
        "defend_cifar",
        "detect_cifar",
    )
]
FILES = [path for rank in ORDER for package in rank for path in sorted((ROOT / package).rglob("*.py"))]


def modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports(path):
    return {module.split(".")[0] for module in modules(path)}


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    rank = next(number for number, packages in enumerate(ORDER) if package in packages)
    allowed = {package}.union(*ORDER[rank + 1 :])
    own = {module for module in imports(path) if (ROOT / module).is_dir() or (ROOT / f"{module}.py").exists()}
    assert own <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "defenses").glob("*.py")), ids=name)
def test_a_defence_knows_no_files_no_printing_and_no_trigger(path):
    assert not {"pathlib", "os", "io", "argparse", "tqdm", "logging"} & imports(path)
    out_of_reach = {"data.triggers", "data.split", "engine.evaluation", "formats.trigger_file", "formats.pruning_file"}
    assert not out_of_reach & set(modules(path))
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not {"print", "open", "Evaluator", "Trigger", "Report", "test", "load_subject", "load_dataset"} & names


def test_the_defenders_view_has_no_trigger_and_no_test_set():
    from formats.subject import Subject

    assert set(Subject.__dataclass_fields__) == {"network", "normalization", "flip", "clean", "card", "held_out"}


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_is_a_table_of_contents(path):
    assert len(path.read_text().splitlines()) < 150


def test_what_surrounds_a_run_stays_small():
    lines = {path: len(path.read_text().splitlines()) for path in [*FILES, *SCRIPTS]}
    assert sum(count for path, count in lines.items() if path.parent.name == "utils") < sum(lines.values()) / 4
