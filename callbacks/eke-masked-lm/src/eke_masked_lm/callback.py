"""Masked language modelling on the device, anew each time a sequence is seen, and a prediction head that runs on the
hidden positions alone.

Sources: Devlin, Chang, Lee, Toutanova, "BERT", NAACL 2019, https://arxiv.org/abs/1810.04805, section 3.1; Joshi, Chen,
Liu and others, "SpanBERT", TACL 2020, https://arxiv.org/abs/1907.10529, section 3.1; Song, Tan, Qin, Lu, Liu, "MASS",
ICML 2019, https://arxiv.org/abs/1905.02450, section 3. Survey section 2.2, references [48] and [80].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from eke import EkeError, Run, Technique, TechniqueCallback, in_run
from eke.seams.batch import named_parts, tensors, with_parts
from eke.seams.trial import compiled
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from eke_masked_lm.entry import RECORD
from eke_masked_lm.masks import IGNORED, choose_spans, choose_tokens, choose_words, corrupt, hide_span, words_of

_EVALUATION = 7  # the seed of the masks that validation sees, each time the same


class MaskingError(EkeError, MisconfigurationException, ValueError):
    """A batch, a model or an argument with which tokens cannot be hidden."""


class Text(NamedTuple):
    """What a batch says of its tokens, each (batch, length) or None."""

    ids: Tensor
    attention: Tensor | None = None
    words: Tensor | None = None
    special: Tensor | None = None
    labels: Any = None


class Masking(TechniqueCallback):
    """What both kinds of masking share: ids in, draws that differ by process, masks for validation that stay."""

    technique: ClassVar[Technique] = RECORD

    _read: bool = in_run(False)  # whether the step was seen to read the labels

    def __init__(
        self, mask_token: int, vocabulary: int, special: Sequence[int], share: float, masked: float, random: float
    ) -> None:
        if not 0 < share <= 1:
            raise MaskingError(f"share={share}: give a share of the tokens above 0.")
        if masked < 0 or random < 0 or masked + random > 1 + 1e-9:
            raise MaskingError(f"masked={masked}, random={random}: give shares of those hidden, 1 or less in all.")
        if vocabulary < 1 or not all(0 <= one < vocabulary for one in (mask_token, *special)):
            raise MaskingError(
                f"mask_token={mask_token}, special={tuple(special)}: give ids below vocabulary={vocabulary}."
            )
        self.mask_token, self.vocabulary, self.special = mask_token, vocabulary, tuple(special)
        self.share, self.masked, self.random = share, masked, random
        self._evaluated = 0
        self._empty = False  # whether nothing could be hidden in the batch at hand
        self._warned = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = 0

    def alter_batch(self, run: Run, batch: Any) -> Any:
        return self.hide(batch, run.seed(per_rank=True))

    def alter_eval_batch(self, run: Run, batch: Any) -> Any:
        self._evaluated += 1
        return self.hide(batch, _EVALUATION * 2**32 + self._evaluated)

    def around_step(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        output = call_next(batch, *args) if self._read else self._watched(run, call_next, batch, *args)
        if not self._empty:
            return output
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(self).__name__} found nothing to hide in a batch: special tokens, padding, or tokens that its "
                "labels leave out with -100. Such batches have the loss of one token that is not hidden, times 0: they "
                "train nothing."
            )
        return _times_zero(output)

    def _watched(self, run: Run, call_next: Any, batch: Any, *args: Any) -> Any:
        """The first step of a run: whether it reads the labels at all. Models of Hugging Face take any name, and those
        that know no labels leave them aside without a word.

        Raises:
            MaskingError: it does not.
        """
        self._read = True
        labels = _text(batch).labels
        if compiled(run.module) or isinstance(labels, FakeTensor):
            return call_next(batch, *args)  # where calls are not seen, or by a forecast
        with Reads(labels) as reads:
            output = call_next(batch, *args)
        if not reads.seen:
            raise MaskingError(
                f"training_step does not read the labels that {type(self).__name__} made of the tokens that it hid: it "
                f"would train on texts with holes, for a loss of something else. Let {type(run.module).__name__} "
                "predict the labels, or leave the technique out of this run."
            )
        return output

    def hide(self, batch: Any, seed: int) -> Any:
        """The batch with tokens hidden and labels for them, as ``seed`` draws them."""
        raise NotImplementedError

    def _candidates(self, text: Text) -> Tensor:
        """Tokens that may be hidden: no padding, nothing special, nothing that the loader's labels leave out."""
        ids = text.ids
        candidates = torch.ones_like(ids, dtype=torch.bool)
        for mask, wanted in ((text.attention, True), (text.special, False)):
            if mask is not None and mask.shape == ids.shape:
                candidates = candidates & (mask.bool() == wanted)
        for one in (*self.special, self.mask_token):
            candidates = candidates & (ids != one)
        if text.labels is not None:
            candidates = candidates & self._asked(text)
        return candidates

    def _asked(self, text: Text) -> Tensor:
        """Tokens that the loader's own labels do not leave out.

        Raises:
            MaskingError: they are no labels of these tokens.
        """
        ids, labels = text.ids, text.labels
        if isinstance(labels, Tensor) and labels.shape == ids.shape and not labels.is_floating_point():
            kept = labels != IGNORED
            if bool(((labels == ids) | ~kept).all()):
                return kept
            for shift in (1, -1):  # the next token's, or the one's before
                of, by = (slice(1, None), slice(None, -1)) if shift == 1 else (slice(None, -1), slice(1, None))
                if bool(((labels[:, by] == ids[:, of]) | ~kept[:, by]).all()):
                    edge = kept[:, :1] if shift == 1 else kept[:, -1:]
                    parts = (edge, kept[:, by]) if shift == 1 else (kept[:, by], edge)
                    return torch.cat(parts, dim=1)
        found = f"of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"in a {type(labels).__name__}"
        raise MaskingError(
            f"The batch has labels {found} that are not its tokens: classes, or what another masking has left. "
            f"{type(self).__name__} makes labels of its own, of the tokens that it hides, and replaces no others. "
            "Leave them out of the batch, or leave the technique out of this run."
        )

    def _one_label(self, text: Text, hidden: Tensor) -> Tensor:
        """``hidden``; where nothing is, the first token of the batch that is text, which keeps the loss finite."""
        self._empty = not bool(hidden.any())
        if not self._empty:
            return hidden
        text_at = text.attention if text.attention is not None and text.attention.shape == hidden.shape else hidden + 1
        first = torch.zeros_like(hidden).flatten()
        first[(text_at != 0).long().flatten().argmax()] = True
        return first.view(hidden.shape)


