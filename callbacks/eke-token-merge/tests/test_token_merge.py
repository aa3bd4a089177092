"""What token merging promises: the paper's matching, sums of sizes, attention that counts by them."""

import eke
import pytest
import torch
from eke.seams import interceptor
from eke.seams.anatomy import attention_sites
from eke.seams.patches import PatchesError, find_patches
from eke.testing import TinyBlocks, TinyViT, fit, hugging_face, shapes
from eke.testing.data import Images
from eke_token_merge import TokenMerge, match, merge
from eke_token_merge.callback import Watch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def test_the_most_alike_pairs_are_joined_first():
    keys = torch.eye(6)[None].clone()
    keys[0, 2] = keys[0, 5] + 0.01 * keys[0, 0]  # place 2 is most like place 5
    keys[0, 4] = keys[0, 1] + 0.5 * keys[0, 0]  # then place 4 like place 1
    stays, goes, into = match(keys, 2)
    assert goes.tolist() == [[1, 2]]  # of the even ones: places 2 and 4
    assert into.tolist() == [[2, 0]]  # of the odd ones: places 5 and 1
    assert stays.tolist() == [[0]]


def by_the_authors(keys, own, count):
    """The authors' division written out for one image: over all tokens, those at even places go into those at odd
    places, and the model's own, the class token first, take no part. Returns pairs of patches, the most alike first."""
    tokens = len(keys)
    pairs = []
    for goes in range(0, tokens, 2):
        others = [place for place in range(1, tokens, 2) if place >= own]
        if goes >= own:
            alike = {place: float(F.cosine_similarity(keys[goes], keys[place], dim=0)) for place in others}
            into = max(alike, key=alike.get)
            pairs.append((alike[into], goes - own, into - own))
    return [pair[1:] for pair in sorted(pairs, reverse=True)[:count]]


@pytest.mark.parametrize(("own", "patches"), [(0, 8), (1, 8), (1, 9), (2, 9), (5, 16)])
def test_the_division_is_the_authors_with_and_without_a_class_token(own, patches):
    keys = torch.randn(1, own + patches, 6, generator=torch.Generator().manual_seed(own + patches))
    first = own % 2
    stays, goes, into = match(keys[:, own:], 3, first)
    pairs = [(2 * a + first, 2 * b + 1 - first) for a, b in zip(goes[0].tolist(), into[0].tolist(), strict=True)]
    assert pairs == by_the_authors(keys[0], own, 3)
    tokens = torch.eye(patches)[None]
    joined, sizes = merge(tokens, torch.ones(1, patches), stays, goes, into, first)
    groups = {frozenset(row.nonzero()[:, 0].tolist()) for row in joined[0]}
    wanted = [{place} for place in range(patches)]
    for gone, kept in pairs:
        wanted[kept] |= {gone}
        wanted[gone] = set()
    assert groups == {frozenset(group) for group in wanted if group}
    assert int(sizes.sum()) == patches


@pytest.mark.parametrize("divide", ["tokens", "patches"])
def test_with_a_class_token_the_division_is_the_one_that_is_asked_for(divide, monkeypatch):
    seen = []

    def noting(keys, count, first=0):
        seen.append(first)
        return match(keys, count, first)

    monkeypatch.setattr("eke_token_merge.callback.match", noting)
    fit(TinyViT(), TokenMerge(2, divide=divide), epochs=1)
    assert set(seen) == {1 if divide == "tokens" else 0}


def test_merging_keeps_the_sum_and_identical_tokens_lose_nothing():
    torch.manual_seed(0)
    tokens, sizes = torch.randn(3, 11, 4), torch.randint(1, 5, (3, 11)).float()
    joined, grown = merge(tokens, sizes, *match(torch.randn(3, 11, 8), 4))
    assert joined.shape == (3, 7, 4)
    assert torch.equal(grown.sum(1), sizes.sum(1))
    torch.testing.assert_close((joined * grown[..., None]).sum(1), (tokens * sizes[..., None]).sum(1))
    same = torch.randn(1, 1, 4).expand(1, 6, 4)
    joined, grown = merge(same, torch.ones(1, 6), *match(torch.randn(1, 6, 8), 3))
    torch.testing.assert_close(joined, same[:, :3])


