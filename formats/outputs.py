"""Which files of an output folder each step writes, and which ones later steps make of them."""

from collections.abc import Sequence
from dataclasses import replace

from utils.run import Outputs

SEED = r"seed-\d+"  # folder of one of several seeds
PICTURES = r"\.(png|pdf)"
TRAIN = (
    r"(last_model|model_init|model_\d+|generators)\.(th|json)",
    r"trigger_info\.th",
    r"train_log\.jsonl",
    rf"(clean_and_triggered|train_curves){PICTURES}",
)
MASKS = (r"mask_values\.(txt|json)", r"optimize_log\.jsonl", rf"mask_values{PICTURES}")
REPAIRED = r"(repaired|compact)_model\.(th|json)|repaired_model\.[a-z-]+\.pt"
TRIGGER_FREE = rf"trigger_free(\.json|{PICTURES})"
SWEEPS = {
    by: (
        REPAIRED,
        TRIGGER_FREE,
        rf"pruning_by_{by}\.txt",
        rf"pruning_by_{by}_log\.jsonl",
        rf"pruning_by_{by}{PICTURES}",
    )
    for by in ("threshold", "number")
}
DEFENDED = (REPAIRED, r"defend_log\.jsonl", rf"curve(\.jsonl|{PICTURES})")
PRUNING = (*SWEEPS["threshold"], *SWEEPS["number"], r"pruning_by_(threshold|number)_resume\.th")


def _of_seeds(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Let patterns fit in the folders of seeds as well."""
    return tuple(rf"({SEED}/)?({pattern})" for pattern in patterns)


DETECTION = (r"detection\.json", r"detect_log\.jsonl", rf"detection{PICTURES}")

OUTPUTS = {
    "train": Outputs(
        ("last_model.th",),
        (r"last_model\.th", r"model_\d+\.th"),
        TRAIN,
        _of_seeds((*MASKS, *PRUNING, *DEFENDED, r"(optimize|defend)_resume\.th")),
        (SEED,),
    ),
    "optimize": Outputs(
        ("mask_values.txt",), _of_seeds((r"mask_values\.txt",)), _of_seeds(MASKS), _of_seeds(PRUNING), (SEED,)
    ),
    "defend": Outputs(("repaired_model.th",), (r"(repaired|compact)_model\.th",), DEFENDED),
    "detect": Outputs(("detection.json",), (r"detection\.json",), DETECTION),
    **{
        f"pruning_by_{by}": Outputs(
            ("repaired_model.th", f"pruning_by_{by}.txt"),
            (r"(repaired|compact)_model\.th", rf"pruning_by_{by}\.txt"),
            files,
        )
        for by, files in SWEEPS.items()
    },
}


def seed_folder(seed: int) -> str:
    """Return the folder, in that of the run, with the masks of one of several seeds."""
    return f"seed-{seed}"


def outputs_of_masks(seeds: Sequence[int]) -> Outputs:
    """Return what step 2 writes.

    Args:
        seeds: those learnt at once, each with a folder of its own; none for the one that needs none.
    """
    outputs = OUTPUTS["optimize"]
    folders = [f"{seed_folder(seed)}/" for seed in seeds] or [""]
    return replace(outputs, results=tuple(folder + name for folder in folders for name in outputs.results))
