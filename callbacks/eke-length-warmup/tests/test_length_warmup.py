"""Which lengths come when, what is cut and what is not, and what is refused."""

from collections import UserDict, namedtuple

import eke
import pytest
import torch
from eke.testing import TinyBlocks, TinyViT, fit
from eke.testing.data import VOCABULARY
from eke_length_warmup import LengthWarmup, SequenceError, length_at, row_length, shorten, split, token_progress
from eke_length_warmup.sequence import find_sequences, windows
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset


def test_lengths_rise_in_a_line_and_are_rounded_down():
    lengths = [length_at(step, 10, 16, 116, 8) for step in range(12)]
    assert lengths == [16, 24, 32, 40, 56, 64, 72, 80, 96, 104, 116, 116]


def test_the_start_and_the_full_length_need_be_no_multiple():
    assert length_at(0, 10, 13, 129, 8) == 13
    assert length_at(10, 10, 13, 129, 8) == 129


def test_sequences_that_are_short_already_stay():
    assert length_at(0, 10, 64, 32, 8) == 32


IDS = torch.arange(24).view(2, 12)


def test_every_tensor_with_an_entry_a_token_is_cut_and_no_other():
    pairs = torch.ones(2, 1, 12, 12)
    batch = {
        "input_ids": IDS,
        "attention_mask": torch.ones(2, 12, dtype=torch.bool),
        "hidden": torch.randn(2, 12, 5),
        "pair_mask": pairs,
        "causal_mask": torch.ones(12, 12).tril(),
        "position_ids": torch.arange(12)[None],
        "sample": torch.tensor([0.5, 1.0]),
        "name": "x",
    }
    short = shorten(batch, 8)
    assert torch.equal(short["input_ids"], IDS[:, :8])
    assert short["attention_mask"].shape == (2, 8)
    assert torch.equal(short["hidden"], batch["hidden"][:, :8])
    assert short["pair_mask"].shape == (2, 1, 8, 8)
    assert torch.equal(short["causal_mask"], torch.ones(8, 8).tril())
    assert (short["position_ids"] == torch.arange(8)).all()
    assert short["sample"] is batch["sample"]
    assert short["name"] == "x"
    assert batch["input_ids"].shape == (2, 12)  # the user's batch is as it was


def noise(*shape, seed=0):
    return torch.randint(5, 100, shape, generator=torch.Generator().manual_seed(seed))


def multi_hot(*shape):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5).long()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("pixel_values", torch.randn(4, 3, 32, 32)),
        ("labels", multi_hot(4, 32)),
        ("labels", multi_hot(4, 32).float()),
        ("labels", multi_hot(4, 32).bool()),
        ("labels", torch.arange(4)),
        ("dense", torch.randn(4, 32)),
        ("regions", torch.randn(4, 32, 7)),
        ("categories", noise(4, 32, seed=9)),
        ("decoder_input_ids", noise(4, 20)),
    ],
)
def test_what_is_as_long_as_the_text_and_no_text_stays_whole(name, part):
    ids = noise(4, 32)
    short = shorten({"input_ids": ids, name: part}, 8)
    assert short["input_ids"].shape == (4, 8)
    assert short[name] is part
    pair = shorten((ids, part), 8) if part.ndim == 2 and part.dtype == torch.float else None
    assert pair is None or pair[1] is part


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_labels_that_are_the_ids_or_their_neighbours_go_with_them(shift):
    text = noise(4, 34)
    ids, labels = text[:, 1:33], text[:, 1 + shift : 33 + shift]
    for batch in ({"input_ids": ids, "labels": labels}, {"input_ids": ids, "other": labels}):
        assert list(shorten(batch, 8).values())[1].shape == (4, 8)
    assert torch.equal(shorten([ids, labels], 8)[1], labels[:, :8])


def test_labels_with_ignored_tokens_go_with_the_text_whatever_they_are():
    tags = multi_hot(4, 32)
    tags[:, 20:] = -100
    assert torch.equal(shorten({"input_ids": noise(4, 32), "labels": tags}, 8)["labels"], tags[:, :8])


def test_a_mask_without_a_name_is_one_that_is_zero_at_one_id_alone():
    ids = noise(4, 32)
    ids[:, 20:] = 0
    assert shorten((ids, (ids != 0).long()), 8)[1].shape == (4, 8)
    assert shorten((ids, multi_hot(4, 32)), 8)[1].shape == (4, 32)


