"""Ctrl-C and SIGTERM, never in the middle of an update."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM arrived."""


class Signals:
    """Turns SIGINT and SIGTERM into ``Interrupted``, which waits for the end of a ``deferred`` block."""

    def __init__(self):
        self._deferring = False
        self._pending = False

    def install(self) -> None:
        """Handle both signals from now on (only the main thread may)."""
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def ignore(self) -> None:
        """Drop further signals, while the run saves its state and ends."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Give both signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if not self._deferring:
            raise Interrupted
        self._pending = True

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
            raise Interrupted
