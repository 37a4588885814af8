"""The last line of defence: whatever goes wrong ends in one line on stderr and an exit status of its own."""

import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from utils.console import complain
from utils.errors import InputError, quote
from utils.machine import as_one_line
from utils.signals import EXIT_INTERRUPTED, Interrupted

EXIT_BAD_INPUT, EXIT_BUG = 1, 70


def guard(work: Callable[[], None], step: str, folder: Path | None = None) -> int:
    """Do some work and turn whatever goes wrong into one line on stderr.

    Args:
        work: what to do.
        step: named in the line.
        folder: for the traceback of an error nobody foresaw; None for that of temporary files.

    Returns:
        The exit status: 0, 1 for bad input, a full disk or too little memory, 130 if interrupted, 70 for an error
        nobody foresaw.
    """
    try:
        work()
    except InputError as error:
        return _fail(step, f"error: {error}", EXIT_BAD_INPUT)
    except OSError as error:
        return _fail(step, f"error: {error.filename or 'output'}: {error.strerror or error}", EXIT_BAD_INPUT)
    except (Interrupted, KeyboardInterrupt) as interruption:
        return _fail(step, f"interrupted; {str(interruption) or 'run the command again'}", EXIT_INTERRUPTED)
    except Exception as error:  # nothing is swallowed, the traceback is kept
        if complaint := as_one_line(error):
            return _fail(step, f"error: {complaint}", EXIT_BAD_INPUT)
        reason = f"{type(error).__name__}: {quote(str(error))}"
        place = _keep_traceback(step, folder)
        return _fail(step, f"internal error ({reason}); please report it with {place}", EXIT_BUG)
    return 0


def _keep_traceback(step: str, folder: Path | None) -> Path:
    """Write the traceback of the exception at hand to a file, in the output folder if that can be written."""
    content = f"{shlex.join(sys.argv)}\n{traceback.format_exc()}".encode(errors="backslashreplace")
    if folder is not None:
        path = folder / f"{step}_error.log"
        try:
            path.write_bytes(content)
            return path
        except OSError:
            pass  # it goes elsewhere
    descriptor, name = tempfile.mkstemp(prefix=f"{step}_error_", suffix=".log")
    os.write(descriptor, content)
    os.close(descriptor)
    return Path(name)


def _fail(step: str, message: str, status: int) -> int:
    complain(f"{step}: {message}")
    return status
