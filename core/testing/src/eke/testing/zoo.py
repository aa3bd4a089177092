"""A zoo: tiny models as people have them, each with a batch of its own kind, as a LightningModule and a DataLoader.

Models differ in what their blocks are, batches in their form, their padding and their labels::

    animal = ZOO["t5"]
    trainer.fit(animal.build(seed=0), animal.loader(seed=0))

What a model needs (transformers, timm) is imported when it is built. The modules are those of
:mod:`eke.testing.shapes` where it has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

SAMPLES = 16
BATCH = 4
PAD, BEGIN, END, MASK = 0, 1, 14, 16  # of 17 tokens; 2 to 13 are words
WORDS = range(2, 14)
IGNORED = -100
PIXELS = 16
CLASSES = 2


@dataclass(frozen=True)
class Animal:
    """One model with its data.

    Attributes:
        name: In :data:`ZOO`.
        says: In a few words, what is special about it.
        tags: What it is, for whoever chooses: ``"text"``, ``"images"`` and ``"audio"`` are what goes in; ``"causal"``,
            ``"masked"``, ``"classes"``, ``"seq2seq"`` and ``"contrastive"`` what it learns; ``"labels"``: the batch has
            some; ``"dictionary"``, ``"tuple"``, ``"dataclass"`` the form of a batch; ``"pads left"``, ``"pads right"``,
            ``"ignored labels"``, ``"one sample"``, ``"lengths differ"`` what is in it. ``"encoder-decoder"``,
            ``"towers"``, ``"experts"``, ``"tied"``, ``"no attention"``, ``"no blocks"``, ``"windows"``,
            ``"dropout"``, ``"manual optimization"``: the model.
        needs: Packages without which it cannot be built.
    """

    name: str
    says: str
    make: Callable[[], Learner]
    data: type[Samples]
    collate: Callable[[list[Any]], Any]
    tags: tuple[str, ...]
    needs: tuple[str, ...] = ()
    batch: int = BATCH

    @property
    def missing(self) -> list[str]:
        """What of :attr:`needs` is not installed."""
        return [name for name in self.needs if find_spec(name) is None]

    def build(self, seed: int = 0) -> Learner:
        """A new model. The global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().train()  # Hugging Face's come in evaluation mode, and Lightning leaves them so

    def dataset(self, seed: int = 0, samples: int = SAMPLES) -> Dataset:
        """Sample ``index`` depends on ``seed`` and ``index`` alone."""
        return self.data(samples, seed)

    def loader(self, seed: int = 0, samples: int = SAMPLES, **options: Any) -> DataLoader:
        """A stock DataLoader that shuffles.

        Args:
            seed: Of the data. In which order they come is up to the global random state, as it is for most people.
            samples: Number of them.
            options: Of the DataLoader, in place of those that the animal has.
        """
        given = {"batch_size": self.batch, "shuffle": True, "collate_fn": self.collate, **options}
        return DataLoader(self.dataset(seed, samples), **given)


# ---------------------------------------------------------------------- data


class Samples(Dataset):
    """Of one kind. What is drawn for a sample depends on the seed and its number."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.draw(index, torch.Generator().manual_seed(10_000 * self.seed + index))

    def draw(self, index: int, numbers: torch.Generator) -> Any:
        raise NotImplementedError


def words(length: int, numbers: torch.Generator) -> Tensor:
    """A sentence that can be learned: the next word is two further on."""
    first = int(torch.randint(len(WORDS), (), generator=numbers))
    return (torch.arange(length) * 2 + first) % len(WORDS) + WORDS[0]


class Sentences(Samples):
    """Of 6 to 12 tokens, with end."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        text = words(5 + index % 7, numbers)
        return {"input_ids": torch.cat([text, torch.tensor([END])])}


class Lines(Samples):
    """All of 12 tokens."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        return {"input_ids": words(12, numbers)}


class Instructions(Samples):
    """A prompt and its answer: only the answer counts."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        text = torch.cat([words(8 + index % 4, numbers), torch.tensor([END])])
        labels = text.clone()
        labels[: 5 + index % 2] = IGNORED
        return {"input_ids": text, "labels": labels}


