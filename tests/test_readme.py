"""README.md and docs/: commands through the real parsers, examples executed, links followed."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks import detection, figures, same_place, speed, tables, trigger_free
from tables import __main__ as whole_tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))}
README = DOCUMENTS["README.md"]
STEPS = ("train_backdoor_cifar", "optimize_mask_cifar", "prune_neuron_cifar")
SCRIPTS = (*STEPS, "defend_cifar", "detect_cifar", "evaluate_cifar", "model_zoo")
PROGRAMS = {f"{name}.py": importlib.import_module(name) for name in SCRIPTS} | {
    "benchmarks.speed": speed,
    "benchmarks.same_place": same_place,
    "benchmarks.tables": tables,
    "benchmarks.figures": figures,
    "benchmarks.detection": detection,
    "benchmarks.trigger_free": trigger_free,
    "tables": whole_tables,
}
SNAKEMAKE = {"--executor", "--jobs", "--default-resources", "--set-resources"}  # flags that are not ours
SNAKEMAKE |= {"--slurm-status-command", "--slurm-no-account"}
PUBLISHED = [
    "python train_backdoor_cifar.py --output-dir './save'",
    "python optimize_mask_cifar.py --output-dir './save' --checkpoints './save/last_model.th' "
    "--trigger-info './save/trigger_info.th'",
    "python prune_neuron_cifar.py --output-dir './save' --mask-file './save/mask_values.txt' "
    "--checkpoints './save/last_model.th' --trigger-info './save/trigger_info.th'",
]


def parse(command):
    """Parse a `python ...` command line as the program does; a bad one ends in SystemExit."""
    program, *words = [word for word in shlex.split(command, comments=True)[1:] if word != "-m"]
    module = PROGRAMS[program]
    if not hasattr(module, "parse_arguments"):
        return module.build_parser().parse_args(words)
    parsed = module.parse_arguments(words)
    return parsed[0] if isinstance(parsed, tuple) else parsed


def blocks(language):
    """Return the fenced blocks of one language, by document."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.S | re.M)
    return [(name, block) for name, text in DOCUMENTS.items() for block in fence.findall(text)]


def commands():
    """Return every `python ...` command of the documents, the docstrings and the result files."""
    found = [line for _, block in blocks("bash") for line in block.splitlines()]
    found += [span for text in DOCUMENTS.values() for span in re.findall(r"`(python [^`\n]+)`", text)]
    for module in PROGRAMS.values():
        found += re.sub(r"\\+\n\s*", " ", module.__doc__).splitlines()
    found += [line for path in ROOT.glob("results/*.json") for line in json.loads(path.read_text()).get("commands", [])]
    found = [re.sub(r"^\s*torchrun (--\S+( \d+)? )+", "python ", line) for line in found]
    return sorted(
        {line.strip() for line in found if re.match(r"\s*python (-m benchmarks\.|\w+_cifar\.py|model_zoo\.py)", line)}
    )


def flags(parser):
    """Return the flags of a parser and of its subcommands."""
    found = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action.choices, dict):
            found.update(*map(flags, action.choices.values()))
    return found


def anchors(text):
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command):
    output = getattr(parse(command), "output_dir", "save")
    assert output.startswith((".", "save"))


@pytest.mark.slow
def test_the_first_example_of_the_help_plants_its_backdoor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = PROGRAMS["train_backdoor_cifar.py"]
    example = re.sub(r"\\\n\s*", " ", train.__doc__.replace("\\\\", "\\")).split("python train_backdoor_cifar.py ")[1]
    flags = shlex.split(example.splitlines()[0])
    assert "synthetic" in flags and train.main([*flags, "--threads", "1"]) == 0
    metrics = json.loads((tmp_path / "save" / "last_model.json").read_text())["metrics"]
    assert metrics["attack_success_rate"] > 90 and metrics["clean_accuracy"] > 95


def test_flags_in_the_text_exist():
    known = {"--standalone", "--nproc-per-node"}  # torchrun's
    known = known.union(*(flags(module.build_parser()) for module in PROGRAMS.values()))
    for name, text in DOCUMENTS.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known | SNAKEMAKE, name


def test_the_three_published_lines():
    """What the published README means; quotes and plural flag as there."""
    block = next(block for _, block in blocks("bash") if "--checkpoints" in block)
    assert block.splitlines() == PUBLISHED
    train, optimize, prune = map(parse, PUBLISHED)
    assert (train.arch, train.widen_factor, train.batch_size, train.epoch, train.save_every) == (
        "resnet18", 1.0, 128, 200, 20)  # fmt: skip
    assert (train.poison_type, train.dataset, train.lr, train.lr_schedule) == ("badnets", "cifar10", 0.1, "step")
    assert optimize.checkpoint == "./save/last_model.th"
    assert (optimize.lr, optimize.nb_iter, optimize.print_every, optimize.val_frac) == (0.2, 2000, 500, 0.01)
    assert (optimize.anp_eps, optimize.anp_steps, optimize.anp_alpha, optimize.anp_project) == (0.4, 1, 0.2, False)
    assert (prune.pruning_by, prune.checkpoint) == ("threshold", "./save/last_model.th")


