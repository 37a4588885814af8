"""The pictures that lie next to the text files, each as PNG and as PDF."""

import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from utils.files import write_together

if TYPE_CHECKING:  # importing it takes time that a run which draws nothing, such as --help, need not spend
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe & Ito (2008), which colour-blind readers can tell apart.
BLACK, ORANGE, GREEN, BLUE, VERMILLION, PURPLE = "#000000", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
# Column of a log: label, colour, line style, marker. A quantity looks the same in every figure, also in grey.
LINES = {
    "train acc %": ("training accuracy (poisoned set)", PURPLE, "-.", "D"),
    "C-Acc %": ("C-Acc", BLUE, "-", "o"),
    "ASR %": ("ASR", VERMILLION, "--", "s"),
    "defender acc %": ("accuracy on the defender's images", GREEN, ":", "^"),
    "cross %": ("accuracy with other images' triggers", ORANGE, (0, (5, 1, 1, 1, 1, 1)), "v"),
}
# Networks, and how their neurons are perturbed.
NETWORKS = ((VERMILLION, "s"), (BLUE, "o"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (BLACK, "X"))
PERTURBATIONS = {"adversarial": "-", "random": "--"}
RING = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "color": BLACK, "linestyle": "none", "zorder": 9}
MARKERS = 25  # on a line; more would hide its style
SHAPES = "osD^v<>Pp*Xh"  # of the attacks of a table
LAYER_LABELS = 45  # that fit side by side under the masks
LOOK = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType, as publishers demand
}
# No dates and no versions: the same rows give the same bytes.
FORMATS = {".pdf": {"Creator": None, "Producer": None, "CreationDate": None}, ".png": {"Software": None}}


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set variables of the environment in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _matplotlib() -> Any:
    """Import matplotlib, whatever MPLBACKEND says: an unknown name would end the import, and no picture needs one."""
    if "matplotlib" not in sys.modules:
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where it can keep no cache
        backend = os.environ.pop("MPLBACKEND", None)
        try:
            import matplotlib
        except (ValueError, OSError):  # the user's settings cannot be read; none of them is needed
            with _environment(MATPLOTLIBRC=os.devnull):
                import matplotlib
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
        from matplotlib.backends import backend_registry

        if backend and backend_registry.is_valid_backend(backend):
            matplotlib.rcParams["backend"] = backend  # the host program may want it
    import matplotlib.figure
    import matplotlib.patches
    import matplotlib.ticker

    return matplotlib


