"""The pictures, looked at through matplotlib's own objects."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from attacks.outputs import write_trigger
from benchmarks import figures
from data.datasets import SYNTHETIC_NORMALIZATION, Dataset, ImageSet
from data.synthetic import CLASSES, _inside
from data.triggers import Trigger
from formats import plots
from models.neurons import Neuron

ROOT = Path(__file__).parents[1]
OKABE_ITO = {"#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"}


def training_rows(epochs):
    figures = {"train acc %": 40.0, "C-Acc %": 50.0, "ASR %": 60.0, "cross %": 70.0}
    return [{"epoch": epoch, **figures} for epoch in range(1, epochs + 1)]


def sweep_row(mask, pruned, acc=90.0, asr=100.0):
    return {"mask": mask, "pruned %": pruned, "C-Acc %": acc, "ASR %": asr, "defender acc %": acc - 1}


SWEEP = [sweep_row(None, 0), sweep_row(0.0, 2, 89), sweep_row(0.05, 4, 88, 50), sweep_row(0.1, 6, 87, 5)]
BEYOND = sweep_row(0.2, 9, 86.12, 3.45)
NEURONS = [Neuron(f"layer1.{layer}.bn1", index, index / 10) for layer in range(20) for index in range(11)]
CURVES = {"neurons pruned (%)": [0, 5, 9], "images moved": [99, 40, 3.0], "accuracy": [90, 89, 80.0]}
PIXELS = torch.full((3, 8, 8, 3), 7, dtype=torch.uint8)
DRAW = {
    "training": lambda path: plots.plot_training(path, training_rows(3)),
    "images": lambda path: plots.plot_images(path, PIXELS, PIXELS + 5, ["a", "b", "c"]),
    "masks": lambda path: plots.plot_masks(path, NEURONS, 0.2),
    "sweep": lambda path: plots.plot_sweep(path, SWEEP, "threshold", BEYOND),
    "trigger-free": lambda path: plots.plot_trigger_free(path, CURVES, 16.0, 5.5),
    "detection": lambda path: plots.plot_detection(
        path, ["a", "b", "c", "d"], {"x": [1.0, 2, 9, 1], "y": [0.5] * 4}, 2
    ),
}


def lines_of(axes):
    """The lines with a legend entry, by their labels."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def legend_texts(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def tick_labels(axis):
    return [label for label in axis.get_ticklabels() if label.get_text()]


# ---- every picture


@pytest.mark.parametrize("name", DRAW)
def test_a_png_and_a_pdf_appear_together(name, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(plots, "write_together", calls.append)
    figure = DRAW[name](tmp_path / "a.b.png")
    (contents,) = calls
    assert set(contents) == {tmp_path / "a.b.png", tmp_path / "a.b.pdf"}
    assert contents[tmp_path / "a.b.pdf"].startswith(b"%PDF-")
    (tmp_path / "a.b.png").write_bytes(contents[tmp_path / "a.b.png"])
    with Image.open(tmp_path / "a.b.png") as image:
        assert image.format == "PNG" and min(image.info["dpi"]) > 199
        assert image.size == pytest.approx(200 * figure.get_size_inches(), abs=1)


@pytest.mark.parametrize("name", DRAW)
def test_the_same_rows_give_the_same_bytes_whatever_the_users_settings(name, tmp_path):
    DRAW[name](tmp_path / "first.png")
    with matplotlib.rc_context({"lines.linewidth": 9, "savefig.dpi": 30, "text.color": "red", "font.size": 30}):
        DRAW[name](tmp_path / "again.png")
        assert matplotlib.rcParams["font.size"] == 30, "the host's settings are as they were"
    for suffix in (".png", ".pdf"):
        content = (tmp_path / f"first{suffix}").read_bytes()
        assert content == (tmp_path / f"again{suffix}").read_bytes()
        assert b"CreationDate" not in content and b"Matplotlib" not in content
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["training", "masks", "sweep"])
def test_the_legend_covers_nothing(name, tmp_path):
    figure = DRAW[name](tmp_path / "a.png")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_quantities_differ_in_colour_style_and_marker():
    _, *looks = zip(*plots.LINES.values(), strict=True)
    assert all(len(set(values)) == len(plots.LINES) for values in looks)
    assert {colour.lower() for colour in looks[0]} <= OKABE_ITO


