"""Runs all that waits for a GPU in the few minutes that one is at hand, the most telling first.

    python tools/gpu.py --minutes 8             # into benchmarks/gpu/<card>
    python tools/gpu.py --rehearse              # the same on a CPU, at the smallest sizes
    python tools/gpu.py --only fp8 attention    # some lines
    python tools/gpu.py --table                 # benchmarks/gpu/README.md from what is stored

A line is a process of its own with a time limit of its own; what it has found is in its file the moment it is found, so
that one that hangs or crashes costs only itself. Lines that time nothing share the card at the beginning, the others
have it alone. What must be brought along to a machine without network: tools/wheels.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
HOME = REPO / "benchmarks" / "gpu"


LEAST = 8.0  # seconds: less than that is not worth a start


@dataclass(frozen=True)
class Line:
    """One process.

    Args:
        name: Of the function in gpu_lines.py.
        what: It measures.
        seconds: That it may take.
        alone: It times something, and has the card for itself.
    """

    name: str
    what: str
    seconds: float
    alone: bool = True


LINES = (
    Line("contract", "the contract of every technique on CUDA", 120, alone=False),
    Line("tests", "pytest -m gpu", 120, alone=False),
    Line("forecast", "eke forecast against the allocator", 100, alone=False),
    Line("fp8", "FP8 against bf16", 60),
    Line("attention", "SDPA's kernels and FlexAttention", 42),
    Line("optimizers", "8-bit optimizers against fused AdamW", 46),
    Line("peft", "LoRA and NF4 on a Llama of 1 B parameters", 42),
    Line("zero", "ZeRO on one card", 42),
    Line("ratios", "steps of techniques that leave something out", 22),
    Line("ceilings", "the best product and copy", 10),
    Line("train", "the project's train.py", 30),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--out", type=Path, help="folder (default: benchmarks/gpu/<card>)")
    parser.add_argument("--only", nargs="*", choices=[line.name for line in LINES])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at the smallest sizes")
    parser.add_argument("--table", action="store_true", help="write the table of what is stored")
    given = parser.parse_args()
    if given.table:
        write_table()
        return 0
    out = given.out or HOME / (Path("rehearsal") if given.rehearse else card())
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * given.minutes
    chosen = [line for line in LINES if not given.only or line.name in given.only]
    device = "cpu" if given.rehearse else "cuda"
    together, alone = ([line for line in chosen if line.alone is kind] for kind in (False, True))
    states = run([*together], out, device, end)
    for line in alone:
        states |= run([line], out, device, end)
    show(chosen, states, out)
    return 0


def run(lines: list[Line], out: Path, device: str, end: float) -> dict[str, str]:
    """Run lines side by side, and return how each ended."""
    states: dict[str, str] = {}
    jobs = []
    for line in lines:
        seconds = min(line.seconds, end - time.monotonic() - 3)
        if seconds < LEAST:
            states[line.name] = "not begun: no time left"
            continue
        log = out / f"{line.name}.log"
        command = [sys.executable, str(REPO / "tools" / "gpu_lines.py"), line.name, "--out", str(out)]
        command += ["--device", device, "--seconds", f"{seconds - 4:.0f}"]
        with log.open("w") as file:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=out, start_new_session=True, env=environment
            )
        jobs.append((line, process, time.monotonic(), seconds))
    for line, process, since, seconds in jobs:
        try:
            status = process.wait(max(0.1, since + seconds - time.monotonic()))
            states[line.name] = "through" if status == 0 else f"ended with status {status}"
        except subprocess.TimeoutExpired:
            states[line.name] = f"stopped after {seconds:.0f} s"
        try:
            os.killpg(process.pid, signal.SIGKILL)  # itself, and what it started
        except ProcessLookupError:
            pass
        process.wait()
        print(f"{line.name}: {states[line.name]}, {time.monotonic() - since:.0f} s", flush=True)
    return states


def card() -> str:
    """The card's name, fit for a folder."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        name = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise SystemExit("nvidia-smi names no card. On a CPU: --rehearse.") from None
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def show(chosen: list[Line], states: dict[str, str], out: Path) -> None:
    """What was found in short, and what is left."""
    for line in chosen:
        found = read(out / f"{line.name}.json")
        for text in rows(found):
            print(" | ".join(text))
    print()
    for line in chosen:
        found = read(out / f"{line.name}.json")
        failed, left = found.get("failed", {}), found.get("left", [])
        print(f"{line.name}: {states.get(line.name)}; {len(found.get('results', {}))} results, {len(failed)} failed"
              + (f"; no time for: {', '.join(left)}" if left else ""))  # fmt: skip
        for name, why in failed.items():
            print(f"  {name}: {why[:400]}")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


# ---------------------------------------------------------------------- table


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """What a line found, as rows of a table."""
    results = found.get("results", {})
    return TABLES[found["line"]](results) if found.get("line") in TABLES else []


def _contract(results: dict[str, Any]) -> list[tuple[str, ...]]:
    table = [("technique", "passed", "excepted", "not passed")]
    for name, one in sorted(results.items()):
        checks = {check: outcome for check, outcome in one.items() if isinstance(outcome, str)}
        bad = [
            check.removeprefix("test_") for check, outcome in checks.items() if outcome.startswith(("FAILED", "no "))
        ]
        passed = sum(outcome == "passed" for outcome in checks.values())
        excepted = sum(outcome.startswith("excepted") for outcome in checks.values())
        table.append((name, str(passed), str(excepted), ", ".join(bad).replace("_", " ") or "-"))
    return table