def test_the_commands_for_a_newcomer_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = {target for _, block in blocks("bash") for target in re.findall(r"^make ([\w-]+)", block, re.M)}
    assert {"demo", "test", "test-all"} <= named <= set(targets)


def test_the_readme_is_short_and_says_what_matters_first():
    assert len(README.splitlines()) <= 140
    order = ["table: main", "badnets_sweep.png", "not been verified", "make demo", *PUBLISHED, "## Your own checkpoint"]
    places = [README.find(text) for text in [*order, "## Your own network", "docs/files.md"]]
    assert -1 not in places and places == sorted(places)


def run_example(name):
    """Execute the one Python example of a document; returns its names."""
    (example,) = [block for document, block in blocks("python") if document == name]
    names = {}
    exec(example, names)
    return names


def test_every_python_example_is_run_here():
    assert sorted(name for name, _ in blocks("python")) == [
        "README.md",
        "docs/attacks.md",
        "docs/defenses.md",
        "docs/detection.md",
    ]


def test_example_your_own_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "save").mkdir()  # as in a clone
    repaired = run_example("README.md")["repaired"]
    layers = {name for name, module in repaired.network.named_modules() if hasattr(module, "running_mean")}
    assert len(layers) == 20 and {neuron.layer for neuron in repaired.neurons} == layers
    saved = torch.load("save/mine.th")
    assert all(torch.equal(saved[name], tensor) for name, tensor in repaired.network.state_dict().items())
    assert f"{repaired.choice.point.count} of 4800 neurons" in capsys.readouterr().out


def test_example_an_attack_from_python(capsys):
    names = run_example("docs/attacks.md")
    poisoned, labels = names["poisoned"], names["labels"]
    assert len(poisoned.index) == int(0.05 * (labels != 0).sum())
    assert (labels[poisoned.index] != 0).all() and (poisoned.train.labels[poisoned.index] == 0).all()
    changed = (poisoned.train.images != names["images"]).flatten(1).any(1)
    assert not changed[torch.isin(torch.arange(1000), poisoned.index, invert=True)].any() and changed.any()
    assert names["trigger"] is not None and "images carry the trigger" in capsys.readouterr().out


def test_example_the_detector_from_python(capsys):
    found = run_example("docs/detection.md")["found"]
    assert len(found.statistics["margin"].values) == 10 and str(found.suspect) in capsys.readouterr().out


def test_example_a_defence_from_python():
    names = run_example("docs/defenses.md")
    before, after = names["network"].state_dict(), names["repaired"].state_dict()
    assert before.keys() == after.keys() and not torch.equal(before["fc.weight"], after["fc.weight"])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name]):
        if target.startswith("https://"):
            continue
        place, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / place).resolve() if place else ROOT / name
        assert path.is_file(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_every_page_is_found_from_the_readme():
    """Linked there, or on a page that is."""
    found = set(re.findall(r"\]\((docs/\w+\.md)", README))
    found |= {f"docs/{name}" for page in found for name in re.findall(r"\]\((\w+\.md)", DOCUMENTS[page])}
    assert found == set(DOCUMENTS) - {"README.md"}


def test_folders_of_the_code_are_described():
    described = set(re.findall(r"`(\w+)/`", DOCUMENTS["docs/files.md"].partition("## The code")[2]))
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= described and all((ROOT / name).is_dir() for name in described)


def cells_of(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_mean_changes_are_those_of_the_table():
    lines = (ROOT / "results" / "tables" / "main" / "table.md").read_text().splitlines()
    known = {cells_of(line)[0]: cells_of(line)[-1] for line in lines if line.startswith("| ")}
    start = README.index("| | ANP, threshold 0.2")
    names, _, accuracy, rate = map(cells_of, README[start:].splitlines()[:4])
    shown = dict(zip(names[1:], map(" / ".join, zip(accuracy[1:], rate[1:], strict=True)), strict=True))
    page = [line for line in DOCUMENTS["docs/defenses.md"].splitlines() if re.match(r"\| .* \| [-+]\d", line)]
    shown |= {f"{name} ": f"{change} / {asr}" for name, change, asr, _ in map(cells_of, page)}
    assert len(shown) == 9 + 11
    for name, change in shown.items():
        assert known[name.removesuffix(" ").removesuffix(", threshold 0.2")] == change, name
