"""What random-LTD promises: the schedule, even and rising draws, tokens that pass by, no look into the future."""

import copy
from functools import partial

import eke
import pytest
import torch
from eke.seams import interceptor
from eke.testing import TinyBlocks, fit, hugging_face
from eke.testing.data import LENGTH
from eke_random_ltd import RandomLTD, RandomLTDError, cut_side_inputs, draw_positions, tokens_at
from eke_random_ltd.callback import Choose, Side
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader


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


def test_chosen_tokens_go_through_the_block_and_the_others_pass_by_with_gradient_one():
    block, x = Plus(1.0), torch.randn(3, 8, 2, requires_grad=True)
    choose = Choose(0.0, 0.5, 1, seed=5)
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
        choose = Choose(0.0, 0.5, 1, seed=number)
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


def test_what_belongs_to_another_sequence_loses_rows_alone():
    """Of 4 tokens that attend to 4 others: the columns of masks and biases are the others'."""
    positions, square = torch.tensor([[0, 2], [1, 3]]), torch.arange(16.0).view(1, 1, 4, 4)
    names = ("position_bias", "encoder_decoder_position_bias", "memory_mask", "encoder_attention_mask")
    args, _ = cut_side_inputs(names, (square, square, square[0, 0], torch.ones(2, 1, 1, 4)), {}, positions, 4)
    assert args[0].tolist() == [[[[0, 2], [8, 10]]], [[[5, 7], [13, 15]]]]
    rows = [[[[0, 1, 2, 3], [8, 9, 10, 11]]], [[[4, 5, 6, 7], [12, 13, 14, 15]]]]
    assert args[1].tolist() == args[2].tolist() == rows
    assert args[3].shape == (2, 1, 1, 4)


class HandsOn(nn.Module):
    """As T5's: returns the bias that it got, and makes one where it got none."""

    def forward(self, x, position_bias=None):
        if position_bias is None:
            position_bias = torch.arange(64.0).view(1, 1, 8, 8)
        return x + 1, position_bias, None


def test_what_a_block_hands_on_reaches_the_next_one_whole():
    block, bias = HandsOn(), torch.rand(1, 1, 8, 8)
    intercepted([block] * 3)
    hidden, handed, none = block(torch.zeros(2, 8, 3), bias)
    assert handed is bias
    assert none is None
    assert hidden.sum() == 2 * 4 * 3
    assert block(torch.zeros(2, 8, 3), position_bias=bias)[1] is bias
    plain, block.forward = block.forward, partial(checkpoint, block.forward, use_reentrant=True)  # gives an alias
    assert block(torch.zeros(2, 8, 3, requires_grad=True), bias)[1] is bias
    block.forward = plain
    with pytest.raises(eke.EkeError, match="nor run on a part of its tokens"):  # one that it made for 4 of 8 tokens
        block(torch.zeros(2, 8, 3))


