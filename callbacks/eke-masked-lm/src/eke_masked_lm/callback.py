"""Masked language modelling on the device, anew each time a sequence is seen, and a prediction head that runs on the
hidden positions alone.

Sources: Devlin, Chang, Lee, Toutanova, "BERT", NAACL 2019, https://arxiv.org/abs/1810.04805, section 3.1; Joshi, Chen,
Liu and others, "SpanBERT", TACL 2020, https://arxiv.org/abs/1907.10529, section 3.1; Song, Tan, Qin, Lu, Liu, "MASS",
ICML 2019, https://arxiv.org/abs/1905.02450, section 3. Survey section 2.2, references [48] and [80].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from eke import Run, Technique, TechniqueCallback
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from eke_masked_lm.entry import RECORD
from eke_masked_lm.masks import IGNORED, choose_spans, choose_tokens, choose_words, corrupt, hide_span, words_of

_EVALUATION = 7  # the seed of the masks that validation sees, each time the same


class Masking(TechniqueCallback):
    """What both kinds of masking share: ids in, draws that differ by process, masks for validation that stay."""

    technique: ClassVar[Technique] = RECORD

    def __init__(
        self, mask_token: int, vocabulary: int, special: Sequence[int], share: float, masked: float, random: float
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: give a share of the tokens above 0.")
        if masked < 0 or random < 0 or masked + random > 1 + 1e-9:
            raise ValueError(f"masked={masked}, random={random}: give shares of those hidden, 1 or less in all.")
        if vocabulary < 1 or not all(0 <= one < vocabulary for one in (mask_token, *special)):
            raise ValueError(
                f"mask_token={mask_token}, special={tuple(special)}: give ids below vocabulary={vocabulary}."
            )
        self.mask_token, self.vocabulary, self.special = mask_token, vocabulary, tuple(special)
        self.share, self.masked, self.random = share, masked, random
        self._rank = 0
        self._evaluated = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rank = trainer.global_rank

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = 0

    def alter_batch(self, run: Run, batch: Any) -> Any:
        seed = int(torch.randint(2**40, (), generator=self.generator)) * 4096 + self._rank
        return self.hide(batch, seed)

    def alter_eval_batch(self, run: Run, batch: Any) -> Any:
        self._evaluated += 1
        return self.hide(batch, _EVALUATION * 2**32 + self._evaluated)

    def hide(self, batch: Any, seed: int) -> Any:
        """The batch with tokens hidden and labels for them, as ``seed`` draws them."""
        raise NotImplementedError

    def _candidates(self, ids: Tensor, attention: Tensor | None) -> Tensor:
        candidates = torch.ones_like(ids, dtype=torch.bool) if attention is None else attention.bool()
        for one in (*self.special, self.mask_token):
            candidates = candidates & (ids != one)
        return candidates


class MaskedLM(Masking):
    """Hide a share of the tokens of each sequence and have the model predict them.

    Batches hold token ids, (batch, length), int64: a mapping with ``input_ids`` (and ``attention_mask``), which gets
    ``labels``; a tuple or list, whose first part are the ids and whose second becomes the labels; or the ids alone,
    which become such a tuple. Labels are -100 where nothing was hidden. Validation sees the same masks each time.

    Example::

        trainer = Trainer(callbacks=[MaskedLM.of(tokenizer, unit="word", head="model.cls")])

    Args:
        mask_token: Id of the mask token.
        vocabulary: Number of ids; random ones are drawn from all of them.
        special: Ids that are never hidden: class, separator, padding.
        share: Of the tokens that are hidden: exactly its rounded number in each sequence, and one at least.
        unit: ``"token"``; ``"word"``: all tokens of a word or none; ``"span"``: a few neighbours at a time.
        masked: Share of the hidden tokens that becomes the mask token.
        random: Share of them that becomes a random one. The rest stays.
        continues: For ``"word"``: ids of tokens that go on with the word before. Or give ``word_ids``, (batch,
            length), in the batch.
        head: Dotted path of the prediction head. It then runs on the hidden positions alone, on (1, hidden, width), and
            labels are (1, hidden): for losses over flattened logits and labels.

    Raises:
        ValueError: wrong shares or ids, no such head, no words.
        MisconfigurationException: a batch without ids; a head that gets something else than hidden states.
    """

    def __init__(
        self,
        mask_token: int,
        vocabulary: int,
        *,
        special: Sequence[int] = (),
        share: float = 0.15,
        unit: Literal["token", "word", "span"] = "token",
        masked: float = 0.8,
        random: float = 0.1,
        continues: Sequence[int] | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__(mask_token, vocabulary, special, share, masked, random)
        if unit not in ("token", "word", "span"):
            raise ValueError(f"unit={unit!r} is none of: token, word, span.")
        self.unit, self.head = unit, head
        self.continues = None if continues is None else tuple(continues)
        self._hooked: Any = None
        self._hidden: list[Tensor] = []  # of the batch that is under way, for the head

    @classmethod
    def of(cls, tokenizer: Any, **arguments: Any) -> MaskedLM:
        """For a Hugging Face tokenizer: its mask token, its special tokens, and which of its tokens go on with a word.

        Raises:
            ValueError: it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token. Add one: add_special_tokens({{'mask_token': ...}})."
            )
        given = dict(special=tokenizer.all_special_ids, continues=_continuing(tokenizer))
        return cls(tokenizer.mask_token_id, len(tokenizer), **{**given, **arguments})

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        if self.head is None or self._hooked is not None:
            return
        try:
            module = pl_module.get_submodule(self.head)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"head={self.head!r} is no module of {type(pl_module).__name__}, whose parts are: {names}."
            ) from None
        self._hooked = module.register_forward_pre_hook(partial(_keep_hidden, self._hidden))

    def end_run(self, run: Run) -> None:
        if self._hooked is not None:
            self._hooked.remove()
        self._hooked = None
        self._hidden.clear()

    def hide(self, batch: Any, seed: int) -> Any:
        ids, attention, words = _ids(batch)
        numbers = torch.Generator(ids.device).manual_seed(seed)
        candidates, groups = self._candidates(ids, attention), None
        if self.unit == "word":
            hidden = choose_words(candidates, self._words(ids, words), self.share, numbers)
        elif self.unit == "span":
            hidden, groups = choose_spans(candidates, self.share, numbers)
        else:
            hidden = choose_tokens(candidates, self.share, numbers)
        out = corrupt(ids, hidden, self.mask_token, self.vocabulary, numbers, self.masked, self.random, groups)
        labels = ids.masked_fill(~hidden, IGNORED)
        if self.head is not None:
            self._hidden[:] = [hidden]
            labels = ids[hidden][None]
        return _with(batch, out, {"labels": labels})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_hooked": None, "_hidden": []}  # a copy meets its model anew

    def _words(self, ids: Tensor, words: Tensor | None) -> Tensor:
        if words is not None:
            return words.clamp(min=0)
        if self.continues is None:
            raise MisconfigurationException(
                "MaskedLM(unit='word') does not know which tokens make a word. Give continues=, the ids of tokens that "
                "go on with the word before, use MaskedLM.of(tokenizer), or put word_ids into the batch."
            )
        table = torch.zeros(self.vocabulary, dtype=torch.bool, device=ids.device)
        table[list(self.continues)] = True
        return words_of(ids, table)


