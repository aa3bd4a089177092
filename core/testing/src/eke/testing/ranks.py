"""Runs functions in forked processes: one that may die, or several that act as the ranks of a launcher.

A fork costs tens of milliseconds where a spawned process spends seconds importing torch again. It starts from what
the parent has imported and done, but nothing it does reaches the parent.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from eke import compat

TIMEOUT = 300.0  # seconds: ten times what the longest run takes on a quiet machine
KILLED = 9  # exit status of a process that was told to die in mid-run


class RankError(RuntimeError):
    """A process raised, died or ran out of time. The message holds its traceback."""


def run_ranks(
    function: Callable[[int], Any], world: int = 2, timeout: float = TIMEOUT, may_die: bool = False
) -> list[Any]:
    """Call ``function(rank)`` in ``world`` processes that form a gloo group, and return the results by rank.

    Each process looks to Lightning like one that a launcher such as torchrun has started, so
    ``Trainer(strategy="ddp", devices=world)`` starts no process of its own.

    Args:
        function: Called with the rank. What it returns must pickle; the function itself need not.
        world: Number of processes.
        timeout: Seconds for all of them together.
        may_die: Whether a process that was ended by ``kill -9`` is none that has failed; its result is None.

    Raises:
        RankError: a rank raised, died or hung. All others are ended, with their children.
    """

    def environment(rank: int) -> dict[str, str]:
        return {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(reserved.getsockname()[1]),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }

    # Held until the end: other processes of a test run look for free ports too. Who listens may share it, since both
    # say SO_REUSEADDR and this one does not listen.
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        jobs = [(lambda rank=rank: function(rank), environment(rank)) for rank in range(world)]
        return [result for result, _ in _run(jobs, timeout, may_die)]


def run_alone(function: Callable[[], Any], timeout: float = TIMEOUT, may_die: bool = False) -> Any:
    """Call ``function()`` in one process of its own and return its result, or None where it called :func:`die`, or, if
    it ``may_die``, was ended by ``kill -9``.

    Raises:
        RankError: it raised, died otherwise, or hung.
    """
    ((result, _),) = _run([(function, {})], timeout, may_die)
    return result


def die() -> None:
    """End this process at once, as a power cut would: no exception, no teardown, nothing flushed."""
    os._exit(KILLED)


def _run(jobs: list[tuple[Callable[[], Any], dict[str, str]]], timeout: float, may_die: bool) -> list[tuple[Any, int]]:
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(number)) for number in range(len(jobs))]
        fork = multiprocessing.get_context("fork")
        met = torch.cuda.is_initialized()
        processes = [fork.Process(target=_work, args=(*job, file, met)) for job, file in zip(jobs, files, strict=True)]
        try:
            for process in processes:
                process.start()
            hung = _wait(processes, timeout)
        finally:
            for process in processes:
                _end(process)
        return _collect(processes, files, hung, timeout, may_die)


def _work(function: Callable[[], Any], environment: dict[str, str], file: Path, met: bool) -> None:
    os.setpgid(0, 0)  # loader workers join this group, so that they can be ended with it
    _die_with_parent()
    os.environ.update(environment)
    tempfile.tempdir = str(file.parent)  # what it leaves there goes with it
    torch.set_num_threads(1)  # a forked process cannot use the parent's thread pool
    compat.forget_group()  # nor the parent's process group
    if met:  # nor the parent's card; Lightning asks for its random state wherever there is one
        torch.cuda.is_available = lambda: False
    try:
        outcome = (True, function())
        content = pickle.dumps(outcome)
    except BaseException:
        outcome = (False, traceback.format_exc())
        content = pickle.dumps(outcome)
    file.write_bytes(content)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if outcome[0] else 1)  # without exit handlers, which would wait for the other ranks


def _die_with_parent() -> None:
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _wait(processes: list, timeout: float) -> bool:
    """Wait until all have ended or one has failed. True if time ran out."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            grace = min(end, time.monotonic() + 1)  # the others may be about to say more
            while time.monotonic() < grace and any(process.is_alive() for process in processes):
                time.sleep(0.01)
            return False
        if time.monotonic() > end:
            return True
        time.sleep(0.005)
    return False


def _end(process: Any) -> None:
    if process.pid is None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # the group is gone, or the process died before it made one
    if process.is_alive():
        process.kill()
    process.join()


def _collect(processes: list, files: list[Path], hung: bool, timeout: float, may_die: bool) -> list[tuple[Any, int]]:
    results, errors = [], []
    for rank, (process, file) in enumerate(zip(processes, files, strict=True)):
        if file.exists() and file.stat().st_size:
            done, value = pickle.loads(file.read_bytes())
            if done:
                results.append((value, 0))
            else:
                errors.append(f"process {rank} raised:\n{value}")
        elif process.exitcode == KILLED or (may_die and not hung and process.exitcode == -signal.SIGKILL):
            results.append((None, KILLED))
        elif hung:
            errors.append(f"process {rank} was still running after {timeout:g} s and was ended")
        else:
            errors.append(f"process {rank} ended with status {process.exitcode} and returned nothing")
    if errors:
        raise RankError("\n".join(errors))
    return results
