"""What patch dropout promises: which patches stay, that the class token does, and all of them at the end."""

import eke
import pytest
import torch
from eke.seams import interceptor
from eke.seams.patches import find_patches
from eke.testing import TinyBlocks, TinyViT, fit, hugging_face
from eke.testing.data import CLASSES, Images
from eke_token_drop import TokenDrop, choose, keep_at
from eke_token_drop.callback import LeaveOut
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F

CPU = torch.device("cpu")


def test_the_schedule_has_a_tail_that_sees_all():
    assert [keep_at(u, 0.75, 0.2, "constant") for u in (0, 0.5, 0.79, 0.8, 1)] == [0.25, 0.25, 0.25, 1, 1]
    assert [keep_at(u, 0.5, 0.5, "linear") for u in (0, 0.25, 0.5, 1)] == [0.5, 0.75, 1, 1]
    assert keep_at(0.99, 0.5, 0, "constant") == 0.5


def test_the_prefix_stays_and_patches_rise_and_come_up_equally_often():
    positions = choose(4000, 16, 4, 2, seed=1, device=CPU)
    assert (positions[:, :2] == torch.tensor([0, 1])).all()
    patches = positions[:, 2:]
    assert (patches.diff(dim=1) > 0).all()
    share = torch.bincount(patches.flatten() - 2, minlength=16) / 4000
    assert (share - 0.25).abs().max() <= 4 * (0.25 * 0.75 / 4000) ** 0.5


class Seen(Callback):
    """Tokens that each block met, in training and in validation, and what the technique says of a step."""

    def __init__(self):
        self.trained, self.validated, self.kinds, self.hooks, self.gradients = [], [], [], [], []

    def on_train_start(self, trainer, model):
        def look(block, args):
            (self.trained if model.training else self.validated).append(args[0].shape[1])

        self.hooks = [block.register_forward_pre_hook(look) for block in model.blocks]

    def on_before_optimizer_step(self, trainer, model, optimizer):
        self.gradients.append(model.pos_embed.grad.abs().sum((0, 2)) > 0)

    def on_train_batch_end(self, trainer, model, *_):
        self.kinds.append(next(t for t in eke.techniques(trainer) if isinstance(t, TokenDrop)).step_kind())

    def on_train_end(self, trainer, model):
        for hook in self.hooks:
            hook.remove()


def test_every_block_meets_the_class_token_and_a_part_of_the_patches_and_validation_all():
    seen = Seen()
    fit(TinyViT(), TokenDrop(0.75, tail=0.25), epochs=2, validate=True, callbacks=[seen])
    assert seen.trained == [1 + 4] * 4 * 6 + [1 + 16] * 4 * 2
    assert set(seen.validated) == {17}
    assert seen.kinds == ["4 patches"] * 6 + ["all patches"] * 2


def test_positions_of_patches_that_no_sample_kept_get_no_gradient():
    class One(TinyViT):
        def loss(self, batch):
            return super().loss([part[:1] for part in batch])

    seen = Seen()
    fit(One(), TokenDrop(0.75, tail=0), epochs=1, callbacks=[seen])
    assert all(step.sum() == 1 + 4 and step[0] for step in seen.gradients)


def test_without_a_share_no_bit_changes():
    plain, kept = fit(TinyViT()).state["weights"], fit(TinyViT(), TokenDrop(0.0)).state["weights"]
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


def test_all_patches_in_another_order_give_the_same_output():
    """An oracle: blocks without positions do not mind the order, so keeping all of them changes nothing."""
    model, images = TinyViT(), torch.randn(3, 3, 8, 8)
    plain = model(images)

    interceptor.attach([model.blocks[0]], "test")
    interceptor.put(model.blocks[0], "test", LeaveOut(1.0, 3, None, {"patches": 16}))
    torch.testing.assert_close(model(images), plain)


