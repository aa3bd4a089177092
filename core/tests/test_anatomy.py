"""The parts of a block against what the configuration says, on every shape of model that Eke claims to read."""

import pytest
import torch
from eke import EkeError
from eke.seams.anatomy import AnatomyError, anatomy, attention_sites, linear_maps, read_blocks
from eke.seams.blocks import BlocksError, find_all_blocks, is_linear
from eke.testing import shapes
from eke.testing.shapes import SHAPES, Flat, FlatBlock, TimmBlock, bert, gpt2, llama, torch_encoder
from torch import nn

ORDERS = {
    "post": ("bert", "roberta", "distilbert", "bart", "wav2vec2", "torch_encoder", "torch_transformer"),
    "sandwich": ("gemma2",),
}


@pytest.fixture(params=SHAPES)
def shape(request):
    torch.manual_seed(0)
    found = SHAPES[request.param]()
    found.name = request.param
    return found


def test_every_list_of_blocks_is_found(shape):
    assert {blocks.path: len(blocks) for blocks in find_all_blocks(shape.model)} == {
        path: numbers[0] for path, numbers in shape.lists.items()
    }


@pytest.mark.parametrize("traced", [False, True], ids=["read", "run"])
def test_heads_and_widths_are_those_of_the_configuration(shape, traced):
    for path, (_, heads, key_heads, width, inner) in shape.lists.items():
        for block in find_all_blocks(shape.model, path)[0]:
            found = anatomy(block, shape.run if traced else None)
            assert found.width == width
            assert [site.cross for site in found.attention] == [False, True][: 1 + (path in shape.cross)]
            for site in found.attention:
                assert (site.heads, site.key_heads) == (heads, key_heads)
                assert site.query.outputs == heads * site.size == site.output.inputs
                assert site.key.outputs == site.value.outputs == key_heads * site.size
                assert site.output.outputs == site.query.inputs == width
            assert [mlp.inner for mlp in found.mlps] == [inner] * len(found.mlps) != []
            for mlp in found.mlps:
                assert (mlp.up.inputs, mlp.up.outputs, mlp.down.inputs, mlp.down.outputs) == (
                    width,
                    inner,
                    inner,
                    width,
                )


def test_every_linear_layer_of_a_block_is_accounted_for(shape):
    for path in shape.lists:
        for block in find_all_blocks(shape.model, path)[0]:
            found = anatomy(block)
            roles = found.maps()
            assert roles.pop("other") == ()
            assert len(roles.pop("router")) == bool(shape.experts)
            assert len(roles["attention output"]) == len(found.attention)
            told = [part.module for maps in found.maps().values() for part in maps]
            linear = [
                part for part in block.modules() if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
            ]
            assert all(any(part is one for one in told) for part in linear)
            weights = [id(p) for maps in found.maps().values() for one in maps for p in one.parameters()]
            matrices = [p for p in block.parameters() if p.ndim > 1 and p.shape[-1] != heads_of(found)]
            assert len(set(weights)) == len(weights)
            assert {id(p) for p in matrices} <= set(weights) | {id(p) for p in embeddings(block)}


def heads_of(found):
    return found.attention[0].heads  # tables of positions have a column for each head


def embeddings(block):
    return [p for part in block.modules() if isinstance(part, nn.Embedding) for p in part.parameters()]


def test_a_run_tells_where_the_norms_are(shape):
    order = next((order for order, names in ORDERS.items() if shape.name in names), "pre")
    for path in shape.lists:
        for block in find_all_blocks(shape.model, path)[0]:
            found = anatomy(block, shape.run)
            assert found.order == order
            for branch in found.branches:
                assert len(branch.before) == (order in ("pre", "sandwich"))
                assert len(branch.after) == (order in ("post", "sandwich"))
            placed = [norm.path for branch in found.branches for norm in (*branch.before, *branch.after)]
            assert sorted(placed) == sorted(norm.path for norm in found.norms)
            assert all(norm.width == found.width for norm in found.norms)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ORDERS["post"]])
