"""Runs a case: once through, once broken, and once more from the checkpoint, each in a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eke import EkeError
from eke.quiet import quiet
from eke.testing.fuzz.arguments import build, record_of
from eke.testing.fuzz.case import Case
from eke.testing.fuzz.judge import judge, ranks_apart
from eke.testing.fuzz.subjects import import_for, make_model
from eke.testing.fuzz.trace import KEY, Planned, Trace, saving
from eke.testing.ranks import RankError, run_alone, run_ranks
from eke.testing.run import make_trainer, seed_everything
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)

TIMEOUT = 150.0  # seconds for one run, on a machine that does other things as well
IN_PASSING = ("steps", "epochs", "validation", "hand")  # ways that leave the run whole: it is its own other half
# How a case may end that is no fault.
SOUND = ("held", "refused", "refused at the resume", "no checkpoint")


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        kind: One of :data:`SOUND`, or ``"differs: weights"`` and the like, ``"error"``, ``"error at the resume"``,
            ``"refused in mid-run"``, ``"processes apart"``, ``"hung"``.
        words: The refusal, the traceback, or what differs.
        seconds: Processor time of all of its runs.
    """

    kind: str
    words: str = ""
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        return self.kind in SOUND


class Ended(Exception):
    """A run ended otherwise than planned."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(kind, words)
        self.kind, self.words = kind, words


def try_case(case: Case) -> Outcome:
    """Run a case and say how it ended."""
    import_for(case.model)
    before = _processor_time()
    with tempfile.TemporaryDirectory(prefix="eke-fuzz-") as folder:
        try:
            kind, words = _try(case, Path(folder))
        except Ended as end:
            kind, words = end.kind, end.words
    return Outcome(kind, words, _processor_time() - before)


def _try(case: Case, folder: Path) -> tuple[str, str]:
    passing = case.save["way"] in IN_PASSING
    whole = _run(case, folder / "whole", "cut" if passing else "whole")
    broken = folder / "whole"
    if not passing:
        broken = folder / "broken"
        _run(case, broken, "cut")
    checkpoint = _checkpoint(broken, case.save.get("which"))
    if checkpoint is None:
        return "no checkpoint", ""
    if found := _apart(case, whole):
        return "processes apart", _some(found)
    at = torch.load(_file(checkpoint), map_location="cpu", weights_only=False).get(KEY)
    if at is None:
        return "error", f"{checkpoint.name} has no key {KEY!r}, which a callback of the run has put there"
    rest = _run(case, broken, "rest", checkpoint, at, steps=whole[0]["progress"]["global_step"])
    if found := judge(whole, rest, at):
        return f"differs: {found[0].partition(':')[0]}", _some(found, at)
    if found := _apart(case, rest):
        return "processes apart", _some(found, at)
    return "held", ""


def _apart(case: Case, states: list[dict[str, Any]]) -> list[str]:
    """Where processes hold other weights though no strategy shards them."""
    shards = any(record_of(name).kind == "strategy" for name in case.techniques)
    return ranks_apart(states) if len(states) > 1 and not shards else []


def _run(case: Case, folder: Path, part: str, checkpoint: Path | None = None, at: Mapping[str, int] | None = None,
         steps: int = 0) -> list[dict[str, Any]]:  # fmt: skip
    """The states of all processes of one run; empty where it died as planned.

    Raises:
        Ended: it ended otherwise.
    """
    folder.mkdir(exist_ok=True)
    order = {"case": case, "folder": folder, "part": part, "checkpoint": checkpoint, "at": at, "steps": steps}
    try:
        if case["processes"] > 1:
            found = run_ranks(lambda rank: train(rank=rank, **order), case["processes"], TIMEOUT, may_die=True)
        elif part == "rest" and case["interpreter"]:
            found = [_anew(order, folder)]
        else:
            found = [run_alone(lambda: train(rank=0, **order), TIMEOUT, may_die=True)]
    except RankError as error:
        notes = sorted(folder.glob("ended-*"))
        if not notes:
            raise Ended("hung" if "still running" in str(error) else "error", str(error)) from None
        kind, words = notes[0].read_text().split("\n", 1)
        raise Ended(kind, words) from None
    return [one for one in found if one is not None]


def train(case: Case, folder: Path, part: str, checkpoint: Path | None, at: Mapping[str, int] | None, steps: int,
          rank: int) -> dict[str, Any] | None:  # fmt: skip
    """One run, in the process that is to have it. None where a planned error ended it.

    Args:
        case: What to run.
        folder: Where, and where checkpoints and a note of how it failed go.
        part: ``"whole"``, ``"cut"`` (with what saves and breaks it) or ``"rest"``.
        checkpoint: Where ``"rest"`` goes on from.
        at: How many batches and validations lie before that.
        steps: Optimizer steps that the whole run had.
        rank: Of this process.
    """
    os.chdir(folder)
    trace = Trace(**(at or {}))
    seed = int(part == "rest")
    try:
        # What techniques and Lightning print belongs to one of hundreds of runs.
        with quiet(all_warnings=True), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            seed_everything(seed)
            callbacks = [trace, *_beside(case), *(saving(case.save, folder) if part == "cut" else ())]
            trainer = make_trainer(
                *[build(name, arguments) for name, arguments in case.techniques.items()],
                world=case["processes"],
                callbacks=callbacks,
                **_options(case, folder, steps if part == "rest" else 0),
            )
            model = make_model(case, seed)
            trainer.fit(model, ckpt_path=checkpoint, weights_only=False)
            if part == "cut" and case.save["way"] == "after fit":
                trainer.save_checkpoint(folder / "saved.ckpt")
    except Planned:
        return None
    except BaseException as error:
        kind = _kind(error, trace.began, part)
        words = str(error) if kind.startswith("refused") else traceback.format_exc()
        (folder / f"ended-{part}-{rank}").write_text(f"{kind}\n{words}")
        raise
    return trace.state(model)


def _kind(error: BaseException, began: bool, part: str) -> str:
    """Whether an error is a refusal in words, or Python's. What Lightning refuses at a resume, it should have refused
    before: that is an error, too.
    """
    own = isinstance(error, EkeError) or (isinstance(error, (ValueError, MisconfigurationException)) and _ours(error))
    own |= isinstance(error, MisconfigurationException) and part != "rest"
    if not own or len(str(error)) < 20:
        return "error at the resume" if part == "rest" else "error"
    if began:
        return "refused in mid-run"
    return "refused at the resume" if part == "rest" else "refused"


def _ours(error: BaseException) -> bool:
    """Whether it was raised by a line of the core or of a technique, on purpose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "eke" in Path(frame.filename).parts or any(part.startswith("eke_") for part in Path(frame.filename).parts)