class Wrapped(LightningModule):
    """A Hugging Face model of images in a LightningModule, with random images."""

    dataset = Images

    def __init__(self, model, step):
        super().__init__()
        self.model, self.step = model, step

    def training_step(self, batch, batch_idx):
        return self.step(self.model, *batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Lengths(Callback):
    def __init__(self, path):
        self.path, self.seen = path, set()

    def on_train_start(self, trainer, model):
        last = list(model.get_submodule(self.path))[-1]
        last.register_forward_pre_hook(lambda _, args, kwargs: self.seen.add(args[0].shape[1]), with_kwargs=True)


def classify(model, images, classes):
    return F.cross_entropy(model(pixel_values=images).logits, classes)


def test_hugging_face_vit():
    pytest.importorskip("transformers")
    seen = Lengths("model.vit.encoder.layer" if hasattr(hugging_face("vit").vit, "encoder") else "model.vit.layers")
    fit(Wrapped(hugging_face("vit"), classify), TokenDrop(0.5, tail=0), epochs=1, callbacks=[seen])
    assert seen.seen == {1 + 8}


def dinov2():
    hf = pytest.importorskip("transformers")
    config = hf.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2, num_register_tokens=3
    )
    config.num_labels = CLASSES
    return hf.Dinov2WithRegistersForImageClassification(config)


def test_register_tokens_stay():
    model = dinov2()
    seen = Lengths("model.dinov2_with_registers.encoder.layer")
    fit(Wrapped(model, classify), TokenDrop(0.5, tail=0), epochs=1, callbacks=[seen])
    assert seen.seen == {1 + 3 + 8}


def clip():
    hf = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**size, "vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 31},
            vision_config={**size, "image_size": 8, "patch_size": 2},
            projection_dim=8,
        )
    )


def contrast(model, images, classes):
    words = torch.arange(6) + torch.arange(len(images))[:, None]
    return model(input_ids=words, pixel_values=images, return_loss=True).loss


def test_flip_drops_patches_of_the_image_tower_and_no_words():
    path = "model.vision_model.encoder.layers"
    for blocks in (None, path, [path]):  # by itself it finds the tower that sees images
        images, words = Lengths(path), Lengths("model.text_model.encoder.layers")
        flip = TokenDrop(0.75, tail=0, blocks=blocks)
        fit(Wrapped(clip(), contrast), flip, epochs=1, callbacks=[images, words])
        assert images.seen == {1 + 4}
        assert words.seen == {6}


class Two(TinyViT):
    """Two image towers, as in self-distillation, the second with larger patches."""

    def make(self, dropout, layers):
        super().make(dropout, layers)
        self.left, self.right = TinyViT(), TinyViT()
        self.right.patch_embed = nn.Conv2d(3, 16, 4, stride=4)
        self.right.pos_embed = nn.Parameter(torch.zeros(1, 5, 16))
        del self.blocks, self.patch_embed, self.pos_embed, self.cls_token, self.norm, self.head, self.pos_drop

    def forward(self, x):
        return self.left(x) + self.right(x)


@pytest.mark.parametrize(
    ("blocks", "wanted"),
    [(None, [1 + 8, 1 + 2]), ("right.blocks", [1 + 16, 1 + 2]), (["left.blocks", "right.blocks"], [1 + 8, 1 + 2])],
)
def test_each_tower_of_images_loses_a_share_of_its_own_patches(blocks, wanted):
    left, right = Lengths("left.blocks"), Lengths("right.blocks")
    model = Two()
    fit(model, TokenDrop(0.5, tail=0, blocks=blocks), epochs=1, callbacks=[left, right])
    assert [left.seen, right.seen] == [{count} for count in wanted]
    assert not any(isinstance(part, interceptor.InterceptedBlock) for part in model.modules())
    assert not model.left.patch_embed._forward_hooks


def test_towers_draw_patches_of_their_own():
    class Same(Two):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.right = TinyViT()

    kept = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            technique = next(t for t in eke.techniques(trainer) if isinstance(t, TokenDrop))
            kept.append([leave.seed for leave in technique._leave])

    fit(Same(), TokenDrop(0.5, tail=0), epochs=1, callbacks=[Watch()])
    assert all(len(set(seeds)) == 2 for seeds in kept)


