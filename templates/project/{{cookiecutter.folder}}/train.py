"""Train a byte-level GPT on real text three ways, side by side, and say which was the better buy.

1. plain     the model as it is, at a tuned learning rate
2. recipe    the same with Eke techniques (--recipe)
3. smaller   a plain shallower model for as long as the recipe took: the check that keeps 2 honest

Each learning rate falls to zero at its own run's end, and evaluation is not on the clock. ``python train.py --help``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import eke
import torch
from data import Text
from eke import recipe as recipes
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from model import ByteGPT
from report import Meter, Progress, environment, print_sweep, print_table, save_report

EVALUATIONS = (12, 10, 9, 8, 11)  # per run, at equal distances: the number that divides its steps best


@dataclass
class Run:
    """What one training run is made of."""

    name: str
    layers: int
    lr: float
    steps: int
    recipe: dict = field(default_factory=dict)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*exists and is not empty.*")  # a resumed run's checkpoints
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # between Lightning and torch
    try:
        if options.resume:
            options = restore(options.resume)
        text = Text(options.text, options.length, options.batch, options.seed)
        recipe = {} if options.plain_only or options.sweep else read_recipe(options.recipe)
        make_trainer(recipe, options, steps=2, every=1, callbacks=[])  # a wrong option should fail now, not in mid-run
        ByteGPT(1, options.width, options.length, options.lr)
        folder = Path(options.resume) if options.resume else new_folder(Path(options.out))
    except (eke.EkeError, MisconfigurationException, ValueError, TypeError, OSError) as error:
        return refuse(error)
    print(f"Writing to {folder}. An interrupted comparison goes on with --resume {folder}", flush=True)
    (folder / "options.json").write_text(json.dumps(vars(options), indent=1))
    torch.set_num_threads(options.threads)
    try:
        sweep(options, text, folder) if options.sweep else compare(options, text, recipe, folder)
    except (eke.EkeError, MisconfigurationException) as error:  # a technique that cannot work with this model
        return refuse(error)
    return 0


def refuse(error: Exception) -> int:
    print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def compare(options: argparse.Namespace, text: Text, recipe: dict, folder: Path) -> None:
    """Train the three, then print the table and save table, curves and picture."""
    plain = Run("plain", options.layers, options.lr, options.steps)
    results = [train(plain, options, text, folder)]
    if not options.plain_only:
        with_recipe = Run("recipe", options.layers, options.lr, options.steps, recipe)
        results.append(train(with_recipe, options, text, folder))
        smaller = Run("smaller", options.control_layers, options.control_lr, steps=0)
        smaller.steps = steps_within(results[-1]["cost"], smaller, options, text, folder)
        results.append(train(smaller, options, text, folder))
    report = {"text": text.describe(), "options": vars(options), "environment": environment(), "runs": results}
    save_report(report, folder)
    print_table(report, folder)


def sweep(options: argparse.Namespace, text: Text, folder: Path) -> None:
    """Train the plain model once for each learning rate, to find the one that the comparison should use."""
    runs = [Run(f"lr-{lr:g}", options.layers, lr, options.steps) for lr in sorted(options.sweep)]
    print_sweep([train(run, options, text, folder) for run in runs])


def train(run: Run, options: argparse.Namespace, text: Text, folder: Path) -> dict:
    """Train once and return its figures; a finished run is read back, an interrupted one goes on where it stopped."""
    place = folder / run.name
    if (place / "result.json").exists():
        return json.loads((place / "result.json").read_text())
    seed_everything(options.seed, verbose=False)  # the same first weights, where the shapes are the same
    model = ByteGPT(run.layers, options.width, options.length, run.lr)
    every, steps = evaluation_points(run.steps)
    meter = Meter()
    keep = ModelCheckpoint(place, "last", enable_version_counter=False, save_on_train_epoch_end=False)  # at evaluations
    trainer = make_trainer(run.recipe, options, steps, every, [meter, Progress(run.name), keep])
    last = place / "last.ckpt"
    trainer.fit(model, text, ckpt_path=last if last.exists() else None)
    result = {**asdict(run), "steps": steps, **meter.result(model, tokens_per_step=options.batch * options.length)}
    (place / "result.json").write_text(json.dumps(result))
    return result


def make_trainer(recipe: dict, options: argparse.Namespace, steps: int, every: int, callbacks: list) -> Trainer:
    """Put the techniques of a recipe beside the run's own callbacks, into a Trainer that is otherwise stock."""
    techniques = eke.trainer_kwargs(**recipe)
    callbacks = callbacks + techniques.pop("callbacks", [])
    return Trainer(
        max_steps=steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,  # count steps, not epochs
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        logger=False,
        enable_model_summary=False,
        **techniques,
    )