def _options(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """The arguments of the Trainer."""
    length: dict[str, Any] = {"max_epochs": case["epochs"], "max_steps": case["max_steps"] or -1}
    if steps and case["ends_by"] == "max_steps":
        length = {"max_epochs": -1, "max_steps": steps}
    return {
        **length,
        "default_root_dir": str(folder),
        "accumulate_grad_batches": case["accumulate"],
        "gradient_clip_val": case["clip"],
        "gradient_clip_algorithm": case["clip_by"] if case["clip"] else None,
        "precision": case["precision"],
        "limit_train_batches": case["limit"],
        "limit_val_batches": case["validate"],
        "val_check_interval": case["val_check"] if case["validate"] else None,
        "check_val_every_n_epoch": case["val_epochs"],
        "num_sanity_val_steps": case["sanity"],
        "reload_dataloaders_every_n_epochs": case["reload"],
        "use_distributed_sampler": True,
    }


def _beside(case: Case) -> list[Callback]:
    """Callbacks of Lightning's that keep or change something of a run."""
    return {
        "none": lambda: [],
        "early stopping": lambda: [EarlyStopping("epoch_loss", patience=2, check_on_train_epoch_end=True)],
        "accumulation": lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
        "averaging": lambda: [EMAWeightAveraging(decay=0.9)],
        "late averaging": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    }[case["beside"]]()


def _checkpoint(folder: Path, which: float | None) -> Path | None:
    """One of the files that a run wrote, in the order of writing: at a share of them, or the last."""
    files = sorted(folder.glob("saved*.ckpt"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not files:
        return None
    return files[-1 if which is None else int(which * len(files))]


def _file(checkpoint: Path) -> Path:
    return checkpoint if checkpoint.is_file() else checkpoint / "meta.pt"  # of a sharded one, what is not sharded


def _anew(order: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """The same in a Python that has imported nothing."""
    (folder / "order.pkl").write_bytes(pickle.dumps(order))
    command = [sys.executable, "-m", "eke.testing.fuzz.execute", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    if done.returncode:
        raise RankError(done.stderr)
    return pickle.loads((folder / "answer.pkl").read_bytes())


def _some(lines: list[str], at: Mapping[str, int] | None = None, show: int = 6) -> str:
    more = [f"... and {len(lines) - show} more"] if len(lines) > show else []
    place = [f"saved after {at['trained']} batches and {at['validated']} validations"] if at else []
    return "\n".join([*place, *lines[:show], *more])


def _processor_time() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    started = time.monotonic()
    answer = train(rank=0, **pickle.loads((place / "order.pkl").read_bytes()))
    (place / "answer.pkl").write_bytes(pickle.dumps(answer))
