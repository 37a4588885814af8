"""The repaired network, as it is, as others lay it out, and made smaller."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from data.augment import normalize
from engine.cost import cost, images_per_second
from engine.evaluation import Evaluator, Report, inference_copy
from formats.cards import save_with_card
from formats.layouts import BARE, save_in_layout
from formats.subject import Subject
from models.compact import compact
from utils.config import Config, setting
from utils.console import announce
from utils.run import Run, versions

SPEED_IMAGES = 64  # measured at once


@dataclass(frozen=True)
class CompactConfig(Config):
    """What is saved beside the repaired network."""

    compact: bool = setting(False, "also save the repaired network without the channels of pruned neurons")


def save_repaired(
    run: Run, subject: Subject, network: nn.Module, repair: dict[str, Any], report: Report
) -> dict[str, Any]:
    """Save the repaired network and its card, and once more as others lay it out if it came so; return the card.

    Args:
        run: of the repair, in whose folder ``repaired_model.th`` goes.
        subject: whence the network came.
        network: the repaired one.
        repair: what was done to it; the time of the run and an earlier repair are added.
        report: what it measured.

    Raises:
        InputError: the file that the network came from is gone or was changed, and so its layout is.
        OSError: the folder cannot be written or the disk is full.
    """
    repair = {**repair, "seconds": round(run.seconds, 1)}
    if earlier := subject.card.get("repair"):
        repair["after"] = earlier
    card = {**subject.card, "repair": repair, "metrics": report.rounded(), "command": run.command}
    card["versions"] = versions()
    source = card["repaired_from"]
    if source["layout"] != BARE:  # first, as the file may be gone
        path = save_in_layout(source, run.arguments.checkpoint, run.folder, network.state_dict())
        announce(f"saved {path}: the repaired network in the layout in which it came")
    save_with_card(run.folder / "repaired_model.th", network.state_dict(), card)
    return card


def save_compact(
    folder: Path, network: nn.Module, card: dict[str, Any], subject: Subject, evaluator: Evaluator
) -> None:
    """Save a network without the channels that are pruned, with its card, and say what that saves.

    Args:
        folder: where ``compact_model.th`` goes.
        network: the repaired network.
        card: what is known of it.
        subject: whence it came.
        evaluator: measures the smaller network, in the precision in which the speed is measured too.

    Raises:
        OSError: the folder cannot be written or the disk is full.
        NotFinite: the loss is none.
    """
    size = (3, *subject.clean.images.shape[1:3])
    smaller, dropped, obstacle = compact(network, size)
    report = evaluator(smaller)
    costs = [cost(each, size) for each in (network, smaller)]
    described = {**card, "compact": True, **costs[1], "metrics": report.rounded()}
    save_with_card(folder / "compact_model.th", smaller.state_dict(), described)
    images = normalize(subject.clean.images[:SPEED_IMAGES], subject.normalization).to(evaluator.precision)
    speeds = images_per_second([inference_copy(each, evaluator.precision) for each in (network, smaller)], images)
    parameters, flops = ([each[name] for each in costs] for name in ("parameters", "flops"))
    announce(
        f"compact_model.th: {dropped} channels dropped{f', as {obstacle}' if obstacle else ''}; "
        f"parameters {parameters[0]:,} -> {parameters[1]:,}, MFLOPs an image {flops[0] / 1e6:,.1f} -> "
        f"{flops[1] / 1e6:,.1f}, images/s {speeds[0]:,.0f} -> {speeds[1]:,.0f}; {report}"
    )
