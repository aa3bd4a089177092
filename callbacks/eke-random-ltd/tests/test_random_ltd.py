"""What random-LTD promises: the schedule, even and rising draws, tokens that pass by, no look into the future."""

import eke
import pytest
import torch
from eke.seams import interceptor
from eke.testing import TinyBlocks, fit, hugging_face
from eke.testing.data import LENGTH
from eke_random_ltd import RandomLTD, cut_side_inputs, draw_positions, tokens_at
from eke_random_ltd.callback import Choose, Side
from lightning.pytorch import Callback, LightningModule
from torch import nn


@pytest.mark.parametrize(
    ("step", "tokens"), [(0, 32), (1, 32), (1000, 72), (1955, 112), (3000, 152), (3909, 192), (3910, 197)]
)
def test_the_schedule_is_that_of_the_authors_for_cifar(step, tokens):
    """floor(t/3910 * (197 - 32) + 32), down to a multiple of 8, from their configuration for the Vision Transformer."""
    assert tokens_at(step, 3910, 32, 197, 8) == tokens


def test_a_share_is_a_share_of_the_sequence_and_full_length_needs_no_multiple():
    assert [tokens_at(step, 4, 0.5, 100, 1) for step in range(6)] == [50, 62, 75, 87, 100, 100]
    assert tokens_at(0, 4, 200, 100, 8) == 100
    assert tokens_at(0, 4, 3, 100, 8) == 1  # never none


def test_positions_rise_and_come_up_equally_often():
    draws = torch.cat([draw_positions(40, 10, 4, seed, torch.device("cpu")) for seed in range(100)])
    assert (draws.diff(dim=1) > 0).all()
    counts = torch.bincount(draws.flatten(), minlength=10) / len(draws)
    assert (counts - 0.4).abs().max() <= 4 * (0.4 * 0.6 / len(draws)) ** 0.5
    assert torch.equal(draws[:40], draw_positions(40, 10, 4, 0, torch.device("cpu")))
    assert len(draws[:40].unique(dim=0)) > 20  # each sample has its own


class Plus(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x + self.by


def ltd(start=0.5, duration=10, multiple=1):
    technique = RandomLTD(start, duration=duration, multiple=multiple)
    technique._steps = duration
    return technique


def test_chosen_tokens_go_through_the_block_and_the_others_pass_by_with_gradient_one():
    block, x = Plus(1.0), torch.randn(3, 8, 2, requires_grad=True)
    choose = Choose(ltd(), 0, seed=5)
    interceptor.attach([block], "test")
    interceptor.put(block, "test", interceptor.Select(choose, Side(block, choose)))
    out = block(x)
    chosen = torch.zeros(3, 8, dtype=torch.bool).scatter(1, draw_positions(3, 8, 4, 5, x.device), True)
    assert torch.equal(out, torch.where(chosen[..., None], x + 1, x))
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


class Seen(Callback):
    """Lengths that each block's attention saw, batch by batch, in training and in validation."""

    def __init__(self):
        self.trained, self.validated, self.kinds, self.hooks = [], [], [], []

    def on_train_start(self, trainer, model):
        def look(block, args):
            (self.trained if model.training else self.validated).append(args[0].shape[1])

        self.hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]

    def on_train_batch_end(self, trainer, model, *_):
        self.kinds.append(next(t for t in eke.techniques(trainer) if isinstance(t, RandomLTD)).step_kind())

    def on_train_end(self, trainer, model):
        for hook in self.hooks:
            hook.remove()


def test_first_and_last_block_see_every_token_and_the_middle_follows_the_schedule():
    seen = Seen()
    fit(TinyBlocks(), RandomLTD(0.25, duration=6, multiple=1), epochs=2, validate=True, callbacks=[seen])
    full = LENGTH
    steps = [seen.trained[i : i + 4] for i in range(0, len(seen.trained), 4)]
    expected = [tokens_at(step, 6, 0.25, full, 1) for step in range(8)]
    assert steps == [[full, count, count, full] for count in expected]
    assert seen.kinds == [f"{c} tokens in the middle" if i < 6 else "all tokens" for i, c in enumerate(expected)]
    assert set(seen.validated) == {full}


def test_full_length_changes_no_bit():
    plain, kept = fit(TinyBlocks()).state["weights"], fit(TinyBlocks(), RandomLTD(1.0)).state["weights"]
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


