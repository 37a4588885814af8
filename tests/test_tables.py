"""The tables of README.md and docs/ are those of results/, and result files come out of logs."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
RUNS = {path.name: json.loads(path.read_text()) for path in ROOT.glob("results/*.json")}
RUNS = {name: run for name, run in RUNS.items() if run["content"] == "run"}


@pytest.fixture
def project(tmp_path):
    """A copy of README.md, docs/, results/ and zoo/."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copytree(ROOT / "zoo", tmp_path / "zoo")
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# Tables


def test_tables_are_those_of_the_result_files(capsys):
    assert tables.main(["--check"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", RUNS)
def test_figures_of_a_run_are_on_the_page(name):
    """Straight from the file to the page, without the code that renders."""
    run, page = RUNS[name], (ROOT / "docs" / "results.md").read_text()
    for entry in run["chosen"]:
        key = "threshold" if entry["sweep"] == "threshold" else "pruned"
        rows = [row for row in run[f"by_{entry['sweep']}"] if row[key] == entry["at"]] or [run["before"]]
        c_acc, asr = rows[0]["clean_accuracy"], rows[0]["attack_success_rate"]
        assert f"{c_acc:.2f} / " + ("-" if asr is None else f"{asr:.2f}") in page
    for row in [] if run.get("excerpt") else run["by_threshold"]:
        assert re.search(rf"^\| {row['threshold']:g} \| {row['pruned']} .* {row['clean_accuracy']:.2f} / ", page, re.M)


def test_seeds_are_averaged():
    cells = (ROOT / "README.md").read_text().partition("| BadNets, mean of 3 seeds |")[2].splitlines()[0].split("|")
    runs = [RUNS[f"badnets-{seed}.json"] for seed in range(3)]
    fixed = [row for run in runs for row in run["by_threshold"] if row["threshold"] == 0.2]
    for rows, cell in (([run["before"] for run in runs], cells[1]), (fixed, cells[2])):
        means = [statistics.fmean(row[name] for row in rows) for name in ("clean_accuracy", "attack_success_rate")]
        assert cell.strip() == "{:.2f} / {:.2f}".format(*means)


@pytest.mark.parametrize(
    ("path", "old", "new", "stale"),
    [
        ("results/badnets-0.json", "84.94", "85.94", ["README.md: table main", "docs/results.md: table runs"]),
        ("results/badnets-2.json", "87.28", "87.29", ["docs/results.md: table by-number"]),
        ("results/speed.json", "45.7", "45.8", ["docs/speed.md: table speed"]),
        ("results/published.json", "90.2", "90.3", ["docs/results.md: table paper"]),
        ("results/precision.json", "0.956", "0.957", ["docs/speed.md: table precision"]),
        ("zoo/blend-0/last_model.json", ": 87.55", ": 87.65", ["docs/zoo.md: table zoo"]),
        ("README.md", "| 84.11 / 3.34 |", "| 84.11 / 3.33 |", ["README.md: table main"]),
        ("docs/speed.md", "| 4.07x |", "| 4.08x |", ["docs/speed.md: table speed", "docs/speed.md: table speed-runs"]),
    ],
)
def test_a_changed_number_is_noticed_and_set_right(project, capsys, path, old, new, stale):
    edit(project / path, old, new)
    before = {file: file.read_text() for file in project.rglob("*.md")}
    assert tables.main(["--check"], project) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" is stale")[0] for line in lines] == stale
    assert before == {file: file.read_text() for file in project.rglob("*.md")}
    assert tables.main([], project) == 0 and tables.main(["--check"], project) == 0
    assert path.endswith(".json") or (project / path).read_text() == (ROOT / path).read_text()


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("README.md", "table: main", "table: mian", "no table is called 'mian'"),
        ("README.md", "<!-- end -->", "", "1 tables begin, but only 0 end"),
        ("results/sig-0.json", '"at": 0.05', '"at": 0.06', "there is no such row"),
        ("results/sig-0.json", '"neurons": 1200,', "", "no entry 'neurons'"),
        ("results/sig-0.json", '"content": "run"', '"content": "walk"', "content is 'walk'"),
        ("results/sig-0.json", "{", "[", "cannot be read as JSON"),
        ("results/speed.json", '"fast"', '"slow"', "lack an entry (KeyError('fast'))"),
    ],
)
def test_damaged_files_end_in_one_line(project, capsys, path, old, new, message):
    edit(project / path, old, new)
    assert tables.main([], project) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tables: error: ") and message in line


