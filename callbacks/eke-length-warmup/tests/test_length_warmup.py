"""Which lengths come when, what is cut and what is not, and what is refused."""

from collections import UserDict, namedtuple

import pytest
import torch
from eke.testing import TinyBlocks, TinyViT, fit
from eke_length_warmup import LengthWarmup, length_at, shorten, split
from lightning.pytorch import Callback


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
        "pairs": pairs,
        "sample": torch.tensor([0.5, 1.0]),
        "name": "x",
    }
    short = shorten(batch, 8)
    assert torch.equal(short["input_ids"], IDS[:, :8])
    assert short["attention_mask"].shape == (2, 8)
    assert torch.equal(short["hidden"], batch["hidden"][:, :8])
    assert short["pairs"].shape == (2, 1, 8, 8)
    assert short["sample"] is batch["sample"]
    assert short["name"] == "x"
    assert batch["input_ids"].shape == (2, 12)  # the user's batch is as it was


def test_rows_put_end_to_end_are_the_sequence_without_its_rest():
    rows = split([IDS, IDS + 1], 5)
    assert rows[0].shape == (4, 5)
    assert torch.equal(rows[0].view(2, 10), IDS[:, :10])
    assert torch.equal(rows[1], rows[0] + 1)


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
    warmup = LengthWarmup(2, duration=0.5, multiple=2)
    fit(TinyBlocks(), warmup)  # 12 steps
    assert warmup._steps == 6


def test_reshape_keeps_the_tokens_of_a_step():
    lengths = Lengths()
    fit(TinyBlocks(), LengthWarmup(4, duration=100, multiple=4, mode="reshape"), epochs=1, callbacks=[lengths])
    batch = next(iter(TinyBlocks().train_dataloader()))[0]
    assert lengths.train[0] == {4}
    assert lengths.rows[0] * 4 == batch.numel() // (batch.shape[1] // 4 * 4) * (batch.shape[1] // 4 * 4)


def test_after_the_warm_up_it_changes_no_bit():
    plain = fit(TinyBlocks()).state["weights"]
    warm = fit(TinyBlocks(), LengthWarmup(4096)).state["weights"]
    assert all(torch.equal(plain[name], warm[name]) for name in plain)


def test_images_are_refused_with_what_was_found():
    with pytest.raises(ValueError, match=r"no single length of sequences in a batch of \(\d+, 3, 8, 8\) float32"):
        fit(TinyViT(), LengthWarmup(4))


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([IDS, IDS[:, :5]], "no single length"),
        ([], "no tensors"),
        (torch.randn(2, 12), "needs token ids"),
    ],
)
def test_a_batch_without_one_length_is_refused(batch, said):
    with pytest.raises(ValueError, match=said):
        shorten(batch, 4)


def test_what_cannot_be_split_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"shape \(2,\), which is not one entry a token. Use mode='truncate'"):
        split([IDS, torch.zeros(2)], 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"start": 1}, "start=1, multiple=8: give 2 tokens or more"),
        ({"multiple": 0}, "multiple=0: give 2 tokens or more"),
        ({"duration": 0}, "duration=0: give a share"),
        ({"duration": 2.5}, "duration=2.5: give a share"),
        ({"mode": "pad"}, "mode='pad' is none of: truncate, reshape"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        LengthWarmup(**arguments)
