"""What masking promises: the papers' shares, whole words, spans, MASS's own example, and a head that loses nothing."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from itertools import groupby
from random import Random

import eke
import pytest
import torch
from eke.testing import TinyBlocks, fit, hugging_face
from eke.testing.data import VOCABULARY, Tokens
from eke_masked_lm import (
    MASS,
    MaskedLM,
    MaskingError,
    choose_spans,
    choose_tokens,
    choose_words,
    corrupt,
    hide_span,
    span_lengths,
    words_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn import functional as F
from torch.utils.data import DataLoader

MASK, PAD, CLS = 103, 0, 101
SIZE = 1000


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def text(rows=400, length=100, seed=1):
    return torch.randint(200, SIZE, (rows, length), generator=numbers(seed))


def test_each_sequence_hides_exactly_its_rounded_share_and_one_at_least():
    candidates = torch.ones(3, 40, dtype=torch.bool)
    candidates[1, 20:] = False
    candidates[2, 1:] = False
    hidden = choose_tokens(candidates, 0.15, numbers())
    assert hidden.sum(1).tolist() == [6, 3, 1]
    assert not (hidden & ~candidates).any()
    assert choose_tokens(torch.zeros(2, 5, dtype=torch.bool), 0.15, numbers()).sum() == 0


def test_every_place_is_hidden_equally_often_and_the_treatments_are_80_10_10():
    ids = text(4000, 50)
    hidden = choose_tokens(torch.ones_like(ids, dtype=torch.bool), 0.2, numbers())
    assert (hidden.float().mean(0) - 0.2).abs().max() < 4 * (0.2 * 0.8 / 4000) ** 0.5
    out = corrupt(ids, hidden, MASK, SIZE, numbers(2))
    count = int(hidden.sum())
    masked = (out == MASK)[hidden].float().mean()
    same = (out == ids)[hidden].float().mean()  # a random token hits the right one once in 1000
    error = 4 * (0.8 * 0.2 / count) ** 0.5
    assert abs(masked - 0.8 - 0.1 / SIZE) < error
    assert abs(same - 0.1 - 0.1 / SIZE) < error
    assert torch.equal(out[~hidden], ids[~hidden])
    assert (corrupt(ids, hidden, MASK, SIZE, numbers(2), 1.0, 0.0)[hidden] == MASK).all()


def test_a_word_is_hidden_whole_or_not_at_all_and_no_word_exceeds_the_budget():
    pieces = torch.zeros(SIZE, dtype=torch.bool)
    pieces[600:] = True
    ids = text(200, 60)
    words = words_of(ids, pieces)
    candidates = torch.ones_like(ids, dtype=torch.bool)
    candidates[:, 50:] = False
    hidden = choose_words(candidates, words, 0.3, numbers())
    for row in range(200):
        for word in range(int(words[row].max()) + 1):
            tokens = (words[row] == word) & candidates[row]
            assert len(set(hidden[row][tokens].tolist())) <= 1
    assert (hidden.sum(1) <= 15).all()
    assert hidden.sum(1).float().mean() > 14.5
    assert not (hidden & ~candidates).any()


def test_words_begin_where_a_token_does_not_go_on():
    pieces = torch.tensor([False, False, True])
    assert words_of(torch.tensor([[0, 2, 2, 1, 0, 2], [2, 0, 0, 2, 1, 1]]), pieces).tolist() == [
        [0, 0, 0, 1, 2, 2],
        [0, 0, 1, 1, 2, 3],
    ]


def test_a_word_that_no_budget_has_room_for_is_hidden_all_the_same():
    """Words of 7 and 5 tokens, and a budget of 2: the shortest is hidden, the first of them where several are."""
    words = torch.tensor([[0] * 7 + [1] * 5, [0] * 6 + [1] * 6]).repeat(200, 1)
    hidden = choose_words(torch.ones_like(words, dtype=torch.bool), words, 0.15, numbers())
    assert (hidden[::2] == (words[::2] == 1)).all()
    assert (hidden[1::2].sum(1) == 6).all()
    first = hidden[1::2, 0].float().mean()
    assert abs(first - 0.5) < 4 * (0.25 / 200) ** 0.5
    nothing = torch.zeros_like(words, dtype=torch.bool)
    assert not choose_words(nothing, words, 0.15, numbers()).any()


def test_the_lengths_of_spans_are_geometric_given_that_they_are_ten_at_most():
    count = 200_000
    found = torch.bincount(span_lengths(count, numbers()), minlength=11)[1:].double() / count
    wanted = torch.tensor([0.2 * 0.8 ** (n - 1) for n in range(1, 11)], dtype=torch.float64)
    wanted = wanted / wanted.sum()
    assert (found - wanted).abs().max() < 4 * (0.25 / count) ** 0.5
    assert wanted[-1] == pytest.approx(0.030, abs=5e-4)  # cut at 10 in place of that, it would be 0.134
    mean = float((wanted * torch.arange(1, 11)).sum())
    assert mean == pytest.approx(3.797, abs=1e-3)
    other = span_lengths(count, numbers(1), 4, 0.5).double()
    assert abs(other.mean() - (0.5 + 2 * 0.25 + 3 * 0.125 + 4 * 0.0625) / 0.9375) < 4 / count**0.5


def test_spans_spend_the_budget_and_neighbours_get_one_treatment():
    ids = text(300, 200)
    hidden, runs = choose_spans(torch.ones_like(ids, dtype=torch.bool), 0.15, numbers())
    assert (hidden.sum(1) == 30).all()
    assert torch.equal(runs > 0, hidden)
    out = corrupt(ids, hidden, MASK, SIZE, numbers(3), groups=runs)
    for row in range(300):
        for number in runs[row].unique().tolist()[1:]:
            places = (runs[row] == number).nonzero()[:, 0]
            assert (places.diff() == 1).all()
            assert places[0] == 0 or not hidden[row, places[0] - 1]
            assert len(set((out[row, places] == MASK).tolist())) == 1
    masked = (out == MASK)[hidden].float().mean()
    assert abs(masked - 0.8) < 4 * (0.16 * 300 * 7) ** 0.5 / (300 * 7)  # about 7 runs a sequence


def authors_spans(words, count, draw):
    """The authors' loop over one text, word by word, as an oracle: the set of hidden places."""
    hidden, lengths = set(), range(1, 11)
    weights = [0.2 * 0.8 ** (n - 1) for n in lengths]
    while len(hidden) < count:
        size, anchor = draw.choices(lengths, weights)[0], draw.randrange(len(words))
        if anchor in hidden:
            continue
        for place, word in enumerate(words):
            if words[anchor] <= word < words[anchor] + size and len(hidden) < count:
                hidden.add(place)
    return hidden


