"""Layer dropping on models of other shapes: a step is that of the model without the blocks that are skipped."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from eke.seams import interceptor
from eke.seams.blocks import find_all_blocks
from eke_layer_drop import LayerDrop
from eke_layer_drop.callback import Rescale, Silent
from torch import nn
from torch.utils.data import DataLoader

VOCABULARY, LENGTH, BATCH = 16, 6, 2
SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
BOTH = {
    "vocab_size": VOCABULARY, "d_model": 8, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


class Translates(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.inner = nn.Transformer(8, 2, 3, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, input_ids, labels):
        mask = nn.Transformer.generate_square_subsequent_mask(labels.shape[1])
        out = self.head(self.inner(self.embedding(input_ids), self.embedding(labels), tgt_mask=mask))
        return {"loss": nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten())}


def build(name):
    if name == "torch":
        return Translates()
    t = pytest.importorskip("transformers")
    if name == "t5":
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
        return t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
        )
    if name == "bart":
        return t.BartForConditionalGeneration(t.BartConfig(max_position_embeddings=16, **BOTH))
    if name == "whisper":
        return t.WhisperForConditionalGeneration(
            t.WhisperConfig(max_source_positions=8, max_target_positions=16, num_mel_bins=4, **BOTH)
        )
    if name == "clip":
        text = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, **SIZES}
        image = {"image_size": 8, "patch_size": 4, **SIZES}
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=image, projection_dim=8))
    if name == "mixtral":
        return t.MixtralForCausalLM(
            t.MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
                            output_router_logits=True, router_aux_loss_coef=1.0, **SIZES)
        )  # fmt: skip
    if name == "mamba":
        return t.MambaForCausalLM(
            t.MambaConfig(vocab_size=VOCABULARY, hidden_size=8, state_size=2, num_hidden_layers=3, time_step_rank=2)
        )
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1, 2], "num_heads": [2, 2, 2]}
    return t.SwinForImageClassification(t.SwinConfig(window_size=2, drop_path_rate=0.0, num_labels=3, **sizes))


def batch_of(name):
    words = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    if name == "swin":
        return {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(3, (BATCH,))}
    if name == "clip":
        return {"input_ids": words, "pixel_values": torch.randn(BATCH, 3, 8, 8), "return_loss": True}
    if name == "whisper":
        return {"input_features": torch.randn(BATCH, 4, 16), "labels": words}
    return {"input_ids": words, "labels": words}


class Watched(pl.LightningModule):
    """Beside each step, the same on a copy without the blocks that are skipped."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.name, self.compared, self.open = build(name), name, [], []

    def training_step(self, batch, batch_idx):
        loss = self.net(**batch)["loss"]
        lists = [list(one) for one in find_all_blocks(self.net)]
        kept = [[not acts(block, (interceptor.Skip, Silent)) for block in blocks] for blocks in lists]
        self.open.append([sum(own) for own in kept])
        # A router's loss takes in a block that adds nothing, and torch's encoder wants to have a block.
        if self.name not in ("mixtral", "torch") or all(map(any, kept)):
            plain = copy.deepcopy(self.net)
            for found, own in zip(find_all_blocks(plain), kept, strict=True):
                interceptor.detach(list(found), "layer_drop")
                left = [block for block, stays in zip(list(found), own, strict=True) if stays]
                del found.container[:]
                found.container.extend(left)
            self.compared.append((loss.detach(), plain(**batch)["loss"].detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def acts(block, kind):
    return any(isinstance(one, kind) for one in interceptor.actions(block))


def train(module, technique, steps=8):
    torch.manual_seed(1)
    batches = DataLoader([batch_of(module.name) for _ in range(steps)], batch_size=None)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_steps=steps, accelerator="cpu", enable_model_summary=False, callbacks=[technique], **options).fit(
        module, batches
    )


@pytest.mark.filterwarnings("ignore::eke.NoEffectWarning")
@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "clip", "mixtral", "mamba", "swin", "torch"])
def test_a_step_is_that_of_the_model_without_the_skipped_blocks(name):
    model = Watched(name)
    train(model, LayerDrop(0.3, schedule="constant", rescale=False))
    assert len({tuple(own) for own in model.open}) > 2
    assert len(model.compared) > 3
    for with_skips, without in model.compared:
        torch.testing.assert_close(with_skips, without, rtol=0, atol=1e-6)
    lists = find_all_blocks(model.net)
    assert len(lists) == {"swin": 3, "mixtral": 1, "mamba": 1}.get(name, 2)
    assert not any(isinstance(part, interceptor.InterceptedBlock) for part in model.modules())