def test_a_quantity_looks_the_same_in_every_figure(tmp_path):
    training = lines_of(DRAW["training"](tmp_path / "a.png").axes[0])
    sweep = lines_of(DRAW["sweep"](tmp_path / "b.png").axes[1])
    assert training.keys() & sweep.keys() == {"C-Acc", "ASR"}
    for lines in (training, sweep):
        for label, colour, style, marker in plots.LINES.values():
            if label in lines:
                drawn = lines[label]
                assert (to_hex(drawn.get_color()), drawn.get_marker()) == (colour.lower(), marker)
                assert drawn.get_linestyle() == (style if isinstance(style, str) else "--")
    assert {to_hex(line.get_color()) for line in DRAW["masks"](tmp_path / "c.png").axes[1].lines} <= OKABE_ITO


# ---- training


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 200])
def test_training_has_markers_and_whole_epochs(epochs, tmp_path):
    axes = plots.plot_training(tmp_path / "a.png", training_rows(epochs)).axes[0]
    lines = lines_of(axes)
    assert [line.get_ydata()[0] for line in lines.values()] == [40, 50, 60, 70]
    for line in lines.values():
        assert list(line.get_xdata()) == list(range(1, epochs + 1)) and line.get_marker() not in (None, "", "None")
        assert epochs / 25 <= line.get_markevery() < epochs / 25 + 1
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == int(tick) for tick in ticks)
    assert low < 1 and epochs < high and "%" in axes.get_ylabel()


def test_training_draws_what_is_known(tmp_path):
    rows = training_rows(3)
    rows[0].update({"C-Acc %": None, "ASR %": None})
    for row in rows:
        del row["cross %"]
    figure = plots.plot_training(tmp_path / "a.png", rows)
    assert {label: len(line.get_xdata()) for label, line in lines_of(figure.axes[0]).items()} == {
        "training accuracy (poisoned set)": 3,
        "C-Acc": 2,
        "ASR": 2,
    }


# ---- masks


@pytest.mark.parametrize(("layers", "named"), [(20, 20), (45, 45), (46, 23), (155, 39)])
def test_layer_names_can_be_read(layers, named, tmp_path):
    neurons = [Neuron(f"layer3.{layer}.downsample.1", 0, 0.5) for layer in range(layers)]
    by_layer = plots.plot_masks(tmp_path / "a.png", neurons, 0.2).axes[0]
    by_layer.figure.draw_without_rendering()
    labels = tick_labels(by_layer.xaxis)
    for place, label in zip(by_layer.get_xticks(), labels, strict=True):
        assert label.get_text() == f"layer3.{int(place)}.downsample.1" and label.get_fontsize() >= 6
    boxes = [label.get_window_extent() for label in labels]
    assert len(labels) == named
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))
    assert len(by_layer.collections[0].get_offsets()) == layers, "every layer is drawn"


def test_the_papers_threshold_is_drawn_and_named(tmp_path):
    figure = plots.plot_masks(tmp_path / "a.png", NEURONS, 0.2)
    by_layer, total = figure.axes
    assert [list(line.get_ydata()) for line in by_layer.lines] == [[0.2, 0.2]]
    assert list(lines_of(total).popitem()[1].get_xdata()) == [0.2, 0.2]
    assert legend_texts(figure) == ["the paper's threshold, 0.2 (27.3 % of the neurons at or below)"]  # 3 of 11
    assert "%" in total.get_ylabel()


# ---- sweep