def test_transcribed_figures_agree_with_each_other():
    speed, published = (json.loads((ROOT / "results" / f"{name}.json").read_text()) for name in ("speed", "published"))
    for row in speed["rows"]:
        assert "plain" not in row or row["fast"] / row["plain"] == pytest.approx(row["speed_up"], rel=0.005)
    for name, change in published["mean_change"].items():
        changes = [row["after"][name] - row["before"][name] for row in published["rows"]]
        assert statistics.fmean(changes) == pytest.approx(change, abs=0.005)


@pytest.mark.parametrize("name", RUNS)
def test_result_files_name_no_places(name):
    text = (ROOT / "results" / name).read_text()
    assert not re.search(r"""["'\s=](/|~|\.\./)""", text)
    assert text == tables.result_text(json.loads(text))


# Collecting

ACCURACIES = [
    (0, None, 90.0, 89.94, 100.0),
    (2, 0.0, 90.2, 89.9, 99.5),
    (10, 0.2, 88.0, 88.7, 9.804),
    (60, 0.9, 50, 51, 0),
]
CARD = {"arch": "resnet18", "widen_factor": 1.0, "dataset": "cifar10"}


def write_log(folder, step, rows, command, ended=True, **arguments):
    record = {
        "step": step,
        "command": command,
        "arguments": {"checkpoint": "/far/away/net.th", "sha256": {"checkpoint": "abc"}, "seed": 3, **arguments},
        "runtime": {"device": "cpu", "precision": "torch.bfloat16", "threads": 2},
        "versions": {"python": "3.11.4", "torch": "2.6.0"},
        "ended": ended,
    }
    lines = [{"record": record}, *rows]
    (folder / f"{step}_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def sweep_row(by, pruned, value, defender, c_acc, asr):
    figures = {"defender acc %": defender, "clean loss": 1.0, "C-Acc %": c_acc, "ASR %": asr}
    return {"pruned": pruned, "pruned %": 100 * pruned / 80, by: value, "mask": value, **figures}


@pytest.fixture
def run_folder(tmp_path):
    """What steps 2 and 3 leave of a checkpoint without a card; made up."""
    folder = tmp_path / "run"
    folder.mkdir()
    command = f"python prune_neuron_cifar.py --output-dir {folder} --mask-file {folder}/mask_values.txt --data-dir /d"
    rows = [{"iteration": 0, "seconds": 0.4}, {"iteration": 2000, "seconds": 5400.0}]
    optimize = f"python optimize_mask_cifar.py --output-dir {folder} --checkpoint /far/away/net.th"
    write_log(folder, "optimize", rows, optimize, nb_iter=2000, val_frac=0.01)
    for step, by in (("pruning_by_threshold", "threshold"), ("pruning_by_number", "mask")):
        write_log(folder, step, [sweep_row(by, *row) for row in ACCURACIES], command)
    write_card(folder / "repaired_model.json", **CARD, attack=None, repaired_from={"file": "net.th", "sha256": "abc"})
    return folder


def write_card(path, **card):
    path.write_text(json.dumps(card))


def collect(folder, output, *options):
    return tables.main(["collect", str(folder), str(output), *options])


TOLD = ("--attack", "badnets", "--epochs", "10")


def test_collect(run_folder, tmp_path):
    output = tmp_path / "made-up.json"
    assert collect(run_folder, output, *TOLD, "--hardware", "2 cores", "--note", "Trained elsewhere.") == 0
    run = json.loads(output.read_text())
    assert {name: run[name] for name in CARD} == CARD
    assert (run["attack"], run["seed"], run["neurons"], run["training"]) == ("badnets", 3, 80, {"epochs": 10})
    assert (run["minutes"], run["note"]) == ({"optimize": 90}, "Trained elsewhere.")
    compute = {"device": "cpu", "precision": "bf16", "threads": {"optimize": 2, "prune": 2}}
    assert run["compute"] == {"hardware": "2 cores", **compute}
    figures = {"clean_accuracy": 88.7, "attack_success_rate": 9.8, "defender_accuracy": 88.0}
    assert run["by_threshold"][1] == {"threshold": 0.2, "pruned": 10, **figures}
    assert run["by_number"][1] == {"pruned": 10, "mask": 0.2, **figures}
    assert run["before"]["clean_accuracy"] == 89.94 and len(run["by_threshold"]) == 3
    assert run["chosen"] == [
        {"rule": "threshold", "value": 0.2, "sweep": "threshold", "at": 0.2},
        {"rule": "max_acc_drop", "value": 3, "sweep": "threshold", "at": 0.2},
        {"rule": "max_acc_drop", "value": 3, "sweep": "number", "at": 10},
    ]
    assert run["commands"] == [
        "python optimize_mask_cifar.py --output-dir save/made-up --checkpoint net.th",
        *["python prune_neuron_cifar.py --output-dir save/made-up --mask-file save/made-up/mask_values.txt"] * 2,
    ]
    assert str(tmp_path) not in output.read_text() and "/far" not in output.read_text()


def test_collect_reads_the_card_and_the_log_of_step_1(run_folder, tmp_path):
    attack = {"attack": {"poison_type": "sig"}, "seed": 7, "epochs": 200}
    write_card(run_folder / "net.json", sha256="abc", **CARD, **attack)
    write_log(run_folder, "train", [{"epoch": 200, "seconds": 120.0}], "python train_backdoor_cifar.py", lr=0.4)
    assert collect(run_folder, tmp_path / "made-up.json") == 0
    run = json.loads((tmp_path / "made-up.json").read_text())
    assert (run["attack"], run["seed"], run["training"]) == ("sig", 7, {"epochs": 200, "lr": 0.4})
    assert run["minutes"] == {"train": 2, "optimize": 90} and run["commands"][0] == "python train_backdoor_cifar.py"


def test_a_card_of_another_checkpoint_is_not_believed(run_folder, tmp_path, capsys):
    write_card(run_folder / "net.json", sha256="def", **CARD, attack={"poison_type": "sig"}, seed=7, epochs=200)
    assert collect(run_folder, tmp_path / "made-up.json") == 1
    assert "give --attack" in capsys.readouterr().err


def test_logs_of_version_1_call_the_threshold_mask(run_folder, tmp_path):
    rows = [sweep_row("mask", *row) for row in ACCURACIES]
    write_log(run_folder, "pruning_by_threshold", rows, "python prune_neuron_cifar.py")
    (run_folder / "pruning_by_number_log.jsonl").unlink()
    assert collect(run_folder, tmp_path / "made-up.json", *TOLD) == 0
    run = json.loads((tmp_path / "made-up.json").read_text())
    assert [row["threshold"] for row in run["by_threshold"]] == [0.0, 0.2, 0.9] and run["by_number"] == []


def test_the_tables_take_up_a_collected_run(run_folder, project):
    """As a row of its own, and with its whole sweep; without it the tables are as they were."""
    output = project / "results" / "made-up.json"
    assert collect(run_folder, output, "--attack", "badnets", "--epochs", "11", "--note", "Trained elsewhere.") == 0
    assert tables.main([], project) == 0
    readme, page = (project / "README.md").read_text(), (project / "docs" / "results.md").read_text()
    assert "| BadNets | full width, 11 epochs | 89.94 / 100.00 | 88.70 / 9.80 | 88.70 / 9.80 |\n" in readme
    assert "| BadNets, seed 3 | full width, 11 epochs | 89.94 / 100.00 | 88.70 / 9.80 (10) |" in page
    _, _, section = page.partition("### BadNets, full width, 11 epochs, seed 3\n")
    assert section.startswith("\nTrained elsewhere.\n") and "| none | 0 (0.00 %) | 89.94 / 100.00 | 90.00 |" in section
    assert "| 0.9 | 60 (75.00 %) | 51.00 / 0.00 | 50.00 |" in section
    output.unlink()
    assert tables.main([], project) == 0
    assert (project / "README.md").read_text() == (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("break_it", "options", "message"),
    [
        (lambda f: (f / "optimize_log.jsonl").unlink(), TOLD, "optimize_log.jsonl: no such file"),
        (lambda f: (f / "optimize_log.jsonl").write_text("{"), TOLD, "not the log of a run"),
        (lambda f: edit(f / "pruning_by_number_log.jsonl", '"ended": true', '"ended": false'), TOLD, "unfinished run"),
        (lambda f: edit(f / "pruning_by_number_log.jsonl", '"abc"', '"def"'), TOLD, "different checkpoints"),
        (lambda f: edit(f / "pruning_by_threshold_log.jsonl", '"C-Acc %"', '"acc"'), TOLD, "not of this version"),
        (lambda f: (f / "repaired_model.json").unlink(), TOLD, "neither the checkpoint nor repaired_model.th"),
        (lambda f: None, TOLD[:2], "give --epochs"),
        (lambda f: write_card(f / "net.json", sha256="abc", attack={"poison_type": "sig"}), TOLD, "contradicts"),
        (lambda f: (f.parent / "made-up.json").write_text("{}"), TOLD, "is there already"),
    ],
)
def test_bad_folders_end_in_one_line(run_folder, tmp_path, capsys, break_it, options, message):
    break_it(run_folder)
    before = (tmp_path / "made-up.json").exists()
    assert collect(run_folder, tmp_path / "made-up.json", *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tables: error: ") and message in line
    assert (tmp_path / "made-up.json").exists() == before


def test_a_result_file_is_replaced_only_with_overwrite(run_folder, tmp_path):
    (tmp_path / "made-up.json").write_text("{}")
    assert collect(run_folder, tmp_path / "made-up.json", *TOLD, "--overwrite") == 0
    assert json.loads((tmp_path / "made-up.json").read_text())["content"] == "run"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python a.py --output-dir ./save --lr 0.2", "python a.py --output-dir ./save --lr 0.2"),
        (
            "python a.py --output-dir /x/y --mask-file /x/y/m.txt",
            "python a.py --output-dir save/n --mask-file save/n/m.txt",
        ),
        ("python a.py --split-file=/x/p.txt --data-dir=/x", "python a.py --split-file=p.txt"),
        ("python a.py --split-file ../s/p.txt --data-dir ../s --resume", "python a.py --split-file p.txt"),
        ("python a.py --clb-dir ~/sets/one", "python a.py --clb-dir one"),
    ],
)
def test_command_lines_lose_the_places_of_the_machine(command, expected):
    assert tables.portable(command, "n") == expected


