"""Masked image pretraining: train a Vision Transformer to fill in patches that were hidden from it.

Sources: He, Chen, Xie, Li, Dollar, Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022,
https://arxiv.org/abs/2111.06377, section 3; Xie, Zhang, Cao and others, "SimMIM", CVPR 2022,
https://arxiv.org/abs/2111.09886; Bao, Dong, Piao, Wei, "BEiT", ICLR 2022, https://arxiv.org/abs/2106.08254. Survey
section 2.2, references [35] and [6].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from eke import EkeError, Run, Technique, TechniqueCallback, compat, in_run
from eke.seams import interceptor
from eke.seams.blocks import Blocks
from eke.seams.patches import (
    PatchEmbedding,
    PatchesError,
    find_images,
    find_patches,
    image_blocks,
    one_of,
    relative_positions,
)
from eke.seams.progress import Until
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from eke_mae.decoder import NAME, Decoder, Head, Hidden, normalized, pixels_of_patches
from eke_mae.entry import RECORD
from eke_mae.masks import blockwise, random_units, units_hidden


class MAEError(EkeError, MisconfigurationException, ValueError):
    """An argument, a model, a batch or a Trainer with which patches cannot be hidden."""


_MASK = {"mae": 0.75, "simmim": 0.6, "beit": 0.4}


class MAE(TechniqueCallback):
    """Pretrain the model's own encoder on its training images: no labels, and none of the user's loss.

    ``training_step`` is not run; the loss is that of the hidden patches, logged as ``masked_loss``, and for each
    validation batch as ``val_masked_loss``. The model's checkpoints hold what they hold without it: leave the callback
    out, load the checkpoint, and fine-tune.

    Example::

        Trainer(max_epochs=400, callbacks=[MAE()]).fit(model, images)

        # or both in one run: half of the steps on the images alone, then the user's training_step
        Trainer(max_epochs=100, callbacks=[MAE(duration=0.5)]).fit(model, images_and_labels)

    Args:
        mask: Share of the patches that is hidden. By default 0.75 for ``"mae"``, 0.6 for ``"simmim"``, 0.4 for
            ``"beit"``.
        method: ``"mae"``: the encoder sees only the visible patches, a light decoder gives the pixels of the others.
            ``"simmim"``: hidden squares are replaced by a learned token in the encoder, a linear map gives their
            pixels. ``"beit"``: hidden rectangles, likewise, and the map gives which of ``classes`` visual words they
            are, as ``tokenizer`` says.
        duration: How long it pretrains: a share of the run up to 1, optimizer steps, or words. Then the user's own
            step takes over, on all patches.
        decoder_width: Of the decoder of ``"mae"``, a multiple of 4. By default half of the encoder's.
        decoder_depth: Blocks of it.
        decoder_heads: Heads of each; its width is a multiple of them.
        normalize: For ``"mae"``: the pixels of each patch with mean 0 and variance 1.
        tokenizer: For ``"beit"``: images to visual words, (batch, patches) or (batch, rows, columns), int64.
        classes: For ``"beit"``: how many visual words there are.
        unit: For ``"simmim"``: side of a hidden square in pixels.
        encoder: Dotted path of the encoder. By default the innermost module that holds the patch embedding and the
            blocks; it is called with images.
        blocks: Dotted path of the list of blocks. By default the one that sees images: of two towers, the image's.

    Raises:
        ValueError: wrong numbers; no patch embedding, a stem of convolutions, relative positions, no images.
        MisconfigurationException: a strategy that shards; an encoder that fails on a part of its patches.
    """

    technique: ClassVar[Technique] = RECORD
    must_not_change = ("method", "decoder_width", "decoder_depth", "classes")
    _sight: Sight | None = in_run(None)
    _until: Until | None = in_run(None)
    _kind: str = in_run("")

    def __init__(
        self,
        mask: float | None = None,
        *,
        method: Literal["mae", "simmim", "beit"] = "mae",
        duration: float | str = 1.0,
        decoder_width: int | None = None,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
        normalize: bool = True,
        tokenizer: Callable[[Tensor], Tensor] | None = None,
        classes: int | None = None,
        unit: int = 32,
        encoder: str | None = None,
        blocks: str | None = None,
    ) -> None:
        if method not in _MASK:
            raise MAEError(f"method={method!r} is none of: {', '.join(_MASK)}.")
        mask = _MASK[method] if mask is None else mask
        if not 0 < mask < 1:
            raise MAEError(f"mask={mask}: give a share of the patches between 0 and 1.")
        if not isinstance(duration, str) and (duration <= 0 or (duration > 1 and duration != int(duration))):
            raise MAEError(f"duration={duration}: give a share of the run up to 1, or optimizer steps.")
        if decoder_depth < 1 or decoder_heads < 1 or unit < 1:
            raise MAEError(
                f"decoder_depth={decoder_depth}, decoder_heads={decoder_heads}, unit={unit}: give 1 or more."
            )
        if (method == "beit") != (tokenizer is not None and classes is not None):
            raise MAEError(
                f"method={method!r} with tokenizer={tokenizer!r}, classes={classes!r}: method='beit' needs both, "
                "images to visual words and their number; the others take neither."
            )
        self.mask, self.method, self.duration, self.normalize, self.unit = mask, method, duration, normalize, unit
        self.decoder_width, self.decoder_depth, self.decoder_heads = decoder_width, decoder_depth, decoder_heads
        self.tokenizer, self.classes, self.encoder, self.blocks = tokenizer, classes, encoder, blocks
        self.decoder: Hidden | None = None

    def check(self, run: Run) -> None:
        if not run.fitting:
            return
        self._until = None if self.duration == 1 else run.until(self.duration, "duration")
        compat.expect_unused_parameters(run.trainer.strategy)  # a head that labels would train

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        if pairs := relative_positions(pl_module):
            raise PatchesError(
                f"{type(pl_module).__name__} has relative positions ({pairs[0]}), for all patches in their places. MAE "
                "serves encoders that add positions to their patches and attend to all of them."
            )
        try:
            found = one_of(pl_module, image_blocks(pl_module, self.blocks))
        except PatchesError as error:
            if any(isinstance(part, nn.Embedding) for part in pl_module.modules()):
                raise PatchesError(
                    f"{error} MAE hides patches of images. On texts, eke-masked-lm hides words."
                ) from None
            raise
        embedding = find_patches(pl_module, found.path)
        if embedding.stem or len(embedding.patch) != 2:
            raise PatchesError(
                f"{type(pl_module).__name__} does more than to cut images into patches before its blocks "
                f"({', '.join(embedding.stem) or embedding.path}): what is hidden would be seen by its neighbours."
            )
        if self.decoder is None:
            self.decoder = self._make(embedding)
        pl_module.add_module(NAME, self.decoder)
        run.at_end(lambda: pl_module._modules.pop(NAME))
        path = _common(embedding.path, found.path) if self.encoder is None else self.encoder
        self._sight = Sight(pl_module.get_submodule(path) if path else pl_module, embedding, found, path)
        run.at_end(self._sight.close)

    def alter_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        # Into a group that is there: a scheduler that knows the groups by number knows it.
        optimizer.param_groups[0]["params"] += [one for one in self.decoder.parameters() if id(one) not in held]
        return optimizer

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Tensor:
        if self._over:
            self._kind = ""
            return call_next(batch, *args)
        seed = run.once("seed", lambda: run.seed(per_rank=True))
        loss = self.masked_loss(find_images(batch, self._sight.embedding.module.in_channels), seed)
        run.module.log("masked_loss", loss.detach())
        return loss

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if not self.run.fitting or self._over:
            return
        images = find_images(batch, self._sight.embedding.module.in_channels)
        loss = self.masked_loss(images, seed=batch_idx)  # the same masks each time
        pl_module.log("val_masked_loss", loss, on_epoch=True, batch_size=len(images), sync_dist=trainer.world_size > 1)

    @property
    def _over(self) -> bool:
        """Whether the user's own step trains now."""
        return self._until is not None and self._until.reached

    def step_kind(self) -> str:
        return self._kind

    def state_dict(self) -> dict[str, Any]:
        return {"decoder": self.decoder.own()} if self.decoder is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.decoder is not None and "decoder" in state:
            self.decoder.put_back(state["decoder"])

    def masked_loss(self, images: Tensor, seed: int) -> Tensor:
        """Loss of the hidden patches of ``images``, (batch, channels, height, width), whose masks follow from ``seed``.

        Source:
            He et al. 2022: mean squared error over the hidden patches alone; Xie et al. 2022: mean absolute error;
            Bao et al. 2022: cross entropy.
        """
        grid, numbers = self._sight.embedding.grid(images), torch.Generator(images.device).manual_seed(seed)
        patch, patches = self._sight.embedding.patch, grid[0] * grid[1]
        if self.method == "mae":
            if patches < 2:
                raise MAEError(
                    f"The images are cut into {patches} patch: none would be left to see, or none to hide. Give larger "
                    "images, or a model with smaller patches."
                )
            visible = min(max(1, round(patches * (1 - self.mask))), patches - 1)
            self._kind = f"{visible} of {patches} patches seen"
            order = torch.rand(len(images), patches, generator=numbers, device=images.device).argsort(1)
            target, predicted = self._mae(images, order, order[:, :visible], grid)
            hidden = order[:, visible:]
            error = (predicted.float() - target).square().mean(-1)
            return error.gather(1, hidden).mean()
        self._kind = "mask tokens"
        if self.method == "simmim":
            unit = max(1, self.unit // patch[0])
            squares = -(-grid[0] // unit) * -(-grid[1] // unit)
            if not 0 < units_hidden(squares, self.mask) < squares:
                raise MAEError(
                    f"MAE(method='simmim', mask={self.mask}, unit={self.unit}) hides all or nothing of an image of "
                    f"{grid[0]} by {grid[1]} patches. Give a unit of fewer pixels; a patch has {patch[0]}."
                )
            hidden = random_units(len(images), grid, self.mask, unit, numbers)
            predicted = self.decoder(self._sight.features(images, Cover(hidden, self.decoder.mask)))[:, -patches:]
            return (predicted.float() - pixels_of_patches(images, patch).float()).abs().mean(-1)[hidden].mean()
        cpu = torch.Generator().manual_seed(seed)
        smallest = min(16, max(1, round(patches * 16 / 196)))  # for the paper's 14 by 14 it is 16
        hidden = torch.stack([blockwise(grid, max(1, int(patches * self.mask)), cpu, smallest) for _ in images])
        hidden = hidden.to(images.device)
        with torch.no_grad():
            words = self.tokenizer(images).reshape(len(images), -1)
        if words.shape[1] != patches:
            raise MAEError(
                f"MAE's tokenizer gave {words.shape[1]} visual words an image, of {grid[0]} by {grid[1]} patches."
            )
        features = self._sight.features(images, Cover(hidden, self.decoder.mask))[:, -patches:]
        return F.cross_entropy(self.decoder(features[hidden]).float(), words[hidden])

    def _mae(self, images: Tensor, order: Tensor, seen: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Target and prediction of all patches, (batch, patches, pixels), of which the encoder sees ``seen``."""
        features = self._sight.features(images, Keep(seen, order.shape[1]))
        target = pixels_of_patches(images, self._sight.embedding.patch).float()
        predicted = self.decoder(features, order, seen.shape[1], grid)
        return normalized(target) if self.normalize else target, predicted

    def _make(self, embedding: PatchEmbedding) -> Hidden:
        conv = embedding.module
        width, pixels = conv.out_channels, conv.in_channels * embedding.patch[0] * embedding.patch[1]
        cards = [torch.cuda.current_device()] if torch.cuda.is_available() else []  # which manual_seed seeds too
        with torch.random.fork_rng(devices=cards):
            torch.manual_seed(int(torch.randint(2**60, (), generator=self.generator)))
            if self.method != "mae":
                return Head(width, self.classes if self.method == "beit" else pixels)
            narrow = self.decoder_width or max(
                4 * self.decoder_heads, width // 2 // self.decoder_heads * self.decoder_heads
            )
            if narrow % self.decoder_heads:
                raise MAEError(f"decoder_width={narrow} is no multiple of decoder_heads={self.decoder_heads}.")
            return Decoder(width, narrow, self.decoder_depth, self.decoder_heads, pixels)


class Sight:
    """Runs an encoder on images of which something is hidden, and gives the features behind its last block and norm."""

    def __init__(self, encoder: nn.Module, embedding: PatchEmbedding, blocks: Blocks, path: str) -> None:
        self.encoder, self.embedding, self.blocks, self.path = encoder, embedding, blocks, path
        self.seen: dict[str, Any] = {}  # what the hooks note of one call
        self._held: list[nn.Module] = []
        inside = {id(part) for block in blocks for part in block.modules()}
        norms = [part for part in encoder.modules() if "norm" in type(part).__name__.lower() and id(part) not in inside]
        self.hooks = [norm.register_forward_hook(partial(_note_norm, self.seen)) for norm in norms]
        self.hooks.append(embedding.module.register_forward_hook(partial(_cover, self.seen)))

    def features(self, images: Tensor, hide: Keep | Cover) -> Tensor:
        """(batch, own + patches, width). The tokens of the model's own come first."""
        self.seen.update(hide=hide, blocks=None, norm=None, on=True)
        first, last = self._ends()
        note = Note(self.seen)
        if first is last:
            interceptor.put(first, RECORD.name, *([hide] if isinstance(hide, Keep) else []), note)
        else:
            interceptor.put(first, RECORD.name, *([hide] if isinstance(hide, Keep) else []))
            interceptor.put(last, RECORD.name, note)
        try:
            self.encoder(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise MAEError(
                f"The encoder at {self.path or 'the module itself'!r} failed on images of which patches are hidden: "
                f"{error}. It has to take any number of tokens behind its first block: no windows, no head for each "
                "place. Name the part that does as MAE(encoder='model.vit')."
            ) from error
        finally:
            seen = dict(self.seen)
            self.seen.clear()  # a model that is copied between steps has no graph to copy
            for block in (first, last):
                interceptor.put(block, RECORD.name)
        if seen["blocks"] is None:
            raise MAEError(
                f"Calling {self.path or 'the module'!r} with images ran none of its blocks. Name the encoder, as "
                "MAE(encoder='model.vit')."
            )
        return seen["blocks"] if seen["norm"] is None else seen["norm"]

    def _ends(self) -> tuple[nn.Module, nn.Module]:
        """First and last block of the moment: another technique may have added some."""
        blocks = list(self.blocks.container)
        now = [blocks[0], blocks[-1]]
        if not self._held or any(new is not old for new, old in zip(now, self._held, strict=True)):
            interceptor.detach([old for old in self._held if not any(old is new for new in now)], RECORD.name)
            interceptor.attach(now, RECORD.name)
            self._held = now
        return blocks[0], blocks[-1]

    def close(self) -> None:
        interceptor.detach(self._held, RECORD.name)
        for hook in self.hooks:
            hook.remove()


class Keep:
    """At the entrance of the first block: lets in the tokens of the model's own and the patches that are seen.

    Args:
        seen: (batch, visible), int64.
        patches: Of a whole image.
    """

    priority = -1  # outside an action that skips the block

    def __init__(self, seen: Tensor, patches: int) -> None:
        self.seen, self.patches = seen, patches

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        own = hidden.shape[1] - self.patches if hidden.ndim == 3 else -1
        if own < 0:
            raise RuntimeError(f"the blocks get hidden states {tuple(hidden.shape)}, of {self.patches} patches")
        for value in (*args, *kwargs.values()):
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, Tensor) and {hidden.shape[1], self.patches} & set(part.shape):
                    raise RuntimeError(f"the blocks get an input {tuple(part.shape)} beside them, one entry a token")
        front = torch.arange(own, device=hidden.device).expand(len(hidden), -1)
        return call_next(interceptor.gather_tokens(hidden, torch.cat([front, self.seen + own], dim=1)), args, kwargs)


class Note:
    """At the exit of the last block: notes what it gives, or what passes it by."""

    priority = -1

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        output = call_next(hidden, args, kwargs)
        self.seen["blocks"] = output[0] if isinstance(output, tuple) else output
        return output


class Cover:
    """In place of hidden patches the encoder gets a learned token, before it adds their positions.

    Args:
        hidden: (batch, patches), bool.
        token: (width,).
    """

    def __init__(self, hidden: Tensor, token: Tensor) -> None:
        self.hidden, self.token = hidden, token


def _cover(seen: dict[str, Any], module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    hide = seen.get("hide")
    if not seen.get("on") or not isinstance(hide, Cover):
        return None
    hidden = hide.hidden.view(len(output), 1, *output.shape[2:])
    return torch.where(hidden, hide.token.to(output.dtype)[:, None, None], output)


def _note_norm(seen: dict[str, Any], module: nn.Module, args: Any, output: Any) -> None:
    blocks = seen.get("blocks") if seen.get("on") else None
    if blocks is not None and seen["norm"] is None and isinstance(output, Tensor) and output.shape == blocks.shape:
        seen["norm"] = output


def _common(one: str, other: str) -> str:
    """The longest path that both begin with, without the parts of their own."""
    parts = []
    for left, right in zip(one.split(".")[:-1], other.split(".")[:-1], strict=False):
        if left != right:
            break
        parts.append(left)
    return ".".join(parts)
