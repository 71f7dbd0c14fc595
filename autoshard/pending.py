"""Collectives that a GPU has still to finish: one that stands still ends the step with an error.

Python only enqueues NCCL's collectives. If a rank is lost, nothing fails in Python: NCCL's watchdog
ends the process some time after the timeout, and knows neither layer nor rank. Here an event is
recorded behind each collective, with the line of the graph. A thread looks twice a second whether the
first one that has not ended stands for nearly as long as the process group's timeout. Then it calls
the roll, aborts the communicators so that the GPU comes back from them, and has the main thread raise
a CollectiveError.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from autoshard.compat import is_capturing, record, timeout_of
from autoshard.errors import CollectiveError
from autoshard.failures import GRACE, INTERVAL, Line, explanation, place_of, way_and_line

MARGIN = 2 * GRACE + 2.0  # seconds before the timeout: for the roll call, ahead of NCCL's watchdog

_log = logging.getLogger("autoshard")


class _Issued(NamedTuple):
    """One collective, and where it was enqueued. A dataclass takes four times as long to make."""

    end: torch.cuda.Event
    collective: str
    ranks: Sequence[int]
    group: dist.ProcessGroup
    way: str
    line: Line | None


_issued: deque[_Issued] = deque()
_free: list[torch.cuda.Event] = []  # events that have ended: making one takes longer than recording it
_watch: _Watch | None = None


def note(collective: str, ranks: Sequence[int], group: dist.ProcessGroup, device: int) -> None:
    """A collective was enqueued on the current stream. Not within a CUDA graph's capture."""
    global _watch
    if is_capturing():
        return
    end = _free.pop() if _free else torch.cuda.Event()
    record(end, device)
    way, line = way_and_line(depth=3)  # from all_reduce, which calls _note, which calls this
    _issued.append(_Issued(end, collective, ranks, group, way, line))
    if _watch is None:
        _watch = _Watch()


def _forget_ended() -> int:
    """Drop what has ended; how many did. They end in order, so that few are asked.

    Each question gives up the interpreter's lock, for which the thread then waits again.
    """
    first, last = 0, len(_issued)
    while first < last:
        middle = (first + last) // 2
        if _issued[middle].end.query():
            first = middle + 1
        else:
            last = middle
    _free.extend(_issued.popleft().end for _ in range(first))
    return first


class _Watch:
    """A thread that forgets what has ended, and finds what does not."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._look, name="autoshard pending", daemon=True)
        self.thread.start()
        atexit.register(self._end)  # joined before the interpreter ends, as the roll call's

    def _end(self) -> None:
        self._ended.set()
        self.thread.join(GRACE)

    def _look(self) -> None:
        global _watch
        try:
            self._until_one_stands()
        finally:
            if _watch is self:
                _watch = None

    def _until_one_stands(self) -> None:
        first, since = None, 0.0  # which one, and when it was first seen to be
        while not self._ended.wait(INTERVAL):
            try:
                _forget_ended()
            except RuntimeError:  # an error of CUDA, which the main thread meets itself
                return
            if not _issued or not dist.is_initialized():
                continue
            if _issued[0] is not first:
                first, since = _issued[0], time.monotonic()
            timeout = timeout_of(first.group, torch.device("cuda"))
            if timeout is None:
                continue
            limit = max(timeout.total_seconds() - MARGIN, timeout.total_seconds() / 2)
            stood = time.monotonic() - since
            if stood > limit:
                _raise(first, stood)
                return


def _raise(first: _Issued, stood: float) -> None:
    said = f"It stood for {stood:.0f} s."
    what = "does not end"
    error = explanation(place_of(first.way, first.line), first.collective, first.ranks, what, said)
    _log.error("%s", error)
    _in_main_thread(error)  # first: it is raised when the abort lets the main thread go on
    groups = {id(one.group): one.group for one in tuple(_issued)}
    for group in groups.values():
        group.abort()


def _in_main_thread(error: CollectiveError) -> None:
    """Have the main thread raise the error when it is back in Python: at the call that waited."""

    class Error(CollectiveError):
        """Made without arguments, as the interpreter makes it."""

        def __init__(self) -> None:
            super().__init__(str(error), error.missing)

    Error.__name__ = Error.__qualname__ = CollectiveError.__name__
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(Error))