class MASS(Masking):
    """Hide one span of each sequence from an encoder and have a decoder predict it from the encoder and its own past.

    The decoder gets the span alone: the tokens before and after it, which the encoder sees, are left out. Batches are
    mappings with ``input_ids`` (and ``attention_mask``), or ids alone; they become mappings with ``input_ids``,
    ``attention_mask``, ``decoder_input_ids``, ``decoder_attention_mask``, ``labels`` and the position ids.

    Args:
        mask_token, vocabulary, special, masked, random: As of :class:`MaskedLM`, for what the encoder sees.
        start_token: What the decoder gets before the first token of a sequence.
        pad_token: Fills spans up to the longest of the batch.
        share: Of a sequence that the span takes.
        positions: Name under which the batch gets the places of the decoder's tokens, (batch, span), int64: the start
            token has 0, the first token 1. None for models with relative positions, such as T5.

    Raises:
        ValueError: wrong shares or ids.
        MisconfigurationException: a batch without ids.
    """

    def __init__(
        self,
        mask_token: int,
        vocabulary: int,
        *,
        start_token: int,
        pad_token: int,
        special: Sequence[int] = (),
        share: float = 0.5,
        masked: float = 0.8,
        random: float = 0.1,
        positions: str | None = "decoder_position_ids",
    ) -> None:
        super().__init__(mask_token, vocabulary, (*special, start_token, pad_token), share, masked, random)
        self.start_token, self.pad_token, self.positions = start_token, pad_token, positions

    def hide(self, batch: Any, seed: int) -> Any:
        ids, attention, _ = _ids(batch)
        numbers = torch.Generator(ids.device).manual_seed(seed)
        attention = torch.ones_like(ids) if attention is None else attention
        start, size = hide_span(attention.sum(1), self.share, numbers)
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = (places >= start[:, None]) & (places < (start + size)[:, None])
        encoder = corrupt(ids, hidden, self.mask_token, self.vocabulary, numbers, self.masked, self.random)

        span = torch.arange(int(size.max()), device=ids.device)
        at = (start[:, None] + span).clamp(max=ids.shape[1] - 1)
        inside = span < size[:, None]
        before = torch.cat([torch.full_like(ids[:, :1], self.start_token), ids[:, :-1]], dim=1)
        new = {
            "attention_mask": attention,
            "decoder_input_ids": before.gather(1, at).masked_fill(~inside, self.pad_token),
            "decoder_attention_mask": inside.to(attention.dtype),
            "labels": ids.gather(1, at).masked_fill(~inside, IGNORED),
        }
        if self.positions is not None:
            new[self.positions] = at.masked_fill(~inside, 0)
        return _with(batch if isinstance(batch, Mapping) else {}, encoder, new)


