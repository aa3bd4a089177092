"""Ends a run in which some process has died or hangs, and says which.

A process that waits for a dead or hanging one waits until the process group's time limit, or for ever on a GPU, and
then fails with words about sockets. So each process writes down what it did last, from a thread of its own, where
the others can read it; and one that has got nowhere for the time limit says who is behind and ends itself.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

log = logging.getLogger("lightning.pytorch.eke_zero")

_SIGNS = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Timed out",
    "timed out",
    "NCCL",
    "gloo",
    "Gloo",
)


class Watch:
    """Watches this process and reads what the others wrote.

    Args:
        store: The process group's key-value store, a connection of its own.
        rank: This process.
        world: How many there are.
        limit: Seconds without a step after which the run is ended.
        end: Called before this process ends itself, to take along the processes that it has started.
    """

    def __init__(self, store: object, rank: int, world: int, limit: float, end: Callable[[], None]) -> None:
        self.store, self.rank, self.world, self.limit, self.end = store, rank, world, limit, end
        self.pause = min(limit / 4, 5.0)  # seconds between two signs of life
        self.doing = "starting"
        self.count = self.beats = 0
        self.since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="eke-zero-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def tick(self, doing: str) -> None:
        """Say that this process goes on, and with what."""
        self.doing, self.count, self.since = doing, self.count + 1, time.monotonic()

    def _run(self) -> None:
        while not self._stop.wait(self.pause):
            self._beat()
            if time.monotonic() - self.since > self.limit:
                self._give_up()

    def _beat(self) -> None:
        self.beats += 1
        try:
            self.store.set(f"eke/{self.rank}", f"{self.beats} {self.count} {self.doing}")
        except RuntimeError:  # process 0, which keeps the store, has ended
            pass

    def _give_up(self) -> None:
        frame = sys._current_frames().get(threading.main_thread().ident)
        where = "".join(traceback.format_stack(frame)[-6:]) if frame is not None else ""
        print(
            f"Eke: process {self.rank} of {self.world} has got nowhere for {self.limit:g} s while {self.doing}. "
            f"{self.report()} The run ends here; go on from its last checkpoint. A step that takes longer needs "
            f"ZeRO(timeout=...). Where process {self.rank} stands:\n{where}",
            file=sys.stderr,
            flush=True,
        )
        self.end()
        os._exit(1)

    def _read(self) -> dict[int, tuple[int, int, str]] | None:
        """Each process's beat, count of steps and what it does; None where the store is gone."""
        try:
            keys = {rank: f"eke/{rank}" for rank in range(self.world)}
            found = {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}
        except RuntimeError:
            return None
        return {rank: (int(beat), int(count), doing) for rank, (beat, count, doing) in
                ((rank, text.split(" ", 2)) for rank, text in found.items())}  # fmt: skip

    def report(self) -> str:
        """Who has ended and who is behind, in words."""
        before = self._read()
        for _ in range(3):
            time.sleep(self.pause)
            self._beat()  # the others, who may be asking too, should find this one alive
        after = self._read() if before is not None else None
        if after is None:
            return "Process 0, to which the others report, has ended."
        silent = [
            rank for rank in range(self.world)
            if rank != self.rank and (rank not in after or after[rank][0] == before.get(rank, (0,))[0])
        ]  # fmt: skip
        if silent:
            return f"No sign of life from {_named(silent, after)}: it has ended, or its machine cannot be reached."
        most = max(count for _, count, _ in after.values())
        behind = [rank for rank, (_, count, _) in after.items() if count < most]
        if behind:
            return f"Alive, but behind the others: {_named(behind, after)}."
        return "All processes are alive and at the same step."

    def explain(self, exception: BaseException) -> None:
        """Put into the words of a failed communication who has ended."""
        if not isinstance(exception, RuntimeError) or not any(sign in str(exception) for sign in _SIGNS):
            return
        message = (
            f"process {self.rank} of {self.world} lost touch with the others while {self.doing}. {self.report()} Look "
            f"at what that process wrote; go on from the last checkpoint. The communication library says: {exception}"
        )
        exception.args = (message,)
        log.error("Eke: %s", message)


def _named(ranks: list[int], known: dict[int, tuple[int, int, str]]) -> str:
    return ", ".join(f"process {rank} (last {known[rank][2] if rank in known else 'not started'})" for rank in ranks)
