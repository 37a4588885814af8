"""Tables end to end on Snakemake, on this machine and on a Slurm that runs here."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests.test_structure import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("snakemake", "pandas", "yaml"))),
        reason="Snakemake is not installed (requirements-tables.txt)",
    ),
]
LIMIT = 600  # seconds a table
SLURM = ["--executor", "slurm", "--jobs", "2", "--slurm-status-command", "squeue", "--slurm-no-account"]
SLURM += ["--slurm-init-seconds-before-status-checks", "5", "--default-resources", "mem_mb=1000", "runtime=10"]


@pytest.fixture
def table(tmp_path):
    """Return what writes a table file on a few small pictures, and the command that makes the table."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 6)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(100 * label, 100 * label + 100, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")

    def make(defenses, *options):
        (tmp_path / "tiny.yaml").write_text(
            "attacks: {badnets: --poison-rate 0.2}\n"
            "training: --epoch 1 --widen-factor 0.125 --batch-size 32\n"
            f"flags: --dataset folder:{tmp_path}/pictures --val-frac 0.1\n"
            f"defenses:\n{defenses}\n"
        )
        output = ["--output-dir", f"{tmp_path}/out", "--cells-dir", f"{tmp_path}/cells"]
        return [sys.executable, "-m", "tables", f"{tmp_path}/tiny.yaml", *output, *options]

    return make


def run(command):
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False
    )
    return done.returncode, done.stdout


def test_a_failing_cell_leaves_the_others_done(table, tmp_path):
    command = table(
        "  ANP: anp --nb-iter 2 --batch-size 4 --pruning-max 0.2 --pruning-step 0.2\n"
        "  broken: [ft --nb-iter 3 --batch-size 4 --lr 1e38, ft --nb-iter 1 --batch-size 4]",
    )
    status, output = run(command)
    assert status == 1, output
    (failed,) = [path for path in (tmp_path / "cells").glob("defend-*") if (path / "log.txt").exists()]
    assert len(list((tmp_path / "cells").glob("*/done"))) == 4, "training, before, masks and pruning"
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| broken | - |" in text and "2 of 6 cells are missing: missing.md" in text
    missing = (tmp_path / "out" / "missing.md").read_text()
    assert f"`{failed.name}`: not finished: defend: error: " in missing and f"({failed}/log.txt)" in missing
    assert missing.count(": not begun") == 1 and f"{failed}/log.txt" in output
    row = next(line for line in text.splitlines() if line.startswith("| ANP |"))
    assert row.count("(1)") == 1
    assert all((tmp_path / "out" / f"table.{suffix}").stat().st_size for suffix in ("csv", "tex", "png", "pdf"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_table_that_was_stopped_goes_on(table, tmp_path, number):
    command = table("  ANP: anp --nb-iter 150 --print-every 5 --batch-size 4 --pruning-max 0.2 --pruning-step 0.2")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    until = time.monotonic() + LIMIT

    def masks():
        return [path for path in (tmp_path / "cells").glob("masks-*/log.txt") if "\n        5 " in path.read_text()]

    while not masks():
        assert process.poll() is None and time.monotonic() < until, "it never came to the masks"
        time.sleep(0.1)
    os.killpg(process.pid, number)
    process.wait(LIMIT)
    (log,) = masks()
    while number == signal.SIGTERM and "interrupted" not in log.read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert not (log.parent / "done").exists()
    assert (log.parent / "optimize_resume.th").exists() == (number == signal.SIGTERM)
    rows = log.parent / "optimize_log.jsonl"
    before = rows.read_text().splitlines()[1:3]  # iterations 0 and 5, with their seconds
    trained = next((tmp_path / "cells").glob("train-*/last_model.th")).stat().st_mtime_ns
    status, output = run(command)
    assert status == 0 and "4 of 4 cells" in output, output
    assert next((tmp_path / "cells").glob("train-*/last_model.th")).stat().st_mtime_ns == trained, "it was done"
    again = rows.read_text().splitlines()[1:3]
    assert (again == before) == (number == signal.SIGTERM), "it goes on where its state was saved, or begins anew"
    assert run([*command, "--dry-run"]) == (0, "0 of 4 cells are not done yet\n")


@pytest.mark.skipif(
    not shutil.which("sinfo")
    or subprocess.run(["sinfo"], capture_output=True, check=False).returncode != 0
    or not importlib.util.find_spec("snakemake_executor_plugin_slurm"),
    reason="no Slurm runs here, or snakemake-executor-plugin-slurm is not installed",
)
def test_a_table_on_slurm(table, tmp_path):
    defenses = "  ANP: anp --nb-iter 2 --batch-size 4 --pruning-max 0.2 --pruning-step 0.2"
    status, output = run(table(defenses, "--", *SLURM))
    assert status == 0 and output.count("has been submitted with SLURM jobid") == 4, output
    assert "4 of 4 cells" in output and len(list((tmp_path / "cells").glob("*/done"))) == 4
    assert "| ANP | " in (tmp_path / "out" / "table.md").read_text()
