"""One run of one step in one output folder: lock, log, resume state, clock, progress and signals."""

import math
import os
import re
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from tqdm import tqdm

from utils import VERSION
from utils.console import announce
from utils.errors import InputError, quote, shorten
from utils.files import card_path, check_file, load_torch, save_torch
from utils.guard import guard
from utils.identity import difference, digests_of, input_files, input_folders, options_of
from utils.machine import as_one_line
from utils.signals import Interrupted, Signals
from utils.table import Table, read_table, write_log

STATE_VERSION = 4  # of the resume files
SAVE_SECONDS = 60.0  # a killed run loses at most this much


@dataclass(frozen=True)
class Outputs:
    """The files of a step in the output folder; patterns are regular expressions for whole names.

    Attributes:
        results: names of files that a complete run has.
        finished: patterns of results; they are replaced with ``--overwrite`` alone.
        files: patterns of all that the step writes. Those that an unfinished run left behind may be replaced.
        derived: patterns of what later steps made of them, and ``--overwrite`` takes along.
        folders: patterns of folders within the output folder. The names of their files begin with ``FOLDER/``.
    """

    results: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "project": VERSION,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": version("torchvision"),  # imported, it would take as long as PyTorch
        "numpy": np.__version__,
    }


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def command_line(script: str, argv: list[str] | None) -> str:
    """Return the command as it can be pasted into a shell."""
    return shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])


@contextmanager
def read_as_state(path: Path) -> Iterator[None]:
    """Turn what a damaged or edited resume state causes in the block into one line.

    Raises:
        InputError: the block found that something is missing or of the wrong shape or type.
    """
    try:
        yield
    except InputError:
        raise  # it says more
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if as_one_line(error):
            raise  # too little memory is no fault of the state
        reason = shorten(str(error).partition("\n")[0])
        raise InputError(f"{path}: not a resume state of this run ({reason}); --overwrite starts again") from error


