"""What masked pretraining promises: the papers' masks and losses, weights that load back."""

import itertools
import math
import random

import eke
import pytest
import torch
from eke.seams import interceptor
from eke.testing import TinyBlocks, TinyViT, fit, hugging_face
from eke.testing.data import Images
from eke_mae import MAE, Decoder, MAEError, blockwise, pixels_of_patches, positions_2d, random_units, units_hidden
from eke_mae.callback import Keep
from eke_mae.decoder import NAME, normalized
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def test_patches_are_cut_row_by_row_with_channels_last():
    image = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    patches = pixels_of_patches(image, (2, 2))
    assert patches.shape == (1, 4, 8)
    assert patches[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]  # (row, column, channel) of the upper right


def test_normalized_targets_have_mean_zero_and_unbiased_variance_one():
    target = normalized(torch.randn(2, 5, 12) * 3 + 7)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 5), atol=1e-4, rtol=0)


def test_positions_are_those_of_the_authors_columns_first():
    expected = [f(x * rate) for x in (2.0, 1.0) for f in (math.sin, math.cos) for rate in (1, 0.01)]
    assert positions_2d((2, 3), 8)[1 * 3 + 2].tolist() == pytest.approx(expected, abs=1e-6)  # second row, third column


def test_random_units_hide_the_share_in_whole_squares_anew_for_each_image():
    hidden = random_units(50, (14, 14), 0.6, 2, numbers()).view(50, 7, 2, 7, 2)
    assert (hidden.sum((1, 2, 3, 4)) == 30 * 4).all()  # 0.6 of 49 squares are 29.4, which SimMIM rounds up
    assert (hidden == hidden[:, :, :1, :, :1]).all()
    assert len(hidden.flatten(1).unique(dim=0)) == 50
    cut = random_units(3, (3, 5), 0.5, 2, numbers())
    assert cut.shape == (3, 15)


def test_shares_are_rounded_up_but_for_the_rounding_of_floats():
    assert [units_hidden(49, 0.6), units_hidden(36, 0.6), units_hidden(10, 0.1), units_hidden(30, 0.7)] == [
        30,
        22,
        1,
        21,
    ]


def authors_blocks(rows, columns, count, draw):
    """The loop of BEiT's authors, in our words, as an oracle: how many patches are hidden, and the areas of blocks."""
    hidden, areas = set(), []
    while len(hidden) < count:
        for _ in range(10):
            area = draw.uniform(16, count - len(hidden))
            aspect = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, left = draw.randint(0, rows - height), draw.randint(0, columns - width)
            block = {(top + i, left + j) for i in range(height) for j in range(width)}
            if 0 < len(block - hidden) <= count - len(hidden):
                areas.append(len(block - hidden))
                hidden |= block
                break
        else:
            break
    return hidden, areas


def test_blocks_are_distributed_as_beits_own():
    """Numbers of hidden patches and where they are, over 600 images; the last block is drawn, and not what is left."""
    images, draw, generator = 600, random.Random(0), numbers()
    own = torch.stack([blockwise((14, 14), 75, generator) for _ in range(images)]).double()
    other = torch.zeros(images, 14, 14, dtype=torch.float64)
    for image in range(images):
        for place in authors_blocks(14, 14, 75, draw)[0]:
            other[image][place] = 1
    other = other.flatten(1)
    counts, wanted = own.sum(1), other.sum(1)
    assert abs(counts.mean() - wanted.mean()) < 4 * (counts.var() / images + wanted.var() / images).sqrt()
    full = (counts == 75).double().mean(), (wanted == 75).double().mean()
    assert abs(full[0] - full[1]) < 4 * (2 * 0.25 / images) ** 0.5
    assert 0.2 < full[1] < 0.9  # with what is left exactly, nearly all would be full
    places = (own.mean(0) - other.mean(0)).abs().max()
    assert places < 4.5 * (2 * 0.25 / images) ** 0.5


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (3, 1)])
def test_a_grid_of_few_patches_has_a_hidden_one(grid):
    assert all(blockwise(grid, 1, numbers(seed), 1).any() for seed in range(50))


def test_blocks_hide_about_the_share_in_few_rectangles():
    counts, kinds = [], set()
    for seed in range(40):
        hidden = blockwise((14, 14), 75, numbers(seed)).view(14, 14)
        counts.append(int(hidden.sum()))
        kinds.add(tuple(hidden.flatten().tolist()))
    assert max(counts) <= 75  # the paper's number for 196 patches and 40 %
    assert sum(counts) / len(counts) > 65
    assert len(kinds) == 40
    neighbours = (hidden[:, 1:] == hidden[:, :-1]).float().mean()
    assert neighbours > 0.8  # at random it would be 0.52