def library(kind, layers=4):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"d_model": 16, "vocab_size": 32}
    if kind == "t5":
        config = hf.T5Config(**small, d_kv=8, d_ff=32, num_layers=layers, num_heads=2, decoder_start_token_id=0)
        return hf.T5ForConditionalGeneration(config)
    if kind == "bart":
        sides = {f"{side}_{what}": count for side in ("encoder", "decoder") for what, count in
                 (("layers", layers), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
        return hf.BartForConditionalGeneration(hf.BartConfig(**small, **sides, max_position_embeddings=32))
    size = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "mixtral":
        more = {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 32, "use_cache": False}
        return hf.MixtralForCausalLM(hf.MixtralConfig(**size, **more, output_router_logits=True))
    text = {**size, "vocab_size": 32, "max_position_embeddings": 32, "projection_dim": 8, "eos_token_id": 31}
    image = {**size, "image_size": 16, "patch_size": 4, "projection_dim": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=image, projection_dim=8))


class Library(LightningModule):
    def __init__(self, kind, layers=4):
        super().__init__()
        self.model, self.seen = library(kind, layers), {}
        for name, part in self.model.named_modules():
            if name.rpartition(".")[2].isdigit() and name.rpartition(".")[0].endswith(("block", "layers")):
                part.register_forward_pre_hook(partial(self.note, name), with_kwargs=True)

    def note(self, name, block, args, kwargs):
        hidden = args[0] if args else next(iter(kwargs.values()))
        self.seen.setdefault(name, []).append(hidden.shape[1])

    def training_step(self, batch, i):
        more = {"return_loss": True} if "pixel_values" in batch else {}
        return self.model(**batch, **more).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def train(model, technique, kind):
    ids = torch.randint(4, 30, (6, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"pixel_values": torch.randn(6, 3, 16, 16)} if kind == "clip" else {"labels": ids.clone()}
    if kind in ("t5", "bart"):
        batch["labels"] = ids[:, :16].clone()
    options = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = Trainer(accelerator="cpu", max_steps=3, callbacks=[technique], **options)
    trainer.fit(model, DataLoader([batch] * 3, batch_size=None))
    return model


@pytest.mark.parametrize(
    ("kind", "full"),
    [
        ("t5", {"encoder": 16, "decoder": 16}),
        ("bart", {"encoder": 16, "decoder": 16}),
        ("clip", {"text": 16, "vision": 17}),
    ],
)
def test_both_stacks_of_a_model_see_a_part_in_the_middle(kind, full):
    seen = train(Library(kind), RandomLTD(0.5, duration=1000, multiple=1), kind).seen
    assert len(seen) == 8
    for name, lengths in seen.items():
        whole = next(count for side, count in full.items() if side in name)
        middle = name.rpartition(".")[2] in ("1", "2")
        assert set(lengths) == {round(whole * 0.5) if middle else whole}, name


def test_lists_that_are_named_are_the_ones():
    model = Library("t5")
    seen = train(model, RandomLTD(0.5, duration=1000, multiple=1, blocks=["model.decoder.block"]), "t5").seen
    assert [set(lengths) for name, lengths in seen.items() if "decoder" in name] == [{16}, {8}, {8}, {16}]
    assert all(set(lengths) == {16} for name, lengths in seen.items() if "encoder" in name)
    with pytest.raises(RandomLTDError, match="has 2 blocks. The first and the last always see"):
        train(Library("t5", 2), RandomLTD(blocks=["model.encoder.block", "model.decoder.block"]), "t5")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_decoder_of_t5_does_not_look_ahead_and_padding_is_as_if_it_were_not_there(attention):
    model = library("t5").eval()
    model.set_attn_implementation(attention)
    for stack in (model.encoder, model.decoder):
        intercepted(stack.block)
    ids, out = torch.randint(4, 30, (2, 8)), torch.randint(4, 30, (2, 8))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    first = model(input_ids=ids, attention_mask=mask, decoder_input_ids=out).logits
    ahead = torch.cat([out[:, :5], (out[:, 5:] + 1) % 32], dim=1)
    padded = torch.where(mask.bool(), ids, (ids + 3) % 32)
    second = model(input_ids=padded, attention_mask=mask, decoder_input_ids=ahead).logits
    torch.testing.assert_close(first[:, :5], second[:, :5], rtol=0, atol=1e-6)
    assert not torch.allclose(first[:, 5:], second[:, 5:])


def test_a_block_of_t5_on_some_tokens_has_their_biases():
    """Chosen tokens alone, with the biases of their places, computed by hand from the plain block."""
    model = library("t5").eval().encoder
    hidden, positions = torch.randn(2, 8, 16), draw_positions(2, 8, 4, 1, torch.device("cpu"))
    bias = model.block[0].layer[0].SelfAttention.compute_bias(8, 8)
    plain = copy.deepcopy(model.block[2])
    intercepted(model.block)
    for row in range(2):
        at = positions[row]
        some = plain(hidden[row : row + 1, at], position_bias=bias[:, :, at][..., at])[0]
        whole = model.block[2](hidden, None, bias)[0]
        torch.testing.assert_close(whole[row, at], some[0])


def test_torchs_own_encoder_and_decoder_are_both_served():
    class Translate(LightningModule):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
            self.net = nn.Transformer(16, 2, 4, 4, 32, batch_first=True)
            self.seen = []
            for stack in (self.net.encoder, self.net.decoder):
                for block in stack.layers:
                    block.register_forward_pre_hook(lambda _, args: self.seen.append(args[0].shape[1]))

        def training_step(self, batch, i):
            mask = nn.Transformer.generate_square_subsequent_mask(16)
            x = self.embed(batch["input_ids"])
            out = self.head(self.net(x, x, tgt_mask=mask, tgt_is_causal=True))
            return nn.functional.cross_entropy(out.flatten(0, 1), batch["labels"].flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model = train(Translate(), RandomLTD(0.5, duration=1000, multiple=1), "")
    assert model.seen[:8] == [16, 8, 8, 16] * 2


def test_a_router_that_needs_every_token_is_said():
    with pytest.raises(
        RandomLTDError, match=r"failed where middle blocks.*attention_mask: leave that out.*router_logits=False"
    ):
        train(Library("mixtral"), RandomLTD(0.5, duration=1000, multiple=1), "mixtral")
    model = Library("mixtral")
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
    )
    train(model, RandomLTD(0.5, duration=1000, multiple=1), "mixtral")  # as it says
    assert [set(lengths) for lengths in model.seen.values()] == [{16}, {8}, {8}, {16}]


def test_an_error_of_ones_own_is_left_alone():
    class Wrong(TinyBlocks):
        def loss(self, batch):
            super().loss(batch)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        fit(Wrong(), RandomLTD(0.5, multiple=1))


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
        RandomLTD().alter_model(eke.Run(RandomLTD(), None, TimeFirst()))


def test_windows_of_an_image_are_refused():
    with pytest.raises(RuntimeError, match=r"hidden states of shape \(2, 4, 4, 8\) and needs \(batch, length, width\)"):
        Choose(0.0, 0.5, 1, 0)(torch.zeros(2, 4, 4, 8))


def test_swin_is_refused_by_its_relative_positions_before_the_first_step():
    swin = pytest.importorskip("transformers").SwinModel
    config = swin.config_class(image_size=32, patch_size=4, embed_dim=8, depths=[3, 2], num_heads=[2, 2], window_size=4)
    module, technique = LightningModule(), RandomLTD()
    module.net = swin(config)
    with pytest.raises(RandomLTDError, match=r"hold relative positions \(.*serves blocks without; leave it out here"):
        technique.alter_model(eke.Run(technique, None, module))