def test_with_zero_ends_a_pre_norm_block_passes_its_input_on(name):
    """What ends a branch is all that it adds."""
    torch.manual_seed(0)
    shape = SHAPES[name]()
    for path in shape.lists:
        block = find_all_blocks(shape.model, path)[0][0]
        for end in anatomy(block).ends:
            for parameter in end.parameters():
                nn.init.zeros_(parameter)
        seen = []
        block.register_forward_hook(
            lambda m, args, kwargs, out, seen=seen: seen.append((args, kwargs, out)), with_kwargs=True
        )
        with torch.no_grad():
            shape.run()
        args, kwargs, out = seen[0]
        given = args[0] if args else kwargs["hidden_states"]
        assert torch.equal(out[0] if isinstance(out, tuple) else out, given)


def test_a_map_gives_its_weight_as_outputs_by_inputs(shape):
    for path in shape.lists:
        found = anatomy(find_all_blocks(shape.model, path)[0][0])
        for site in found.attention:
            for one in (site.query, site.key, site.value, site.output):
                assert one.matrix().shape == (one.outputs, one.inputs)
        for mlp in found.mlps:
            for one in mlp.maps:
                assert one.matrix().shape[-2:] == (one.outputs, one.inputs)


def test_rows_of_a_fused_layer_are_its_queries_keys_and_values():
    model = gpt2().model
    site = attention_sites(model)[0]
    x = torch.randn(2, 5, 16)
    whole = site.module.c_attn(x)
    for part, one in zip(site.split(whole), (site.query, site.key, site.value), strict=True):
        assert part.shape == (2, 5, 4, 4)
        bias = site.module.c_attn.bias[slice(*one.rows)]
        torch.testing.assert_close(part.flatten(-2), x @ one.matrix().T + bias)


def test_only_a_run_tells_a_layout_by_heads():
    torch.manual_seed(0)
    shape = SHAPES["gpt_neox"]()
    block = shape.model.gpt_neox.layers[1]
    assert not anatomy(block).attention[0].by_head
    assert anatomy(block, shape.run).attention[0].by_head
    other = SHAPES["phi3"]()
    assert not anatomy(other.model.model.layers[1], other.run).attention[0].by_head
    site = anatomy(block, shape.run).attention[0]
    whole = torch.arange(48.0)[None]
    query, key, value = site.split(whole)
    assert query[0, 1].tolist() == [12, 13, 14, 15]  # the second head's three begin at 12
    assert key[0, 1].tolist() == [16, 17, 18, 19]
    assert value[0, 1].tolist() == [20, 21, 22, 23]


def test_gates_are_told_from_what_they_gate():
    torch.manual_seed(0)
    mlp = anatomy(llama().model.model.layers[0]).mlps[0]
    assert (mlp.gate.path, mlp.up.path, mlp.down.path) == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    fused = anatomy(SHAPES["phi3"]().model.model.layers[0]).mlps[0]
    assert (fused.gate.rows, fused.up.rows) == ((0, 40), (40, 80))
    assert [one.outputs for one in fused.maps] == [80, 16]


def test_experts_are_one_mlp_each_in_a_list_and_one_for_all_in_a_stack():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(16, 3)
            self.list = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(16, 24), "w3": nn.Linear(16, 24),
                                                     "w2": nn.Linear(24, 16)}) for _ in range(3))  # fmt: skip

    block = FlatBlock(16, 4, 40)
    block.ff = Experts()
    found = anatomy(block)
    assert [(mlp.gate.path, mlp.down.path) for mlp in found.mlps] == [
        (f"ff.list.{i}.w1", f"ff.list.{i}.w2") for i in range(3)
    ]
    assert [one.path for one in found.routers] == ["ff.router"]
    assert len(found.branches[1].ends) == 3
    stack = anatomy(SHAPES["mixtral"]().model.model.layers[0])
    assert [(mlp.down.experts, mlp.inner) for mlp in stack.mlps] == [(3, 40)]