class Reviews(Samples):
    """A text and its class."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        return {"input_ids": words(5 + index % 7, numbers), "labels": torch.tensor(index % CLASSES)}


class Topics(Samples):
    """A text and those of its topics that hold, as floats."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        topics = torch.tensor([index % 2, index // 2 % 2]).float()
        return {"input_ids": words(5 + index % 7, numbers), "labels": topics}


class Translations(Samples):
    """Two texts of different lengths."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        text = words(6 + index % 5, numbers)
        return {"input_ids": text, "labels": torch.cat([text[: 4 + index % 3].flip(0), torch.tensor([END])])}


class Pictures(Samples):
    """An image and its class."""

    def draw(self, index: int, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
        label = index % CLASSES
        return torch.randn(3, PIXELS, PIXELS, generator=numbers) + label, torch.tensor(label)


class LargePictures(Samples):
    def draw(self, index: int, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
        label = index % CLASSES
        return torch.randn(3, 2 * PIXELS, 2 * PIXELS, generator=numbers) + label, torch.tensor(label)


class Captions(Samples):
    """An image and what it shows."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        text = torch.cat([words(4 + index % 4, numbers), torch.tensor([END])])
        return {"input_ids": text, "pixel_values": torch.randn(3, PIXELS, PIXELS, generator=numbers) + index % 3}


class Spectrograms(Samples):
    """16 frames of 8 bands and their transcript."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        labels = torch.cat([words(3 + index % 3, numbers), torch.tensor([END])])
        return {"input_features": torch.randn(8, 16, generator=numbers), "labels": labels}


class Waves(Samples):
    """Sound of different lengths and its transcript."""

    def draw(self, index: int, numbers: torch.Generator) -> dict[str, Tensor]:
        return {
            "input_values": torch.randn(64 + 4 * (index % 5), generator=numbers),
            "labels": words(3 + index % 3, numbers),
        }


# ---------------------------------------------------------------------- batches


def padded(rows: list[Tensor], value: float, left: bool = False) -> Tensor:
    """Rows of different lengths as one tensor."""
    length = max(len(row) for row in rows)
    room = [length - len(row) for row in rows]
    pads = [(free, 0) if left else (0, free) for free in room]
    return torch.stack([F.pad(row, pad, value=value) for row, pad in zip(rows, pads, strict=True)])


@dataclass(frozen=True)
class Padded:
    """A dictionary, as Hugging Face's collators make it.

    Args:
        side: On which short texts are padded.
        labels: ``"next"``: the tokens themselves, padding ignored. ``"own"``: those of the samples, padded as ignored.
            ``"class"``: one, or some floats, for each sample. ``"none"``.
        types: Whether there are token types too.
    """

    side: str = "right"
    labels: str = "next"
    types: bool = False
    pad: int = PAD
    ids: str = "input_ids"

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        left = self.side == "left"
        texts = [sample[self.ids] for sample in samples]
        batch = {
            self.ids: padded(texts, self.pad, left),
            "attention_mask": padded([torch.ones(len(text), dtype=torch.long) for text in texts], 0, left),
        }
        if self.types:
            batch["token_type_ids"] = padded([(torch.arange(len(text)) > 3).long() for text in texts], 0, left)
        if self.labels == "next":
            batch["labels"] = padded(texts, IGNORED, left)
        elif self.labels == "own":
            batch["labels"] = padded([sample["labels"] for sample in samples], IGNORED, left)
        elif self.labels == "class":
            batch["labels"] = torch.stack([sample["labels"] for sample in samples])
        if "pixel_values" in samples[0]:
            batch["pixel_values"] = torch.stack([sample["pixel_values"] for sample in samples])
        return batch


def as_transcripts(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    features = torch.stack([sample["input_features"] for sample in samples])
    return {"input_features": features, "labels": padded([sample["labels"] for sample in samples], IGNORED)}


def as_encoding(samples: list[dict[str, Tensor]]) -> Any:
    """What a tokenizer of Hugging Face's returns: not a ``dict``, though it behaves like one."""
    from transformers import BatchEncoding

    return BatchEncoding(Padded(labels="class", pad=1)(samples))