def _ids(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Token ids, attention mask and word numbers of a batch."""
    if isinstance(batch, Mapping):
        ids, attention, words = (batch.get(name) for name in ("input_ids", "attention_mask", "word_ids"))
    else:
        ids, attention, words = (batch[0] if isinstance(batch, (list, tuple)) and batch else batch), None, None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        have = f"{type(ids).__name__} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise MisconfigurationException(
            f"The batch holds no token ids where they are looked for: a mapping's input_ids, or the first part; "
            f"found {have}. They have to be whole numbers of shape (batch, length)."
        )
    return ids, attention, words


def _with(batch: Any, ids: Tensor, new: dict[str, Tensor]) -> Any:
    if isinstance(batch, Mapping):
        kept = {name: value for name, value in batch.items() if name != "word_ids"}
        changed = {**kept, "input_ids": ids, **new}
        return changed if type(batch) is dict else type(batch)(changed)
    if isinstance(batch, Tensor):
        return ids, new["labels"]
    parts = [ids, new["labels"], *batch[2:]]
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def _keep_hidden(hidden: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not hidden:
        return None  # predicting: the head gives every position
    states = args[0] if args else None
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[:2] != hidden[0].shape:
        found = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise MisconfigurationException(
            f"The head of MaskedLM gets {found} and not hidden states of {tuple(hidden[0].shape)} tokens. Name "
            "the module that maps hidden states to the vocabulary, or leave head= out."
        )
    return (states[hidden[0]][None], *args[1:])


def _continuing(tokenizer: Any) -> list[int]:
    """Ids of tokens that go on with the word before: WordPiece marks those, other vocabularies mark the beginnings."""
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    if any(name.startswith("##") for name in names):
        return [number for number, name in enumerate(names) if name.startswith("##")]
    begins = next((mark for mark in ("Ġ", "▁") if any(name.startswith(mark) for name in names)), None)
    if begins is None:
        return []
    return [number for number, name in enumerate(names) if number not in special and not name.startswith(begins)]