def test_what_goes_by_token_can_be_said():
    ids, tags, dense = noise(4, 32), multi_hot(4, 32), torch.randn(4, 32)
    short = shorten({"text": {"input_ids": ids}, "tags": tags, "dense": dense}, 8, ["text.input_ids", "tags"])
    assert short["text"]["input_ids"].shape == short["tags"].shape == (4, 8)
    assert short["dense"] is dense
    assert [one.shape[1] for one in shorten((ids, tags, dense), 8, [0, 2])] == [8, 32, 8]
    with pytest.raises(
        SequenceError, match=r"names 'tag', and the batch has input_ids \(4, 32\) int64.*Name parts of shape"
    ):
        shorten({"input_ids": ids}, 8, ["tag"])


def test_everything_that_is_cut_is_contiguous():
    ids = noise(4, 32)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones(4, 1, 32, 32)}
    for short in (shorten(batch, 8), shorten(batch, 8, ["input_ids", "labels"]), split([ids, ids + 0], 5)):
        parts = short.values() if isinstance(short, dict) else short
        assert all(one.is_contiguous() for one in parts)
        list(parts)[1].view(-1)


def test_the_window_begins_behind_padding_on_the_left():
    ids = noise(3, 12)
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, :10] = 0  # two tokens of text: the window ends with them
    batch = {"input_ids": ids, "attention_mask": mask, "pair_mask": torch.arange(144.0).view(1, 1, 12, 12)}
    short = shorten(batch, 4)
    assert torch.equal(short["input_ids"], torch.stack([ids[0, 5:9], ids[1, 8:], ids[2, :4]]))
    assert short["attention_mask"].sum(1).tolist() == [4, 2, 4]
    assert torch.equal(short["pair_mask"][0, 0], batch["pair_mask"][0, 0, 5:9, 5:9])


def test_a_window_without_a_target_moves_to_the_first_one():
    ids = noise(5, 32)
    labels = torch.full_like(ids, -100)
    for row, first in enumerate((20, 31, 3, 0)):  # the last row has none at all
        labels[row, first : first + (1 if first in (0, 31) else 12)] = ids[
            row, first : first + (1 if first in (0, 31) else 12)
        ]
    batch = {"input_ids": ids, "labels": labels}
    assert windows(find_sequences(batch), 8).tolist() == [16, 24, 0, 0, 0]
    short = shorten(batch, 8)
    predicted = (short["labels"][:, 1:] != -100).any(1)  # what a model that predicts the next token is asked for
    assert predicted.tolist() == [True, True, True, False, False]
    assert torch.equal(short["labels"][0, 4:], ids[0, 20:24])
    loss_mask = {"input_ids": ids, "completion_mask": (labels != -100).long()}
    assert torch.equal(windows(find_sequences(loss_mask), 8), windows(find_sequences(batch), 8))


def test_a_target_at_the_first_place_of_a_window_alone_does_not_count():
    """Hugging Face's causal models shift labels, so that nothing predicts the first."""
    labels = torch.full((1, 16), -100)
    labels[0, 0], labels[0, 10] = 1, 1
    assert windows(find_sequences({"input_ids": noise(1, 16), "labels": labels}), 4).tolist() == [8]


def test_an_answer_moves_the_window_and_its_places():
    ids = noise(5, 32)
    first, last = torch.tensor([25, 3, 0, 6, 32]), torch.tensor([28, 5, 0, 9, 32])  # 0: none; 32: ignored
    short = shorten({"input_ids": ids, "start_positions": first, "end_positions": last}, 8)
    for row in (0, 1, 2, 3):
        places = short["start_positions"][row], short["end_positions"][row]
        assert 0 <= places[0] <= places[1] < 8
        assert torch.equal(short["input_ids"][row, places[0] : places[1] + 1], ids[row, first[row] : last[row] + 1])
    assert short["start_positions"][4] >= 8  # ignored still


def finite_steps(model, batches, warmup):
    """Losses of a Hugging Face model that gets a batch by name."""
    losses = []

    class Named(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, i):
            loss = self.model(**batch).loss
            losses.append(float(loss))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    options = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    Trainer(accelerator="cpu", max_steps=3, callbacks=[warmup], **options).fit(
        Named(), DataLoader(batches, batch_size=None)
    )
    return losses