def test_the_first_block_of_t5_which_makes_the_positions_of_all_always_runs_and_is_not_scaled():
    seen = []

    class Look(Watched):
        def training_step(self, batch, batch_idx):
            seen.append([interceptor.actions(one[0]) for one in find_all_blocks(self.net)])
            return super().training_step(batch, batch_idx)

    train(Look("t5"), LayerDrop(0.01, schedule="constant"))
    assert seen == [[(), ()]] * 8


class Makes(nn.Module):
    """Makes what the others hand on, without a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, hidden, bias=None):
        bias = hidden.mean() if bias is None else bias
        return hidden + self.self_attn(hidden, hidden, hidden)[0] * bias, bias


def test_a_first_block_that_makes_something_without_a_parameter_runs_too():
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.blocks, self.ran = nn.ModuleList(Makes() for _ in range(3)), []

        def training_step(self, batch, batch_idx):
            bias, hidden = None, batch
            for block in self.blocks:
                hidden, bias = block(hidden, bias)
                assert bias is not None
            plain = batch + self.blocks[0].self_attn(batch, batch, batch)[0] * batch.mean()
            if torch.equal(hidden, plain):
                self.ran.append(batch_idx)
            return hidden.square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Model()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=8, accelerator="cpu", callbacks=[LayerDrop(0.05, schedule="constant")], **options)
    trainer.fit(model, DataLoader([torch.randn(2, 3, 8) for _ in range(8)], batch_size=None))
    assert len(model.ran) > 1  # the first alone, unscaled, however it was drawn


@pytest.mark.parametrize("trained", [None, 2])
def test_where_all_that_trains_is_skipped_one_block_runs_and_adds_nothing(trained):
    """A router's loss needs a block, and backward something that trains; the loss is that of no block."""
    model = Watched("mixtral")
    if trained is not None:
        model.requires_grad_(False)
        model.net.model.layers[trained].requires_grad_(True)
        model.net.config.output_router_logits = False
    technique, kinds, losses = LayerDrop(1e-6, schedule="constant", rescale=False), [], []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            kinds.append(technique.step_kind())
            losses.append(outputs["loss"])

        def on_before_optimizer_step(self, trainer, module, optimizer):
            block = module.net.model.layers[trained or 0]
            if kinds.count("1 of 3 blocks") == len(kinds):
                assert all(one.grad is not None for one in block.self_attn.parameters())

    torch.manual_seed(1)
    batches = DataLoader([batch_of("mixtral") for _ in range(12)], batch_size=None)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_steps=12, accelerator="cpu", callbacks=[technique, Look()], **options).fit(model, batches)
    assert "0 of 3 blocks" not in kinds
    assert "1 of 3 blocks" in kinds


def test_lists_that_are_named_are_the_ones_each_with_the_probabilities_of_its_own_places():
    seen = {"encoder": [], "decoder": []}

    class Look(Watched):
        def training_step(self, batch, batch_idx):
            for name, own in seen.items():
                own += [one.chance for block in find_all_blocks(self.net, name)[0]
                        for one in interceptor.actions(block) if isinstance(one, Rescale)]  # fmt: skip
            return super().training_step(batch, batch_idx)

    train(Look("bart"), LayerDrop(0.5, schedule="constant", blocks=["decoder.layers"]))
    assert not seen["encoder"]
    assert set(seen["decoder"]) == {0.75, 0.5}  # of two blocks
    train(Look("bart"), LayerDrop(0.4, schedule="constant", blocks=["encoder.layers", "decoder.layers"]))
    assert {round(chance, 6) for chance in seen["encoder"]} == {0.8, 0.6, 0.4}
    assert {round(chance, 6) for chance in seen["decoder"]} == {0.75, 0.5, 0.7, 0.4}