def intercepted(blocks):
    middle = list(blocks)[1:-1]
    interceptor.attach(middle, "test")
    for number, block in enumerate(middle):
        choose = Choose(ltd(), 0, seed=number)
        interceptor.put(block, "test", interceptor.Select(choose, Side(block, choose)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_output_of_a_causal_model_looks_into_the_future(kind, attention):
    pytest.importorskip("transformers")
    model = hugging_face(kind)
    model.set_attn_implementation(attention)
    intercepted(model.transformer.h if kind == "gpt2" else model.model.layers)
    ids = torch.randint(0, 32, (2, LENGTH))
    ahead = torch.cat([ids[:, :5], (ids[:, 5:] + 1) % 32], dim=1)
    torch.testing.assert_close(model(ids).logits[:, :5], model(ahead).logits[:, :5], rtol=0, atol=1e-6)
    assert not torch.allclose(model(ids).logits[:, 5:], model(ahead).logits[:, 5:])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_padding_is_as_if_it_were_not_there(kind):
    """Chosen tokens attend to chosen ones that are no padding: what the padding holds does not matter."""
    pytest.importorskip("transformers")
    model = hugging_face(kind).eval()
    blocks = {"gpt2": "transformer.h", "llama": "model.layers", "bert": "bert.encoder.layer"}[kind]
    intercepted(model.get_submodule(blocks))
    ids = torch.randint(0, 32, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    other = torch.where(mask.bool(), ids, (ids + 3) % 32)
    first, second = (model(input_ids=x, attention_mask=mask).logits[:, :6] for x in (ids, other))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_rotary_tables_and_masks_are_cut_to_the_chosen_tokens():
    positions = torch.tensor([[0, 2], [1, 3]])
    cos = torch.arange(4.0).view(1, 4, 1).expand(1, 4, 6)
    mask = torch.arange(16.0).view(1, 1, 4, 4)
    names = ("attention_mask", "position_ids", "encoder_hidden_states")
    args, kwargs = cut_side_inputs(
        names,
        (mask, torch.arange(4)[None], torch.zeros(2, 4, 3)),
        {"position_embeddings": (cos, -cos), "src_key_padding_mask": torch.eye(4)[:2]},
        positions,
        4,
    )
    assert args[0].tolist() == [[[[0, 2], [8, 10]]], [[[5, 7], [13, 15]]]]
    assert args[1].tolist() == [[0, 2], [1, 3]]
    assert args[2].shape == (2, 4, 3)  # of another sequence
    assert kwargs["position_embeddings"][0][..., 0].tolist() == [[0, 2], [1, 3]]
    assert kwargs["src_key_padding_mask"].tolist() == [[1, 0], [1, 0]]


def test_a_causal_mask_of_pairs_is_cut_and_another_is_refused():
    positions, mask = torch.tensor([[0, 2]]), nn.Transformer.generate_square_subsequent_mask(4)
    (cut,), _ = cut_side_inputs(("src_mask",), (mask,), {"is_causal": True}, positions, 4)
    assert torch.equal(cut, mask[:2, :2])
    with pytest.raises(RuntimeError, match=r"gets src_mask of shape \(4, 4\), with one entry for each of 4 tokens"):
        cut_side_inputs(("src_mask",), (mask,), {"is_causal": False}, positions, 4)


def test_an_unknown_input_of_token_length_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"gets cu_seqlens of shape \(4,\)"):
        cut_side_inputs((), (), {"cu_seqlens": torch.zeros(4)}, torch.tensor([[0, 2]]), 4)


def test_the_blocks_compile_to_one_graph_a_length_and_one_for_the_first_and_last():
    model = TinyBlocks()
    for block in model.blocks:
        block.compile(dynamic=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(model, RandomLTD(4, duration=6, multiple=2), epochs=2)  # lengths 4, 6 and 8
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3 + 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"start": 0}, "start=0: give a share of the tokens up to 1"),
        ({"start": 2.5}, "start=2.5: give a share"),
        ({"duration": 1.5}, "duration=1.5: give a share of the run"),
        ({"multiple": 0}, "multiple=0: give 1 or more"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        RandomLTD(**arguments)


def test_models_that_it_cannot_serve_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="blocks has 2 blocks. The first and the last always see all tokens"):
        fit(TinyBlocks(layers=2), RandomLTD())

    class TimeFirst(LightningModule):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16)
            self.encoder = nn.TransformerEncoder(layer, 4)

    with pytest.raises(ValueError, match="the attention has the batch second"):
        fit(TimeFirst(), RandomLTD())


def test_windows_of_an_image_are_refused():
    with pytest.raises(RuntimeError, match=r"hidden states of shape \(2, 4, 4, 8\) and needs \(batch, length, width\)"):
        Choose(ltd(), 0, 0)(torch.zeros(2, 4, 4, 8))