class MaskedLM(Masking):
    """Hide a share of the tokens of each sequence and have the model predict them.

    Batches hold token ids, (batch, length), int64: a mapping with ``input_ids`` (and ``attention_mask``,
    ``special_tokens_mask``), which gets ``labels``; a tuple or list, whose first part are the ids and whose second
    becomes the labels; or the ids alone, which become such a tuple. Labels are -100 where nothing was hidden. Labels
    that the batch brings have to be its tokens, or those one place on or back: where they are -100, nothing is hidden.
    Validation sees the same masks each time.

    Example::

        trainer = Trainer(callbacks=[MaskedLM.of(tokenizer, unit="word", head="model.cls")])

    Args:
        mask_token: Id of the mask token.
        vocabulary: Number of ids; random ones are drawn from all of them.
        special: Ids that are never hidden: class, separator, padding.
        share: Of the tokens that are hidden: exactly its rounded number in each sequence, and one at least.
        unit: ``"token"``; ``"word"``: all tokens of a word or none; ``"span"``: a few neighbouring words at a time.
        masked: Share of the hidden tokens that becomes the mask token.
        random: Share of them that becomes a random one. The rest stays.
        continues: For ``"word"`` and ``"span"``: ids of tokens that go on with the word before. Or give ``word_ids``,
            (batch, length), in the batch. Without either, each token is a word of a span.
        head: Dotted path of the prediction head. It then runs on the hidden positions alone, on (1, hidden, width), and
            labels are (1, hidden): for losses over flattened logits and labels.

    Raises:
        MaskingError: wrong shares or ids, no such head, no words; a causal model of Hugging Face; a batch without ids,
            or with labels of something else; a head that gets something else than hidden states.
    """

    _hidden: list[Tensor] = in_run(list)  # of the batch that is under way, for the head

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
            raise MaskingError(f"unit={unit!r} is none of: token, word, span.")
        self.unit, self.head = unit, head
        self.continues = None if continues is None else tuple(continues)

    @classmethod
    def of(cls, tokenizer: Any, **arguments: Any) -> MaskedLM:
        """For a Hugging Face tokenizer: its mask token, its special tokens, and which of its tokens go on with a word.

        Raises:
            MaskingError: it has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise MaskingError(
                f"{type(tokenizer).__name__} has no mask token. Add one: add_special_tokens({{'mask_token': ...}})."
            )
        given = dict(special=tokenizer.all_special_ids, continues=_continuing(tokenizer))
        return cls(tokenizer.mask_token_id, len(tokenizer), **{**given, **arguments})

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        name, library = causal(pl_module)
        if name and not library:
            rank_zero_warn(
                f"Attention in {name} sees earlier tokens alone, so that hidden tokens are predicted without those "
                "behind them. MaskedLM is for models that see both sides."
            )
        elif name:
            raise MaskingError(
                f"{name} attends to earlier tokens alone and is trained to predict the next one: MaskedLM would have "
                "it predict hidden tokens without those behind them. Leave MaskedLM out, or train a model that sees "
                "both sides, such as a BERT."
            )
        if self.head is None:
            return
        try:
            module = pl_module.get_submodule(self.head)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise MaskingError(
                f"head={self.head!r} is no module of {type(pl_module).__name__}, whose parts are: {names}."
            ) from None
        run.at_end(module.register_forward_pre_hook(partial(_keep_hidden, self._hidden)).remove)

    def hide(self, batch: Any, seed: int) -> Any:
        text = _text(batch)
        ids, numbers = text.ids, torch.Generator(text.ids.device).manual_seed(seed)
        candidates, groups = self._candidates(text), None
        if self.unit == "word":
            hidden = choose_words(candidates, self._words(text), self.share, numbers)
        elif self.unit == "span":
            known = text.words is not None or self.continues is not None
            words = self._words(text) if known else None
            hidden, groups = choose_spans(candidates, self.share, numbers, words=words)
        else:
            hidden = choose_tokens(candidates, self.share, numbers)
        out = corrupt(ids, hidden, self.mask_token, self.vocabulary, numbers, self.masked, self.random, groups)
        hidden = self._one_label(text, hidden)
        labels = ids.masked_fill(~hidden, IGNORED)
        if self.head is not None:
            self._hidden[:] = [hidden]
            labels = ids[hidden][None]
        return _with(batch, out, {"labels": labels})

    def _words(self, text: Text) -> Tensor:
        if text.words is not None:
            return text.words.clamp(min=0)
        if self.continues is None:
            raise MaskingError(
                "MaskedLM(unit='word') does not know which tokens make a word. Give continues=, the ids of tokens that "
                "go on with the word before, use MaskedLM.of(tokenizer), or put word_ids into the batch."
            )
        table = torch.zeros(self.vocabulary, dtype=torch.bool, device=text.ids.device)
        table[list(self.continues)] = True
        return words_of(text.ids, table)


class MASS(Masking):
    """Hide one span of each sequence from an encoder and have a decoder predict it from the encoder and its own past.

    The decoder gets the span alone: the tokens before and after it, which the encoder sees, are left out. What is
    special, padding on either side, and what the loader's labels leave out with -100, are no part of it. Batches are
    mappings with ``input_ids`` (and ``attention_mask``), or ids alone; they become mappings with ``input_ids``,
    ``attention_mask``, ``decoder_input_ids``, ``decoder_attention_mask``, ``labels`` and the position ids.

    Args:
        mask_token, vocabulary, special, masked, random: As of :class:`MaskedLM`, for what the encoder sees.
        start_token: What the decoder gets before the first token of a sequence.
        pad_token: Fills spans up to the longest of the batch.
        share: Of a sequence that the span takes.
        positions: Name under which the batch gets the places of the decoder's tokens, (batch, span), int64: the start
            token has 0, the first token of the text 1. None for models with relative positions, such as T5.

    Raises:
        MaskingError: wrong shares or ids; a batch without ids, or with labels of something else.
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
        text = _text(batch)
        ids, numbers = text.ids, torch.Generator(text.ids.device).manual_seed(seed)
        attention = torch.ones_like(ids) if text.attention is None else text.attention
        candidates = self._candidates(text)
        count = candidates.sum(1)
        start, size = hide_span(count, self.share, numbers)
        order = (~candidates).long().argsort(dim=1, stable=True)  # places of what may be hidden come first
        rank = candidates.cumsum(1) - 1
        hidden = candidates & (rank >= start[:, None]) & (rank < (start + size)[:, None])
        encoder = corrupt(ids, hidden, self.mask_token, self.vocabulary, numbers, self.masked, self.random)
        self._one_label(text, hidden)
        if self._empty:
            size[0] = 1

        span = torch.arange(max(1, int(size.max())), device=ids.device)
        inside = span < size[:, None]
        number = (start[:, None] + span).clamp(max=ids.shape[1] - 1)  # of the token in its text, from 0
        tokens = ids.gather(1, order)
        before = torch.cat([torch.full_like(tokens[:, :1], self.start_token), tokens[:, :-1]], dim=1)
        new = {
            "attention_mask": attention,
            "decoder_input_ids": before.gather(1, number).masked_fill(~inside, self.pad_token),
            "decoder_attention_mask": (inside | (span == 0)).to(attention.dtype),  # one at least, or attention is NaN
            "labels": tokens.gather(1, number).masked_fill(~inside, IGNORED),
        }
        if self.positions is not None:
            new[self.positions] = number.masked_fill(~inside, 0)
        return _with(batch if named_parts(batch) is not None else {}, encoder, new)