def hf_batch(kind):
    ids = noise(4, 32) % VOCABULARY
    mask, labels = torch.ones_like(ids), ids.clone()
    if kind == "left padding":
        mask[:, :24] = 0
        labels[:, :24] = -100
    if kind == "prompt":
        labels[:, :20] = -100
    if kind == "answer":
        return {"input_ids": ids, "start_positions": torch.full((4,), 25), "end_positions": torch.full((4,), 28)}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("mode", ["truncate", "reshape"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Llama", "left padding"),
        ("Llama", "prompt"),
        ("T5", "plain"),
        ("Bart", "plain"),
        ("Bert", "plain"),
        ("BertQA", "answer"),
    ],
)
def test_hugging_face_models_have_finite_losses_from_the_first_short_step(name, kind, mode):
    hf = pytest.importorskip("transformers")
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    small = {"d_model": 16, "vocab_size": VOCABULARY}
    make = {
        "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**size, intermediate_size=32, use_cache=False)),
        "T5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**small, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
        ),
        "Bart": lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                **small,
                **{f"{part}_{what}": count for part in ("encoder", "decoder") for what, count in
                   (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))},
                max_position_embeddings=64,
            )
        ),
        "Bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**size, intermediate_size=32)),
        "BertQA": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**size, intermediate_size=32)),
    }  # fmt: skip
    warmup = LengthWarmup(8, duration=100, mode=mode)
    if (kind, mode) == ("answer", "reshape"):
        with pytest.raises(SequenceError, match="start_positions"):
            finite_steps(make[name](), [hf_batch(kind)] * 3, warmup)
        return
    losses = finite_steps(make[name](), [hf_batch(kind)] * 3, warmup)
    assert len(losses) == 3
    assert torch.tensor(losses).isfinite().all()


def test_a_step_that_fails_on_what_was_left_whole_says_so():
    class Tags(TinyBlocks):
        def loss(self, batch):
            logits = self(batch["input_ids"])
            return F.cross_entropy(logits.flatten(0, 1), batch["tags"].flatten())

    def batches(x, y):
        return {"input_ids": x, "tags": (y * 7 + x) % VOCABULARY}

    class Named(Tags):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batches(*batch)

    with pytest.raises(
        SequenceError, match=r"left tags whole.*LengthWarmup\(sequence=\['input_ids', 'labels', \.\.\.\]\)"
    ):
        fit(Named(), LengthWarmup(4, duration=100, multiple=4))
    fit(Named(), LengthWarmup(4, duration=100, multiple=4, sequence=["input_ids", "tags"]))

    class Wrong(Named):
        def loss(self, batch):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        fit(Wrong(), LengthWarmup(4, duration=100, multiple=4))


def test_rows_put_end_to_end_are_the_sequence_without_its_rest():
    rows = split([IDS, IDS + 1], 5)
    assert rows[0].shape == (6, 4)
    assert torch.equal(rows[0].view(2, 12), IDS)
    assert torch.equal(rows[1], rows[0] + 1)


@pytest.mark.parametrize("full", [100, 127, 512])
def test_rows_are_never_longer_than_asked_and_lose_less_than_one_token_each(full):
    for length in range(2, full + 1):
        size = row_length(length, full)
        rows = full // size
        assert size <= length
        assert size == full // -(-full // length)  # the longest of even ones
        assert full - rows * size < rows


def test_reshape_sees_the_tokens_of_a_full_step_throughout():
    """From 32 to 512: what is lost is less than one token a row, 0.2 % on average over the warm-up."""
    seen = []
    ids = noise(2, 512)
    for step in range(0, 1000, 10):
        rows = split([ids, ids + 0], length_at(step, 1000, 32, 512, 8))[0]
        seen.append(rows.numel() / ids.numel())
        assert rows.shape[1] < 512
    assert min(seen) > 0.97
    assert sum(seen) / len(seen) > 0.995
    done = token_progress(1000, 1000, 32, 512, mode="reshape")
    assert (done[1] - done[0]) / (done[1000] - done[999]) > 0.97


def test_rows_without_text_or_without_a_target_are_left_out():
    ids = noise(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.clone()
    labels[1, :8] = -100
    batch = split({"input_ids": ids, "attention_mask": mask, "labels": labels}, 4)
    assert torch.equal(batch["input_ids"], torch.stack([ids[0, 4:8], ids[0, 8:], ids[1, 8:]]))


def test_token_progress_is_the_share_of_the_runs_tokens():
    lengths = [length_at(step, 10, 16, 116, 8) for step in range(20)]
    done = token_progress(20, 10, 16, 116, 8)
    assert done == [pytest.approx(sum(lengths[:step]) / sum(lengths)) for step in range(21)]


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    "make", [tuple, list, lambda parts: Pair(*parts), lambda parts: {"x": parts[0], "y": parts[1]}]
)
def test_containers_stay_what_they_are(make):
    batch = make([IDS, IDS])
    short = shorten(batch, 4)
    assert type(short) is type(batch)
    first = short["x"] if isinstance(short, dict) else short[0]
    assert torch.equal(first, IDS[:, :4])


