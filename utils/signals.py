"""Ctrl-C, SIGTERM and the end of a terminal, never in the middle of an update, unless they come twice."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 130
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE = 1.0  # seconds after an interruption in which more signals mean the same


class Interrupted(BaseException):
    """A signal arrived.

    Attributes:
        at_once: it came a second time, in the middle of an update; what is in memory is no state to save.
    """

    def __init__(self, message: str = "", at_once: bool = False):
        super().__init__(message)
        self.at_once = at_once


def end_silently() -> None:
    """Let signals end the process at once with status 130, as while modules are imported: there is nothing to save."""
    _handle_all(lambda number, frame: os._exit(EXIT_INTERRUPTED))


def ignore_all() -> None:
    """Let no signal change how a process ends whose work is over."""
    _handle_all(signal.SIG_IGN)


def _handle_all(handler) -> dict:
    """Install a handler; returns the older ones. The end of a terminal stays ignored where it is, as under nohup."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may
    heard = [n for n in SIGNALS if n in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


class Signals:
    """Turns signals into ``Interrupted``, which waits for the end of a ``deferred`` block; a second one does not."""

    def __init__(self):
        self._deferring = False
        self._pending = False
        self._raised = -PATIENCE
        self._before: dict = {}

    def install(self) -> None:
        """Handle signals from now on."""
        self._before = _handle_all(self._handle)

    def ignore(self) -> None:
        """Drop further signals, while the run saves its state and ends."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self._deferring and not self._pending:
            self._pending = True
        elif time.monotonic() - self._raised >= PATIENCE:
            self._raised = time.monotonic()
            raise Interrupted(at_once=self._deferring)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold a signal back until the block has ended.

        Raises:
            Interrupted: a signal came meanwhile.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._pending:
            self._pending = False
            self._raised = time.monotonic()
            raise Interrupted
