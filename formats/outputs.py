"""Which files of an output folder each step writes, and which ones later steps make of them."""

from utils.run import Outputs

PICTURES = r"\.(png|pdf)"
TRAIN = (
    r"(last_model|model_init|model_\d+|generators)\.(th|json)",
    r"trigger_info\.th",
    r"train_log\.jsonl",
    rf"(clean_and_triggered|train_curves){PICTURES}",
)
MASKS = (r"mask_values\.(txt|json)", r"optimize_log\.jsonl", rf"mask_values{PICTURES}")
REPAIRED = r"(repaired|compact)_model\.(th|json)|repaired_model\.[a-z-]+\.pt"
SWEEPS = {
    by: (REPAIRED, rf"pruning_by_{by}\.txt", rf"pruning_by_{by}_log\.jsonl", rf"pruning_by_{by}{PICTURES}")
    for by in ("threshold", "number")
}
DEFENDED = (REPAIRED, r"defend_log\.jsonl", rf"curve(\.jsonl|{PICTURES})")
PRUNING = (*SWEEPS["threshold"], *SWEEPS["number"], r"pruning_by_(threshold|number)_resume\.th")

OUTPUTS = {
    "train": Outputs(
        ("last_model.th",),
        (r"last_model\.th", r"model_\d+\.th"),
        TRAIN,
        (*MASKS, *PRUNING, *DEFENDED, r"(optimize|defend)_resume\.th"),
    ),
    "optimize": Outputs(("mask_values.txt",), (r"mask_values\.txt",), MASKS, PRUNING),
    "defend": Outputs(("repaired_model.th",), (r"(repaired|compact)_model\.th",), DEFENDED),
    **{
        f"pruning_by_{by}": Outputs(
            ("repaired_model.th", f"pruning_by_{by}.txt"),
            (r"(repaired|compact)_model\.th", rf"pruning_by_{by}\.txt"),
            files,
        )
        for by, files in SWEEPS.items()
    },
}
