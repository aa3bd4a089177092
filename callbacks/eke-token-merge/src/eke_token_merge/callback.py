"""Token merging: each block of a Vision Transformer joins the patches whose keys are most alike and hands on fewer.

Source: Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, "Token Merging: Your ViT But Faster", ICLR 2023,
https://arxiv.org/abs/2210.09461, section 3. Survey section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from eke import ArgumentError, Run, RunError, Technique, TechniqueCallback, in_run
from eke.seams import interceptor
from eke.seams.anatomy import AttentionSite, attention_sites
from eke.seams.patches import PatchesError, find_patches, patch_blocks, relative_positions
from eke.seams.sdpa import Call, Catch, sdpa
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from eke_token_merge.entry import RECORD


def match(keys: Tensor, count: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens are joined: bipartite soft matching.

    Every other token may go, into one of those between; each into the one whose key is most alike, by the cosine. The
    ``count`` most alike pairs are taken.

    Args:
        keys: (batch, tokens, size).
        count: At most half of the tokens, rounded down.
        first: Place of the first token that may go, 0 or 1.

    Returns:
        Of those that may go the ones that stay, rising, (batch, number - count), and the ones that go, (batch, count);
        and the others that these go into, likewise: numbers among those that may go and among the others.

    Source:
        Bolya et al. 2023, section 3, and appendix D.
    """
    keys = F.normalize(keys.float(), dim=-1)
    alike, best = (keys[:, first::2] @ keys[:, 1 - first :: 2].transpose(1, 2)).max(-1)
    order = alike.argsort(dim=1, descending=True, stable=True)
    goes = order[:, :count]
    return order[:, count:].sort(1).values, goes, best.gather(1, goes)