def runs_of(hidden):
    """Lengths of the runs of hidden tokens in all rows, counted up to 12, by row: (12,)."""
    counts = torch.zeros(12, dtype=torch.float64)
    for row in hidden.tolist():
        for value, group in groupby(row):
            if value:
                counts[min(len(list(group)), 12) - 1] += 1
    return counts / len(hidden)


@pytest.mark.parametrize("sizes", [[1], [1, 2, 3]])
def test_spans_are_distributed_as_the_authors_own(sizes):
    words = torch.arange(60).repeat_interleave(torch.tensor(sizes).repeat(60 // len(sizes)))[:60]
    rows, budget, draw = 3000, 9, Random(0)
    own, _ = choose_spans(torch.ones(rows, 60, dtype=torch.bool), 0.15, numbers(), words=words.expand(rows, -1))
    other = torch.zeros(rows, 60, dtype=torch.bool)
    for row in range(rows):
        other[row, list(authors_spans(words.tolist(), budget, draw))] = True
    # Of a mean over rows of something between 0 and 3 or so, twice: 4 standard errors.
    places = (own.double().mean(0) - other.double().mean(0)).abs().max()
    assert places < 4 * (2 * 0.15 * 0.85 / rows) ** 0.5 * 1.1
    assert (runs_of(own) - runs_of(other)).abs().max() < 4 * (2 * 0.6 / rows) ** 0.5


def test_spans_begin_at_words_and_hold_whole_ones():
    words = torch.arange(120).repeat_interleave(torch.tensor([1, 2, 3]).repeat(40)).expand(400, -1)
    candidates = torch.ones_like(words, dtype=torch.bool)
    hidden, runs = choose_spans(candidates, 0.15, numbers(), words=words)
    assert (hidden.sum(1) == round(0.15 * words.shape[1])).all()
    begins = torch.ones_like(candidates)
    begins[:, 1:] = words[:, 1:] != words[:, :-1]
    first = (runs > 0) & ~torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
    assert begins[first].all()
    whole = 0
    for row in range(400):
        for word in set(words[row][hidden[row]].tolist()):
            whole += hidden[row][words[row] == word].all().item()
    cut = sum(len(set(words[row][hidden[row]].tolist())) for row in range(400)) - whole
    assert cut <= 400  # the last span of a sequence alone
    # The authors draw a token and take its word: a word of 3 begins a span three times as often as one of 1.
    anchors, _ = choose_spans(candidates, 1e-9, numbers(5), words=words)  # a budget of one token: where spans begin
    place = anchors.long().argmax(1)
    length = torch.bincount(words[0])[words[0][place]].double()
    counts = torch.bincount(length.long(), minlength=4)[1:].double() / 400
    assert (counts - torch.tensor([1, 2, 3]) / 6).abs().max() < 4 * (0.25 / 400) ** 0.5


def test_a_span_does_not_run_over_what_may_not_be_hidden():
    candidates = torch.ones(200, 40, dtype=torch.bool)
    candidates[:, ::5] = False
    hidden, _ = choose_spans(candidates, 0.5, numbers())
    assert not (hidden & ~candidates).any()
    assert (hidden.sum(1) == 16).all()


def test_spans_know_which_tokens_go_on_with_a_word():
    ids = text(50, 60)
    words = words_of(ids, torch.arange(SIZE) >= 600)
    for batch, given in (({"input_ids": ids}, range(600, SIZE)), ({"input_ids": ids, "word_ids": words}, None)):
        hidden = MaskedLM(MASK, SIZE, unit="span", continues=given).hide(batch, 3)["labels"] != -100
        begins = hidden & ~torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        assert ((ids < 600) | (torch.arange(60) == 0))[begins].all()


def test_special_tokens_and_padding_are_never_hidden_and_labels_are_the_originals():
    ids = text(50, 30)
    ids[:, 0], ids[:, 25:] = CLS, PAD
    mask = (ids != PAD).long()
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    for unit in ("token", "span"):
        out = MaskedLM(MASK, SIZE, special=[CLS, PAD], share=0.5, unit=unit).hide(batch, 0)
        labels = out["labels"]
        assert torch.equal(out["input_ids"][:, 0], ids[:, 0])
        assert (out["input_ids"][:, 25:] == PAD).all()
        assert (labels[:, 0] == -100).all()
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        assert torch.equal(out["input_ids"][labels == -100], ids[labels == -100])
        assert out["token_type_ids"] is batch["token_type_ids"]
    assert torch.equal(batch["input_ids"], ids)  # the user's own batch is left alone


def test_what_the_loader_leaves_out_is_not_hidden():
    ids = text(50, 30)
    special = torch.zeros_like(ids)
    special[:, :10] = 1
    own = ids.masked_fill(special.bool(), -100)
    after = torch.cat([own[:, 1:], own[:, -1:]], dim=1)  # labels of the token behind each
    after[:, -1] = 7
    for unit in ("token", "word", "span"):
        technique = MaskedLM(MASK, SIZE, share=0.5, unit=unit, continues=())
        for batch in (
            {"input_ids": ids, "special_tokens_mask": special},
            {"input_ids": ids, "labels": own},
            {"input_ids": ids, "labels": after},
            (ids, own),
        ):
            out = technique.hide(batch, 0)
            labels = out["labels"] if isinstance(out, dict) else out[1]
            assert (labels[:, :10] == -100).all()
            assert ((labels[:, 10:] != -100).sum(1) == 10).all()
            assert "special_tokens_mask" not in out
    hidden = [one.hide({"input_ids": ids}, 0)["labels"][:, :10] for one in (MaskedLM(MASK, SIZE, share=0.5),)]
    assert (hidden[0] != -100).any()


@pytest.mark.parametrize("make", [lambda **given: MaskedLM(MASK, SIZE, **given), lambda **given: MASS(
    MASK, SIZE, start_token=5, pad_token=PAD, **given
)])  # fmt: skip
@pytest.mark.parametrize(
    "labels",
    [
        torch.arange(4),
        torch.rand(4, 30),
        torch.randint(2, (4, 30)),
        torch.randint(9, (4, 3)),
        ["a", "b", "c", "d"],
    ],
)
def test_labels_that_are_not_the_tokens_are_never_replaced(make, labels):
    with pytest.raises(MaskingError, match="The batch has labels (of shape|in a list).*Leave them out of the batch"):
        make().hide({"input_ids": text(4, 30), "labels": labels}, 0)
    with pytest.raises(MaskingError, match="The batch has labels"):
        make().hide((text(4, 30), labels), 0)


def test_a_batch_that_another_masking_has_been_at_is_refused():
    ids = text(4, 30)
    done = MaskedLM(MASK, SIZE).hide({"input_ids": ids}, 0)
    with pytest.raises(MaskingError, match="what another masking has left"):
        MaskedLM(MASK, SIZE).hide(done, 1)


@pytest.mark.parametrize("head", [None, "model.cls"])
@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_a_batch_with_nothing_to_hide_trains_nothing_and_says_so(unit, head):
    pytest.importorskip("transformers")
    batches = [torch.zeros(4, 8, dtype=torch.long), torch.arange(1, 33).view(4, 8) % VOCABULARY]
    before, seen = [], []

    class Own(Masked):
        def training_step(self, batch, batch_idx):
            before.append([weight.detach().clone() for weight in self.parameters()])
            return super().training_step(batch, batch_idx)

        def on_after_backward(self):
            seen.append(
                [None if weight.grad is None else float(weight.grad.abs().sum()) for weight in self.parameters()]
            )

        def validation_step(self, batch, batch_idx):
            assert self.model(input_ids=batch[0], labels=batch[1]).loss.isfinite()

    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    technique = MaskedLM(VOCABULARY - 1, VOCABULARY, special=[0], unit=unit, continues=[], head=head)
    with pytest.warns(UserWarning, match="MaskedLM found nothing to hide in a batch"):
        Trainer(max_steps=2, callbacks=[technique], enable_checkpointing=False, **options).fit(
            Own(), DataLoader(batches, batch_size=None), DataLoader(batches, batch_size=None)
        )
    assert all(one == 0 for one in seen[0])  # every weight has a gradient, of 0
    assert any(one > 0 for one in seen[1])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_causal_models_are_refused_and_those_of_ones_own_are_warned_about(kind):
    pytest.importorskip("transformers")

    class Causal(Masked):
        def __init__(self):
            super().__init__()
            self.model = hugging_face(kind)

    with pytest.raises(MaskingError, match="(GPT2LMHeadModel|LlamaForCausalLM) attends to earlier tokens alone.*BERT"):
        fit(Causal(), MaskedLM(VOCABULARY - 1, VOCABULARY))
    with pytest.warns(UserWarning, match="Attention in TinyBlocks sees earlier tokens alone"):
        fit(TinyBlocks(), MaskedLM(VOCABULARY - 1, VOCABULARY), epochs=1)


Pair = namedtuple("Pair", ["ids", "labels"])


def test_batches_keep_their_kind():
    ids = text(2, 10)
    one = MaskedLM(MASK, SIZE)
    assert isinstance(one.hide(UserDict(input_ids=ids), 0), UserDict)
    assert isinstance(one.hide(Pair(ids, ids), 0), Pair)
    assert isinstance(one.hide([ids, ids, "name"], 0), list)
    masked, labels = one.hide(ids, 0)
    assert masked.shape == labels.shape == ids.shape
    assert torch.equal(one.hide(ids, 5)[0], one.hide(ids, 5)[0])
    assert not torch.equal(one.hide(ids, 5)[1], one.hide(ids, 6)[1])


class Masked(LightningModule):
    """A Hugging Face masked language model on the kit's tokens."""

    dataset = Tokens

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = hugging_face("bert")
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch[0], labels=batch[1]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_a_sparse_head_has_the_loss_and_the_gradient_of_the_dense_one():
    """Of Hugging Face's BERT with its own loss; the head runs on hidden positions only."""
    pytest.importorskip("transformers")
    rows = []

    class Rows(Callback):
        def on_train_start(self, trainer, model):
            model.model.cls.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape))

    runs = [
        fit(Masked(), MaskedLM(VOCABULARY - 1, VOCABULARY, share=0.25, head=head), epochs=2, callbacks=[Rows()])
        for head in (None, "model.cls")
    ]
    dense, sparse = ([weight for _, weight in sorted(run.state["weights"].items())] for run in runs)
    assert runs[0].model.losses == pytest.approx(runs[1].model.losses, rel=1e-5)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(dense, sparse, strict=True))
    half = len(rows) // 2
    assert all(shape[1] == 8 for shape in rows[:half])
    assert all(shape[:2] == (1, rows[0][0] * 2) for shape in rows[half:])  # a quarter of 8 tokens


