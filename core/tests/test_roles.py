"""Roles of parameters and weight decay by them, on every shape of model that Eke claims to read."""

import pytest
import torch
from eke.seams.anatomy import read_blocks
from eke.seams.roles import KINDS, decay_groups, roles, table
from eke.testing.shapes import SHAPES, Flat, llama
from torch import nn

# By model: names of embeddings, and of heads. Everything else is asked of the anatomy.
EMBEDDINGS = {
    "gpt2": ["transformer.wte.weight", "transformer.wpe.weight"],
    "bert": [f"bert.embeddings.{one}_embeddings.weight" for one in ("word", "position", "token_type")],
    "t5": ["shared.weight"],
    "bart": ["model.shared.weight", "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"],
    "clip": [
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
    ],
    "vit": [
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
    ],
    "swin": ["embeddings.patch_embeddings.projection.weight"],
    "llama": ["model.embed_tokens.weight"],
    "timm_vit": ["pos_embed", "patch_embed.weight"],
    "plain_list": ["embed.weight"],
    "torch_encoder": [],
}
HEADS = {
    "gpt2": ["transformer.wte.weight"],
    "bert": ["bert.embeddings.word_embeddings.weight"],
    "roberta": ["classifier.out_proj.weight"],
    "t5": ["shared.weight"],
    "bart": ["model.shared.weight"],
    "mistral": ["lm_head.weight"],
    "vit": ["classifier.weight"],
    "wav2vec2": ["lm_head.weight"],
    "timm_vit": ["head.weight"],
    "plain_list": ["head.weight"],
    "torch_encoder": [],
    "dinov2": [],
}


@pytest.fixture(params=SHAPES)
def named(request):
    torch.manual_seed(0)
    return request.param, SHAPES[request.param]().model


def of(found, kind):
    return [name for name, role in found.items() if kind in role.kinds]


def test_every_parameter_has_a_role_under_its_own_name(named):
    _, model = named
    found = roles(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(role.parameter is parameter for role, parameter in zip(found.values(), model.parameters(), strict=True))
    assert all(set(role.kinds) <= set(KINDS) for role in found.values())


def test_hidden_matrices_are_the_linear_maps_of_the_blocks(named):
    _, model = named
    found = roles(model)
    for path, block in read_blocks(model).items():
        inside = {name: role for name, role in found.items() if name.startswith(f"{path}.")}
        weights = {id(getattr(one.module, one.weight)) for maps in block.maps().values() for one in maps}
        assert {id(role.parameter) for role in inside.values() if role.kind == "hidden"} == weights
        norms = {id(p) for norm in (*block.norms, *block.head_norms) for p in norm.module.parameters()}
        assert {id(role.parameter) for role in inside.values() if role.kind == "norm"} == norms
        rest = [role for role in inside.values() if role.kind not in ("hidden", "norm", "bias")]
        assert all(role.kind == "other" for role in rest)
        assert all(role.parameter.ndim == 1 for role in inside.values() if role.kind == "bias")


def test_embeddings_and_heads_are_those_that_stand_here(named):
    name, model = named
    found = roles(model)
    if name in EMBEDDINGS:
        assert sorted(of(found, "embedding")) == sorted(EMBEDDINGS[name])
    if name in HEADS:
        assert of(found, "head") == HEADS[name]


def test_a_tied_parameter_is_named_once_and_is_both():
    model = llama().model
    role = roles(model)["model.embed_tokens.weight"]
    assert role.kinds == ("embedding", "head")
    assert role.names == ("model.embed_tokens.weight", "lm_head.weight")
    assert role.tied
    assert role.kind == "embedding"


def test_tables_of_positions_gains_and_scales_are_none_of_the_five():
    assert of(roles(SHAPES["t5"]().model), "other") == [
        f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for part in ("encoder", "decoder")
    ]
    assert "logit_scale" in of(roles(SHAPES["clip"]().model), "other")
    assert all("lambda1" in name for name in of(roles(SHAPES["dinov2"]().model), "other"))
    assert all("relative_position_bias_table" in name for name in of(roles(SHAPES["swin"]().model), "other"))


def test_the_compilers_part_is_in_no_name():
    model = Flat()
    plain = {name: role.kinds for name, role in roles(model).items()}
    model.blocks[1] = torch.compile(model.blocks[1])
    assert {name: role.kinds for name, role in roles(torch.compile(model)).items()} == plain


def test_matrices_of_adapters_are_hidden():
    peft = pytest.importorskip("peft")
    model = llama().model
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "embed_tokens"], use_dora=False), model)
    found = roles(model)
    lora = {name: role.kind for name, role in found.items() if "lora_" in name}
    assert len(lora) == 8
    assert set(lora.values()) == {"hidden"}
    assert found["model.layers.0.self_attn.q_proj.base_layer.weight"].kind == "hidden"
    assert found["model.embed_tokens.base_layer.weight"].kinds == ("embedding", "head")


def test_the_last_layer_behind_the_blocks_is_the_head_where_no_name_says_so():
    model = Flat()
    model.answer, model.head = nn.Linear(16, 5), nn.Identity()
    assert of(roles(model), "head") == ["answer.weight"]
    assert of(roles(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), "head") == ["2.weight"]


def test_decay_spares_norms_biases_and_others(named):
    _, model = named
    groups = decay_groups(model, 0.1)
    found = roles(model)
    decayed = {name for group in groups if group["weight_decay"] == 0.1 for name in group["names"]}
    spared = {name for group in groups if group["weight_decay"] == 0 for name in group["names"]}
    trained = {name for name, role in found.items() if role.parameter.requires_grad}
    assert decayed | spared == trained
    assert decayed == {name for name in trained if {"hidden", "embedding", "head"} & set(found[name].kinds)}
    torch.optim.AdamW([{key: group[key] for key in ("params", "weight_decay")} for group in groups])


def test_each_kind_may_have_a_decay_of_its_own_and_frozen_parameters_are_left_out():
    model = llama().model
    model.model.layers[0].requires_grad_(False)
    groups = decay_groups(model, {"hidden": 0.2, "head": 0.1, "embedding": 0.05})
    assert [group["weight_decay"] for group in groups] == [0.2, 0.1, 0.0]
    assert groups[1]["names"] == ["model.embed_tokens.weight"]  # as the head that it also is
    assert not any("layers.0" in name for group in groups for name in group["names"])
    assert decay_groups(model, 0.1, ["hidden"])[1]["names"][0] == "model.embed_tokens.weight"
    with pytest.raises(ValueError, match="'matrix' is no kind of parameter: give hidden, embedding"):
        decay_groups(model, {"matrix": 0.1})


def test_the_table_has_a_line_for_what_all_blocks_have():
    text = table(roles(Flat()))
    lines = text.splitlines()
    assert lines[0].split() == ["hidden", "blocks.*.wq.weight", "3", "of", "16", "x", "16"]
    assert lines[-1].split() == ["bias", "head.bias", "17"]
    assert len(lines) == 15
    assert "embedding and head  model.embed_tokens.weight = lm_head.weight" in table(roles(llama().model))
