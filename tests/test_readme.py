"""The README's own commands, through the real parsers, and its Python example."""

import re
import shlex
from pathlib import Path

import pytest

import optimize_mask_cifar
import prune_neuron_cifar
import train_backdoor_cifar
from benchmarks import same_place, speed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PARSERS = {
    "train_backdoor_cifar.py": train_backdoor_cifar.parse_arguments,
    "optimize_mask_cifar.py": lambda argv: optimize_mask_cifar.build_parser().parse_args(argv),
    "prune_neuron_cifar.py": prune_neuron_cifar.parse_arguments,
    "benchmarks.speed": lambda argv: speed.build_parser().parse_args(argv),
    "benchmarks.same_place": lambda argv: same_place.build_parser().parse_args(argv),
}


def commands():
    """Yield every `python ...` command of the README and of the docstrings, with continued lines joined."""
    documents = [README] + [(ROOT / name).read_text().split('"""')[1] for name in PARSERS if name.endswith(".py")]
    for text in documents:
        for line in re.sub(r"\\+\n\s*", " ", text).splitlines():
            if re.match(r"\s*python (-m benchmarks\.|\w+_cifar\.py)", line):
                yield line.strip()


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_is_accepted(command):
    words = [word for word in shlex.split(command, comments=True)[1:] if word != "-m"]
    args = PARSERS[words[0]](words[1:])
    assert getattr(args, "output_dir", "save").startswith((".", "save"))


def test_the_three_published_lines():
    """What the published README means; quotes and plural flag as there."""
    lines = [
        "train_backdoor_cifar.py --output-dir './save'",
        "optimize_mask_cifar.py --output-dir './save' --checkpoints './save/last_model.th' "
        "--trigger-info './save/trigger_info.th'",
        "prune_neuron_cifar.py --output-dir './save' --mask-file './save/mask_values.txt' "
        "--checkpoints './save/last_model.th' --trigger-info './save/trigger_info.th'",
    ]
    train, optimize, prune = (PARSERS[line.split()[0]](shlex.split(line)[1:]) for line in lines)
    assert (train.arch, train.widen_factor, train.batch_size, train.epoch, train.save_every) == (
        "resnet18", 1.0, 128, 200, 20)  # fmt: skip
    assert (train.poison_type, train.dataset, train.lr, train.lr_schedule) == ("badnets", "cifar10", 0.1, "step")
    assert optimize.checkpoint == "./save/last_model.th"
    assert (optimize.lr, optimize.nb_iter, optimize.print_every, optimize.val_frac) == (0.2, 2000, 500, 0.01)
    assert (optimize.anp_eps, optimize.anp_steps, optimize.anp_alpha, optimize.anp_project) == (0.4, 1, 0.2, False)
    assert (prune.pruning_by, prune.checkpoint) == ("threshold", "./save/last_model.th")


def test_the_two_commands_for_a_newcomer_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    for command in ("make demo", "make test"):
        assert command in README and command.split()[1] in targets


def test_python_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(example, names)
    pruned = [name for name, module in names["repaired"].named_modules() if hasattr(module, "running_mean")]
    assert len(pruned) == 20 and names["neurons"]


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / name).exists(), name