class Seen(Callback):
    """Tokens that each block met in training, and in validation when the user's own step ran."""

    def __init__(self):
        self.lengths, self.logged = [], []

    def on_train_start(self, trainer, model):
        for block in model.blocks:
            block.register_forward_pre_hook(lambda _, args: self.lengths.append(args[0].shape[1]))

    def on_train_batch_end(self, trainer, *_):
        self.logged.append(float(trainer.callback_metrics["masked_loss"]))


def test_the_encoder_sees_the_class_token_and_a_quarter_of_the_patches():
    seen = Seen()
    fit(TinyViT(), MAE(decoder_depth=1), epochs=3, callbacks=[seen])
    assert set(seen.lengths) == {1 + 4}
    assert sum(seen.logged[-4:]) < sum(seen.logged[:4])


def started(technique, model):
    technique.alter_model(eke.Run(technique, None, model))
    return technique


def test_what_is_hidden_does_not_reach_the_encoder_and_what_is_seen_bears_no_loss():
    model, images = TinyViT(), torch.randn(2, 3, 8, 8)
    mae = started(MAE(0.75, decoder_depth=1, normalize=False), model)
    order = torch.rand(2, 16, generator=numbers(7)).argsort(1)  # what the technique draws from this seed
    hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, order[:, :4], False)
    pixels = hidden.view(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    images.requires_grad_(True)
    _, predicted = mae._mae(images, order, order[:, :4], (4, 4))
    predicted.sum().backward()
    assert (images.grad[pixels.expand_as(images)] == 0).all()
    assert images.grad[~pixels.expand_as(images)].abs().sum() > 0
    predicted = predicted.detach()
    loss = mae.masked_loss(images.detach(), 7)
    target = pixels_of_patches(images.detach(), (2, 2))
    by_hand = sum(
        ((predicted[i, j] - target[i, j]) ** 2).mean()
        for i, j in itertools.product(range(2), range(16))
        if hidden[i, j]
    )
    torch.testing.assert_close(loss.detach(), by_hand / (2 * 12))


def test_all_patches_visible_in_another_order_give_the_plain_features():
    model, images = TinyViT(), torch.randn(2, 3, 8, 8)
    plain = {}
    hook = model.norm.register_forward_hook(lambda module, args, output: plain.update(features=output))
    model(images)
    hook.remove()
    mae = started(MAE(decoder_depth=1), model)
    order = torch.rand(2, 16).argsort(1)
    features = mae._sight.features(images, Keep(order, 16))
    torch.testing.assert_close(features[:, :1], plain["features"][:, :1])
    back = features[:, 1:].gather(1, order.argsort(1)[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(back, plain["features"][:, 1:])


def test_loss_and_gradient_equal_those_of_hugging_faces_vit_mae():
    """An oracle: the same weights, the same masks, the same images."""
    hf = pytest.importorskip("transformers")
    size = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "image_size": 8, "patch_size": 2, "layer_norm_eps": 1e-5,
    }  # fmt: skip
    decoder = {
        "decoder_hidden_size": 8, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32, "norm_pix_loss": True,
    }  # fmt: skip
    torch.manual_seed(0)
    reference = hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**size, **decoder))
    for weight in reference.parameters():
        if weight.ndim == 1:
            nn.init.normal_(weight, std=0.1)  # biases that are zero could not be told apart

    class Holder(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = hf.ViTModel(hf.ViTConfig(**size), add_pooling_layer=False)

    ours = Holder()
    ours.model.load_state_dict(reference.vit.state_dict())
    mae = started(MAE(decoder_width=8, decoder_heads=2), ours)
    theirs = reference.decoder
    theirs.decoder_pos_embed.data[0, 1:] = positions_2d((4, 4), 8)
    names = {
        "narrow": "decoder_embed", "norm": "decoder_norm", "out": "decoder_pred", "norm1": "layernorm_before",
        "norm2": "layernorm_after", "proj": "attention.o_proj", "up": "mlp.fc1", "down": "mlp.fc2",
    }  # fmt: skip
    state = theirs.state_dict()
    for name, weight in mae.decoder.named_parameters():
        parts = ["decoder_layers" if part == "blocks" else names.get(part, part) for part in name.split(".")]
        if name == "mask":
            value = state["mask_token"]
        elif "qkv" in parts:
            value = torch.cat([state[".".join(parts).replace("qkv", f"attention.{x}_proj")] for x in "qkv"])
        else:
            value = state[".".join(parts)]
        with torch.no_grad():
            weight.copy_(value)

    images, seed = torch.randn(3, 3, 8, 8), 11
    noise = torch.rand(3, 16, generator=numbers(seed))
    expected = reference(images, noise=noise).loss
    loss = mae.masked_loss(images, seed)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    theirs = dict(reference.vit.named_parameters())
    for name, weight in ours.model.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(weight.grad, theirs[name].grad, msg=name)


def test_simmim_hides_inside_the_encoder_and_its_loss_is_the_mean_absolute_error():
    model, images = TinyViT(), torch.randn(2, 3, 8, 8)
    mae = started(MAE(method="simmim", unit=2), model)
    hidden = random_units(2, (4, 4), 0.6, 1, numbers(3))
    seen = {}
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    norm = model.norm.register_forward_hook(lambda module, args, output: seen.update(features=output))
    loss = mae.masked_loss(images, 3)
    hook.remove(), norm.remove()
    token = mae.decoder.mask + model.pos_embed[0, 1:]
    torch.testing.assert_close(seen["x"][:, 1:][hidden], token.expand(2, -1, -1)[hidden])
    predicted = mae.decoder.out(seen["features"][:, 1:])
    expected = F.l1_loss(predicted[hidden], pixels_of_patches(images, (2, 2))[hidden])
    torch.testing.assert_close(loss, expected)


def brightness(images):
    """A tokenizer: which quarter of the range of brightness a patch falls into."""
    return F.avg_pool2d(images.mean(1), 2).add(1).mul(2).long().clamp(0, 3)


def test_beit_learns_which_visual_words_are_hidden():
    seen = Seen()
    fit(TinyViT(), MAE(method="beit", tokenizer=brightness, classes=4), epochs=6, callbacks=[seen])
    assert set(seen.lengths) == {17}  # hidden patches go through the encoder
    assert sum(seen.logged[-4:]) < sum(seen.logged[:4])


def test_beits_loss_is_the_cross_entropy_of_the_hidden_patches():
    model, images = TinyViT(), torch.randn(2, 3, 8, 8)
    mae = started(MAE(method="beit", tokenizer=brightness, classes=4), model)
    draws = numbers(5)
    hidden = torch.stack([blockwise((4, 4), 6, draws, 1) for _ in range(2)])
    seen = {}
    norm = model.norm.register_forward_hook(lambda module, args, output: seen.update(features=output))
    loss = mae.masked_loss(images, 5)
    norm.remove()
    words = brightness(images).flatten(1)
    torch.testing.assert_close(loss, F.cross_entropy(mae.decoder(seen["features"][:, 1:])[hidden], words[hidden]))


def test_a_checkpoint_loads_strictly_into_the_plain_model_and_holds_its_keys(tmp_path):
    model = TinyViT()
    plain = set(model.state_dict())
    done = fit(model, MAE(decoder_depth=1), epochs=1)
    done.trainer.save_checkpoint(tmp_path / "mae.ckpt")
    loaded = TinyViT.load_from_checkpoint(tmp_path / "mae.ckpt")
    assert set(loaded.state_dict()) == plain == set(torch.load(tmp_path / "mae.ckpt")["state_dict"])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert NAME not in dict(model.named_children())  # what pretraining added is gone
    fit(loaded, epochs=1)  # and fine-tunes


def test_images_without_labels_and_an_optimizer_of_the_models_own_parameters():
    """The decoder trains although configure_optimizers knows nothing of it, and the schedule goes on."""

    class Pictures(torch.utils.data.Dataset):
        def __init__(self, count):
            self.images = Images(count)

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index][0]

    class Own(TinyViT):
        dataset = Pictures

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW([*self.patch_embed.parameters(), *self.blocks.parameters()], lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    mae = MAE(decoder_depth=1)
    start = {}

    class Note(Callback):
        def on_fit_start(self, trainer, model):
            start.update(mae.decoder.own())

    fit(Own(), mae, epochs=1, callbacks=[Note()])
    assert all(not torch.equal(value, start[name]) for name, value in mae.decoder.own().items())


class ViTHolder(LightningModule):
    dataset = Images

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        raise AssertionError("pretraining does not run the user's step")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("method", ["mae", "simmim"])
def test_hugging_face_vit(method):
    pytest.importorskip("transformers")
    model = hugging_face("vit")
    before = [weight.clone() for weight in model.vit.parameters()]
    fit(ViTHolder(model), MAE(method=method, unit=2), epochs=1)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.vit.parameters(), strict=True))