@pytest.mark.parametrize("by", ["threshold", "number"])
def test_the_unpruned_network_stands_left_of_all_thresholds(by, tmp_path):
    left, right = plots.plot_sweep(tmp_path / "a.png", SWEEP, by, SWEEP[2]).axes
    place = left.get_xticks()[0]
    names = [label.get_text() for label in tick_labels(left.xaxis)]
    assert names[:2] == ["unpruned", "0"] and left.get_xlim()[0] < place < 0
    drawn = [(x, y) for line in left.lines for x, y in line.get_xydata() if x == place]
    assert sorted(y for _, y in drawn) == [89, 90, 100]
    assert list(lines_of(left)["C-Acc"].get_xdata()) == [0, 0.05, 0.1]
    assert list(lines_of(right)["C-Acc"].get_xdata()) == [0, 2, 4, 6]
    assert right.get_xlabel() == "neurons pruned (%)" and "%" in left.get_ylabel()
    assert left.get_xlabel() == ("threshold" if by == "threshold" else "mask of the last neuron pruned")


def rings(axes):
    return [line for line in axes.lines if line.get_label().startswith("chosen")]


def test_the_chosen_point_is_shown_with_its_values_even_beyond_the_sweep(tmp_path):
    figure = plots.plot_sweep(tmp_path / "a.png", SWEEP, "threshold", BEYOND)
    for axes, place in zip(figure.axes, (0.2, 9), strict=True):
        (ring,) = rings(axes)
        assert sorted(map(tuple, ring.get_xydata())) == [(place, 3.45), (place, 85.12), (place, 86.12)]
        assert axes.get_xlim()[1] > place
        own = [line.get_marker() for line in axes.lines if list(line.get_xdata()) == [place]]
        assert own == ["o", "s", "^"], "each value with its quantity's marker"
    text = "chosen: C-Acc 86.12 %, ASR 3.45 %, accuracy on the defender's images 85.12 %"
    assert legend_texts(figure) == ["C-Acc", "ASR", "accuracy on the defender's images", text]


def test_a_sweep_without_a_trigger_that_chose_nothing(tmp_path):
    rows = [{**row, "ASR %": None} for row in SWEEP[:1]]
    figure = plots.plot_sweep(tmp_path / "a.png", rows, "number", rows[0])
    left, right = figure.axes
    assert set(rings(left)[0].get_xdata()) == {left.get_xticks()[0]} and set(rings(right)[0].get_xdata()) == {0}
    assert legend_texts(figure)[-1] == "chosen: C-Acc 90.00 %, accuracy on the defender's images 89.00 %"


def test_the_readmes_figure_shows_what_is_on_file(tmp_path, capsys):
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    content = (ROOT / "results" / figures.README_RUN).read_bytes()
    (tmp_path / "results" / figures.README_RUN).write_bytes(content)
    assert figures.main(["readme"], tmp_path) == 0
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"badnets_sweep.png", "badnets_sweep.pdf"}
    run = json.loads(content)
    left, right = figures.draw_readme(tmp_path / "again.png", {"file": figures.README_RUN, **run}).axes
    expected = [(row["threshold"], row["attack_success_rate"]) for row in run["by_threshold"]]
    assert [tuple(point) for point in lines_of(left)["ASR"].get_xydata()] == expected
    assert lines_of(right)["C-Acc"].get_xdata()[-1] == pytest.approx(100 * 701 / 4800)
    assert set(rings(left)[0].get_ydata()) == {87.7, 2.33, 89.6} and not run.get("excerpt")
    (tmp_path / "results" / figures.README_RUN).write_text("cut off")
    assert figures.main(["readme"], tmp_path) == 1
    assert capsys.readouterr().err.count("\n") == 1


# ---- images


