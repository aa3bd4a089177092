"""The contract of every technique on a GPU, in its shortest form, and the tests marked gpu.

    python tools/gpu_lines.py contract --out results --device cuda

Contracts are read from the tests of the distributions; what they except stays excepted. Each runs in a process of its
own, so that a technique that crashes, or hangs, costs only itself. On a card it is a fresh one: some library meets the
card when it is imported, and what a process forks after that cannot. On a CPU it is forked, which saves the imports.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
# Those that fork first: a process that has met the card cannot.
CHECKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("test_a_run_killed_in_mid_epoch_resumes_to_the_same_bits", {}),
    ("test_a_run_with_accumulated_gradients_resumes_to_the_same_bits", {}),
    ("test_its_checkpoint_loads_without_it_or_says_why_not", {}),
    ("test_it_trains_and_every_weight_moves", {"shape": None}),
    ("test_it_trains_in_bf16", {}),
    ("test_after_a_run_the_model_is_as_before", {}),
    ("test_it_fails_cleanly", {"where": "training_step"}),
    ("test_it_leaves_the_global_random_state_alone", {}),
    ("test_accumulated_gradients_equal_the_big_batch", {}),
    ("test_it_pickles_and_deep_copies", {}),
    ("test_it_does_what_its_record_says", {}),
    ("test_it_fits_twice_validates_and_tests", {}),
    ("test_a_weights_only_checkpoint_loads", {}),
)


def contracts(only: str = "*") -> dict[str, type]:
    """The contract classes of all techniques, or of one, and of back ends that only a GPU has."""
    found: dict[str, type] = {}
    for file in sorted(REPO.glob(f"*/eke-{only}/tests/test_*.py")):
        if "Contract)" not in file.read_text(encoding="utf-8"):
            continue
        spec = importlib.util.spec_from_file_location(f"contract_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        technique = file.parts[-3].removeprefix("eke-")
        for name, one in vars(module).items():
            if isinstance(one, type) and getattr(one, "eke_contract", False) and one.__module__ == spec.name:
                label = name.removeprefix("TestContract").removeprefix("Test").removeprefix("Of")
                found[technique + (f", {label}" if label and label != "PEFT" else "")] = one
    return {**found, **further(found)}


def further(found: dict[str, type]) -> dict[str, type]:
    """Back ends that the tests, which run anywhere, do not build."""
    import eke

    def built(base: str, name: str, **arguments: Any) -> type:
        return type(
            "Further",
            (found[base],),
            {"build": lambda self: eke.create(name, **arguments), "__module__": found[base].__module__},
        )

    more = {}
    if "adam8bit" in found:
        for backend in ("torch", "torchao"):
            arguments = {"min_elements": 256, "backend": backend, "compile": False}
            more[f"adam8bit, {backend}"] = built("adam8bit", "adam8bit", **arguments)
    if "fp8" in found:
        for recipe in ("tensorwise", "rowwise"):
            more[f"fp8, torchao {recipe}"] = built("fp8", "fp8", recipe=recipe, backend="torchao")
    if "peft" in found:
        example = sys.modules[found["peft"].__module__].TestPEFT().build()
        more["peft, nf4"] = built("peft", "peft", settings={"r": 4}, train=example.train, quantize="nf4")
        more["peft, nf4"].exceptions = {"test_it_pickles_and_deep_copies": "The check writes NaN, which 4 bits lack."}
    return more


def with_capability_told(device: str) -> None:
    """Let libraries that ask for the card's capability when they are imported have it without initializing CUDA.

    torchao, which transformers imports, and bitsandbytes, which peft imports, ask; no process forked later could use
    the card.
    """
    import subprocess

    import torch

    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
        capability = tuple(int(part) for part in told.split("."))
        torch.cuda.get_device_capability = lambda *_: capability


def tell_of_the_card(file: Path) -> None:
    """Write to ``file`` who meets the card first in this process, for the checks that fork are lost with it."""
    import torch

    meet = torch.cuda._lazy_init

    def told() -> None:
        if not torch.cuda.is_initialized() and not file.exists():
            file.write_text("".join(traceback.format_stack(limit=25)))
        meet()

    torch.cuda._lazy_init = told


class Fresh:
    """A contract in a Python of its own; looks like a process of multiprocessing."""

    def __init__(self, name: str, place: Path) -> None:
        self.command = [sys.executable, __file__, "--name", name, "--place", str(place)]

    def start(self) -> None:
        import subprocess

        self.process = subprocess.Popen(self.command)
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def join(self) -> None:
        self.process.wait()

    @property
    def exitcode(self) -> int | None:
        return self.process.returncode


def run_all(device: str, seconds: float, workers: int, write: Any, fresh: bool = True) -> dict[str, Any]:
    """Run all contracts, some side by side; ``write(results)`` after each."""
    import torch

    end = time.monotonic() + seconds - 2
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # in each of many processes
    with_capability_told(device)
    import lightning.pytorch  # noqa: F401  so that it is loaded once, and not in each process
    import transformers  # noqa: F401

    waiting = contracts()
    if device == "cuda":  # techniques whose processes compile begin first
        slow = ("attention", "fp8", "adam8bit", "peft")
        waiting = dict(sorted(waiting.items(), key=lambda item: not item[0].startswith(slow)))
    fork = multiprocessing.get_context("fork")
    results: dict[str, Any] = {}
    running: dict[str, tuple[Any, Any, Path]] = {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            late = time.monotonic() > end
            while waiting and len(running) < workers and not late:
                name = next(iter(waiting))
                place = Path(folder, str(len(waiting)))
                place.mkdir()
                contract = waiting.pop(name)
                process = (
                    Fresh(name, place)
                    if device == "cuda" and fresh
                    else fork.Process(target=_one, args=(contract, device, place))
                )
                process.start()
                running[name] = (process, time.monotonic(), place)
            for name, (process, since, place) in list(running.items()):
                if process.is_alive() and not late:
                    continue
                if process.is_alive():
                    os.killpg(process.pid, 9)
                process.join()
                results[name] = _read(place, process.exitcode, late, time.monotonic() - since)
                del running[name]
                write(results)
            if late:
                results.update({name: {"not run": "no time left"} for name in waiting})
                write(results)
                break
            time.sleep(0.05)
    return results


def _read(place: Path, status: int | None, late: bool, took: float) -> dict[str, Any]:
    import json

    lines = place.joinpath("lines").read_text().splitlines() if place.joinpath("lines").exists() else []
    found = {key: value for line in lines for key, value in json.loads(line).items()}
    last = [name for name, outcome in found.items() if outcome == "began"]
    for name in last:
        found[name] = f"FAILED: {'no time left' if late else f'the process ended with status {status}'}"
    if any(outcome.startswith("FAILED") for outcome in found.values()) and place.joinpath("met.txt").exists():
        found["met the card first"] = place.joinpath("met.txt").read_text()[-3000:]
    return {**found, "seconds": round(took, 1)}


def _one(contract: type, device: str, place: Path) -> None:
    """In a process of its own: each check, with its outcome written at once."""
    import json

    from eke.testing import CallbackContract, ranks

    os.setpgid(0, 0)
    ranks._die_with_parent()
    os.chdir(place)
    log = os.open(place / "output", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)

    def say(name: str, outcome: str) -> None:
        with open(place / "lines", "a") as file:
            file.write(json.dumps({name: outcome}) + "\n")

    options = {**contract.options}
    if device == "cuda":
        options.update(accelerator="gpu", devices=1)
    one = type(contract.__name__, (contract,), {"options": options, "__module__": contract.__module__})()
    excepted = one.all_exceptions()
    for name, given in CHECKS:
        if name in excepted:
            say(name, f"excepted: {excepted[name]}")
            continue
        if not hasattr(one, name):
            continue
        given = {key: contract.model if key == "shape" else value for key, value in given.items()}
        if "where" in given and getattr(contract, name) is not getattr(CallbackContract, name):
            given["where"] = "validation_step"  # it does not run its model's training_step
        say(name, "began")
        for old in place.glob("*.npz"):  # of the check before
            old.unlink()
        try:
            getattr(one, name)(**given)
        except BaseException as error:
            say(name, f"FAILED: {_told(error)}")
            with open(place / "output", "a") as file:
                traceback.print_exc(file=file)
        else:
            say(name, "passed")
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """One contract on the card, in this process, which is new."""
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    with_capability_told(given.device)
    import torch

    torch.set_num_threads(1)
    tell_of_the_card(given.place / "met.txt")
    _one(contracts(given.name.partition(",")[0])[given.name], given.device, given.place)


def _told(error: BaseException, length: int = 1200) -> str:
    text = "".join(traceback.format_exception_only(type(error), error)).strip()
    text = text if len(text) <= length else f"{text[: length // 3]} ... {text[-2 * length // 3 :]}"
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} [{Path(where.filename).name}:{where.lineno}]"


if __name__ == "__main__":
    main()