def to_mask(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tokens hidden when a batch is made, as Hugging Face's collator does it: from the global random state."""
    batch = Padded(labels="next")(samples)
    hidden = (torch.rand(batch["input_ids"].shape) < 0.3) & batch["attention_mask"].bool()
    hidden[:, 0] = True
    batch["labels"] = batch["labels"].masked_fill(~hidden, IGNORED)
    batch["input_ids"] = batch["input_ids"].masked_fill(hidden, MASK)
    return batch


def of_one_length(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def shifted(samples: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Tokens and the next ones."""
    text = torch.stack([sample["input_ids"] for sample in samples])
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def as_pixel_values(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def as_tuple(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels)


def two_texts(samples: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts, targets, and of both where they are padded: positional, as ``nn.Transformer`` takes them."""
    texts, targets = ([sample[name] for sample in samples] for name in ("input_ids", "labels"))
    text, target = padded(texts, PAD), padded(targets, PAD)
    return text, target, text == PAD, target == PAD


@dataclass
class Tagged:
    """A batch as a dataclass."""

    tokens: Tensor  # (batch, length)
    padding: Tensor  # (batch, length), bool
    tags: Tensor  # (batch, length), ignored where padded


def as_tagged(samples: list[dict[str, Tensor]]) -> Tagged:
    tokens = padded([sample["input_ids"] for sample in samples], PAD)
    return Tagged(tokens, tokens == PAD, (tokens % CLASSES).masked_fill(tokens == PAD, IGNORED))


@dataclass
class Pairs:
    """Queries and what answers them, of different lengths."""

    queries: Tensor  # (batch, length)
    documents: Tensor  # (batch, another length)


def as_pairs(samples: list[dict[str, Tensor]]) -> Pairs:
    return Pairs(padded([one["labels"] for one in samples], PAD), padded([one["input_ids"] for one in samples], PAD))


# ---------------------------------------------------------------------- models


class Learner(LightningModule):
    """What people write around a model: a loss that is logged, AdamW, a warm-up by step."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        if model is not None:
            self.model = model

    def loss(self, batch: Any) -> Tensor:
        """As Hugging Face's models give it."""
        return self.model(**batch).loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=1)

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [weight for weight in self.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.parameters() if weight.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3)
        schedule = LambdaLR(optimizer, _warm_up)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _warm_up(step: int) -> float:
    return min(step + 1, 4) / 4


class LearnsToContinue(Learner):
    """Gives the model its own input as labels: Hugging Face shifts them."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, labels=batch["input_ids"]).loss


class LearnsTopics(Learner):
    """Takes the loss itself."""

    def loss(self, batch: Any) -> Tensor:
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return F.binary_cross_entropy_with_logits(self.model(**inputs).logits, labels)


class LearnsContrast(Learner):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch, return_loss=True).loss


class OnBackbone(Learner):
    """A pretrained backbone of Hugging Face's and a new head."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__(model)
        self.head = nn.Linear(width, CLASSES)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.head(self.model(pixel_values=images).pooler_output), labels)


class Classifier(Learner):
    """A model of images that gives logits."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)


class NextToken(Learner):
    """A model of tokens that gives logits."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())


class Tagger(Learner):
    """Around torch's own encoder: a class for each token."""

    def __init__(self, encoder: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width, padding_idx=PAD)
        self.encoder = encoder
        self.head = nn.Linear(width, CLASSES)

    def loss(self, batch: Tagged) -> Tensor:
        states = self.encoder(self.embed(batch.tokens), src_key_padding_mask=batch.padding)
        return F.cross_entropy(self.head(states).transpose(1, 2), batch.tags, ignore_index=IGNORED)


class Translator(Learner):
    """Around ``nn.Transformer``."""

    def __init__(self, transformer: nn.Transformer, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width, padding_idx=PAD)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.transformer = transformer
        self.head = nn.Linear(width, 17)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        text, target, text_padding, target_padding = batch
        begun = F.pad(target[:, :-1], (1, 0), value=BEGIN)
        states = self.transformer(
            self.embed(text) + self.position[: text.shape[1]],
            self.embed(begun) + self.position[: begun.shape[1]],
            tgt_mask=self.transformer.generate_square_subsequent_mask(begun.shape[1], device=begun.device),
            src_key_padding_mask=text_padding,
            memory_key_padding_mask=text_padding,
            tgt_key_padding_mask=F.pad(target_padding[:, :-1], (1, 0), value=False),
            tgt_is_causal=True,
        )
        return F.cross_entropy(self.head(states).flatten(0, 1), target.flatten(), ignore_index=PAD)


class TwoTowers(Learner):
    """Two encoders that share nothing: queries and documents, each pair against all others of the batch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, width)
        layers = [nn.TransformerEncoderLayer(width, 4, 32, batch_first=True, norm_first=True) for _ in range(2)]
        self.query = nn.TransformerEncoder(layers[0], 3, enable_nested_tensor=False)
        self.document = nn.TransformerEncoder(layers[1], 3, enable_nested_tensor=False)

    def loss(self, batch: Pairs) -> Tensor:
        query = self.query(self.embed(batch.queries)).mean(1)
        document = self.document(self.embed(batch.documents)).mean(1)
        return F.cross_entropy(query @ document.T, torch.arange(len(query), device=query.device))


class ByHand(NextToken):
    """Manual optimization with two optimizers, clipping by hand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        body, head = self.optimizers()
        loss = self.loss(batch)
        body.zero_grad()
        head.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(body, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        body.step()
        head.step()
        self.log("train_loss", loss.detach(), batch_size=1)
        return loss.detach()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        head = list(self.model.head.parameters())
        body = [weight for weight in self.model.parameters() if not any(weight is one for one in head)]
        return [torch.optim.AdamW(body, lr=3e-3), torch.optim.SGD(head, lr=3e-2)]


class Cnn(nn.Module):
    """No Transformer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(images).mean((2, 3)))


def _shape(name: str, learner: type[Learner] = Learner, *arguments: Any) -> Callable[[], Learner]:
    """A model of :mod:`eke.testing.shapes`, with what trains it around it."""

    def make() -> Learner:
        from eke.testing import shapes

        made = getattr(shapes, name)()
        return learner(getattr(made, "model", made), *arguments)

    return make


def _timm(name: str, **settings: Any) -> Callable[[], Learner]:
    def make() -> Learner:
        import timm

        return Classifier(timm.create_model(name, num_classes=CLASSES, **settings))

    return make


def _by_hand() -> Learner:
    from eke.testing.shapes import Flat

    return ByHand(Flat())


def _cnn() -> Learner:
    return Classifier(Cnn())


def _animals() -> list[Animal]:
    hugging, dictionary = ("transformers",), ("labels", "dictionary")
    padding = ("pads right", "ignored labels", "lengths differ")
    found = [
        Animal("gpt2", "Conv1D layers, a tied head, dropout", _shape("gpt2"), Sentences, Padded(),
               ("text", "causal", "tied", "dropout", *dictionary, *padding)),
        Animal("llama", "grouped queries, a tied head, prompts that do not count", _shape("llama"), Instructions,
               Padded("left", "own"),
               ("text", "causal", "tied", "pads left", "ignored labels", "lengths differ", *dictionary)),
        Animal("mistral", "one key for all queries, a sliding window, batches of one sample",
               _shape("mistral", LearnsToContinue), Lines, of_one_length,
               ("text", "causal", "one sample", "dictionary"), batch=1),
        Animal("mixtral", "experts, and a loss of their router", _shape("mixtral", LearnsToContinue), Lines,
               of_one_length, ("text", "causal", "experts", "dictionary")),
        Animal("mamba", "no attention", _shape("mamba", LearnsToContinue), Lines, of_one_length,
               ("text", "causal", "no attention", "tied", "dictionary")),
        Animal("bert", "masked tokens by its collator", _shape("bert"), Sentences, to_mask,
               ("text", "masked", "tied", "dropout", *dictionary, *padding)),
        Animal("bert_classifier", "a class for each text, token types", _shape("bert_classifier"), Reviews,
               Padded(labels="class", types=True),
               ("text", "classes", "pads right", "lengths differ", "dropout", *dictionary)),
        Animal("roberta", "several labels for each text, in a BatchEncoding", _shape("roberta", LearnsTopics), Topics,
               as_encoding, ("text", "classes", "pads right", "lengths differ", "dropout", "labels")),
        Animal("t5", "encoder and decoder, a position bias of the first block", _shape("t5"), Translations,
               Padded(labels="own"), ("text", "seq2seq", "encoder-decoder", "tied", "dropout", *dictionary, *padding)),
        Animal("bart", "encoder and decoder of different widths and depths", _shape("bart"), Translations,
               Padded(labels="own"), ("text", "seq2seq", "encoder-decoder", "tied", "dropout", *dictionary, *padding)),
        Animal("clip", "texts and images, each pair against all others", _shape("clip", LearnsContrast), Captions,
               Padded(labels="none", pad=END),
               ("text", "images", "contrastive", "towers", "dictionary", "pads right", "lengths differ")),
        Animal("vit", "a class token", _shape("vit"), Pictures, as_pixel_values, ("images", "classes", *dictionary)),
        Animal("dinov2", "a backbone, and a head in the LightningModule", _shape("dinov2", OnBackbone, 16), Pictures,
               as_tuple, ("images", "classes", "labels", "tuple")),
        Animal("swin", "windows, stages of different widths", _shape("swin", OnBackbone, 16), LargePictures, as_tuple,
               ("images", "classes", "windows", "dropout", "labels", "tuple")),
        Animal("whisper", "spectrograms, encoder and decoder", _shape("whisper"), Spectrograms,
               as_transcripts,
               ("audio", "seq2seq", "encoder-decoder", "tied", "ignored labels", "labels", "dictionary")),
        Animal("wav2vec2", "sound of different lengths, a CTC loss", _shape("wav2vec2"), Waves,
               Padded(labels="own", ids="input_values"),
               ("audio", "ctc", "dropout", "pads right", "ignored labels", "lengths differ", *dictionary)),
        Animal("timm_vit", "timm's", _timm("vit_tiny_patch16_224", img_size=PIXELS, patch_size=4, embed_dim=16,
               num_heads=4, depth=3), Pictures, as_tuple, ("images", "classes", "labels", "tuple"), ("timm",)),
        Animal("timm_swin", "timm's", _timm("swin_tiny_patch4_window7_224", img_size=2 * PIXELS, window_size=4,
               embed_dim=8, depths=(2, 2), num_heads=(2, 4)), LargePictures, as_tuple,
               ("images", "classes", "windows", "dropout", "labels", "tuple"), ("timm",)),
        Animal("blocks", "images, blocks in an nn.Sequential, no class token", _shape("timm_vit", Classifier), Pictures,
               as_tuple, ("images", "classes", "labels", "tuple")),
        Animal("flat", "blocks without modules for attention and MLP", _shape("plain_list", NextToken), Lines, shifted,
               ("text", "causal", "labels", "tuple")),
        Animal("encoder", "torch's encoder, a class for each token, in a dataclass", _shape("torch_encoder", Tagger),
               Sentences, as_tagged, ("text", "classes", "dropout", "labels", "dataclass", *padding)),
        Animal("transformer", "torch's encoder and decoder, masks by position",
               _shape("torch_transformer", Translator), Translations, two_texts,
               ("text", "seq2seq", "encoder-decoder", "dropout", "labels", "tuple", "pads right", "lengths differ")),
        Animal("two_towers", "two encoders, each pair against all others", TwoTowers, Translations, as_pairs,
               ("text", "contrastive", "towers", "dropout", "dataclass", "pads right", "lengths differ")),
        Animal("cnn", "no Transformer", _cnn, Pictures, as_tuple, ("images", "classes", "no blocks", "no attention",
               "labels", "tuple")),
        Animal("by_hand", "manual optimization with two optimizers", _by_hand, Lines, shifted,
               ("text", "causal", "manual optimization", "labels", "tuple")),
    ]  # fmt: skip
    plain = ("timm_vit", "timm_swin", "blocks", "flat", "encoder", "transformer", "two_towers", "cnn", "by_hand")
    return [one if one.name in plain else replace(one, needs=hugging) for one in found]


ZOO: dict[str, Animal] = {animal.name: animal for animal in _animals()}