@pytest.mark.parametrize(
    ("target", "titles"),
    [
        (torch.tensor([1]), ["disc\n→ square", "frame\n→ square", "triangle\n→ square"]),
        (None, ["disc\n→ square", "square\n→ triangle", "frame\n→ disc", "triangle\n→ ring"]),
    ],
    ids=["all-to-one", "all-to-all"],
)
def test_columns_name_the_class_and_where_the_trigger_leads(target, titles, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("attacks.outputs.plot_images", lambda *given: figures.append(plots.plot_images(*given)))
    images = ImageSet(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1, 9, 2]), 10)
    dataset = Dataset("drawn", SYNTHETIC_NORMALIZATION, True, CLASSES, images, images)
    trigger = Trigger(torch.full((1, 8, 8, 3), 51.0), torch.ones(1, 8, 8, 1), 1.0, target)
    write_trigger(tmp_path, trigger, dataset, torch.arange(2))
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == titles
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["clean", "triggered", "difference × 5"]
    assert {path.suffix for path in tmp_path.glob("clean_and_triggered.*")} == {".png", ".pdf"}


def test_titles_stand_apart(tmp_path):
    longest = max(CLASSES, key=len)
    figure = plots.plot_images(tmp_path / "a.png", PIXELS, PIXELS, [f"{longest}\n→ {longest}"] * len(PIXELS))
    figure.draw_without_rendering()
    boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes)) and len(boxes) == len(PIXELS)


def test_the_synthetic_classes_have_the_names_of_their_shapes():
    # (right, down) of the centre, which is (0, 0)
    points = torch.tensor([(0.0, 0.0), (0.8, 0.0), (0.85, 0.85), (0.0, -0.8), (0.2, 0.2), (0.7, -0.7)])
    inside = torch.stack(_inside(*points.T)).int().tolist()
    assert dict(zip(CLASSES, inside, strict=True)) == {
        "disc": [1, 1, 0, 1, 1, 1],
        "square": [1, 1, 1, 1, 1, 1],
        "triangle": [1, 0, 0, 1, 1, 0],
        "ring": [0, 1, 0, 1, 0, 1],
        "plus": [1, 1, 0, 1, 1, 0],
        "saltire": [1, 0, 1, 0, 1, 1],
        "striped disc": [0, 0, 0, 0, 1, 0],
        "striped square": [0, 1, 1, 0, 1, 1],
        "chequers": [0, 0, 1, 0, 1, 0],
        "frame": [0, 1, 1, 1, 0, 1],
    }


# ---- matplotlib is not imported before it is needed


def run_python(code, backend, **env):
    variables = {**os.environ, "MPLBACKEND": backend, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run([sys.executable, *code], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_works_with_a_backend_that_does_not_exist():
    assert "--poison-type" in run_python(["train_backdoor_cifar.py", "--help"], "nonsense")


PROGRAM = """
import os, sys
import train_backdoor_cifar, optimize_mask_cifar, prune_neuron_cifar
assert not {"matplotlib", "torchvision"} & set(sys.modules)  # each would take seconds
from pathlib import Path
from formats.plots import plot_training
path, backend = Path(sys.argv[1]), os.environ["MPLBACKEND"]
plot_training(path, [{"epoch": 1, "C-Acc %": 50.0}])
assert os.environ["MPLBACKEND"] == backend
assert "matplotlib.pyplot" not in sys.modules
print(sys.modules["matplotlib"].rcParams._get("backend"))
"""


def test_pictures_need_no_backend_and_leave_the_hosts_alone(tmp_path):
    printed = [
        run_python(["-c", PROGRAM, str(tmp_path / f"{backend}.png")], backend, PYTHONHASHSEED=seed).strip()
        for backend, seed in (("nonsense", "1"), ("svg", "2"), ("", "3"))
    ]
    assert printed[1] == "svg" and printed[0] != "nonsense"
    for suffix in (".png", ".pdf"):
        first, second = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("nonsense", "svg"))
        assert first == second, "the bytes do not depend on the process"
