"""``eke scores``: what a file of scores holds, and a contact sheet of the hardest and the easiest samples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from eke.seams.scores import Scores, check_data
from eke.spec import EkeError
from torch import Tensor


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="eke scores", description="What a file of scores holds.")
    parser.add_argument("file", type=Path, metavar="FILE", help="what Score wrote")
    parser.add_argument(
        "--data", metavar="MODULE:FUNCTION", help="returns the dataset: images, with classes or without"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw the hardest and easiest samples; needs --data")
    parser.add_argument("--count", type=int, default=20, help="of each (default 20)")
    given = parser.parse_args(arguments)
    try:
        scores = Scores.load(given.file)
        print(describe(scores))
        if given.sheet is not None:
            if given.data is None or given.count < 1:
                raise EkeError(
                    "--sheet needs --data MODULE:FUNCTION, which returns the dataset, and a count of 1 or more."
                )
            dataset = _dataset(given.data)
            check_data(scores, dataset, given.file)
            sheet(scores, dataset, given.sheet, given.count)
            print(f"{given.sheet}: the {given.count} hardest and the {given.count} easiest samples")
    except (EkeError, ValueError) as error:
        print(f"eke scores: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def describe(scores: Scores) -> str:
    """A line about the file, and its quantiles."""
    values = scores.values
    learned = values[values.isfinite()]
    shares = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=values.dtype)
    quantiles = ", ".join(f"{value:.3g}" for value in learned.quantile(shares).tolist()) if len(learned) else "none"
    never = f"; {len(values) - len(learned)} were never learned" if len(learned) < len(values) else ""
    return (
        f"{scores.kind} of {len(values)} samples, the mean over {scores.runs} run{'s' if scores.runs > 1 else ''}; "
        f"least, quartiles, most: {quantiles}{never}; data {scores.data}"
    )


def sheet(scores: Scores, dataset: Any, file: Path, count: int) -> None:
    """Draw the samples with the highest and the lowest scores, each with its score and its class.

    Raises:
        EkeError: matplotlib is missing, or a sample does not begin with an image.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EkeError("a contact sheet needs matplotlib: pip install 'eke-data-scores[pictures]'") from None
    order = scores.values.argsort(descending=True, stable=True).tolist()
    count = min(count, len(order) // 2 or 1)
    columns = min(count, 10)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * 1.1, rows * 2 * 1.35 + 0.9), dpi=100)
    halves = figure.subfigures(2, 1)
    for half, title, chosen in ((halves[0], "hardest", order[:count]), (halves[1], "easiest", order[::-1][:count])):
        half.suptitle(f"{title} by {scores.kind}", fontsize=11)
        places = half.subplots(rows, columns, squeeze=False).flatten()
        half.subplots_adjust(
            left=0.02, right=0.98, bottom=0.02, top=0.78 if rows == 1 else 0.84, hspace=0.5, wspace=0.15
        )
        for place in places:
            place.axis("off")
        for place, index in zip(places, chosen, strict=False):
            image, label = _image(dataset[index], index)
            place.imshow(image, cmap="gray")
            place.set_title(f"{scores.values[index]:.2f}{label}", fontsize=8, pad=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _image(sample: Any, index: int) -> tuple[Any, str]:
    """Rows and columns, with colours last, between 0 and 1; and the class, if there is one."""
    parts = sample if isinstance(sample, (list, tuple)) else (sample,)
    image = parts[0]
    if not isinstance(image, Tensor):
        import numpy as np

        image = torch.as_tensor(np.asarray(image)) if hasattr(image, "__array__") else image
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        raise EkeError(
            f"sample {index} begins with {type(image).__name__} {tuple(getattr(image, 'shape', ()))}: a sheet needs "
            "images, (channels, height, width) or (height, width)."
        )
    image = image.detach().float()
    if image.ndim == 3:
        image = image.movedim(0, -1) if image.shape[0] in (1, 3) else image
        image = image[..., 0] if image.shape[-1] == 1 else image
    image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-9)
    label = parts[1] if len(parts) > 1 else None
    if isinstance(label, Tensor) and label.ndim == 0:
        label = label.item()
    return image.numpy(), f" ({label})" if isinstance(label, (int, str)) else ""


def _dataset(path: str) -> Any:
    module, _, name = path.partition(":")
    if not name:
        raise EkeError(f"--data {path!r}: give MODULE:FUNCTION, such as project.data:training_set.")
    sys.path.insert(0, "")  # as python -m does: the caller's own folder
    try:
        return getattr(import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise EkeError(f"--data {path!r} does not load: {error}.") from error
    finally:
        sys.path.remove("")
