"""Names without torch.compile's part, and the one pattern language of all arguments that name layers or parameters."""

import pytest
import torch
from eke import EkeError
from eke.seams.names import NamesError, at, match, match_parameters, parameter_names, parent_of, plain, plain_keys
from eke.testing.shapes import Flat, llama
from torch import nn

NAMES = ["embed", "blocks.0.attn.q_proj", "blocks.0.mlp.fc1", "blocks.1.attn.q_proj", "blocks.1.mlp.fc1", "head"]


def test_the_compilers_part_is_stripped_wherever_it_stands():
    assert [plain(name) for name in ("_orig_mod.a.b", "a._orig_mod.b", "a.b._orig_mod", "a_orig_mod.b")] == [
        "a.b",
        "a.b",
        "a.b",
        "a_orig_mod.b",
    ]
    model, compiled = Flat(), torch.compile(Flat())
    compiled.blocks[1] = torch.compile(compiled.blocks[1])
    assert list(plain_keys(compiled.state_dict())) == list(model.state_dict())


def test_modules_are_found_by_plain_names_in_compiled_models_and_by_compiled_names_in_plain_ones():
    model, compiled = Flat(), Flat()
    compiled.blocks[1] = torch.compile(compiled.blocks[1])
    whole = torch.compile(compiled)
    assert at(whole, "blocks.1.wq") is compiled.blocks[1]._orig_mod.wq
    assert at(model, "_orig_mod.blocks.1._orig_mod.wq") is model.blocks[1].wq
    assert at(model, "") is model
    assert parent_of(whole, "blocks.1.ff.0") == (compiled.blocks[1]._orig_mod.ff, "0")
    with pytest.raises(AttributeError):
        at(model, "blocks.1.w")


@pytest.mark.parametrize(
    ("patterns", "met"),
    [
        ("q_proj", ["blocks.0.attn.q_proj", "blocks.1.attn.q_proj"]),
        ("attn.q_proj", ["blocks.0.attn.q_proj", "blocks.1.attn.q_proj"]),
        ("blocks.1.mlp.fc1", ["blocks.1.mlp.fc1"]),
        ("*.mlp.*", ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
        ("blocks.[0].*", ["blocks.0.attn.q_proj", "blocks.0.mlp.fc1"]),
        (["head", "embed"], ["embed", "head"]),
        ("_orig_mod.head", ["head"]),
    ],
)
def test_a_plain_pattern_meets_the_end_of_a_name_and_one_with_wildcards_the_whole(patterns, met):
    assert match(NAMES, patterns) == met


@pytest.mark.parametrize("pattern", ["proj", "mlp.*", "Head", "blocks.0"])
def test_a_part_of_a_word_a_half_of_a_name_and_other_capitals_are_not_met(pattern):
    with pytest.raises(NamesError):
        match(NAMES, pattern)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("qproj", r"targets='qproj' meets no name. Near it are blocks.0.attn.q_proj"),
        ("*.mlpp.fc1", r"Near it are blocks.0.mlp.fc1"),
        ("zzz", r"There are embed, blocks.0.attn.q_proj, blocks.0.mlp.fc1, blocks.1.attn.q_proj and 2 more."),
        ("mlp", r"Near it are blocks.0.mlp.fc1, blocks.1.mlp.fc1"),
    ],
)
def test_a_pattern_that_meets_nothing_shows_near_names(pattern, said):
    with pytest.raises(NamesError, match=said):
        match(NAMES, ["head", pattern], "targets")
    assert issubclass(NamesError, EkeError)
    assert issubclass(NamesError, ValueError)


def test_no_names_are_no_reason_to_be_silent():
    with pytest.raises(NamesError, match="there are no names to meet"):
        match([], "head")


def test_a_tied_parameter_is_met_by_each_of_its_names():
    model = llama().model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for pattern in ("lm_head.weight", "lm_head.*", "lm_head", "model.embed_tokens", "embed_tokens.weight"):
        found = match_parameters(model, pattern)
        assert list(found) == ["model.embed_tokens.weight"]
        assert found["model.embed_tokens.weight"] is model.lm_head.weight
    assert parameter_names(model)[model.lm_head.weight] == ("model.embed_tokens.weight", "lm_head.weight")


def test_the_name_of_a_module_means_all_its_parameters():
    model = Flat()
    assert list(match_parameters(model, ["head", "*.ln_a.bias"])) == [
        *(f"blocks.{i}.ln_a.bias" for i in range(3)),
        "head.weight",
        "head.bias",
    ]
    assert list(match_parameters(nn.ModuleDict({"a": torch.compile(nn.Linear(2, 2))}), "a")) == ["a.weight", "a.bias"]
    with pytest.raises(NamesError, match="train='heads' meets no name. Near it are head.weight, head.bias"):
        match_parameters(model, "heads", "train")
