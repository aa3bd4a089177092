"""Text as bytes: finding files, splitting them once and for all, cutting windows."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
VALIDATION_SHARE = 20  # one file in this many
VALIDATION_WINDOWS = 256


class TextError(ValueError):
    """The text cannot be trained on; the message says why and what to do."""


def find_files(path: Path | None) -> list[Path]:
    """The files of a person's own text, or, with None, the sources of Python's standard library without its tests."""
    if path is not None and not path.exists():
        raise TextError(f"{path} does not exist. Give a text file or a folder of them.")
    if path is not None and path.is_file():
        return [path]
    root = path or Path(sysconfig.get_path("stdlib"))
    found = sorted(file for file in root.rglob("*" if path else "*.py") if file.is_file())
    return [file for file in found if not _left_out(file.relative_to(root), hidden=path is not None)]


def split(root: Path, files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Divide files into training and validation by a hash of their path below ``root``.

    A file stays on its side whatever else is added, and no text is on both.
    """
    held_out = [file for file in files if _bucket(file.relative_to(root).as_posix()) == 0]
    return [file for file in files if file not in set(held_out)], held_out


def read_text(path: Path | None) -> tuple[Tensor, Tensor]:
    """Read training and validation text, each (bytes,), uint8. One file is cut: its last twentieth is validation."""
    files = find_files(path)
    if path is not None and path.is_file():
        text = _read(files)
        cut = len(text) - len(text) // VALIDATION_SHARE
        return text[:cut], text[cut:]
    train, held_out = split(path or Path(sysconfig.get_path("stdlib")), files)
    return _read(train), _read(held_out)


class Windows(Dataset):
    """Text cut into windows of ``length + 1`` bytes that overlap by the one byte which is only predicted."""

    def __init__(self, text: Tensor, length: int) -> None:
        self.text, self.length = text, length

    def __len__(self) -> int:
        return max(0, (len(self.text) - 1) // self.length)

    def __getitem__(self, index: int) -> Tensor:  # (length + 1,), int64
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")  # ends a for loop over the windows
        start = index * self.length
        return self.text[start : start + self.length + 1].long()


class Windowed(DataLoader):
    """Shuffled batches of windows that know where they stand: an interrupted run goes on with those it has not seen."""

    def __init__(self, windows: Windows, batch: int, seed: int) -> None:
        self.seed, self.epoch, self.used, self.skip = seed, 0, 0, 0
        super().__init__(windows, batch, shuffle=True, drop_last=True, generator=torch.Generator())

    def __iter__(self) -> Iterator[Tensor]:
        if self.used:  # Lightning leaves an epoch at its last batch, so the end of this loop is never reached
            self.epoch += 1
        self.generator.manual_seed(self.seed * 1_000_003 + self.epoch)  # so that an epoch's order can be made again
        skip, self.skip = self.skip, 0
        for self.used, batch in enumerate(super().__iter__(), start=1):
            if self.used > skip:
                yield batch

    def state_dict(self) -> dict:
        ended = self.used == len(self)
        return {"epoch": self.epoch + ended, "used": 0 if ended else self.used}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.skip = state["epoch"], state["used"]


class Text(LightningDataModule):
    """Windows of real text; the same seed gives the same order to every run.

    Args:
        path: A text file or a folder of them. None reads the standard library of this Python.
        length: Window length in bytes.
        batch: Windows per training step.
        seed: Seeds the order.

    Raises:
        TextError: nothing is there, or it is too short for one training batch and one validation window.
    """

    def __init__(self, path: str | Path | None, length: int, batch: int, seed: int) -> None:
        super().__init__()
        path = Path(path) if path else None
        train, held_out = read_text(path)
        self.name = str(path) if path else "Python standard library"
        self.batch, self.seed, self.place = batch, seed, None
        self.train, self.held_out = Windows(train, length), Windows(held_out, length)
        if len(self.train) < batch or not len(self.held_out):
            raise TextError(
                f"{self.name} gives {len(train):,} bytes for training and {len(held_out):,} for validation; "
                f"--batch {batch} and --length {length} need {batch * length + 1:,} and {length + 1:,}. "
                "Give a longer text, or lower --batch or --length."
            )

    def describe(self) -> str:
        train, held_out = len(self.train.text), len(self.held_out.text)
        return f"{self.name}: {train / 1e6:.2f} MB for training, {held_out / 1e6:.2f} MB for validation"

    def train_dataloader(self) -> DataLoader:
        self.loader = Windowed(self.train, self.batch, self.seed)
        if self.place:
            self.loader.load_state_dict(self.place)
        return self.loader

    # Lightning keeps a loader's own state as well, but hands it back only in the middle of an epoch.
    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.place = state

    def val_dataloader(self) -> DataLoader:
        # Spread over the whole text, always the same windows.
        count = min(VALIDATION_WINDOWS, len(self.held_out))
        picks = torch.linspace(0, len(self.held_out) - 1, count).round().long().tolist()
        return DataLoader(torch.utils.data.Subset(self.held_out, picks), batch_size=32)


def _left_out(file: Path, hidden: bool) -> bool:
    return bool(LEFT_OUT & set(file.parts)) or (hidden and any(part.startswith(".") for part in file.parts))


def _bucket(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_SHARE


def _read(files: list[Path]) -> Tensor:
    parts = (file.read_bytes() for file in files)
    text = b"\n".join(part for part in parts if b"\0" not in part)  # a zero byte marks a file that is no text
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
