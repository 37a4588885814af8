"""The paper's figures from the command line, looked at through matplotlib's own objects and the files beside them."""

import json
import shutil

import pytest
import torch
from matplotlib.collections import PolyCollection

import prune_neuron_cifar
from benchmarks import figures
from formats import plots
from formats.cards import read_card, save_with_card
from formats.mask_file import write_masks
from models.neurons import Neuron
from utils.files import write_text
from utils.table import read_table, write_log

SWEEP = {0.0: (88, 99), 0.1: (87, 50), 0.2: (85, 10)}  # C-Acc and ASR by threshold


def rows(change=0.0, sweep=SWEEP, asr=True):
    """Rows of step 3, a run that differs from the others by some points."""
    table = [(None, 0.0, 90.0, 100.0)]
    table += [(mask, 100 * mask / 2 + 1, c_acc + change, a - change) for mask, (c_acc, a) in sweep.items()]
    names = ("mask", "pruned %", "C-Acc %", "ASR %")
    return [dict(zip(names, (*row[:3], row[3] if asr else None), strict=True)) for row in table]


def step_3(folder, by="threshold", attack="badnets", ended=True, **given):
    """Write what step 3 leaves that a figure needs."""
    folder.mkdir(exist_ok=True)
    card = {"arch": "resnet18", "widen_factor": 0.25, "attack": attack and {"poison_type": attack}}
    save_with_card(folder / "repaired_model.th", {"weight": torch.zeros(1)}, card)
    write_log(folder / f"pruning_by_{by}_log.jsonl", {}, rows(**given), ended)
    return str(folder)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that commands have drawn."""
    found = []
    for name in ("plot_sweeps", "plot_perturbation", "plot_several_masks"):
        original = getattr(plots, name)
        monkeypatch.setattr(figures, name, lambda *given, original=original: found.append(original(*given)))
    return found


def lines_of(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def bands_of(axes):
    """Lowest and highest value of each band by place."""
    found = []
    for band in axes.collections:
        if isinstance(band, PolyCollection):
            places = {}
            for x, y in band.get_paths()[0].vertices:
                places.setdefault(round(float(x), 6), []).append(float(y))
            found.append({x: (min(values), max(values)) for x, values in places.items()})
    return found


def legend_texts(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def fails(capsys, *argv):
    """Run a command that has to fail in one line, without a file; returns the line."""
    assert figures.main([str(word) for word in argv]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("figures: error: ")
    return error


# ---- sweeps


def test_several_runs_become_a_mean_and_a_band(tmp_path, drawn, capsys):
    runs = [step_3(tmp_path / name, change=change) for name, change in (("a", 0.0), ("b", 1.0), ("c", -0.4))]
    assert figures.main(["sweep", *runs, "--output", str(tmp_path / "sweep.png")]) == 0
    assert (tmp_path / "sweep.png").exists() and (tmp_path / "sweep.pdf").exists()
    (figure,) = drawn
    by_mask, by_share = figure.axes
    assert legend_texts(figure) == ["C-Acc, mean of 3 runs", "ASR, mean of 3 runs", "lowest to highest run"]
    for axes, places in ((by_mask, [0, 0.1, 0.2]), (by_share, [0, 1, 6, 11])):
        lines = lines_of(axes)
        assert list(lines["C-Acc, mean of 3 runs"].get_xdata()) == pytest.approx(places)
        assert lines["C-Acc, mean of 3 runs"].get_ydata()[-1] == pytest.approx(85.2)
        assert lines["ASR, mean of 3 runs"].get_ydata()[-1] == pytest.approx(9.8)
        c_acc, asr = bands_of(axes)
        assert c_acc[places[-1]] == pytest.approx((84.6, 86)) and asr[places[-1]] == pytest.approx((9, 10.4))
    assert by_mask.get_title("left") == "BadNets, resnet18, 1/4 width (3 runs)"
    assert by_mask.get_xlabel() == "threshold" and by_share.get_xlabel() == "neurons pruned (%)"
    assert by_mask.get_xticklabels()[0].get_text() == "unpruned" and "%" in by_mask.get_ylabel()


def test_attacks_stand_one_below_the_other(tmp_path, drawn):
    runs = [step_3(tmp_path / "a"), step_3(tmp_path / "b", change=1.0), step_3(tmp_path / "c", attack="blend")]
    benign = step_3(tmp_path / "d", attack="benign", asr=False)
    unknown = step_3(tmp_path / "e", attack=None)
    output = str(tmp_path / "sweep.png")
    assert figures.main(["sweep", *runs, benign, unknown, "--output", output]) == 0
    (figure,) = drawn
    network = "resnet18, 1/4 width"
    assert [axes.get_title("left") for axes in figure.axes[::2]] == [
        f"BadNets, {network} (2 runs)",
        f"Blend, {network} (1 run)",
        f"benign (no backdoor), {network} (1 run)",
        f"attack not known, {network} (1 run)",
    ]
    assert list(lines_of(figure.axes[5])) == ["C-Acc, mean of 1 to 2 runs"], "no trigger, no ASR"
    assert [len(bands_of(axes)) for axes in figure.axes[1::2]] == [2, 0, 0, 0]


def test_where_runs_were_measured_at_other_places_they_are_straight_lines():
    curves = [{0.0: 10.0, 1.0: 20.0, 3.0: 40.0}, {0.5: 0.0, 2.0: 30.0}]
    places, values = plots._at_common_places(curves)
    assert list(places) == [0.5, 1, 2]
    assert values.tolist() == [[15, 20, 30], [0, 10, 30]]


def test_each_axis_takes_the_sweep_that_was_made_for_it(tmp_path, drawn):
    folder = tmp_path / "a"
    step_3(folder)
    step_3(folder, by="number", sweep={0.0: (80, 90), 0.05: (79, 89)})
    only = step_3(tmp_path / "b", by="number", attack="sig", sweep={0.0: (80, 90), 0.05: (79, 89)})
    assert figures.main(["sweep", str(folder), only, "--output", str(tmp_path / "sweep.png")]) == 0
    first = [list(lines_of(axes)["C-Acc, 1 run"].get_ydata()) for axes in drawn[0].axes]
    assert first == [[88, 87, 85], [90, 80, 79], [80, 79], [90, 80, 79]]


def test_a_result_file_and_what_step_3_itself_writes(trained, tmp_path, drawn):
    inputs = {"checkpoint": "last_model.th", "trigger-info": "trigger_info.th", "mask-file": "mask_values.txt"}
    source = [f"--{flag}={trained}/{name}" for flag, name in inputs.items()]
    out = str(tmp_path / "out")
    options = ["--output-dir", out, "--val-frac", "0.1", "--precision", "fp32", "--pruning-max", "0.1"]
    assert prune_neuron_cifar.main([*options, *source]) == 0
    result = figures.ROOT / "results" / figures.README_RUN
    assert figures.main(["sweep", out, str(result), "--output", str(tmp_path / "sweep.png")]) == 0
    (figure,) = drawn
    _, log = read_table(tmp_path / "out" / "pruning_by_threshold_log.jsonl")
    assert list(lines_of(figure.axes[1])["ASR, 1 run"].get_ydata())[-1] == log[-1]["ASR %"]
    full = json.loads(result.read_text())
    by_threshold = [row["attack_success_rate"] for row in full["by_threshold"]]
    assert list(lines_of(figure.axes[2])["ASR, 1 run"].get_ydata()) == by_threshold
    assert len(lines_of(figure.axes[3])["ASR, 1 run"].get_ydata()) == len(full["by_number"]) + 1
    assert figure.axes[2].get_title("left").startswith("BadNets, resnet18, full width")


def test_bad_sweeps_end_in_one_line(tmp_path, capsys):
    good, output = step_3(tmp_path / "a"), ["--output", tmp_path / "sweep.png"]
    assert "no pruning_by_threshold_log.jsonl" in fails(capsys, "sweep", tmp_path, *output)
    assert "no such" in fails(capsys, "sweep", tmp_path / "no.json", *output).lower()
    assert "named twice" in fails(capsys, "sweep", good, good, *output)
    unfinished = step_3(tmp_path / "b", ended=False)
    assert "unfinished run" in fails(capsys, "sweep", good, unfinished, *output)
    elsewhere = step_3(tmp_path / "c", sweep={0.7: (50, 1), 0.8: (40, 1)})
    assert "is reached by all 2 runs; draw them apart" in fails(capsys, "sweep", good, elsewhere, *output)
    excerpt = figures.ROOT / "results" / "badnets-0.json"
    assert "only an excerpt" in fails(capsys, "sweep", excerpt, *output)
    assert "holds no run" in fails(capsys, "sweep", figures.ROOT / "results" / "published.json", *output)
    write_text(tmp_path / "a" / "pruning_by_threshold_log.jsonl", '{"record": {"ended": true}}\n{"mask": null}\n')
    assert "not of this version" in fails(capsys, "sweep", good, *output)
    assert not list(tmp_path.glob("*.p*"))


def test_a_figure_is_replaced_only_when_asked(tmp_path, capsys):
    run, output = step_3(tmp_path / "a"), tmp_path / "sweep.png"
    (tmp_path / "sweep.pdf").write_text("mine")
    assert "sweep.pdf is there already" in fails(capsys, "sweep", run, "--output", output)
    assert (tmp_path / "sweep.pdf").read_text() == "mine" and not output.exists()
    assert figures.main(["sweep", run, "--output", str(output), "--overwrite"]) == 0
    assert (tmp_path / "sweep.pdf").read_bytes().startswith(b"%PDF")
    assert "ends in .png" in fails(capsys, "sweep", run, "--output", tmp_path / "sweep.svg")
    assert "there is no folder" in fails(capsys, "sweep", run, "--output", tmp_path / "no" / "sweep.png")


# ---- perturbations

QUICK = ["--eps", "0", "0.5", "--draws", "2", "--val-frac", "0.1", "--precision", "fp32", "--threads", "1"]


@pytest.fixture
def two(trained, tmp_path):
    """A backdoored network, and the same weights with a card that calls them benign."""
    for name, attack in (("bad", None), ("benign", {"poison_type": "benign"})):
        (tmp_path / name).mkdir()
        shutil.copy(trained / "last_model.th", tmp_path / name)
        card = read_card(trained / "last_model.th")
        (tmp_path / name / "last_model.json").write_text(json.dumps({**card, **({"attack": attack} if attack else {})}))
    return [str(tmp_path / name / "last_model.th") for name in ("bad", "benign")]


def perturbation(*checkpoints):
    return ["perturbation", *(word for name in checkpoints for word in ("--checkpoint", name)), *QUICK]


def test_two_networks_under_perturbations(two, tmp_path, drawn, capsys):
    output = tmp_path / "perturbation.png"
    assert figures.main([*perturbation(*two), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert output.exists() and output.with_suffix(".pdf").exists()
    record, found = read_table(output.with_suffix(".jsonl"))
    assert record["ended"] and record["targets"] == dict.fromkeys(two, 0) and "--draws 2" in record["command"]
    assert len(found) == 2 * 2 * 2 * 2, "networks, kinds, sizes, draws"
    for row in found:
        assert row["target %"] == row["shares %"][0] and sum(row["shares %"]) == pytest.approx(100)
    (figure,) = drawn
    for axes, column in zip(figure.axes, ("error %", "target %"), strict=True):
        for name in two:
            for kind, style in (("adversarial", "-"), ("random", "--")):
                line = lines_of(axes)[f"{kind}, {name} (mean of 2 draws)"]
                own = [row for row in found if (row["network"], row["kind"]) == (name, kind)]
                means = [sum(row[column] for row in own if row["eps"] == eps) / 2 for eps in (0, 0.5)]
                assert list(line.get_xdata()) == [0, 0.5] and list(line.get_ydata()) == pytest.approx(means)
                assert line.get_linestyle() == style
        assert len(bands_of(axes)) == 4 and "eps" in axes.get_xlabel() and "%" in axes.get_ylabel()
    assert len({line.get_color() for line in lines_of(figure.axes[0]).values()}) == 2
    assert legend_texts(figure)[-2:] == ["one class of 10", "lowest to highest draw"]
    assert "disc" in figure.axes[1].get_ylabel(), "the name of class 0"
    error = [row["error %"] for row in found if (row["network"], row["kind"], row["eps"]) == (two[0], "random", 0.5)]
    assert f"{min(error):.1f} to {max(error):.1f}" in printed


def test_bad_perturbations_end_in_one_line(two, tmp_path, capsys):
    bad, benign = two
    output = ["--output", tmp_path / "perturbation.png"]
    assert "--target-class" in fails(capsys, *perturbation(benign), *output)
    assert "counted from 0" in fails(capsys, *perturbation(bad), *output, "--target-class", "10")
    assert "named twice" in fails(capsys, *perturbation(bad, bad), *output)
    assert "cannot be told apart" in fails(capsys, *perturbation(*"abcdefg"), *output)
    assert "no network 'nothing'" in fails(capsys, *perturbation(bad, "nothing"), *output)
    (tmp_path / "perturbation.jsonl").write_text("mine")
    assert "perturbation.jsonl is there already" in fails(capsys, *perturbation(bad), *output)
    with pytest.raises(SystemExit) as leaving:
        figures.main([*perturbation(bad), "--eps", "-1", "--output", "a.png"])
    assert leaving.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("*.p*"))


@pytest.mark.parametrize("given", [None, 4])
def test_whose_target_class_is_counted(given):
    networks = {
        name: figures.Measured(type("Subject", (), {"card": {"attack": attack}}), tuple("abcdef"))
        for name, attack in (("benign", None), ("one", {"poison_target": 3}), ("two", {"poison_target": 5}))
    }
    found = figures._targets(networks, given)
    assert found == ({"benign": 3, "one": 3, "two": 5} if given is None else dict.fromkeys(networks, 4))


# ---- masks


def test_masks_of_several_networks(tmp_path, drawn, capsys):
    files = []
    for name, masks in (("$a$", (0.1, 0.2, 0.9)), ("b", (0.5, 0.6, 1.0))):
        path = tmp_path / f"{name}.txt"
        write_masks(path, [Neuron(f"bn{index}", 0, mask) for index, mask in enumerate(masks)], "0" * 64)
        files.append(str(path))
    assert figures.main(["masks", *files, "--output", str(tmp_path / "masks.png")]) == 0
    (figure,) = drawn
    assert legend_texts(figure) == ["the paper's threshold, 0.2"]
    assert [axes.get_title() for axes in figure.axes] == [
        f"{files[0]}: mask of each neuron, by layer",
        "66.7 % of the neurons at or below 0.2",
        f"{files[1]}: mask of each neuron, by layer",
        "0.0 % of the neurons at or below 0.2",
    ]
    points = [axes.collections[0].get_offsets()[:, 1].tolist() for axes in figure.axes[::2]]
    assert points == [[0.1, 0.2, 0.9], [0.5, 0.6, 1.0]]
    other = ["--output", tmp_path / "other.png"]
    assert "no such file" in fails(capsys, "masks", files[0], tmp_path / "no.txt", *other)
    (tmp_path / "b.txt").write_text((tmp_path / "b.txt").read_text().splitlines()[0] + "\n")
    assert "names no neuron" in fails(capsys, "masks", *files, *other)
    assert not (tmp_path / "other.png").exists()