def test_after_its_duration_the_users_own_step_trains_on_all_patches():
    own = []

    class Labelled(TinyViT):
        def training_step(self, batch, batch_idx):
            own.append(self.global_step)
            return super().training_step(batch, batch_idx)

    model, seen = Labelled(), Seen()
    seen.on_train_batch_end = lambda *_: None
    head = model.head.weight.clone()
    fit(model, MAE(decoder_depth=1, duration=0.5), epochs=2, callbacks=[seen])
    assert own == [4, 5, 6, 7]
    assert seen.lengths == [5] * 4 * 4 + [17] * 4 * 4
    assert not torch.equal(head, model.head.weight)


def test_validation_logs_the_loss_of_the_same_masks_each_time():
    class Unlabelled(TinyViT):
        def validation_step(self, batch, batch_idx):
            pass

    done = fit(Unlabelled(), MAE(decoder_depth=1), epochs=2, validate=True)
    assert 0 < float(done.trainer.callback_metrics["val_masked_loss"]) < 10
    model = TinyViT()
    mae = started(MAE(decoder_depth=1), model)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(mae.masked_loss(images, 0), mae.masked_loss(images, 0))
    assert not torch.equal(mae.masked_loss(images, 0), mae.masked_loss(images, 1))


def test_models_and_batches_that_it_cannot_serve_are_refused_with_the_reason():
    class Stem(TinyViT):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.stem = nn.Conv2d(3, 3, 3, padding=1)

    class Windows(TinyViT):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(4))

    class Dense(TinyViT):
        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            x = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed)
            return self.head(self.norm(x)[:, 1:].unflatten(1, (4, 4)).mean((1, 2)))

    with pytest.raises(ValueError, match=r"before its blocks \(stem\): what is hidden would be seen by its neighbours"):
        fit(Stem(), MAE())
    with pytest.raises(ValueError, match=r"has relative positions \(relative_position_bias_table\)"):
        fit(Windows(), MAE())
    with pytest.raises(MisconfigurationException, match="failed on images of which patches are hidden: .* no windows"):
        fit(Dense(), MAE())
    with pytest.raises(ValueError, match="0 convolutions that cut images"):
        fit(TinyBlocks(), MAE())

    class Words(TinyViT):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(4, 5)), batch_size=2)

    class OnePatch(TinyViT):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.patch_embed = nn.Conv2d(3, 16, 8, stride=8)
            self.pos_embed = nn.Parameter(torch.zeros(1, 2, 16))

    with pytest.raises(MAEError, match="cut into 1 patch: none would be left to see"):
        fit(OnePatch(), MAE())
    with pytest.raises(MisconfigurationException, match="hides all or nothing of an image of 4 by 4 patches"):
        fit(TinyViT(), MAE(method="simmim"))

    trainer = Trainer(max_steps=1, callbacks=[MAE()], logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"The batch has 0 tensors of images with 3 channels; its shapes: \(2, 5\)"):
        trainer.fit(Words(), Words().train_dataloader())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"mask": 1.0}, "mask=1.0: give a share of the patches between 0 and 1"),
        ({"method": "data2vec"}, "method='data2vec' is none of: mae, simmim, beit"),
        ({"duration": 1.5}, "duration=1.5: give a share of the run up to 1, or optimizer steps"),
        ({"decoder_depth": 0}, "decoder_depth=0, decoder_heads=4, unit=32: give 1 or more"),
        ({"method": "beit"}, "method='beit' needs both"),
        ({"classes": 3, "tokenizer": brightness}, "the others take neither"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        MAE(**arguments)


def test_a_decoder_width_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="decoder_width=6 is no multiple of 4"):
        Decoder(16, 6, 1, 1, 12)
    with pytest.raises(ValueError, match="decoder_width=12 is no multiple of decoder_heads=8"):
        started(MAE(decoder_width=12, decoder_heads=8), TinyViT())


def test_the_gates_are_gone_after_the_run():
    model = TinyViT()
    fit(model, MAE(decoder_depth=1), epochs=1)
    assert all(
        interceptor.actions(block) == () and not isinstance(block, interceptor.InterceptedBlock)
        for block in model.blocks
    )
    assert not model.patch_embed._forward_hooks
    assert not model.norm._forward_hooks


def test_compiled_by_block_it_takes_few_graphs():
    model = TinyViT()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(model, MAE(decoder_depth=1, decoder_heads=2), epochs=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
