"""Is this network backdoored, and to which class? Told without the trigger, from the network and a few clean images.

A network of the zoo (about half a minute on a CPU core):
    python detect_cifar.py --output-dir save/detection --checkpoint badnets-0

Each class gets a margin and a share of images that a noise sends there (docs/detection.md says what they are); a class
that stands out is suspected. The trigger cannot be given, and no test image is looked at.

Writes to the output folder: detection.json, the same as .png and .pdf, detect_log.jsonl with the table.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
from functools import partial

from defenses.defense import CleanImages
from defenses.detection import DetectionConfig, count_images, detect
from engine.runtime import RuntimeConfig, choose_runtime
from formats.outputs import OUTPUTS
from formats.plots import plot_detection
from formats.subject import add_subject_flags, load_defender, remember
from formats.zoo import locate_inputs
from utils.config import add_flags, add_output_flags, from_flags, make_parser
from utils.console import announce, leave
from utils.files import as_json, write_bytes
from utils.run import Run, command_line, run_script, versions

COLUMNS = {"class": "5d", "name": "12s", "margin": "8.2f", "noise %": "8.2f"}
AXES = {"margin": "largest margin of the logits", "noise": "images that noise sends there (%)"}


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
    values = {name: statistic.values for name, statistic in found.statistics.items()}
    values["noise"] = [100 * share for share in values["noise"]]
    table = run.table(COLUMNS)
    for number, (name, margin, noise) in enumerate(zip(names, values["margin"], values["noise"], strict=True)):
        table.add({"class": number, "name": str(name), "margin": margin, "noise %": noise})
    written = {**found.as_dict(), "suspect_name": names[found.suspect], "clean_images": len(clean)}
    written["noise_images"] = count = count_images(clean, len(names), config)
    card = {name: subject.card[name] for name in ("dataset", "normalization", "repaired_from")}
    facts = {"seconds": round(run.seconds, 1), "command": run.command, "versions": versions()}
    write_bytes(run.folder / "detection.json", as_json({**written, "settings": run.options, "network": card, **facts}))
    drawn = {AXES[name]: values[name] for name in values}
    plot_detection(run.folder / "detection.png", names, drawn, found.suspect)
    if count < config.noise_images:
        announce(f"a noise saw {count} images, not {config.noise_images}: there are no more of other classes")
    verdict = "backdoored" if found.backdoored else "no backdoor found"
    announce(f"{verdict}: class {found.suspect} ({names[found.suspect]}) stands out most, p = {found.p_value:.2g}")
    announce(f"saved {run.folder / 'detection.json'}; {run.seconds:.0f} s")


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
