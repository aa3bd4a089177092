"""Tune a causal language model on instructions: a pretrained model from a local folder, LoRA, answers alone learned.

The recipe of Alpaca-LoRA on any causal model of Hugging Face's. ``python finetune.py --help``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import eke
import torch
from eke import recipe as recipes
from eke_peft import export
from instructions import Instructions, attention_mask, prompt
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class Tuned(LightningModule):
    """A causal model whose loss is that of the answers.

    Args:
        folder: Of a Hugging Face model.
        lr: Highest learning rate; it warms up for 3 % of the run and falls to zero at its end.
    """

    def __init__(self, folder: str, lr: float) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        self.model.config.use_cache = False
        self.lr = lr

    def loss(self, batch: list[Tensor]) -> Tensor:
        tokens, labels, positions, numbers = batch
        mask = attention_mask(numbers, self.model.dtype)
        return self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, labels=labels).loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.0)
        steps = self.trainer.estimated_stepping_batches
        warm = max(1, round(0.03 * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    seed_everything(options.seed, verbose=False)
    out = Path(options.out)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
        data = Instructions(options.data, tokenizer, options.length, options.batch, options.validation, options.seed)
        techniques = eke.trainer_kwargs(**recipes.parse_words(options.recipe))
        module = Tuned(options.model, options.lr)
    except (eke.EkeError, ValueError, OSError) as error:
        print(f"finetune.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    left = f", {data.left_out} longer than a row left out" if data.left_out else ""
    print(f"{data.examples} examples in {len(data.train)} rows of {options.length} tokens{left}.")
    keep = ModelCheckpoint(out, "last", enable_version_counter=False, every_n_epochs=1, save_on_train_epoch_end=True)
    callbacks = [keep, *techniques.pop("callbacks", [])]
    trainer = Trainer(
        max_epochs=options.epochs, accumulate_grad_batches=options.accumulate, gradient_clip_val=1.0,
        accelerator=options.accelerator, devices=1, precision=options.precision, callbacks=callbacks, logger=False,
        num_sanity_val_steps=0, enable_model_summary=False, **techniques,
    )  # fmt: skip
    last = out / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if options.resume and last.exists() else None)
    if getattr(module.model, "peft_config", None):
        export(module, out / "adapter")
        print(f"Wrote {out / 'adapter'}, which PeftModel.from_pretrained reads.")
    if options.ask:
        print(answer(module, tokenizer, options.ask))
    return 0


@torch.no_grad()
def answer(module: Tuned, tokenizer: object, question: str, most: int = 64) -> str:
    """What the model says, the likeliest token each time."""
    module.eval()
    given = tokenizer(prompt({"instruction": question}, tokenizer), return_tensors="pt")["input_ids"].to(module.device)
    said = module.model.generate(given, max_new_tokens=most, do_sample=False, use_cache=True)
    return tokenizer.decode(said[0, given.shape[1] :], skip_special_tokens=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a causal Hugging Face model")
    parser.add_argument("--data", required=True, metavar="FILE", help="JSON lines: instruction, input, output")
    parser.add_argument("--out", default="tuned", metavar="DIR", help="for checkpoint and adapter (default: tuned)")
    words = "techniques, such as peft:settings={r: 8},quantize=nf4 adam8bit (default: peft)"
    parser.add_argument("--recipe", nargs="+", default=["peft"], metavar="WORD", help=words)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="rows of a batch (default: 4)")
    parser.add_argument("--accumulate", type=int, default=8, help="batches a step (default: 8)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--validation", type=float, default=0.05, help="share of the examples (default: 0.05)")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ask", metavar="TEXT", help="say what the tuned model answers to this")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/last.ckpt, if it is there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