def _tests(results: dict[str, Any]) -> list[tuple[str, ...]]:
    counted: dict[str, int] = {}
    for outcome in results.values():
        counted[outcome.partition(":")[0]] = counted.get(outcome.partition(":")[0], 0) + 1
    table = [("tests marked gpu", "outcome"), ("all", ", ".join(f"{n} {what}" for what, n in counted.items()))]
    bad = {name: outcome for name, outcome in results.items() if outcome.startswith(("failure", "error"))}
    return [*table, *((name.rpartition(".")[2], outcome[:160].replace("\n", " ")) for name, outcome in bad.items())]


def _forecast(results: dict[str, Any]) -> list[tuple[str, ...]]:
    table = [("step", "forecast, MiB", "measured, MiB", "off")]
    for name, one in results.items():
        measured = f"{one['measured'] / 2**20:,.0f}" if "measured" in one else "-"
        table.append((name, f"{one['forecast'] / 2**20:,.0f}", measured, f"{one.get('off', 0):+.1%}"))
    return table


def _timings(first: str, *more: tuple[str, str]) -> Any:
    def build(results: dict[str, Any]) -> list[tuple[str, ...]]:
        return [
            (first, *(title for title, _ in more)),
            *((name, *(_shown(one.get(key)) for _, key in more)) for name, one in results.items()),
        ]

    return build


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _fp8(results: dict[str, Any]) -> list[tuple[str, ...]]:
    table = [("forward and backward, 16,384 tokens", "ms", "of bf16, as eager or compiled", "peak MiB")]
    for name, one in results.items():
        what, _, rest = name.partition(" | ")
        base = results.get(f"{what} | bf16,{rest.partition(',')[2]}", {}).get("ms")
        ratio = f"{one['ms'] / base:.2f}" if base else "-"
        table.append((name.replace(" | ", ", "), _shown(one["ms"]), ratio, _shown(one.get("peak_mib"))))
    return table


def _attention(results: dict[str, Any]) -> list[tuple[str, ...]]:
    table = [("attention", "forward, ms", "forward and backward, ms", "peak MiB")]
    for name, one in results.items():
        both, forward = one.get("forward and backward", one), one.get("forward", {})
        cells = _shown(forward.get("ms")), _shown(both.get("ms")), _shown(both.get("peak_mib"))
        table.append((name.replace(" | ", ", "), *cells))
    return table


def _ratios(results: dict[str, Any]) -> list[tuple[str, ...]]:
    table = [("step", "ms", "of the whole step's time")]
    for name, one in results.items():
        for label, row in one.items():
            if isinstance(row, dict):
                ratio = row["ratio"][0] if "ratio" in row else one["ratio"] if label == list(one)[1] else 1.0
                table.append((f"{name}: {label}", _shown(row["ms"]), f"{ratio:.2f}"))
    return table


def _ceilings(results: dict[str, Any]) -> list[tuple[str, ...]]:
    found = results.get("ceilings", {})
    table = [("ceiling", "best", "median")]
    for name, unit in (("float32", "TFLOP/s"), ("bfloat16", "TFLOP/s"), ("copy", "TB/s")):
        if name in found:
            table.append((f"{name}, {unit}", *(f"{found[name][of] / 1e12:.2f}" for of in ("best", "median"))))
    return table


TABLES: dict[str, Any] = {
    "contract": _contract,
    "tests": _tests,
    "forecast": _forecast,
    "fp8": _fp8,
    "attention": _attention,
    "optimizers": _timings(
        "optimizer's step", ("ms", "ms"), ("bytes of state a parameter", "state_bytes_a_parameter"),
        ("peak above, MiB", "peak_mib"), ("first step, s", "first_step_s"),
    ),
    "peft": _timings("Llama of 1 B, 4 by 1,024 tokens, bf16", ("ms a step", "ms"), ("peak MiB", "peak_mib"),
                     ("between steps, MiB", "held_mib"), ("trained", "trained")),
    "zero": _timings("GPT of 0.4 B, 4 by 1,024 tokens, bf16-mixed", ("ms a step", "ms"), ("peak MiB", "peak_mib"),
                     ("between steps, MiB", "held_mib")),
    "ratios": _ratios,
    "ceilings": _ceilings,
}  # fmt: skip


def write_table() -> None:
    """benchmarks/gpu/README.md, from the files."""
    text = [
        "# Measured on GPUs",
        "",
        "Written by `python tools/gpu.py --table` from the files in the folders here.",
        "",
    ]
    text += ["What has not run on a GPU yet is in [TODO.md](TODO.md).", ""]
    for folder in sorted(path for path in HOME.iterdir() if path.is_dir() and path.name != "rehearsal"):
        books = [read(folder / f"{line.name}.json") for line in LINES]
        books = [book for book in books if book.get("results")]
        if not books:
            continue
        text += [f"## {books[0]['machine']['device']}", ""]
        for book in books:
            table = rows(book)
            if not table:
                continue
            what = next(line.what for line in LINES if line.name == book["line"])
            text += [f"### {what[0].upper()}{what[1:]}", "", _words(book["machine"]), ""]
            head, *body = table
            text += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
            text += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in body]
            for name, why in book.get("failed", {}).items():
                text += ["", f"Failed: {name.replace(' | ', ', ')}: {' '.join(why.split())[:300]}"]
            text += [""]
    (HOME / "README.md").write_text("\n".join(text))
    print(f"Wrote {HOME / 'README.md'}.")


def _words(machine: dict[str, Any]) -> str:
    versions = [f"{name} {machine[name]}" for name in machine
                if name not in ("date", "device", "driver", "memory", "cuda", "cores", "commit")]  # fmt: skip
    return f"{machine['date']}, driver {machine.get('driver')}, CUDA {machine.get('cuda')}, {', '.join(versions)}."


if __name__ == "__main__":
    sys.exit(main())