def test_weighed_attention_over_joined_tokens_is_attention_over_the_tokens_they_stand_for():
    """The oracle of proportional attention: a token of size 3 counts as three of the same."""
    vit = TinyViT()
    attention = vit.blocks[0].attn
    one = torch.randn(2, 5, 16)
    sizes = torch.tensor([[1.0, 3, 1, 2, 1]] * 2)
    many = one.repeat_interleave(sizes[0].long(), dim=1)
    with Watch(attention_sites(vit.blocks[0])[0], sizes) as watch:
        weighed = attention(one)
    torch.testing.assert_close(weighed, attention(many)[:, [0, 1, 4, 5, 7]])
    assert watch.keys.shape == (2, 5, 8)  # the mean over heads
    torch.testing.assert_close(watch.keys, attention.qkv(one)[..., 16:32].unflatten(-1, (2, 8)).mean(2))

    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    found = attention_sites(layer)[0]

    def run(x):
        return layer.self_attn(x, x, x, need_weights=False)[0]

    with Watch(found, sizes) as watch:
        weighed = run(one)
    torch.testing.assert_close(weighed, run(many)[:, [0, 1, 4, 5, 7]])
    assert watch.keys.shape == (2, 5, 8)


class Seen(Callback):
    """Tokens that each block met, in training and in validation."""

    def __init__(self, path="blocks"):
        self.path, self.trained, self.validated, self.kinds = path, [], [], []

    def on_train_start(self, trainer, model):
        def look(block, args, kwargs):
            (self.trained if model.training else self.validated).append(args[0].shape[1])

        for block in model.get_submodule(self.path):
            block.register_forward_pre_hook(look, with_kwargs=True)

    def on_train_batch_end(self, trainer, model, *_):
        self.kinds.append(next(t for t in eke.techniques(trainer) if isinstance(t, TokenMerge)).step_kind())


def test_each_block_hands_on_fewer_patches_and_validation_sees_all():
    seen = Seen()
    fit(TinyViT(), TokenMerge(3, tail=0.5), epochs=2, validate=True, callbacks=[seen])
    assert seen.trained == [17, 14, 11, 8] * 4 + [17] * 16
    assert set(seen.validated) == {17}
    assert seen.kinds == ["4 patches at the end"] * 4 + ["all patches"] * 4


def test_it_may_merge_in_evaluation_too_and_never_more_than_half():
    seen = Seen()
    fit(TinyViT(), TokenMerge(6, evaluate=True), epochs=1, validate=True, callbacks=[seen])
    assert seen.trained[:4] == seen.validated[-4:] == [17, 11, 6, 4]


def test_a_validation_before_the_first_batch_merges_as_well():
    seen = Seen()
    fit(TinyViT(), TokenMerge(6, evaluate=True), epochs=1, validate=True, num_sanity_val_steps=1, callbacks=[seen])
    assert seen.validated[:4] == [17, 11, 6, 4]


def test_the_class_token_is_never_merged():
    """What a class token attends to, with a mark that only it carries, is still at the first place after each block."""
    firsts = []

    class Mark(TinyViT):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            with torch.no_grad():
                self.cls_token.fill_(100.0)

        def forward(self, x):
            hooks = [block.register_forward_pre_hook(lambda _, args: firsts.append(args[0])) for block in self.blocks]
            out = super().forward(x)
            for hook in hooks:
                hook.remove()
            return out

    fit(Mark(), TokenMerge(5), epochs=1)
    assert all((x[:, 0].mean(-1) > 50).all() and (x[:, 1:].mean(-1) < 50).all() for x in firsts)


def test_none_merged_changes_no_bit():
    plain, kept = fit(TinyViT()).state["weights"], fit(TinyViT(), TokenMerge(0)).state["weights"]
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


class Wrapped(LightningModule):
    dataset = Images

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(pixel_values=batch[0]).logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def vit():
    pytest.importorskip("transformers")
    model = hugging_face("vit")
    path = "model.vit.layers" if hasattr(model.vit, "layers") else "model.vit.encoder.layer"
    return model, path


def test_hugging_face_vit():
    model, path = vit()
    seen = Seen(path)
    fit(Wrapped(model), TokenMerge(3), epochs=1, callbacks=[seen])
    assert seen.trained[:4] == [17, 14, 11, 8]
    model.set_attn_implementation("eager")
    with pytest.raises(MisconfigurationException, match="does not go through scaled_dot_product_attention"):
        fit(Wrapped(model), TokenMerge(3), epochs=1)
    fit(Wrapped(model), TokenMerge(3, proportional=False), epochs=1)


def test_blocks_of_torch():
    class Encoder(TinyViT):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True, norm_first=True)
            self.blocks = nn.Sequential(*nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).layers)

    seen = Seen()
    fit(Encoder(), TokenMerge(3), epochs=1, callbacks=[seen])
    assert seen.trained[:4] == [17, 14, 11, 8]