def steps_within(cost: float, run: Run, options: argparse.Namespace, text: Text, folder: Path) -> int:
    """How many steps of a run come to ``cost`` seconds, by timing its first few."""
    known = folder / f"{run.name}-steps.json"
    if known.exists():  # resumed: the schedule must end where it was to end
        return json.loads(known.read_text())
    meter = Meter()
    trainer = make_trainer(run.recipe, options, steps=40, every=40, callbacks=[meter, Progress("timing")])
    trainer.fit(ByteGPT(run.layers, options.width, options.length, run.lr), text)
    whole = EVALUATIONS[0]
    steps = max(2, round(cost / meter.cost_per_step() / whole) * whole)
    known.write_text(json.dumps(steps))
    return steps


def evaluation_points(steps: int) -> tuple[int, int]:
    """Steps between evaluations, and ``steps`` as a whole number of them, so that the last one ends the run."""
    times = min((n for n in EVALUATIONS if n <= steps), key=lambda n: steps % n, default=steps)
    return steps // times, steps // times * times


def read_recipe(words: list[str]) -> dict[str, dict]:
    """Techniques and their arguments from a YAML file, or from words: ``stacking adam8bit:block=256``."""
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return recipes.load(words[0])
    # stacking,adam8bit is two words as well, as long as no arguments follow
    return recipes.parse_words([name for word in words for name in (word.split(",") if ":" not in word else [word])])


def new_folder(out: Path) -> Path:
    """Make the first free numbered folder below ``out``: an older run is never overwritten."""
    number = 1
    while (out / str(number)).exists():
        number += 1
    (out / str(number)).mkdir(parents=True)
    return out / str(number)


def restore(folder: str) -> argparse.Namespace:
    """The options that an interrupted comparison was started with."""
    saved = Path(folder) / "options.json"
    if not saved.exists():
        raise ValueError(f"{folder} holds no options.json: nothing can be resumed. Give a folder that train.py made.")
    return argparse.Namespace(**{**json.loads(saved.read_text()), "resume": folder})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")  # one line; argparse would print the usage before it


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of {least} or more.")
        return int(text)

    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--text", help="a text file or a folder of them (default: the sources of Python's standard library)")
    add(
        "--recipe",
        nargs="+",
        default=["stacking"],
        metavar="TECHNIQUE",
        help="technique, or technique:key=value,key=value, or one YAML file (default: %(default)s)",
    )
    add("--plain-only", action="store_true", help="train the plain model and nothing else")
    add("--steps", type=at_least(2), default=960, help="steps of plain and recipe (default: %(default)s)")
    add("--layers", type=at_least(1), default=8, help="blocks of plain and recipe (default: %(default)s)")
    add("--width", type=at_least(1), default=64, help="default: %(default)s")
    add("--length", type=at_least(1), default=128, help="bytes in a window (default: %(default)s)")
    add("--batch", type=at_least(1), default=8, help="windows in a step (default: %(default)s)")
    add("--lr", type=float, default=8e-3, help="highest learning rate (default: %(default)s, tuned for the defaults)")
    add("--control-layers", type=at_least(1), default=1, help="blocks of the smaller model (default: %(default)s)")
    add("--control-lr", type=float, default=16e-3, help="its highest learning rate (default: %(default)s, tuned)")
    add("--sweep", type=float, nargs="+", metavar="LR", help="only try these learning rates on the plain model")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--precision", default="32-true", help="as Trainer takes it, such as bf16-mixed (default: %(default)s)")
    add("--accelerator", default="auto", help="as Trainer takes it (default: %(default)s)")
    add("--threads", type=at_least(1), default=1, help="CPU threads (default: %(default)s)")
    add("--out", default="runs", help="a new numbered folder is made in it (default: %(default)s)")
    add("--resume", metavar="DIR", help="go on with an interrupted comparison; all other options come from it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