@contextmanager
def _drawn(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """Lend a figure, in inches, and write it as PNG and PDF; the user's own settings of matplotlib play no part."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
        yield figure
        contents = {}
        for suffix, metadata in FORMATS.items():
            buffer = io.BytesIO()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph")  # of a class's name, in a script that the font has not
                figure.savefig(buffer, format=suffix[1:], metadata=metadata)
            contents[path.with_suffix(suffix)] = buffer.getvalue()
    write_together(contents)


def _draw_lines(axes: "Axes", places: list[float], rows: list[dict], connect: bool = True) -> None:
    """Draw all that rows know; a row has its place on the x axis."""
    for zorder, (name, (label, colour, style, marker)) in enumerate(LINES.items(), 3):
        known = [(place, row[name]) for place, row in zip(places, rows, strict=True) if row.get(name) is not None]
        if known:
            axes.plot(
                *zip(*known, strict=True),
                label=label if connect else None,
                color=colour,
                linestyle=style if connect else "none",
                marker=marker,
                markerfacecolor="white" if name == "defender acc %" else colour,  # it often lies on C-Acc
                markevery=math.ceil(len(known) / MARKERS),
                zorder=zorder,
            )


def plot_training(path: Path, rows: list[dict]) -> "Figure":
    """Draw training accuracy, C-Acc, ASR and cross-trigger accuracy against the epoch, as far as they are known.

    Args:
        path: the PNG file; the PDF file lies beside it.
        rows: of the training log; accuracies in percent.

    Returns:
        The figure as it was written.

    Raises:
        OSError: the folder cannot be written or the disk is full; so for every picture.
    """
    with _drawn(path, 6, 4.2) as figure:
        axes = figure.subplots()
        _draw_lines(axes, [row["epoch"] for row in rows], rows)
        axes.set(xlabel="epoch", ylabel="accuracy, ASR (%)", ylim=(-3, 103))
        axes.xaxis.set_major_locator(_matplotlib().ticker.MaxNLocator("auto", integer=True, min_n_ticks=1))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def plot_images(path: Path, clean: Tensor, triggered: Tensor, titles: list[str]) -> "Figure":
    """Draw a row of clean images, the same with the trigger, and the difference, stretched to full range.

    Args:
        path: the PNG file; the PDF file lies beside it.
        clean: the images.
        triggered: the same with the trigger.
        titles: one for each image.

    Shape:
        clean, triggered: uint8 (B, H, W, 3), 0..255.

    Returns:
        The figure as it was written.
    """
    difference = (triggered.int() - clean.int()).abs()
    factor = 255 // max(int(difference.max()), 1)
    parts = (("clean", clean), ("triggered", triggered), (f"difference × {factor}", difference * factor))
    with _drawn(path, 1.05 * len(clean) + 0.3, 3.6) as figure:
        grid = figure.subplots(len(parts), len(clean), squeeze=False)
        for row, (name, images) in zip(grid, parts, strict=True):
            for axes, image in zip(row, images, strict=True):
                axes.imshow(image.cpu().numpy().astype(np.uint8), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            row[0].set_ylabel(name)
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, fontsize="small", parse_math=False)  # a class may have a $ in its name
    return figure


def _draw_masks(by_layer: "Axes", total: "Axes", neurons: list, threshold: float) -> str:
    """Draw one network's masks by layer and how many lie below each value; returns the share below the threshold."""
    layers = list(dict.fromkeys(neuron.layer for neuron in neurons))
    places = {layer: number for number, layer in enumerate(layers)}
    step = math.ceil(len(layers) / LAYER_LABELS)
    jitter = np.random.default_rng(0).uniform(-0.35, 0.35, len(neurons))
    values = np.array([neuron.mask for neuron in neurons])
    line = {"color": VERMILLION, "linestyle": "--", "zorder": 3}
    # thousands of points: a bitmap in the PDF
    where = [places[neuron.layer] for neuron in neurons] + jitter
    by_layer.scatter(where, values, s=2, alpha=0.5, linewidths=0, color=BLUE, rasterized=True)
    by_layer.set_xticks(range(0, len(layers), step), layers[::step], rotation=90, fontsize=7)
    by_layer.set(ylabel="mask", xlim=(-0.7, len(layers) - 0.3), ylim=(-0.03, 1.03))
    by_layer.set(title="mask of each neuron, by layer" + (f" (1 in {step} is named)" if step > 1 else ""))
    by_layer.axhline(threshold, **line)
    by_layer.grid(axis="x", visible=False)
    total.step(np.sort(values), 100 * np.arange(1, len(values) + 1) / len(values), where="post", color=BLUE)
    total.axvline(threshold, **line, label=f"the paper's threshold, {threshold:g}")
    total.set(xlabel="mask", xlim=(-0.03, 1.03), xticks=np.linspace(0, 1, 6), title="all neurons")
    total.set(ylabel="neurons at or below (%)", ylim=(-3, 103))
    return f"{100 * (values <= threshold).mean():.1f} % of the neurons"


def plot_masks(path: Path, neurons: list, threshold: float) -> "Figure":
    """Draw the mask of every neuron, a tuple with ``layer`` and ``mask``, and how many lie below each value.

    Args:
        path: the PNG file; the PDF file lies beside it.
        neurons: in any order; layers appear in the order of their first neurons.
        threshold: the paper's, 0..1; a line is drawn there.

    Returns:
        The figure as it was written.
    """
    with _drawn(path, 9, 4.2) as figure:
        by_layer, total = figure.subplots(1, 2, width_ratios=(2.5, 1))
        below = _draw_masks(by_layer, total, neurons, threshold)
        ((line,), (label,)) = total.get_legend_handles_labels()
        figure.legend([line], [f"{label} ({below} at or below)"], loc="outside lower center")
    return figure


def plot_several_masks(path: Path, networks: dict[str, list], threshold: float) -> "Figure":
    """Draw the masks of several networks one below the other, each as ``plot_masks`` does.

    Args:
        path: the PNG file; the PDF file lies beside it.
        networks: neurons by what the network is called.
        threshold: the paper's, 0..1; a line is drawn there.

    Returns:
        The figure as it was written.
    """
    with _drawn(path, 9, 3.4 * len(networks) + 0.4) as figure:
        grid = figure.subplots(len(networks), 2, width_ratios=(2.5, 1), squeeze=False)
        for (by_layer, total), (name, neurons) in zip(grid, networks.items(), strict=True):
            below = _draw_masks(by_layer, total, neurons, threshold)
            by_layer.set_title(f"{name}: {by_layer.get_title()}", parse_math=False)
            total.set_title(f"{below} at or below {threshold:g}", fontsize="medium")
        figure.legend(*grid[0, 1].get_legend_handles_labels(), loc="outside lower center")
    return figure


def _place_unpruned(axes: "Axes", masks: list[float]) -> float:
    """Make room for the unpruned network left of 0, and name the place; returns it."""
    last = max(masks, default=0.0) or 1.0
    ticks = _matplotlib().ticker.MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, last)
    ticks = [tick for tick in ticks if tick <= last + 1e-9]
    place = -0.2 * last
    axes.set_xticks([place, *ticks], ["unpruned", *(f"{tick:.4g}" for tick in ticks)])
    return place