def test_activation_checkpointing_compiled_blocks_and_causal_attention_are_refused():
    model, _ = vit()
    model.gradient_checkpointing_enable()
    with pytest.raises(MisconfigurationException, match="run again in the backward pass"):
        fit(Wrapped(model), TokenMerge(3), epochs=1)

    class Around(TinyViT):
        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return self.head(self.norm(x)[:, 0])

    with pytest.raises(MisconfigurationException, match="run again in the backward pass"):
        fit(Around(), TokenMerge(3), epochs=1)
    compiled = TinyViT()
    for block in compiled.blocks:
        block.compile(backend="eager")
    with pytest.raises(MisconfigurationException, match="which compiled code does not let it"):
        fit(compiled, TokenMerge(3), epochs=1)
    with pytest.raises(ValueError, match="0 convolutions that cut images"):
        fit(TinyBlocks(), TokenMerge(3))
    with pytest.raises(MisconfigurationException, match="The attention is causal"):
        fit(TinyBlocks(), TokenMerge(3, prefix=0))


def test_a_mask_or_positions_of_the_blocks_are_refused():
    class Rotary(TinyViT):
        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
            for block in self.blocks:
                x = block(x, rope=torch.zeros(16, 8)) if isinstance(block, Block) else block(x)
            return self.head(self.norm(x)[:, 0])

        def make(self, dropout, layers):
            super().make(dropout, layers)
            for block in self.blocks:
                block.__class__ = Block

    with pytest.raises(MisconfigurationException, match=r"also get an input of shape \(16, 8\), one entry a token"):
        fit(Rotary(), TokenMerge(3), epochs=1)


class Block(type(TinyViT().blocks[0])):
    def forward(self, x, rope=None):
        return super().forward(x)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"count": -1}, "count=-1: give a number of patches"),
        ({"tail": 2}, "tail=2: give a share of the run"),
        ({"prefix": -1}, "prefix=-1: give 0 or more tokens"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        TokenMerge(**arguments)


# Several lists of blocks


class Towers(LightningModule):
    """Images in two towers of other patch sizes, and words."""

    def __init__(self):
        super().__init__()
        self.coarse, self.fine, self.text = shapes.TimmViT(), shapes.TimmViT(), shapes.Flat()
        self.fine.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.fine.pos_embed = nn.Parameter(torch.zeros(1, 16, 16))


def test_of_an_image_and_a_text_tower_the_image_s_patches_are_joined():
    class Clip(LightningModule):
        dataset = Images

        def __init__(self):
            super().__init__()
            self.net = shapes.SHAPES["clip"]().model

        def training_step(self, batch, batch_idx):
            images = batch[0].repeat(1, 3 // batch[0].shape[1], 1, 1)
            images = nn.functional.interpolate(images, (16, 16))
            words = torch.arange(len(images) * 6).view(len(images), 6) % 13 + 2
            return self.net(input_ids=words, pixel_values=images).logits_per_image.square().mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(Images(8), batch_size=4)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    seen, read = Seen("net.vision_model.encoder.layers"), Seen("net.text_model.encoder.layers")
    fit(Clip(), TokenMerge(1), epochs=1, callbacks=[seen, read])
    patches = find_patches(Clip()).grid(torch.zeros(1, 3, 16, 16))
    first = 1 + patches[0] * patches[1]
    assert seen.trained[:3] == [first, first - 1, first - 2]
    assert set(read.trained) == {6}


def test_each_of_two_towers_of_images_counts_its_own_patches():
    model, technique = Towers(), TokenMerge(1)
    run = eke.Run(technique, None, model)
    technique._run = run
    technique.alter_model(run)
    technique._switch(True)
    lengths = {"coarse": [], "fine": []}
    for name, seen in lengths.items():
        for block in getattr(model, name).blocks:
            block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
    images = torch.randn(2, 3, 16, 16)
    model.coarse(images)
    model.fine(images)
    model.coarse(images)
    assert lengths == {"fine": [16, 15, 14], "coarse": [4, 3, 2] * 2}
    run.close()
    assert not any(isinstance(part, interceptor.InterceptedBlock) for part in model.modules())


def test_a_model_of_texts_is_told_what_serves_texts_and_a_path_asks_for_one_tower():
    with pytest.raises(PatchesError, match="TokenMerge joins patches of images. On texts, eke-random-ltd"):
        fit(TinyBlocks(), TokenMerge(2))
    technique = TokenMerge(1, blocks="coarse.blocks")
    technique.alter_model(run := eke.Run(technique, None, model := Towers()))
    assert technique._blocks.now() == list(model.coarse.blocks)
    run.close()
