"""Is this network backdoored, and to which class? Told without the trigger, from the network and a few clean images.

A network of the zoo (about half a minute on a CPU core):
    python detect_cifar.py --output-dir save/detection --checkpoint badnets-0

Each class gets a margin and a share of images that a noise sends there; a class that stands out is suspected. For
attacks without a single target, each class is assigned to another one. docs/detection.md says what all that is. The
trigger cannot be given, and no test image is looked at.

Writes to the output folder: detection.json, the same as .png and .pdf, detect_log.jsonl with the table.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
from collections.abc import Sequence
from functools import partial

from defenses.all_to_all import CLASSES, PER_CLASS
from defenses.defense import CleanImages
from defenses.detection import Detection, DetectionConfig, count_images, detect
from engine.runtime import RuntimeConfig, choose_runtime
from formats.outputs import OUTPUTS
from formats.plots import plot_detection
from formats.subject import add_subject_flags, load_defender, remember
from formats.zoo import locate_inputs
from utils.config import add_flags, add_output_flags, from_flags, make_parser
from utils.console import announce, leave
from utils.files import as_json, write_bytes
from utils.run import Run, command_line, run_script, versions

COLUMNS = {"class": "5d", "name": "12s", "margin": "8.2f", "noise %": "8.2f", "goes to": "7d", "flow %": "7.2f"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the detector."""
    parser = make_parser(__doc__)
    add_subject_flags(parser, attack=False)
    add_flags(parser.add_argument_group("detection"), DetectionConfig)
    add_flags(parser.add_argument_group("computation"), RuntimeConfig)
    add_output_flags(parser)
    return parser


def run_detection(args: argparse.Namespace, run: Run) -> None:
    """Carry out the detection in the run's folder."""
    runtime = choose_runtime(from_flags(RuntimeConfig, args), run)
    subject, loaded = load_defender(args, runtime)
    remember(run, subject)
    config = from_flags(DetectionConfig, args, precision=runtime.precision)
    names, size = loaded.dataset.classes, tuple(subject.clean.images.shape[1:3])
    clean = CleanImages.of(subject)
    run.clear()
    tell = partial(_tell, len(names))
    found = detect(subject.network, len(names), size, subject.normalization, clean, config, tell)
    show(found, names, run)
    count = count_images(clean, len(names), config)
    suspect = None if found.suspect is None else names[found.suspect]
    written = {**found.as_dict(), "suspect_name": suspect, "clean_images": len(clean), "noise_images": count}
    card = {name: subject.card[name] for name in ("dataset", "normalization", "repaired_from")}
    facts = {"seconds": round(run.seconds, 1), "command": run.command, "versions": versions()}
    facts["runtime"] = runtime.facts()
    write_bytes(run.folder / "detection.json", as_json({**written, "settings": run.options, "network": card, **facts}))
    if count < config.noise_images:
        announce(f"a noise saw {count} images, not {config.noise_images}: there are no more of other classes")
    if not found.assignment:
        announce(
            f"no assignment: it is known for {CLASSES} classes with {PER_CLASS} clean images each, or more of them"
        )
    verdict = "backdoored" if found.backdoored else "no backdoor found"
    most = "the assignment of each class to another" if suspect is None else f"class {found.suspect} ({suspect})"
    announce(f"{verdict}: {most} stands out most, p = {found.p_value:.2g}")
    announce(f"saved {run.folder / 'detection.json'}; {run.seconds:.0f} s")


def show(found: Detection, names: Sequence[str], run: Run) -> None:
    """Print and draw what was found about every class."""
    margin, noise = found.statistics["margin"].values, [100 * share for share in found.statistics["noise"].values]
    drawn = {"largest margin of the logits": margin, "images that noise sends there (%)": noise}
    targets: list[int] | list[None] = [None] * len(names)
    flows: list[float] | list[None] = [None] * len(names)
    if found.assignment:
        targets, flows = found.assignment.targets, [100 * flow for flow in found.assignment.flows]
        drawn["net flow to the class assigned to it (%)"] = flows
    table = run.table(COLUMNS)
    for row in zip(range(len(names)), map(str, names), margin, noise, targets, flows, strict=True):
        table.add(dict(zip(COLUMNS, row, strict=True)))
    plot_detection(run.folder / "detection.png", names, drawn, found.suspect)


def _tell(classes: int, name: str) -> None:
    announce(f"measuring the {name} of {classes} classes")


def main(argv: list[str] | None = None) -> int:
    """Run the detector; returns the exit status."""
    args = build_parser().parse_args(argv)
    command = command_line("detect_cifar.py", argv)
    return run_script(
        partial(run_detection, args), "detect", args, command, OUTPUTS["detect"], partial(locate_inputs, args)
    )


if __name__ == "__main__":
    leave(main())