def test_validation_sees_the_same_masks_each_time_and_training_new_ones():
    seen = {"train": [], "val": []}

    class Look(TinyBlocks):
        def training_step(self, batch, batch_idx):
            seen["train"].append(batch[1].clone())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen["val"].append(batch[1].clone())

    fit(Look(), MaskedLM(VOCABULARY - 1, VOCABULARY), epochs=2, validate=True)
    assert torch.equal(*[labels == -100 for labels in seen["val"][:2]])
    assert (seen["val"][0] == -100).any()
    assert not torch.equal(seen["train"][0] == -100, seen["train"][1] == -100)


class Tokenizer:
    """What a fast tokenizer tells of itself."""

    mask_token_id, all_special_ids = 2, [0, 1, 2]

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def convert_ids_to_tokens(self, ids):
        return [self.names[number] for number in ids]


def test_a_tokenizer_tells_which_tokens_go_on_with_a_word():
    piece = MaskedLM.of(Tokenizer(["[PAD]", "[CLS]", "[MASK]", "play", "##ing", "##s"]), unit="word")
    assert piece.continues == (4, 5)
    assert piece.special == (0, 1, 2)
    byte = MaskedLM.of(Tokenizer(["<pad>", "<s>", "<mask>", "Ġplay", "ing", "Ġthe"]))
    assert byte.continues == (4,)
    nameless = Tokenizer(["a"])
    nameless.mask_token_id = None
    with pytest.raises(ValueError, match="Tokenizer has no mask token. Add one"):
        MaskedLM.of(nameless)


