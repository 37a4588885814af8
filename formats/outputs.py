"""Which files of an output folder each step writes, and which ones later steps make of them."""

from utils.run import Outputs

TRAIN = (
    "last_model.*",
    "model_init.*",
    "model_[0-9]*.*",
    "generators.*",
    "trigger_info.th",
    "clean_and_triggered.*",
    "train_curves.*",
    "train_log.jsonl",
)
MASKS = ("mask_values.*", "optimize_log.jsonl")
SWEEPS = {
    by: ("repaired_model.*", f"pruning_by_{by}.*", f"pruning_by_{by}_log.jsonl") for by in ("threshold", "number")
}
UNFINISHED = ("optimize_resume.th", "pruning_by_*_resume.th")

PRUNING = tuple(pattern for patterns in SWEEPS.values() for pattern in patterns)
OUTPUTS = {
    "train": Outputs(("last_model.th", "model_[0-9]*.th"), TRAIN, MASKS + PRUNING + UNFINISHED),
    "optimize": Outputs(("mask_values.txt",), MASKS, PRUNING + UNFINISHED[1:]),
    **{
        f"pruning_by_{by}": Outputs(("repaired_model.th", f"pruning_by_{by}.txt"), files)
        for by, files in SWEEPS.items()
    },
}
