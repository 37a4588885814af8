"""The process and its streams: prepared for what can be wrong with them, and the one way to print."""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn, TextIO

from utils.errors import printable
from utils.signals import end_silently, ignore_all


def prepare_process() -> None:
    """Prepare a script's process, before the imports that take seconds: Ctrl-C, closed streams, narrow encodings."""
    end_silently()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller; the next file would take its place
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show


def leave(status: int) -> NoReturn:
    """End a script's process with a status that no late signal changes."""
    ignore_all()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        sys.stdout.flush()
        os._exit(status)  # threads that DistributedDataParallel leaves behind could abort a process that takes longer
    sys.exit(status)


def announce(message: str) -> None:
    """Print one line for the reader, beside any progress bar; where he has gone, that is an interruption."""
    if not _print(message, sys.stdout):
        signal.raise_signal(signal.SIGTERM)


def complain(message: str) -> None:
    """Print one line to stderr, beside any progress bar."""
    _print(message, sys.stderr)


def _print(message: str, stream: TextIO) -> bool:
    """Print one line; returns whether there is still a reader. What a stream without one holds goes nowhere."""
    from tqdm import tqdm  # not above: a signal during that import would still end in a traceback

    try:
        tqdm.write(printable(message), stream)
        stream.flush()
    except BrokenPipeError:  # the reader has gone, as with `| head`
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return False
    return True