def merge(
    tokens: Tensor, sizes: Tensor, stays: Tensor, goes: Tensor, into: Tensor, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Join tokens as :func:`match` says, each the mean of what it stands for.

    Args:
        tokens, sizes: (batch, tokens, width), and how many patches each stands for, (batch, tokens).
        stays, goes, into: From :func:`match`, with the same ``first``.

    Returns:
        Those that might have gone and stay, then all the others, and their sizes.
    """
    weighted = tokens * sizes[..., None].to(tokens.dtype)
    some, others = weighted[:, first::2], weighted[:, 1 - first :: 2]
    wide = partial(_wide, width=tokens.shape[-1])
    grown = others.scatter_add(1, wide(into), some.gather(1, wide(goes)))
    joined = torch.cat([some.gather(1, wide(stays)), grown], dim=1)
    some, others = sizes[:, first::2], sizes[:, 1 - first :: 2]
    sizes = torch.cat([some.gather(1, stays), others.scatter_add(1, into, some.gather(1, goes))], dim=1)
    return joined / sizes[..., None].to(tokens.dtype), sizes


def _wide(index: Tensor, width: int) -> Tensor:
    return index[..., None].expand(-1, -1, width)


class TokenMerge(TechniqueCallback):
    """Join ``count`` patches a block while training. Attention counts a joined patch as often as it stands for patches.

    Example::

        trainer = Trainer(max_epochs=90, callbacks=[TokenMerge(8)])

    Args:
        count: Patches that each block joins into others. At most half of those that are left.
        tail: Share of the run, at its end, in which nothing is merged.
        proportional: Add the logarithm of a token's size to the attention that it gets.
        divide: Which patches may go into the others: of the ``"tokens"``, the model's own counted, every other one, as
            in the authors' code: with a class token in front the second patch, the fourth and so on; or of the
            ``"patches"`` the first, the third and so on.
        evaluate: Merge in validation, testing and prediction, too. Otherwise they see all patches.
        prefix: Tokens of the model's own in front of the patches. By default found, see :mod:`eke.seams.patches`.
        blocks: Dotted paths of lists of blocks, one or several. By default those that see images: of an image and a
            text tower, the image's.

    Raises:
        ValueError: wrong numbers; no patch embedding, without ``prefix``; a model of texts; relative positions; blocks
            without attention.
        MisconfigurationException: a run of unknown length with a tail; causal attention; attention that does not go
            through ``scaled_dot_product_attention``, with ``proportional``; compiled blocks; activation checkpointing.
    """

    technique: ClassVar[Technique] = RECORD
    may_change = ("evaluate",)
    _blocks: interceptor.InterceptedBlocks | None = in_run(None)
    _states: list[dict[str, Any]] = in_run(list)  # of each list in this batch
    _merges: bool = in_run(False)

    def __init__(
        self,
        count: int = 8,
        *,
        tail: float = 0.0,
        proportional: bool = True,
        divide: Literal["tokens", "patches"] = "tokens",
        evaluate: bool = False,
        prefix: int | None = None,
        blocks: str | Sequence[str] | None = None,
    ) -> None:
        if count < 0 or count != int(count):
            raise ArgumentError(f"count={count}: give a number of patches that each block joins, 0 or more.")
        if not 0 <= tail <= 1:
            raise ArgumentError(f"tail={tail}: give a share of the run.")
        if prefix is not None and prefix < 0:
            raise ArgumentError(f"prefix={prefix}: give 0 or more tokens.")
        if divide not in ("tokens", "patches"):
            raise ArgumentError(f"divide={divide!r} is none of: tokens, patches.")
        self.count, self.tail, self.proportional, self.evaluate = count, tail, proportional, evaluate
        self.divide = divide
        self.prefix, self.blocks = prefix, blocks

    def check(self, run: Run) -> None:
        if run.fitting and self.tail > 0:
            run.until(1.0, "tail")  # it goes by the length of the run

    def alter_model(self, run: Run) -> None:
        on_texts = (
            "TokenMerge joins patches of images. On texts, eke-random-ltd leaves tokens out of the middle blocks."
        )
        lists = patch_blocks(run.module, self.blocks, self.prefix, "TokenMerge", on_texts)
        for found in lists:
            if pairs := relative_positions(found.container):
                raise PatchesError(
                    f"The blocks at {found.path!r} hold relative positions ({pairs[0]}), for all tokens in their "
                    "places: none can be merged. TokenMerge serves blocks without, such as ViT's."
                )
            for block in found:
                if not attention_sites(block):
                    raise PatchesError(
                        f"A {type(block).__name__} has no attention whose keys are to be found; TokenMerge compares "
                        "them."
                    )
        self._states = [{} for _ in lists]
        if self.prefix is None:
            try:
                embeddings = [find_patches(run.module, found.path) for found in lists]
            except PatchesError as error:
                raise PatchesError(f"{error} Say how many tokens precede the patches: TokenMerge(prefix=1).") from None
            for embedding, state in zip(embeddings, self._states, strict=True):
                run.at_end(embedding.module.register_forward_hook(partial(_count, state)).remove)
        self._blocks = run.blocks(lists)
        if self.evaluate and not run.fitting:
            self._switch(True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        merges = self._due()
        if merges or self._merges:
            self._switch(merges)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # By the progress and not by what the last batch had: a run may go on, or be looked at, before it has one.
        if self.evaluate and self.run.fitting:
            self._switch(self._due())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._merges and not self.evaluate:
            self._blocks.clear()

    def step_kind(self) -> str:
        left = ", ".join(str(state.get("left", 0)) for state in self._states)
        return f"{left} patches at the end" if self._merges else "all patches"

    def _due(self) -> bool:
        """Whether a training run merges where it is."""
        return self.count > 0 and (self.tail == 0 or self.progress.share < 1 - self.tail)

    def _switch(self, merges: bool) -> None:
        self._merges = merges
        if not merges:
            self._blocks.clear()
            return
        for blocks, state in zip(self._blocks.lists(), self._states, strict=True):
            for number, block in enumerate(blocks):
                self._blocks.put(block, Merge(self, state, block, first=number == 0))


class Merge:
    """Runs a block, notes its keys, and joins what it gives."""

    priority = -1  # outside an action that skips the block

    def __init__(self, owner: TokenMerge, state: dict[str, Any], block: nn.Module, first: bool) -> None:
        self.count, self.proportional, self.prefix = owner.count, owner.proportional, owner.prefix
        self.first, self.state = first, state
        self.divide = owner.divide
        self.attention = attention_sites(block)[0]
        self.compiled = getattr(block, "_compiled_call_impl", None) is not None
        self.recomputed = getattr(block, "gradient_checkpointing", False)  # Hugging Face's

    def __call__(self, call_next: Any, hidden: Tensor, args: Any, kwargs: Any, form: interceptor.Form) -> Any:
        state = self.state
        self._check(hidden, args, kwargs)
        if self.first:
            own = hidden.shape[1] - state["patches"] if self.prefix is None else self.prefix
            if not 0 <= own < hidden.shape[1]:
                raise RunError(
                    f"The first block gets {hidden.shape[1]} tokens, and {state.get('patches')} patches are cut: "
                    "say how many tokens of its own come first: TokenMerge(prefix=1)."
                )
            state.update(own=own, sizes=torch.ones(hidden.shape[:2], device=hidden.device))
        with Watch(self.attention, state["sizes"] if self.proportional else None) as watch:
            output = call_next(hidden, args, kwargs)
        own, sizes = state["own"], state["sizes"]
        count = min(self.count, (hidden.shape[1] - own) // 2)
        if count and watch.keys is not None:  # None: another technique skipped the block
            tokens = output[0] if isinstance(output, tuple) else output
            first = own % 2 if self.divide == "tokens" else 0
            chosen = match(watch.keys[:, own:].detach(), count, first)
            joined, grown = merge(tokens[:, own:], sizes[:, own:], *chosen, first)
            state["sizes"] = torch.cat([sizes[:, :own], grown], dim=1)
            tokens = torch.cat([tokens[:, :own], joined], dim=1)
            output = (tokens, *output[1:]) if isinstance(output, tuple) else tokens
        state["left"] = state["sizes"].shape[1] - own
        return output

    def _check(self, hidden: Tensor, args: Any, kwargs: Any) -> None:
        if self.compiled or torch.compiler.is_compiling():
            raise RunError(
                "TokenMerge looks into the attention while it runs, which compiled code does not let it. Leave "
                "torch.compile or the technique out."
            )
        if self.recomputed or torch._C._current_graph_task_id() != -1:
            raise RunError(_RECOMPUTED)
        if hidden.ndim != 3:
            raise RunError(
                f"TokenMerge met hidden states of shape {tuple(hidden.shape)} and needs (batch, length, width)."
            )
        for value in (*args, *kwargs.values()):
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, Tensor) and {hidden.shape[1], self.state.get("patches", -1)} & set(part.shape):
                    raise RunError(
                        f"The blocks also get an input of shape {tuple(part.shape)}, one entry a token. TokenMerge "
                        "serves models that add their positions before the blocks and take no mask."
                    )


_RECOMPUTED = (
    "The block is run again in the backward pass (activation checkpointing): it would not see the tokens that it saw. "
    "Switch that off, or leave TokenMerge out."
)


class Watch:
    """Notes the keys of one attention, and lets it count each token by its size.

    Args:
        attention: As found in the block.
        sizes: (batch, tokens), or None for attention as it is.
    """

    def __init__(self, attention: AttentionSite, sizes: Tensor | None) -> None:
        self.attention, self.bias = attention, None if sizes is None else sizes.log()
        self.keys: Tensor | None = None  # (batch, tokens, size), the mean over heads
        self.weighed = False
        self.caught = Catch(self._weigh)
        self.hook: Any = None

    def __enter__(self) -> Watch:
        module = self.attention.module
        if self.attention.kind == "torch":
            self.hook = module.register_forward_pre_hook(self._of_torch, with_kwargs=True)
        else:
            self.hook = self.attention.key.module.register_forward_hook(self._of_projection)
        self.caught.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.caught.__exit__(*error)
        self.hook.remove()
        if error[0] is None and self.keys is not None and self.bias is not None and not self.weighed:
            raise RunError(
                f"The attention at {self.attention.path!r} does not go through scaled_dot_product_attention, so that "
                "tokens cannot be weighed by their size. Choose that implementation (attn_implementation='sdpa'), or "
                "TokenMerge(proportional=False)."
            )

    def _weigh(self, call: Call) -> Tensor:
        if call.causal:
            raise RunError(
                "The attention is causal: a token that is merged with a later one would see the future. TokenMerge "
                "serves Vision Transformers."
            )
        if self.bias is None or call.key.shape[2] != self.bias.shape[1]:
            return sdpa(call)
        if call.mask is not None and call.mask.dtype == torch.bool:
            raise RunError("The attention gets a mask. TokenMerge serves models that take none.")
        self.weighed = True
        bias = self.bias[:, None, None].to(call.query.dtype)
        return sdpa(call._replace(mask=bias if call.mask is None else call.mask + bias))

    def _of_projection(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.attention.kind == "fused":
            self.keys = self.attention.split(output)[1].mean(2)
        else:
            self.keys = output.unflatten(-1, (self.attention.key_heads, -1)).mean(2)

    def _of_torch(self, module: nn.MultiheadAttention, args: Any, kwargs: Any) -> None:
        source = kwargs.get("key", args[1] if len(args) > 1 else None)
        first, end = self.attention.key.rows
        bias = None if module.in_proj_bias is None else module.in_proj_bias[first:end]
        with torch.no_grad():
            keys = F.linear(source, self.attention.key.matrix(), bias)
        keys = keys if module.batch_first else keys.transpose(0, 1)
        self.keys = keys.unflatten(-1, (self.attention.key_heads, -1)).mean(2)


def _count(state: dict[str, Any], module: Any, args: Any, output: Tensor) -> None:
    state["patches"] = output.shape[2:].numel()