def plot_sweep(path: Path, rows: list[dict], by: str, chosen: dict) -> "Figure":
    """Draw C-Acc and ASR against the threshold and against the share of neurons pruned (the published figure).

    Args:
        path: the PNG file; the PDF file lies beside it.
        rows: the sweep's rows, the unpruned network, whose ``mask`` is None, first; accuracies in percent.
        by: ``threshold`` or ``number``; what the left picture's axis counts.
        chosen: the operating point's row; it need not be one of the sweep.

    Returns:
        The figure as it was written.
    """
    known = [name for name in LINES if chosen.get(name) is not None]
    values = ", ".join(f"{LINES[name][0]} {chosen[name]:.2f} %" for name in known)
    with _drawn(path, 9, 4) as figure:
        by_mask, by_share = figure.subplots(1, 2, sharey=True)
        unpruned = _place_unpruned(by_mask, [row["mask"] for row in (*rows, chosen) if row["mask"] is not None])
        # apart from the line: no threshold lies between the unpruned network and the first
        _draw_lines(by_mask, [unpruned] * len(rows[:1]), rows[:1], connect=False)
        _draw_lines(by_mask, [row["mask"] for row in rows[1:]], rows[1:])
        _draw_lines(by_share, [row["pruned %"] for row in rows], rows)
        point = unpruned if chosen["mask"] is None else chosen["mask"]
        for axes, place in ((by_mask, point), (by_share, chosen["pruned %"])):
            axes.axvline(place, color="0.6", linewidth=1, zorder=2)
            _draw_lines(axes, [place], [chosen], connect=False)
            heights = [chosen[name] for name in known]
            axes.plot([place] * len(known), heights, **RING, label=f"chosen: {values}")
        by_mask.set(xlabel="threshold" if by == "threshold" else "mask of the last neuron pruned", ylim=(-3, 103))
        by_mask.set(ylabel="accuracy, ASR (%)")
        by_share.set(xlabel="neurons pruned (%)")
        figure.legend(*by_share.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def plot_trigger_free(path: Path, curves: dict[str, list[float]], left: float, chosen: float) -> "Figure":
    """Draw what a defender without the trigger sees as more and more neurons are pruned.

    Args:
        path: the PNG file; the PDF file lies beside it.
        curves: in percent, by what they say; the first is the share of neurons pruned, the second what patches move.
        left: percent; patches have failed that move at most this share of the images.
        chosen: percent of the neurons.

    Returns:
        The figure as it was written.
    """
    (across, places), *lines = curves.items()
    with _drawn(path, 6, 4.2) as figure:
        axes = figure.subplots()
        for (label, values), (_, colour, style, marker) in zip(lines, reversed(LINES.values()), strict=False):
            axes.plot(places, values, label=label, color=colour, linestyle=style, marker=marker)
        axes.axhline(left, color="0.6", linewidth=1, linestyle=":", label=f"patches have failed: {left:g} %")
        axes.axvline(chosen, color="0.6", linewidth=1, label=f"chosen: {chosen:.2f} % of the neurons")
        axes.set(xlabel=across, ylabel="images (%)", ylim=(-3, 103))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _at_common_places(curves: list[dict[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return all places (P,) at which a run was measured, as far as every run reaches, and the runs' values (runs, P).

    Between two places of its own a run is taken to be a straight line; where all have the same places nothing is.
    """
    curves = [dict(sorted(curve.items())) for curve in curves]
    low, high = max(min(curve) for curve in curves), min(max(curve) for curve in curves)
    places = np.array(sorted({place for curve in curves for place in curve if low <= place <= high}))
    values = [np.interp(places, list(curve), list(curve.values())) for curve in curves]
    return places, np.array(values)


def _draw_mean(axes: "Axes", places: np.ndarray, values: np.ndarray, **look: Any) -> None:
    """Draw the mean of values (runs, P) as a line, and as a band from the lowest to the highest."""
    if len(values) > 1:
        axes.fill_between(places, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0, zorder=2)
    axes.plot(places, values.mean(0), markevery=math.ceil(len(places) / MARKERS), **look)


def _of_runs(counts: list[int], word: str) -> str:
    """Say of how many runs a mean is."""
    low, high = min(counts), max(counts)
    several = f"{high}" if low == high else f"{low} to {high}"
    return f"1 {word}" if high == 1 else f"mean of {several} {word}s"


def _show_legend(figure: "Figure", axes: list["Axes"], counts: list[int], word: str) -> None:
    """Name what any of the axes shows, and the bands."""
    found = {}
    for handles, labels in (each.get_legend_handles_labels() for each in axes):
        found |= dict(zip(labels, handles, strict=True))
    if max(counts) > 1:
        found[f"lowest to highest {word}"] = _matplotlib().patches.Patch(color="0.5", alpha=0.3, linewidth=0)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=2)


def plot_sweeps(path: Path, groups: dict[str, list[tuple[list[dict], list[dict]]]]) -> "Figure":
    """Draw C-Acc and ASR of several runs against the threshold and against the share of neurons pruned.

    Lines are means, bands reach from the lowest to the highest run. A group shows what is known of all its runs, as far
    as all of them reach.

    Args:
        path: the PNG file; the PDF file lies beside it.
        groups: runs by title, such as the attack; of each run the rows that are drawn against the threshold, and
            against the share. Each begins with the unpruned network, whose ``mask`` is None; accuracies in percent.

    Returns:
        The figure as it was written.

    Raises:
        ValueError: the runs of a group reach no point together.
    """
    counts = [len(runs) for runs in groups.values()]
    with _drawn(path, 9, 2.9 * len(groups) + 1) as figure:
        grid = figure.subplots(len(groups), 2, sharey=True, squeeze=False)
        for (by_mask, by_share), (title, runs) in zip(grid, groups.items(), strict=True):
            masks, shares = ([run[part] for run in runs] for part in (0, 1))
            last = min(max(row["mask"] for row in rows[1:]) for rows in masks)
            unpruned = _place_unpruned(by_mask, [last])
            for name in ("C-Acc %", "ASR %"):
                label, colour, style, marker = LINES[name]
                look = {"color": colour, "marker": marker, "zorder": 3 + (name == "ASR %")}
                look["label"] = f"{label}, {_of_runs(counts, 'run')}"
                if any(row.get(name) is None for run in runs for rows in run for row in rows):
                    continue  # no trigger
                for axes, key, parts in (
                    (by_mask, "mask", [rows[1:] for rows in masks]),
                    (by_share, "pruned %", shares),
                ):
                    # of equal places the last counts: all neurons up to that mask are pruned there
                    curves = [{round(row[key], 6): row[name] for row in rows} for rows in parts]
                    places, values = _at_common_places(curves)
                    if not len(places):
                        raise ValueError(f"{title}: no {axes.get_xlabel() or key} is reached by all {len(runs)} runs")
                    _draw_mean(axes, places, values, linestyle=style, **look)
                before = np.array([rows[0][name] for rows in masks])
                spread = [[before.mean() - before.min()], [before.max() - before.mean()]]
                del look["label"]
                by_mask.errorbar([unpruned], [before.mean()], spread, linestyle="none", **look)
            by_mask.set(ylabel="accuracy, ASR (%)", ylim=(-3, 103), xlabel="threshold")
            by_mask.set_title(f"{title} ({len(runs)} run{'s' * (len(runs) > 1)})", loc="left", parse_math=False)
            by_share.set(xlabel="neurons pruned (%)")
        _show_legend(figure, list(grid[:, 1]), counts, "run")
    return figure


def plot_perturbation(path: Path, networks: dict[str, list[dict]], target: str, classes: int) -> "Figure":
    """Draw error rate and share of the target class among the answers against the size of a perturbation.

    Lines are means over draws, bands reach from the lowest to the highest draw.

    Args:
        path: the PNG file; the PDF file lies beside it.
        networks: at most as many as ``NETWORKS``; rows of each, one a draw: ``kind`` of ``PERTURBATIONS``, ``eps``,
            ``error %`` and ``target %`` in percent.
        target: what the target class is called.
        classes: their number.

    Returns:
        The figure as it was written.
    """
    with _drawn(path, 9, 3.9 + 0.25 * len(networks)) as figure:  # each has two lines in the legend
        panels, draws = figure.subplots(1, 2, sharey=True), []
        for (name, rows), (colour, marker) in zip(networks.items(), NETWORKS, strict=False):
            for kind, style in PERTURBATIONS.items():
                own = [row for row in rows if row["kind"] == kind]
                places = sorted({row["eps"] for row in own})
                draws.append(len(own) // len(places))
                for axes, column in zip(panels, ("error %", "target %"), strict=True):
                    values = np.array([[row[column] for row in own if row["eps"] == place] for place in places]).T
                    _draw_mean(
                        axes,
                        np.array(places),
                        values,
                        label=f"{kind}, {name} ({_of_runs([len(values)], 'draw')})".replace("$", r"\$"),
                        color=colour,
                        marker=marker,
                        linestyle=style,
                        markerfacecolor=colour if kind == "adversarial" else "white",
                        zorder=3,
                    )
        panels[0].set(ylabel="wrong answers (%)", ylim=(-3, 103))
        panels[1].axhline(100 / classes, color="0.6", linewidth=1, zorder=1, label=f"one class of {classes}")
        panels[1].set_ylabel(f"answers “{target}” (%)", parse_math=False)
        for axes in panels:
            axes.set(xlabel="size of the perturbation, eps (relative to the weights)")
            axes.yaxis.set_tick_params(labelleft=True)
        _show_legend(figure, list(panels), draws, "draw")
    return figure


def plot_curve(path: Path, rows: list[dict], chosen: float) -> "Figure":
    """Draw C-Acc and ASR along a curve of networks.

    Args:
        path: the PNG file; the PDF file lies beside it.
        rows: of the curve; ``t`` in 0..1, accuracies in percent.
        chosen: the operating point; a line is drawn there.

    Returns:
        The figure as it was written.
    """
    with _drawn(path, 6, 4.2) as figure:
        axes = figure.subplots()
        _draw_lines(axes, [row["t"] for row in rows], rows)
        axes.axvline(chosen, color="0.6", linewidth=1, zorder=2, label=f"chosen: t = {chosen:g}")
        axes.set(xlabel="place on the curve, t", ylabel="accuracy, ASR (%)", ylim=(-3, 103))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def plot_detection(
    path: Path, classes: Sequence[str], statistics: dict[str, list[float]], suspect: int | None
) -> "Figure":
    """Draw the statistics of every class; the suspected one is filled.

    Args:
        path: the PNG file; the PDF file lies beside it.
        classes: their names.
        statistics: values by class, by the label of their axis.
        suspect: a class; None: no single one.

    Returns:
        The figure as it was written.
    """
    places = range(len(classes))
    with _drawn(path, 4.5 * len(statistics), 3.4) as figure:
        panels = figure.subplots(1, len(statistics), squeeze=False)[0]
        for axes, (name, values) in zip(panels, statistics.items(), strict=True):
            colours = [VERMILLION if place == suspect else "white" for place in places]
            axes.bar(places, values, color=colours, edgecolor=BLACK, linewidth=0.8)
            axes.set(ylabel=name)
            if len(classes) <= LAYER_LABELS:
                axes.set_xticks(places, classes, rotation=90, parse_math=False)
            else:
                axes.set(xlabel="class")
            axes.grid(axis="x", visible=False)
    return figure


def plot_table(path: Path, rows: list[tuple[str, bool, list[dict[str, tuple]]]], attacks: list[str]) -> "Figure":
    """Draw C-Acc and ASR of each row of a table, a shape for each attack, a line for the mean over the attacks.

    Args:
        path: the PNG file; the PDF file lies beside it.
        rows: label, whether its figures are published ones (drawn hollow), and for each attack mean and standard
            deviation of ``C-Acc`` and ``ASR`` in percent, either of them None where it is not known.
        attacks: their titles.

    Returns:
        The figure as it was written.
    """
    colours = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, BLACK)
    with _drawn(path, 10, 1.6 + 0.35 * len(rows) + 0.1 * len(attacks)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, ("C-Acc", "ASR"), strict=True):
            for number, attack in enumerate(attacks):
                look = {"color": colours[number % len(colours)], "marker": SHAPES[number % len(SHAPES)]}
                axes.plot([], [], **look, linestyle="none", label=attack)
                shift = 0.6 * (number + 0.5) / len(attacks) - 0.3
                for place, (_, hollow, cells) in enumerate(rows):
                    mean, deviation = cells[number].get(name, (None, None))
                    if mean is not None:
                        face = {"markerfacecolor": "white"} if hollow else {}
                        axes.errorbar(mean, place + shift, xerr=deviation, **look, **face, linestyle="none", capsize=2)
            for place, (_, _, cells) in enumerate(rows):
                known = [cell[name][0] for cell in cells if cell.get(name, (None,))[0] is not None]
                if known:
                    axes.vlines(sum(known) / len(known), place - 0.4, place + 0.4, color="0.4", linewidth=1)
            axes.set(xlabel=f"{name} (%)")
            axes.grid(axis="y", visible=False)
        panels[1].set(xlim=(-3, 103))
        panels[0].set_yticks(range(len(rows)), [label for label, _, _ in rows], parse_math=False)
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