@pytest.mark.parametrize("prefix", [None, 1])
def test_a_model_of_texts_is_refused_whatever_the_prefix(prefix):
    """It once advised prefix=1 here, which trained a BERT with half of its words left out."""
    pytest.importorskip("transformers")

    class Words(Wrapped):
        dataset = TinyBlocks.dataset

    models = [TinyBlocks(), Words(hugging_face("bert"), lambda model, ids, labels: model(ids, labels=labels).loss)]
    if prefix is None:
        models.append(Words(nn.Transformer(8, 2, 2, 2, 8), None))
        models[-1].embed = nn.Embedding(8, 8)
    for model in models:
        with pytest.raises(
            ValueError, match=r"TokenDrop leaves out patches of images.* On texts, eke-random-ltd"
        ) as one:
            fit(model, TokenDrop(prefix=prefix), epochs=1)
        assert "prefix" not in str(one.value)
        assert isinstance(one.value, eke.EkeError)


def test_an_error_of_ones_own_is_left_alone():
    class Wrong(TinyViT):
        def loss(self, batch):
            super().loss(batch)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="^mine$"):
        fit(Wrong(), TokenDrop(tail=0))


def test_a_model_of_the_users_own_without_a_convolution_says_how_many_tokens_come_first():
    class Linear(TinyViT):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.patch_embed = nn.Linear(12, 16)

        def forward(self, x):
            x = self.patch_embed(F.unfold(x, 2, stride=2).transpose(1, 2))
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            return self.head(self.norm(self.blocks(x + self.pos_embed))[:, 0])

    with pytest.raises(ValueError, match=r"no convolution\. Say how many tokens precede the patches: TokenDrop\(pref"):
        fit(Linear(), TokenDrop())
    seen = Seen()
    fit(Linear(), TokenDrop(0.5, tail=0, prefix=1), epochs=1, callbacks=[seen])
    assert set(seen.trained) == {1 + 8}


def test_models_that_need_every_patch_are_refused_with_the_reason():
    class Dense(TinyViT):
        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            x = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed)
            return self.head(self.norm(x)[:, 1:].unflatten(1, (4, 4)).mean((1, 2)))

    with pytest.raises(MisconfigurationException, match="The model failed on a part of its patches: .* no head for"):
        fit(Dense(), TokenDrop(tail=0))

    class Pairs(TinyViT):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            for block in self.blocks:
                block.attn.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))

    with pytest.raises(ValueError, match=r"hold relative positions \(0.attn.relative_position_bias_table\)"):
        fit(Pairs(), TokenDrop())


def test_a_full_memory_is_not_taken_for_a_wrong_model():
    class Full(TinyViT):
        def loss(self, batch):
            super().loss(batch)
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        fit(Full(), TokenDrop(tail=0))


def test_rotary_positions_are_refused():
    leave = LeaveOut(0.5, 0, None, {"patches": 16})
    with pytest.raises(RuntimeError, match=r"get rope of shape \(16, 4\), one entry a token, such as rotary"):
        leave(None, torch.zeros(2, 17, 4), (), {"rope": torch.zeros(16, 4)}, None)


def test_the_patch_embedding_is_found_beside_a_stem_and_within_its_own_tower():
    pytest.importorskip("transformers")
    found = find_patches(clip(), "vision_model.encoder.layers")
    assert found.path == "vision_model.embeddings.patch_embedding"
    assert (found.patch, found.stem) == ((2, 2), ())
    assert found.grid(torch.zeros(1, 3, 8, 6)) == (4, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"drop": 1.0}, "drop=1.0, tail=0.1: give a share"),
        ({"tail": 1.5}, "drop=0.5, tail=1.5: give a share"),
        ({"schedule": "cosine"}, "schedule='cosine' is none of: constant, linear"),
        ({"prefix": -1}, "prefix=-1: give 0 or more"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        TokenDrop(**arguments)


def test_compiled_by_block_it_takes_few_graphs():
    model = TinyViT()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(model, TokenDrop(0.5, tail=0.3), epochs=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
