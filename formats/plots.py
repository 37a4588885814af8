"""The pictures that lie next to the text files."""

import io
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from utils.files import write_bytes

CLEAN, TRIGGERED = "tab:blue", "tab:red"
# column of the sweep's log: colour, label
SWEEP_LINES = {
    "C-Acc %": (CLEAN, "C-Acc"),
    "ASR %": (TRIGGERED, "ASR"),
    "defender acc %": ("tab:green", "accuracy on the defender's images"),
}
# column of the training log: colour, label
TRAINING_LINES = {
    "train acc %": ("gray", "training accuracy (poisoned set)"),
    "C-Acc %": (CLEAN, "C-Acc"),
    "ASR %": (TRIGGERED, "ASR"),
    "cross %": ("tab:orange", "accuracy with other images' triggers"),
}


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"savefig.dpi": 110}):
        figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    write_bytes(path, buffer.getvalue())


def plot_training(path: Path, rows: list[dict]) -> None:
    """Draw training accuracy, C-Acc, ASR and cross-trigger accuracy against the epoch, as far as they are known."""
    axes = Figure(figsize=(5.5, 3.5)).subplots()
    epochs = [row["epoch"] for row in rows]
    for name, (colour, title) in TRAINING_LINES.items():
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            axes.plot(epochs, [math.nan if value is None else value for value in values], color=colour, label=title)
    axes.set(xlabel="epoch", ylabel="percent", ylim=(-2, 102))
    axes.legend()
    _save(axes.figure, path)


def plot_images(path: Path, clean: Tensor, triggered: Tensor) -> None:
    """Draw a row of clean images, the same with the trigger, and the difference, stretched to full range.

    Shape:
        clean, triggered: uint8 (B, H, W, 3).
    """
    difference = (triggered.int() - clean.int()).abs()
    factor = 255 // max(int(difference.max()), 1)
    parts = (("clean", clean), ("triggered", triggered), (f"difference x{factor}", difference * factor))
    grid = Figure(figsize=(1.1 * len(clean), 3.6)).subplots(len(parts), len(clean), squeeze=False)
    for row, (title, images) in zip(grid, parts, strict=True):
        for axes, image in zip(row, images, strict=True):
            axes.imshow(image.cpu().numpy().astype(np.uint8), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(title)
    _save(grid[0, 0].figure, path)


def plot_masks(path: Path, neurons: list) -> None:
    """Draw the mask of every neuron, a tuple with ``layer`` and ``mask``, and how many lie below each value."""
    figure = Figure(figsize=(9, 3.8))
    by_layer, total = figure.subplots(1, 2, width_ratios=(2.5, 1))
    layers = list(dict.fromkeys(neuron.layer for neuron in neurons))
    places = {layer: number for number, layer in enumerate(layers)}
    jitter = np.random.default_rng(0).uniform(-0.35, 0.35, len(neurons))
    values = np.array([neuron.mask for neuron in neurons])
    by_layer.scatter([places[n.layer] for n in neurons] + jitter, values, s=3, alpha=0.4, linewidths=0)
    by_layer.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6 if len(layers) < 40 else 3)
    by_layer.set(ylabel="mask", ylim=(-0.03, 1.03), title="mask of each neuron by layer")
    total.plot(np.sort(values), 100 * np.arange(1, len(values) + 1) / len(values))
    total.set(xlabel="mask", ylabel="% of neurons at or below", xlim=(-0.03, 1.03), title="all neurons")
    _save(figure, path)


def plot_sweep(path: Path, rows: list[dict], by: str, chosen: dict) -> None:
    """Draw C-Acc and ASR against the threshold and against the share of neurons pruned (the published figure).

    Args:
        path: the PNG file.
        rows: the sweep's rows, the untouched network first.
        by: ``threshold`` or ``number``; what the left picture's axis counts.
        chosen: the operating point's row.
    """
    figure = Figure(figsize=(9.5, 3.6))
    by_value, by_share = figure.subplots(1, 2, sharey=True)
    for axes, key, label in (
        (by_value, "mask", "threshold" if by == "threshold" else "mask of the last neuron pruned"),
        (by_share, "pruned %", "% of neurons pruned"),
    ):
        shown = [row for row in rows if row[key] is not None]
        for name, (colour, title) in SWEEP_LINES.items():
            if shown and shown[0][name] is not None:
                axes.plot([r[key] for r in shown], [r[name] for r in shown], ".-", color=colour, label=title)
        if chosen[key] is not None:
            axes.axvline(chosen[key], color="gray", linestyle=":", label="chosen")
        axes.set(xlabel=label, ylim=(-2, 102))
    by_value.set_ylabel("percent")
    figure.legend(*by_value.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
    _save(figure, path)
