"""The finder of blocks and attention, on every shape of model that people bring."""

import lightning.pytorch as pl
import pytest
import torch
from eke import EkeError
from eke.seams.blocks import BlocksError, find_all_blocks, find_attention, find_blocks
from torch import nn


class Attention(nn.Module):
    """As timm names it."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Identity()
        self.proj = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width=8, experts=0):
        super().__init__()
        self.attn = Attention(width)
        if experts:
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(width, 4), nn.Linear(4, width)) for _ in range(experts)
            )


class Vit(nn.Module):
    def __init__(self, depth=3, width=8, experts=0):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4)
        self.blocks = nn.Sequential(*[Block(width, experts) for _ in range(depth)])
        self.head = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


def layer(decoder=False, **kwargs):
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    return kind(8, 2, 16, batch_first=True, **kwargs)


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=16))
    if name == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=16, **small))
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **small))
    if name == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **small))
    if name == "albert":
        return transformers.AlbertModel(transformers.AlbertConfig(vocab_size=16, embedding_size=8, **small))
    if name == "t5":
        return transformers.T5Model(
            transformers.T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2)
        )
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config)


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("gpt2", "transformer.h", "fused"),
        ("bert", "bert.encoder.layer", "separate"),
        ("llama", "model.layers", "separate"),
        ("vit", "vit.layers", "separate"),
    ],
)
def test_it_finds_the_blocks_and_the_attention_of_a_hugging_face_model(name, path, kind):
    model = hugging_face(name)
    blocks = find_blocks(model)
    assert (blocks.path, len(blocks), blocks.shared) == (path, 3, ())
    assert blocks.container is model.get_submodule(path)
    assert [attention.kind for attention in find_attention(model)] == [kind] * 3
    assert all(len(find_attention(block)) == 1 for block in blocks)


def test_it_finds_those_of_the_torch_encoder_of_a_vit_and_of_a_wrapped_model():
    class Wrapped(pl.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

    encoder = nn.TransformerEncoder(layer(), 3)
    assert find_blocks(encoder).path == "layers"
    assert find_blocks(Wrapped(encoder)).path == "net.layers"
    assert find_blocks(Wrapped(Wrapped(Vit()))).path == "net.net.blocks"
    assert find_blocks(torch.compile(Vit())).path == "_orig_mod.blocks"
    assert [one.path for one in find_attention(encoder)] == [f"layers.{i}.self_attn" for i in range(3)]
    assert {one.kind for one in find_attention(encoder)} == {"torch"}
    assert [(one.path, one.kind) for one in find_attention(Block())] == [("attn", "fused")]


def test_a_block_knows_its_path():
    assert find_blocks(Vit()).path_of(1) == "blocks.1"
    assert find_blocks(nn.Sequential(Block(), Block())).path_of(1) == "1"


def test_the_experts_of_a_block_are_not_its_blocks_however_many():
    assert find_blocks(Vit(depth=2, experts=5)).path == "blocks"


def test_without_any_attention_the_outer_list_of_composites_counts():
    mixer = nn.ModuleDict(
        {
            "taps": nn.ModuleList(nn.Linear(2, 2) for _ in range(9)),
            "blocks": nn.ModuleList(
                nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(7)) for _ in range(3)
            ),
        }
    )
    assert find_blocks(mixer).path == "blocks"


def test_two_towers_are_not_two_blocks():
    towers = nn.ModuleList([Vit(3), Vit(3)])
    with pytest.raises(BlocksError, match=r"2 lists of blocks: '0.blocks' \(3 Block\), '1.blocks' \(3 Block\)"):
        find_blocks(towers)
    assert find_blocks(towers, "1").path == "1.blocks"


def test_an_encoder_and_a_decoder_of_one_length_are_named_and_a_path_is_asked_for():
    model = nn.Transformer(8, 2, 3, 3, 16)
    with pytest.raises(BlocksError, match="Say which one is meant by its path, as blocks='encoder.layers'") as error:
        find_blocks(model)
    assert "'encoder.layers' (3 TransformerEncoderLayer), 'decoder.layers' (3 TransformerDecoderLayer)" in str(
        error.value
    )
    assert find_blocks(model, "decoder.layers").path == "decoder.layers"
    assert find_blocks(model, "decoder").path == "decoder.layers"
    assert [one.path for one in find_attention(find_blocks(model, "decoder")[0])] == ["self_attn", "multihead_attn"]


def test_of_two_kinds_of_block_the_longer_list_wins():
    assert find_blocks(nn.Transformer(8, 2, 4, 3, 16)).path == "encoder.layers"


def test_stages_of_one_class_are_ambiguous_even_with_different_lengths():
    with pytest.raises(BlocksError, match=r"encoder.layers.0.blocks' \(2 SwinLayer\), 'encoder.layers.1.blocks'"):
        find_blocks(hugging_face("swin"))
    stages = nn.ModuleDict(
        {"one": nn.ModuleList([Block(8)] + [Block(8)]), "two": nn.ModuleList([Block(4) for _ in "abc"])}
    )
    with pytest.raises(BlocksError, match=r"'one' \(2 Block\), 'two' \(3 Block\)"):
        find_blocks(stages)


def test_lists_that_are_no_blocks_are_described():
    with pytest.raises(BlocksError, match="Linear holds no list of two or more like blocks. It holds no nn.ModuleList"):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(BlocksError, match=r"Its lists are: 'itself' \(2 Block, not of one shape\)"):
        find_blocks(nn.ModuleList([Block(8), Block(4)]))
    with pytest.raises(BlocksError, match=r"'encoder.albert_layer_groups' \(1 AlbertLayerGroup\)"):
        find_blocks(hugging_face("albert"))
    with pytest.raises(BlocksError, match=r"'encoder.block' \(3 T5Block, not of one shape\)"):
        find_blocks(hugging_face("t5"))


def test_a_path_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(BlocksError, match=r"Vit has no module at 'block'. Its lists are: 'blocks' \(3 Block\)"):
        find_blocks(Vit(), "block")


def test_a_list_given_by_path_may_hold_unlike_blocks():
    unlike = nn.ModuleDict({"blocks": nn.ModuleList([Block(8), Block(4)]), "other": nn.ModuleList([Block(), Block()])})
    assert find_blocks(unlike).path == "other"
    assert find_blocks(unlike, "other").alike
    assert not find_blocks(unlike, "blocks").alike
    t5 = hugging_face("t5")
    assert len(find_blocks(t5, "encoder.block")) == 3


def test_blocks_that_share_parameters_say_which():
    block = Block()
    assert find_blocks(nn.ModuleList([block] * 3)).shared[0] == "1.attn.qkv.weight"
    one, other = Block(), Block()
    other.attn.proj.weight = one.attn.proj.weight
    assert find_blocks(nn.ModuleList([one, other])).shared == ("1.attn.proj.weight",)


def test_attention_is_found_by_its_parts_or_else_by_its_name():
    class Anything(nn.Module):
        def __init__(self, **children):
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

    class RetentionAttention(Anything): ...

    def linear():
        return nn.Linear(4, 4)

    assert find_attention(Anything(to_q=linear(), to_k=linear(), to_v=linear()))[0].kind == "separate"
    assert find_attention(Anything(wq=linear(), wk=linear(), wv=linear(), wo=linear()))[0].kind == "separate"
    assert find_attention(Anything(q_lin=linear(), k_lin=linear(), v_lin=linear()))[0].kind == "separate"
    assert find_attention(Anything(c_attn=nn.Linear(4, 6), c_proj=linear()))[0].kind == "fused"
    assert find_attention(Anything(attn=linear())) == []
    assert find_attention(Anything(q=linear(), k=linear())) == []
    assert find_attention(RetentionAttention(mix=linear()))[0].kind == "named"
    inner = RetentionAttention(out=linear(), inner=Anything(q_proj=linear(), k_proj=linear(), v_proj=linear()))
    assert [one.path for one in find_attention(inner)] == ["inner"]
    assert find_attention(nn.Linear(2, 2)) == []


def test_all_lists_of_blocks_are_found_an_encoders_and_a_decoders_and_each_stages():
    both = find_all_blocks(nn.Transformer(8, 2, 4, 3, 16))
    assert [(blocks.path, len(blocks)) for blocks in both] == [("encoder.layers", 4), ("decoder.layers", 3)]
    assert [blocks.path for blocks in find_all_blocks(hugging_face("swin"))] == [
        "encoder.layers.0.blocks",
        "encoder.layers.1.blocks",
    ]
    assert [blocks.path for blocks in find_all_blocks(nn.ModuleList([Vit(3), Vit(2)]))] == ["0.blocks", "1.blocks"]
    assert [blocks.path for blocks in find_all_blocks(Vit(depth=2, experts=5))] == ["blocks"]
    assert [blocks.path for blocks in find_all_blocks(nn.Transformer(8, 2, 4, 3, 16), ["decoder"])] == [
        "decoder.layers"
    ]


def test_a_block_may_hold_one_submodule_more_than_the_others():
    t5 = find_all_blocks(hugging_face("t5"))
    assert [blocks.path for blocks in t5] == ["encoder.block", "decoder.block"]
    assert [(blocks.alike, blocks.nearly_alike) for blocks in t5] == [(False, True)] * 2
    assert t5[0].extra == {0: ("layer.0.SelfAttention.relative_attention_bias.weight",)}
    assert find_all_blocks(Vit())[0].extra == {}
    with pytest.raises(BlocksError, match=r"holds no list of two or more like blocks. .*2 Block, not of one shape"):
        find_all_blocks(nn.ModuleList([Block(8), Block(4)]))


def test_a_path_serves_a_compiled_model_and_a_plain_one():
    compiled = nn.ModuleDict({"net": torch.compile(Vit())})
    assert find_blocks(compiled, "net.blocks").modules == find_blocks(compiled).modules
    assert len(find_blocks(nn.ModuleDict({"net": Vit()}), "net._orig_mod.blocks")) == 3
    assert issubclass(BlocksError, EkeError)


def test_a_list_of_which_some_blocks_are_compiled_is_one_list():
    model = Vit(depth=4)
    model.blocks[1] = torch.compile(model.blocks[1])
    found = find_blocks(model)
    assert (found.path, len(found), found.alike, found.extra) == ("blocks", 4, True, {})
    assert [blocks.path for blocks in find_all_blocks(model)] == ["blocks"]


class Dense(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.one, self.two = nn.Linear(width, 16), nn.Linear(16, width)


class Mixed(nn.Module):
    """A block that has experts, or is dense."""

    def __init__(self, experts=False, width=8, attention=True):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.LayerNorm(width)
        if attention:
            self.attn = Attention(width)
        self.mlp = nn.ModuleList(Dense(width) for _ in range(4)) if experts else Dense(width)


class MixedToo(Mixed):
    """Another class."""


def test_blocks_that_are_dense_or_hold_experts_are_one_list():
    model = nn.ModuleDict({"layers": nn.ModuleList([Mixed(), Mixed(True), Mixed(True)])})
    for found in (find_blocks(model), *find_all_blocks(model)):
        assert (found.path, len(found), found.alike, found.nearly_alike) == ("layers", 3, False, True)


def test_a_list_of_several_classes_counts_where_there_is_nothing_else():
    layers = [MixedToo(attention=False), Mixed(), MixedToo(attention=False), Mixed()]
    assert [one.path for one in find_all_blocks(nn.ModuleDict({"layers": nn.ModuleList(layers)}))] == ["layers"]
    beside = nn.ModuleDict({"layers": nn.ModuleList(layers), "blocks": nn.ModuleList([Block(), Block()])})
    assert [one.path for one in find_all_blocks(beside)] == ["blocks"]
    parts = nn.ModuleDict({"parts": nn.ModuleList([Attention(8), Dense()])})  # of one block
    with pytest.raises(BlocksError, match="no list of two or more like blocks"):
        find_all_blocks(parts)


def test_parts_of_a_block_behind_norms_of_one_class_are_no_blocks():
    class PreNorm(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.norm, self.fn = nn.LayerNorm(8), inner

    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleList([PreNorm(Attention(8)), PreNorm(Dense())]) for _ in "abc")}
    )
    assert [one.path for one in find_all_blocks(model)] == ["layers"]


def test_a_stage_of_one_block_is_found_beside_longer_ones_and_several_such_by_themselves():
    stages = nn.ModuleList(
        nn.ModuleDict({"blocks": nn.ModuleList([Block(w)] * n)}) for w, n in ((8, 1), (4, 2), (2, 1))
    )
    assert [(one.path, len(one)) for one in find_all_blocks(stages)] == [
        ("0.blocks", 1), ("1.blocks", 2), ("2.blocks", 1)
    ]  # fmt: skip
    single = nn.ModuleList(nn.ModuleDict({"blocks": nn.ModuleList([Block(w)])}) for w in (8, 4))
    assert [one.path for one in find_all_blocks(single)] == ["0.blocks", "1.blocks"]
    with pytest.raises(BlocksError, match="no list of two or more"):
        find_all_blocks(single[0])


def test_a_part_of_a_model_gives_all_its_lists_and_each_counts_once():
    model = nn.ModuleDict({"trunk": nn.ModuleList([Vit(3), Vit(2)]), "other": Vit(2)})
    assert [one.path for one in find_all_blocks(model, "trunk")] == ["trunk"]  # a list that is named is meant
    model = nn.ModuleDict({"trunk": nn.ModuleDict({"a": Vit(3), "b": Vit(2)}), "other": Vit(2)})
    paths = ["trunk", "trunk.a.blocks", "other"]
    assert [one.path for one in find_all_blocks(model, paths)] == ["trunk.a.blocks", "trunk.b.blocks", "other.blocks"]
    with pytest.raises(BlocksError, match=r"blocks=\[\] names no list"):
        find_all_blocks(model, [])


def test_the_end_of_a_path_or_a_pattern_will_do_and_several_have_to_be_told_apart():
    model = nn.ModuleDict({"net": hugging_face("t5")})
    for paths in (["encoder.block", "decoder.block"], "*.block", ["block"], ["encoder", "net.decoder"]):
        assert [one.path for one in find_all_blocks(model, paths)] == ["net.encoder.block", "net.decoder.block"]
    assert find_blocks(model, "decoder").path == find_blocks(model, "decoder.block").path == "net.decoder.block"
    with pytest.raises(BlocksError, match=r"blocks='block' meets 'net.encoder.block', 'net.decoder.block'. Say which"):
        find_blocks(model, "block")
    with pytest.raises(BlocksError, match=r"no module at 'encoder.layers'. Its lists are: 'net.encoder.block'"):
        find_all_blocks(model, ["encoder.layers"])


def test_a_list_that_is_none_by_itself_is_advised_and_taken_where_it_is_named():
    albert = nn.ModuleDict({"net": hugging_face("albert")})
    with pytest.raises(BlocksError, match=r"say so: blocks='(.*albert_layers)'") as refused:
        find_all_blocks(albert)
    named = str(refused.value).rpartition("blocks='")[2].rstrip("'.")
    assert [len(one) for one in find_all_blocks(albert, named)] == [1]