class Run:
    """Context of one step: refuses a folder in use, continues an unfinished run, saves before it dies.

    Args:
        step: name of the step, the stem of its log and resume files.
        arguments: the parsed command line, with ``output_dir``, ``resume`` and ``overwrite``.
        command: the command as typed.
        outputs: what the step writes.

    Attributes:
        saved: the state of the run that is continued, if any.

    Raises:
        InputError: another process uses the folder, an unfinished run is there and neither ``--resume`` nor
            ``--overwrite`` was given, or its arguments were others; results are there and ``--overwrite`` was not
            given; an input would be overwritten.
    """

    def __init__(self, step: str, arguments: Namespace, command: str, outputs: Outputs | None = None):
        self.step, self.command, self.outputs = step, command, outputs or Outputs()
        self.folder = Path(arguments.output_dir)
        self.arguments = arguments
        self.options = options_of(arguments)
        self.resuming, self.overwriting = arguments.resume, arguments.overwrite
        self.snapshot: Callable[[], dict] | None = None
        self.saved: dict | None = None
        self.state_path = self.folder / f"{step}_resume.th"
        self._log_path = self.folder / f"{step}_log.jsonl"
        self._facts: dict[str, Any] = {}
        self._signals = Signals()
        self._seconds_before = 0.0
        self._bar: tqdm | None = None
        self._cleared = False

    def __enter__(self) -> "Run":
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InputError(f"--output-dir {self.folder}: is no folder; choose another") from error
        self._lock = filelock.FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(
                f"{self.folder}: another process works in this folder; wait for it or choose another --output-dir"
            ) from error
        self._started = self._last_save = time.monotonic()
        try:
            self._protect_inputs()
            self.options["sha256"] = digests_of(self.arguments)
            self._find_saved()
            if not (self.saved or self.overwriting or self.complete_before):
                self._protect_results()
        except BaseException:
            self._lock.release()
            raise
        self._signals.install()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._signals.ignore()
        try:
            if self._bar is not None:
                self._bar.close()
            if kind is Interrupted and self.snapshot is not None:
                if not error.at_once:
                    self.save()
                if self.state_path.exists():
                    error.args = (f"continue with --resume ({self.state_path})",)
        finally:
            self._signals.restore()
            self._lock.release()

    def _folders(self) -> dict[str, Path]:
        """Return the folders that the step writes to, by what the names of their files begin with."""
        inner = (path for path in self.folder.iterdir() if _fits(path.name, self.outputs.folders) and path.is_dir())
        return {"": self.folder, **{f"{path.name}/": path for path in inner}}

    def _there(self, patterns: tuple[str, ...]) -> list[Path]:
        """Return the files whose names fit one of the patterns.

        Raises:
            InputError: a folder has such a name.
        """
        folders = self._folders().items()
        found = sorted(
            path for begin, folder in folders for path in folder.iterdir() if _fits(begin + path.name, patterns)
        )
        for path in found:
            if path.is_dir() and not path.is_symlink():
                raise InputError(f"{path}: a folder lies where a file is to be written; move it away")
        return found

    def _protect_inputs(self) -> None:
        """Make sure that no file is read that the step writes, or removes, whatever link leads to it."""
        output = self.folder.resolve()
        folders = {folder.resolve(): begin for begin, folder in self._folders().items()}
        patterns = self.outputs.files + self.outputs.derived
        self._there((*patterns, re.escape(self.state_path.name)))  # no folder among them
        for name, path in input_files(self.arguments).items():
            if os.path.lexists(path):
                check_file(path)
            for each in (path, card_path(path)):  # its card goes with it
                link = Path(os.path.realpath(each.parent), each.name)
                places = Path(os.path.realpath(each)), link  # where a link leads, and the link itself
                begun = [folders[place.parent] + place.name for place in places if place.parent in folders]
                if any(_fits(name, patterns) for name in begun):
                    self._refuse_input(name, path, "would be overwritten")
        for name, path in input_folders(self.arguments).items():
            if path.resolve() in (output, *output.parents):
                self._refuse_input(name, path, f"holds --output-dir {self.folder}")

    @staticmethod
    def _refuse_input(name: str, path: Path, reason: str) -> None:
        raise InputError(f"--{name.replace('_', '-')} {path} {reason}; choose another --output-dir")

    def _protect_results(self) -> None:
        """Make sure that nothing is lost; leftovers of a run that never ended are no results."""
        unfinished = self._log_path.exists() and read_table(self._log_path)[0].get("ended") is False
        there = self._there(self.outputs.finished) or ([] if unfinished else self._there(self.outputs.files))
        if there:
            raise InputError(f"{there[0]} is there already; choose another --output-dir or --overwrite")
        if self.resuming:
            announce(f"{self.folder}: nothing to resume here; starting from the beginning")

    def _find_saved(self) -> None:
        if self.overwriting or not os.path.lexists(self.state_path):
            return
        if not self.resuming:
            raise InputError(
                f"{self.state_path}: an unfinished run is here; add --resume to continue it or "
                "--overwrite to start again"
            )
        saved = load_torch(self.state_path)
        if not isinstance(saved, dict) or saved.get("state_version") != STATE_VERSION:
            raise InputError(f"{self.state_path}: not a resume state of this version; --overwrite starts again")
        with read_as_state(self.state_path):
            self._check_saved(saved)
            other = difference(saved["options"], self.options)
        if other:
            raise InputError(f"{other}, in the run to resume; use the same, or --overwrite to start again")
        self.saved, self._seconds_before = saved, float(saved["seconds"])

    @staticmethod
    def _check_saved(saved: dict) -> None:
        """Raise ``ValueError``, or whatever a missing entry raises, where a state is none that was saved."""
        right = (
            isinstance(saved["options"], dict)
            and isinstance(saved["options"]["sha256"], dict)
            and isinstance(saved["runtime"], dict)
            and math.isfinite(saved["seconds"])
            and isinstance(saved["rows"], list)
            and all(isinstance(row, dict) for row in saved["rows"])
        )
        if not right:
            raise ValueError("an entry has another type")

    @property
    def began_with(self) -> dict[str, Any] | None:
        """What the run to resume relied on beside its arguments, such as device and threads."""
        return self.saved and self.saved["runtime"]

    def rely_on(self, facts: dict[str, Any]) -> None:
        """Record what a run depends on beside its arguments, such as device and threads; may be called again.

        Raises:
            InputError: the run to resume relied on others.
        """
        self._facts = {**self._facts, **facts}
        for name, new in facts.items():
            old = (self.began_with or {}).get(name, new)
            if old != new:
                raise InputError(
                    f"{name} is {quote(new)} but was {quote(old)} in the run to resume; --overwrite starts again"
                )

    @property
    def complete_before(self) -> bool:
        """Whether ``--resume`` was asked for a run that is already complete with the same arguments.

        Raises:
            InputError: it is complete with others.
        """
        if not self.resuming or self.saved is not None or not self._log_path.exists():
            return False
        record, _ = read_table(self._log_path)
        if not record.get("ended") or any(not (self.folder / name).exists() for name in self.outputs.results):
            return False
        try:
            other = difference(record["arguments"], self.options)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self._log_path}: not the log of a run; move it away or use --overwrite") from error
        if other:
            raise InputError(f"{self.folder}: a complete run is here, but {other}; --overwrite starts again")
        return True

    @property
    def seconds(self) -> float:
        """Time spent on this run, interruptions not counted."""
        return self._seconds_before + time.monotonic() - self._started

    def clear(self) -> None:
        """Make sure, once, that nothing older is left to be taken for this run's; a continued run keeps all.

        Raises:
            InputError: a folder lies where a file is to be written.
            OSError: the folder cannot be written or the disk is full; nothing was removed then.
        """
        if self.saved or self._cleared:
            return
        self._cleared = True
        patterns = self.outputs.files + (self.outputs.derived if self.overwriting else ())
        older = [path for path in self._there(patterns) if path != self._log_path]
        write_log(self._log_path, self._record, [], ended=False)  # first: a full disk shall fail before anything goes
        self.state_path.unlink(missing_ok=True)
        for path in sorted(older, key=lambda path: path.suffix == ".json"):  # no network is ever without its card
            path.unlink()

    def table(self, columns: dict[str, str]) -> Table:
        """Open the log. A resumed run starts with the rows it had; raises ``InputError`` where these are none."""
        with read_as_state(self.state_path):
            self.log = Table(self._log_path, self._record, columns, self.saved["rows"] if self.saved else None)
        return self.log

    @property
    def _record(self) -> dict[str, Any]:
        """What produces the rows of the log."""
        return {
            "step": self.step,
            "command": self.command,
            "arguments": self.options,
            "runtime": self._facts,
            "versions": versions(),
        }

    def track(self, steps: Iterable[Any], total: int, done: int, title: str, unit: str) -> Iterator[Any]:
        """Pass steps through with a progress bar (on a terminal), saving now and then between them.

        A signal waits for the end of the step it falls into. What the caller does with a step must not be part of
        the state that is saved.
        """
        self._bar = tqdm(
            desc=title, total=total, initial=done, unit=unit, disable=None, leave=False, dynamic_ncols=True
        )
        with closing(iter(steps)) as iterator:
            while True:
                with self._signals.deferred():
                    step = next(iterator, None)
                if step is None:
                    break
                self._bar.update()
                yield step
                if self.snapshot is not None and time.monotonic() - self._last_save > SAVE_SECONDS:
                    self.save()
        self._bar.close()

    def uninterrupted(self) -> AbstractContextManager:
        """Hold a signal back until the block has ended."""
        return self._signals.deferred()

    def save(self) -> None:
        """Write the state from which ``--resume`` continues; raises ``OSError`` where that fails."""
        self._last_save = time.monotonic()
        state = {
            "state_version": STATE_VERSION,
            "options": self.options,
            "runtime": self._facts,
            "seconds": self.seconds,
            "rows": self.log.rows,
        }
        save_torch(self.state_path, {**state, **self.snapshot()})

    def finish(self) -> None:
        """Mark the run as complete; the resume state goes. Raises ``OSError`` where the log cannot be written."""
        self.log.write(ended=True)
        self.state_path.unlink(missing_ok=True)
        self.snapshot = None


def run_script(
    work: Callable[[Run], None],
    step: str,
    arguments: Namespace,
    command: str,
    outputs: Outputs | None = None,
    prepare: Callable[[], None] | None = None,
) -> int:
    """Carry out a step in its output folder and turn whatever goes wrong into one line on stderr.

    Args:
        work: the step; called with the run.
        step, arguments, command, outputs: as for ``Run``.
        prepare: called before the run begins; may change the arguments.

    Returns:
        The exit status, as ``guard``.
    """

    def carry_out() -> None:
        if prepare:
            prepare()
        with Run(step, arguments, command, outputs) as run:
            if run.complete_before:
                announce(f"{run.folder}: this run is complete; nothing to resume")
                return
            work(run)
            run.finish()

    return guard(carry_out, step, Path(arguments.output_dir))