@pytest.mark.parametrize("build", [bert, llama, torch_encoder], ids=["bert", "llama", "torch"])
def test_an_mlp_as_wide_as_the_stream_is_told_by_names(build, monkeypatch):
    monkeypatch.setitem(shapes.SMALL, "intermediate_size", 16)
    model = (
        build().model if build is not torch_encoder else nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 16), 2)
    )
    for block in find_all_blocks(model)[0]:
        found = anatomy(block)
        assert [mlp.inner for mlp in found.mlps] == [16]
        assert found.others == ()
        assert found.mlps[0].down.path in ("output.dense", "mlp.down_proj", "linear2")


def test_what_neither_shapes_nor_names_tell_is_seen_in_a_run_or_asked_for():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.one(self.other(x).relu())

    block = FlatBlock(16, 4, 16)
    block.ff = Backwards()
    with pytest.raises(AnatomyError, match=r"'ff.one', 'ff.other' all map 16 features to 16.*Give forward="):
        anatomy(block)
    found = anatomy(block, lambda: block(torch.randn(1, 3, 16)))
    assert (found.mlps[0].up.path, found.mlps[0].down.path) == ("ff.other", "ff.one")
    sequence = anatomy(FlatBlock(16, 4, 16))
    assert (sequence.mlps[0].up.path, sequence.mlps[0].down.path) == ("ff.0", "ff.2")


def test_heads_that_nothing_names_are_an_error_when_they_are_asked_for():
    block = FlatBlock(16, 4, 40)
    del block.heads
    site = anatomy(block).attention[0]
    assert site.output.path == "wo"
    with pytest.raises(AnatomyError, match="names no number of heads: its projections give 16 features of queries"):
        _ = site.heads
    assert issubclass(AnatomyError, EkeError)
    assert issubclass(AnatomyError, ValueError)


def test_a_run_without_the_block_is_an_error():
    with pytest.raises(BlocksError, match="ran without the FlatBlock"):
        anatomy(FlatBlock(16, 4, 40), lambda: None)


def test_a_model_that_was_read_is_as_it_was():
    model = Flat()
    model.blocks[1].eval()
    before, state = torch.get_rng_state(), {name: p.clone() for name, p in model.named_parameters()}
    read_blocks(model, forward=lambda: model(torch.zeros(1, 4, dtype=torch.int64)))
    assert torch.equal(torch.get_rng_state(), before)
    assert [block.training for block in model.blocks] == [True, False, True]
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())
    assert all(torch.equal(p, state[name]) and p.grad is None for name, p in model.named_parameters())


def test_adapted_layers_stand_for_the_layers_they_adapt():
    peft = pytest.importorskip("peft")
    shape = gpt2()
    config = peft.LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    peft.inject_adapter_in_model(config, shape.model)
    found = anatomy(shape.model.transformer.h[0])
    assert (found.attention[0].heads, found.mlps[0].inner) == (4, 64)
    assert [one.path for one in linear_maps(found.block)] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert found.attention[0].query.matrix().shape == (16, 16)


def test_a_block_without_attention_has_its_mlp_alone():
    block = nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 32), "down": nn.Linear(32, 8)})
    found = anatomy(block)
    assert (found.width, found.attention, [mlp.inner for mlp in found.mlps]) == (8, (), [32])
    with pytest.raises(AnatomyError, match="holds no linear layer"):
        anatomy(nn.Sequential(nn.ReLU()))


def test_blocks_are_read_by_their_paths_and_errors_begin_with_them():
    model = Flat()
    assert list(read_blocks(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert is_linear(read_blocks(model)["blocks.1"].ends[0].module)
    other = nn.ModuleDict({"h": nn.ModuleList(TimmBlock(16, 4, 40) for _ in range(2))})
    other.h[1].attn.second, other.h[1].attn.third = nn.Linear(16, 16), nn.Linear(16, 16)
    del other.h[1].attn.proj
    with pytest.raises(AnatomyError, match="The block 'h.1': the attention at 'attn' could end in 'attn.second'"):
        read_blocks(other, "h")