def test_collect_what_the_scripts_write(trained, tmp_path):
    """The layout is that of real logs."""
    import prune_neuron_cifar

    folder = shutil.copytree(trained, tmp_path / "run")
    source = ["--checkpoint", str(folder / "last_model.th"), "--trigger-info", str(folder / "trigger_info.th")]
    options = ["--mask-file", str(folder / "mask_values.txt"), "--val-frac", "0.1", "--pruning-step", "0.5"]
    assert prune_neuron_cifar.main(["--output-dir", str(folder), *source, *options, "--pruning-max", "1"]) == 0
    assert collect(folder, tmp_path / "made-up.json") == 0
    run = json.loads((tmp_path / "made-up.json").read_text())
    masks = (folder / "mask_values.txt").read_text().splitlines()[1:]
    card = json.loads((folder / "repaired_model.json").read_text())
    assert (run["attack"], run["dataset"], run["neurons"]) == ("badnets", "tiny", len(masks))
    assert (run["training"]["epochs"], run["masks"]["iterations"]) == (1, 4)
    assert [row["threshold"] for row in run["by_threshold"]] == [0, 0.5, 1]
    before = json.loads((folder / "last_model.json").read_text())["metrics"]
    assert run["before"]["clean_accuracy"] == before["clean_accuracy"]
    assert card["metrics"].keys() >= {"clean_accuracy", "attack_success_rate"} and str(tmp_path) not in json.dumps(run)