def test_mass_is_the_papers_example():
    """m = 8, u = 3, k = 4: the encoder sees x1 x2 M M M M x7 x8, the decoder gets x2 to x5 at places 2 to 5."""
    x = torch.arange(11, 19)[None]
    mass = MASS(MASK, SIZE, start_token=5, pad_token=PAD, masked=1.0, random=0.0)
    seed = next(s for s in range(1000) if hide_span(torch.tensor([8]), 0.5, numbers(s))[0].item() == 2)
    batch = mass.hide({"input_ids": x}, seed)
    assert batch["input_ids"].tolist() == [[11, 12, MASK, MASK, MASK, MASK, 17, 18]]
    assert batch["decoder_input_ids"].tolist() == [[12, 13, 14, 15]]
    assert batch["decoder_position_ids"].tolist() == [[2, 3, 4, 5]]
    assert batch["labels"].tolist() == [[13, 14, 15, 16]]


def test_mass_at_the_beginning_starts_from_the_start_token_and_shorter_sequences_are_padded():
    lengths = torch.tensor([8, 4])
    ids = torch.arange(20, 36).view(2, 8)
    seed = next(s for s in range(1000) if hide_span(lengths, 0.5, numbers(s))[0].tolist() == [0, 1])
    mask = (torch.arange(8) < lengths[:, None]).long()
    batch = MASS(MASK, SIZE, start_token=5, pad_token=PAD).hide({"input_ids": ids, "attention_mask": mask}, seed)
    assert batch["decoder_input_ids"].tolist() == [[5, 20, 21, 22], [28, 29, PAD, PAD]]
    assert batch["labels"].tolist() == [[20, 21, 22, 23], [29, 30, -100, -100]]
    assert batch["decoder_position_ids"].tolist() == [[0, 1, 2, 3], [1, 2, 0, 0]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_mass_hides_text_alone_wherever_the_padding_is(side):
    """Begin and end tokens, one between two sentences, and padding on one side, of 300 sequences of other lengths."""
    rows, length, begin, end = 300, 40, 1, 2
    ids, mask = torch.full((rows, length), PAD), torch.zeros(rows, length, dtype=torch.long)
    words = 200 + torch.arange(rows * length).view(rows, length) % (SIZE - 200)
    for row in range(rows):
        size = 5 + row % 30
        first = length - size if side == "left" else 0
        ids[row, first : first + size] = words[row, first : first + size]
        ids[row, [first, first + 3, first + size - 1]] = torch.tensor([begin, end, end])
        mask[row, first : first + size] = 1
    technique = MASS(MASK, SIZE, start_token=5, pad_token=PAD, special=[begin, end], masked=1.0, random=0.0)
    batch = technique.hide({"input_ids": ids, "attention_mask": mask}, 4)
    plain = ids >= 200
    hidden = batch["input_ids"] == MASK
    assert not (hidden & ~plain).any()
    assert torch.equal(hidden.sum(1), (plain.sum(1) * 0.5).round().long().clamp(min=1))
    for row in range(rows):
        labels = batch["labels"][row][batch["labels"][row] != -100]
        assert torch.equal(labels, ids[row][hidden[row]])  # in order
        of = ids[row][plain[row]]
        at = (of == labels[0]).nonzero()[0, 0]
        assert torch.equal(of[at : at + len(labels)], labels)  # one span of the text
        before = torch.cat([torch.tensor([5]), of])[at : at + len(labels)]
        assert torch.equal(batch["decoder_input_ids"][row, : len(labels)], before)
        assert batch["decoder_position_ids"][row, : len(labels)].tolist() == list(range(at, at + len(labels)))


def test_mass_with_nothing_to_hide_has_a_finite_loss_times_zero():
    technique = MASS(MASK, SIZE, start_token=5, pad_token=PAD)
    batch = technique.hide({"input_ids": torch.full((2, 6), PAD)}, 0)
    assert (batch["labels"] != -100).sum() == 1
    assert batch["decoder_attention_mask"].any(1).all()
    run = eke.Run(technique, None, TinyBlocks())
    assert technique.around_step(run, lambda batch: batch["labels"].sum() * 0 + 3.0, batch) == 0


def test_mass_begins_at_the_beginning_in_a_fifth_and_ends_at_the_end_in_a_fifth():
    start, size = hide_span(torch.full((20_000,), 100), 0.5, numbers())
    assert (size == 50).all()
    first, last = ((start == end).float().mean() for end in (0, 50))
    for share in (first, last):
        assert abs(share - (0.2 + 0.6 / 51)) < 0.012
    assert start.max() == 50


def test_mass_trains_hugging_faces_t5_without_positions():
    hf = pytest.importorskip("transformers")

    class Translate(LightningModule):
        dataset = Tokens

        def __init__(self):
            super().__init__()
            size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
            self.model = hf.T5ForConditionalGeneration(hf.T5Config(**size, decoder_start_token_id=0))

        def training_step(self, batch, batch_idx):
            assert batch["decoder_input_ids"].shape[1] == 4  # of 8
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Ids(Tokens):
        def __getitem__(self, index):
            return super().__getitem__(index)[0]

    Translate.dataset = Ids
    mass = MASS(VOCABULARY - 1, VOCABULARY, start_token=0, pad_token=0, positions=None)
    losses = [step["loss"] for step in fit(Translate(), mass, epochs=6).state["steps"].values()]
    assert sum(losses[-4:]) < sum(losses[:4])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"share": 0}, "share=0: give a share"),
        ({"masked": 0.9, "random": 0.2}, "masked=0.9, random=0.2: give shares of those hidden"),
        ({"unit": "sentence"}, "unit='sentence' is none of: token, word, span"),
        ({"special": [1000]}, r"special=\(1000,\): give ids below vocabulary=1000"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        MaskedLM(MASK, SIZE, **arguments)


def test_batches_and_heads_that_it_cannot_serve_are_refused_with_the_reason():
    with pytest.raises(MisconfigurationException, match=r"holds no token ids .* found float32 of shape \(2, 3, 4\)"):
        MaskedLM(MASK, SIZE).hide(torch.zeros(2, 3, 4), 0)
    with pytest.raises(MisconfigurationException, match="found inputs in a dict"):
        MaskedLM(MASK, SIZE).hide({"inputs": 3}, 0)
    with pytest.raises(MisconfigurationException, match="does not know which tokens make a word"):
        MaskedLM(MASK, SIZE, unit="word").hide(text(), 0)
    with pytest.raises(ValueError, match="head='cls' is no module of TinyBlocks, whose parts are: embed, blocks, norm"):
        fit(TinyBlocks(), MaskedLM(VOCABULARY - 1, VOCABULARY, head="cls"))
    with pytest.raises(
        MisconfigurationException, match=r"The head of MaskedLM gets \(\d+, 8\) and not hidden states of"
    ):
        fit(TinyBlocks(), MaskedLM(VOCABULARY - 1, VOCABULARY, head="embed"))


def test_a_dense_loss_equals_the_mean_over_hidden_tokens():
    logits, ids = torch.randn(2, 6, SIZE), text(2, 6)
    out = MaskedLM(MASK, SIZE, share=0.5).hide((ids, ids), 0)[1]
    hidden = out != -100
    dense = F.cross_entropy(logits.flatten(0, 1), out.flatten())
    torch.testing.assert_close(dense, F.cross_entropy(logits[hidden], ids[hidden]))


def test_compiled_by_block_it_takes_few_graphs():
    model = TinyBlocks()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(model, MaskedLM(VOCABULARY - 1, VOCABULARY, head="head"), epochs=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_step_that_does_not_read_the_labels_is_refused_before_it_trains_on_texts_with_holes():
    class Deaf(TinyBlocks):
        def loss(self, batch):
            return self(batch[0]).logsumexp(-1).mean()

    class Late(TinyBlocks):
        def loss(self, batch):  # a view of the labels is enough
            return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].view(-1))

    masking = MaskedLM(VOCABULARY - 1, VOCABULARY, share=0.4)
    with pytest.raises(MaskingError, match="does not read the labels that MaskedLM made.*Let Deaf predict"):
        fit(Deaf(), masking)
    fit(Late(), masking, epochs=1)


@dataclass
class Sentences:
    input_ids: torch.Tensor
    labels: torch.Tensor | None = None


def test_a_dataclass_with_input_ids_gets_labels_and_one_without_is_named():
    batch = Sentences(text(4, 10))
    hidden = MaskedLM(MASK, SIZE, share=0.3).hide(batch, 1)
    assert type(hidden) is Sentences
    assert (hidden.labels != -100).sum() == 4 * 3
    assert batch.labels is None
    with pytest.raises(MaskingError, match="found pixel_values, labels in a dict"):
        MaskedLM(MASK, SIZE).hide({"pixel_values": torch.zeros(2, 3, 4, 4), "labels": torch.zeros(2)}, 1)