class Reads(TorchFunctionMode):
    """Whether anything is computed with a tensor, or a view of it, inside."""

    def __init__(self, tensor: Any) -> None:
        super().__init__()
        self.seen = not isinstance(tensor, Tensor)
        self.place = None if self.seen else tensor.untyped_storage().data_ptr()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.seen:
            parts = tensors([*args, *(kwargs or {}).values()])
            self.seen = any(type(one) is Tensor and one.untyped_storage().data_ptr() == self.place for one in parts)
        return func(*args, **(kwargs or {}))


def causal(module: nn.Module) -> tuple[str, bool]:
    """What inside ``module`` sees earlier tokens alone, as its attention says by ``is_causal`` or ``causal``.

    Returns:
        Its name, empty where attention sees both sides somewhere or does not say, and whether it is a Hugging Face
        model.
    """
    library = [part for part in module.modules() if hasattr(part, "config") and hasattr(part, "base_model_prefix")]
    flags = {
        flag
        for part in module.modules()
        if "attention" in type(part).__name__.lower() or "attn" in type(part).__name__.lower()
        if isinstance(flag := getattr(part, "is_causal", getattr(part, "causal", None)), bool)
    }
    if library and (flags == {True} or (not flags and type(library[0]).__name__.endswith("ForCausalLM"))):
        return type(library[0]).__name__, True
    return (type(module).__name__, False) if flags == {True} else ("", False)


