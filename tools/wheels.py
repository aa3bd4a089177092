"""Fetches what must be carried to a machine with a GPU and without a network: wheels, ours and others'.

    python tools/wheels.py --out .whl                       # what a machine with torch and Lightning lacks
    python tools/wheels.py --out .whl --ours                # only build ours anew, after a change

There, in the checkout:

    python -m pip install --no-index --no-deps --upgrade --target site .whl/*.whl
    PYTHONPATH=site python tools/gpu.py --minutes 8

The machine brings torch, Triton, Lightning, transformers, peft and pytest itself. Of bitsandbytes only the library for
one CUDA is kept: the others make up most of its bytes.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).parents[1]
OTHERS = (
    "torchao==0.18.0", "bitsandbytes==0.50.2", "jsonargparse==4.53.0", "docstring-parser", "typeshed-client",
    "mlxtend==0.25.0",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".whl"))
    parser.add_argument("--python", default="3.12", help="of the machine")
    parser.add_argument("--cuda", default="130", help="of its torch")
    parser.add_argument("--ours", action="store_true", help="leave the others as they are")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.ours:
        fetch(given.out, given.python)
        for wheel in given.out.glob("bitsandbytes-*.whl"):
            keep_one_cuda(wheel, given.cuda)
    build(given.out)
    size = sum(wheel.stat().st_size for wheel in given.out.glob("*.whl"))
    print(f"{len(list(given.out.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB, in {given.out}")


def fetch(out: Path, python: str) -> None:
    """Others' wheels, without what they need: that is named, or there."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", str(out)]
    command += ["--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    subprocess.run([*command, *OTHERS], check=True)


def build(out: Path) -> None:
    """Ours, from the checkout."""
    for old in out.glob("eke*.whl"):
        old.unlink()
    folders = [REPO / "core", REPO / "bench", *sorted(file.parent for file in REPO.glob("*/eke-*/pyproject.toml"))]
    for folder in folders:
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


def keep_one_cuda(wheel: Path, cuda: str) -> None:
    """Write the wheel anew without the libraries of other cards and other CUDAs."""
    content = io.BytesIO()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as new:
        rows = []
        for item in old.infolist():
            library = re.search(r"libbitsandbytes_(\w+?)\.so$", item.filename)
            if library and library[1] not in (f"cuda{cuda}", "cpu"):
                continue
            if item.filename.endswith("RECORD"):
                record = item.filename
                continue
            data = old.read(item)
            new.writestr(item, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append((item.filename, f"sha256={digest}", str(len(data))))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
        new.writestr(record, text.getvalue())
    wheel.write_bytes(content.getvalue())


if __name__ == "__main__":
    main()
