"""One run of one step in one output folder: lock, log, resume state, clock, progress and signals."""

import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import torchvision
from tqdm import tqdm

from utils.config import InputFile, InputFolder
from utils.errors import InputError
from utils.files import load_torch, save_torch, sha256_of, sha256_of_folder
from utils.signals import Interrupted, Signals
from utils.table import Table, read_table

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 130
STATE_VERSION = 3  # of the resume files
SAVE_SECONDS = 60.0  # a killed run loses at most this much
RESUME_OPTIONS = {"resume", "overwrite", "output_dir"}  # may differ between a run and its continuation


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def _plain(value: Any) -> Any:
    """Return a value of the command line as it is stored in files: plain types, lists for tuples."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, str) else value


def command_line(script: str, argv: list[str] | None) -> str:
    """Return the command as it can be pasted into a shell."""
    return shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])


class Run:
    """Context of one step: refuses a folder in use, continues an unfinished run, saves before it dies.

    Args:
        step: name of the step, the stem of its log and resume files.
        arguments: the parsed command line, with ``output_dir``, ``resume`` and ``overwrite``.
        command: the command as typed.

    Raises:
        InputError: another process uses the folder, an unfinished run is there and neither ``--resume`` nor
            ``--overwrite`` was given, or its arguments were others.
    """

    def __init__(self, step: str, arguments: Namespace, command: str):
        self.step, self.command = step, command
        self.folder = Path(arguments.output_dir)
        self.arguments = arguments
        self.options = {name: _plain(v) for name, v in sorted(vars(arguments).items()) if name not in RESUME_OPTIONS}
        self.resuming, self.overwriting = arguments.resume, arguments.overwrite
        self.snapshot: Callable[[], dict] | None = None
        self.saved: dict | None = None
        self._state_path = self.folder / f"{step}_resume.th"
        self._log_path = self.folder / f"{step}_log.jsonl"
        self._facts: dict[str, Any] = {}
        self._signals = Signals()
        self._seconds_before = 0.0
        self._bar: tqdm | None = None

    def __enter__(self) -> "Run":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise InputError(
                f"{self.folder}: another process works in this folder; wait for it or choose another --output-dir"
            ) from error
        self._started = self._last_save = time.monotonic()
        try:
            self.options["sha256"] = self._digests()
            self._find_saved()
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
                self.save()
                error.args = (f"continue with --resume ({self._state_path})",)
        finally:
            self._signals.restore()
            self._lock.release()

    def _digests(self) -> dict[str, str]:
        """Name the files that went in, so that a run is never continued with others of the same name."""
        given = {name: Path(value) for name, value in vars(self.arguments).items() if isinstance(value, InputFile)}
        folders = {name: Path(value) for name, value in vars(self.arguments).items() if isinstance(value, InputFolder)}
        files = {name: sha256_of(path) for name, path in given.items() if path.is_file()}
        return files | {name: sha256_of_folder(path) for name, path in folders.items() if path.is_dir()}

    def _find_saved(self) -> None:
        if self.overwriting or not self._state_path.exists():
            return
        if not self.resuming:
            raise InputError(
                f"{self._state_path}: an unfinished run is here; add --resume to continue it or "
                "--overwrite to start again"
            )
        saved = load_torch(self._state_path)
        if not isinstance(saved, dict) or saved.get("state_version") != STATE_VERSION:
            raise InputError(f"{self._state_path}: not a resume state of this version; --overwrite starts again")
        self._compare(saved["options"], self.options)
        self.saved, self._seconds_before = saved, saved["seconds"]

    @staticmethod
    def _compare(before: dict, now: dict) -> None:
        for name in sorted(before.keys() | now.keys()):
            old, new = before.get(name), now.get(name)
            if isinstance(old, dict) and isinstance(new, dict):
                Run._compare(old, new)
            elif old != new:
                raise InputError(
                    f"--{name.replace('_', '-')} is {new} but was {old} in the run to resume; "
                    "use the same, or --overwrite to start again"
                )

    def rely_on(self, facts: dict[str, Any]) -> None:
        """Record what a run depends on beside its arguments, such as device and threads.

        Raises:
            InputError: the run to resume began with other facts.
        """
        self._facts = facts
        if self.saved:
            self._compare(self.saved["runtime"], facts)

    @property
    def finished_before(self) -> bool:
        """Whether ``--resume`` was asked for a run that is already complete with the same arguments."""
        if not self.resuming or self.saved is not None or not self._log_path.exists():
            return False
        record, _ = read_table(self._log_path)
        return record.get("ended") is True and record.get("arguments") == self.options

    @property
    def seconds(self) -> float:
        """Time spent on this run, interruptions not counted."""
        return self._seconds_before + time.monotonic() - self._started

    def drop_saved(self) -> None:
        """Forget an older unfinished run: nothing of it may be continued once its files begin to change."""
        self._state_path.unlink(missing_ok=True)

    def table(self, columns: dict[str, str]) -> Table:
        """Open the log: the run begins here. A resumed run starts with the rows it had."""
        if not self.saved:
            self.drop_saved()
        record = {
            "step": self.step,
            "command": self.command,
            "arguments": self.options,
            "runtime": self._facts,
            "versions": versions(),
        }
        self.log = Table(self._log_path, record, columns, self.saved["rows"] if self.saved else None)
        return self.log

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
        save_torch(self._state_path, {**state, **self.snapshot()})

    def finish(self) -> None:
        """Mark the run as complete; the resume state goes."""
        self.log.write(ended=True)
        self._state_path.unlink(missing_ok=True)
        self.snapshot = None


def announce(message: str) -> None:
    """Print one line for the reader, beside any progress bar."""
    tqdm.write(message)
    sys.stdout.flush()


def run_script(work: Callable[[Run], None], step: str, arguments: Namespace, command: str) -> int:
    """Carry out a step in its output folder and turn a user's mistake into one line on stderr.

    Args:
        work: the step; called with the run.
        step, arguments, command: as for ``Run``.

    Returns:
        The exit status: 0, 1 for bad input or a full disk, 130 if interrupted.
    """
    try:
        with Run(step, arguments, command) as run:
            if run.finished_before:
                announce(f"{run.folder}: this run is complete; nothing to resume")
                return 0
            work(run)
            run.finish()
    except InputError as error:
        return _fail(step, f"error: {error}", EXIT_BAD_INPUT)
    except OSError as error:
        return _fail(step, f"error: {error.filename or 'output'}: {error.strerror or error}", EXIT_BAD_INPUT)
    except (Interrupted, KeyboardInterrupt) as interruption:
        return _fail(step, f"interrupted; {str(interruption) or 'run the command again'}", EXIT_INTERRUPTED)
    return 0


def _fail(step: str, message: str, status: int) -> int:
    print(f"{step}: {message}", file=sys.stderr)
    return status