def test_a_tokenizers_own_mapping_stays_one():
    batch = UserDict(input_ids=IDS)
    short = shorten(batch, 4)
    assert type(short) is UserDict
    assert short["input_ids"].shape == (2, 4)
    assert batch["input_ids"].shape == (2, 12)


class Lengths(Callback):
    def __init__(self):
        self.train, self.rows, self.val = {}, {}, set()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.train.setdefault(trainer.global_step, set()).add(batch[0].shape[1])
        self.rows[trainer.global_step] = len(batch[0])

    def on_validation_batch_start(self, trainer, module, batch, *_):
        self.val.add(batch[0].shape[1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_has_the_lengths_of_the_schedule_one_for_each_window(accumulate):
    lengths = Lengths()
    whole = next(iter(TinyBlocks().train_dataloader()))[0].shape[1]
    fit(
        TinyBlocks(),
        LengthWarmup(2, duration=4, multiple=2),
        epochs=4,
        validate=True,
        callbacks=[lengths],
        accumulate_grad_batches=accumulate,
    )
    for step, seen in lengths.train.items():
        assert seen == {length_at(step, 4, 2, whole, 2)}
    assert lengths.val == {whole}


def test_a_share_is_one_of_the_whole_run():
    lengths = Lengths()
    fit(TinyBlocks(), LengthWarmup(2, duration=0.5, multiple=1), callbacks=[lengths])  # 12 steps
    whole = next(iter(TinyBlocks().train_dataloader()))[0].shape[1]
    assert [lengths.train[step] for step in range(12)] == [{length_at(step, 6, 2, whole, 1)} for step in range(12)]


def test_a_share_of_a_run_of_unknown_length_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(IDS[0], IDS[0])] * 4)

    with pytest.raises(
        ValueError, match=r"LengthWarmup\(duration=0.3\) goes by the length of the run, which is not known"
    ):
        Trainer(max_epochs=1, callbacks=[LengthWarmup(4)], logger=False, enable_checkpointing=False).fit(
            TinyBlocks(), DataLoader(Stream(), batch_size=2)
        )


def test_reshape_keeps_the_tokens_of_a_step():
    lengths = Lengths()
    fit(TinyBlocks(), LengthWarmup(4, duration=100, multiple=4, mode="reshape"), epochs=1, callbacks=[lengths])
    batch = next(iter(TinyBlocks().train_dataloader()))[0]
    assert lengths.train[0] == {4}
    assert lengths.rows[0] * 4 == batch.numel()


def test_after_the_warm_up_it_changes_no_bit():
    plain = fit(TinyBlocks()).state["weights"]
    warm = fit(TinyBlocks(), LengthWarmup(4096)).state["weights"]
    assert all(torch.equal(plain[name], warm[name]) for name in plain)


def test_images_are_refused_with_what_was_found():
    with pytest.raises(ValueError, match=r"no token ids.* in a batch of \(\d+, 3, 8, 8\) float32"):
        fit(TinyViT(), LengthWarmup(4))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([IDS, IDS[:, :5]], r"several lengths.*sequence=\[0\]"),
        ([], "no tensors"),
        (torch.randn(2, 12), "no token ids"),
    ],
)
def test_a_batch_without_one_length_is_refused(batch, said):
    with pytest.raises(ValueError, match=said):
        shorten(batch, 4)


def test_what_cannot_be_split_is_refused_with_what_to_do():
    with pytest.raises(
        ValueError, match=r"shape \(2,\) \(1\), which is not known to be one entry a token. Use mode='tr"
    ):
        split([IDS, torch.zeros(2)], 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"start": 1}, "start=1, multiple=8: give 2 tokens or more"),
        ({"multiple": 0}, "multiple=0: give 2 tokens or more"),
        ({"duration": 0}, "duration=0: give a share"),
        ({"duration": 2.5}, "duration=2.5: give a share"),
        ({"mode": "pad"}, "mode='pad' is none of: truncate, reshape"),
        ({"sequence": "labels"}, "sequence='labels': give a list"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said) as refusal:
        LengthWarmup(**arguments)
    assert isinstance(refusal.value, eke.EkeError)