def _times_zero(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * 0
    return {**output, "loss": output["loss"] * 0} if isinstance(output, Mapping) and "loss" in output else output


def _text(batch: Any) -> Text:
    """Token ids of a batch, and what it says of them."""
    parts, have = named_parts(batch), ""
    if parts is not None:
        names = ("input_ids", "attention_mask", "word_ids", "special_tokens_mask", "labels")
        text, have = Text(*(parts.get(name) for name in names)), f"{', '.join(parts)} in a {type(batch).__name__}"
    elif isinstance(batch, (list, tuple)) and batch:
        text = Text(batch[0], labels=batch[1] if len(batch) > 1 else None)
    else:
        text = Text(batch)
    ids = text.ids
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        if isinstance(ids, Tensor):
            have = f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}"
        raise MaskingError(
            f"The batch holds no token ids where they are looked for, under input_ids or as its first part; found "
            f"{have or f'a {type(ids).__name__}'}. They have to be whole numbers of shape (batch, length): tokens of "
            "texts are hidden, and of nothing else."
        )
    return text


def _with(batch: Any, ids: Tensor, new: dict[str, Tensor]) -> Any:
    if is_dataclass(batch):
        return with_parts(batch, {"input_ids": ids, **new})
    if isinstance(batch, Mapping):
        kept = {name: value for name, value in batch.items() if name not in ("word_ids", "special_tokens_mask")}
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
        raise MaskingError(
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
