"""Other layers in the place of a model's own, and back: identity, names, ties and copies."""

import copy
import pickle

import pytest
import torch
from eke import EkeError
from eke.seams.layers import LayersError, Transposed, find_layers, is_conv1d, place, restore, swap, swapped
from eke.seams.names import NamesError
from eke.testing.shapes import Flat, gpt2, llama, torch_encoder
from torch import nn


class Scaled(nn.Linear):
    """Computes twice what a linear layer does, with its parameters."""

    def forward(self, x):
        return 2 * super().forward(x)


class Factors(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.up(self.down(x))


def scaled(layer):
    new = Scaled(layer.in_features, layer.out_features, bias=layer.bias is not None)
    new.weight, new.bias = layer.weight, layer.bias
    return new


def become(layer):
    layer.__class__, layer.factor = Scaled, 2
    return layer


@pytest.fixture(params=[scaled, become], ids=["another object", "another class"])
def build(request):
    return request.param


def test_layers_of_a_kind_are_found_but_for_those_that_nobody_calls():
    assert len(find_layers(Flat())) == 3 * 6 + 1
    assert list(find_layers(gpt2().model.transformer.h[0])) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(find_layers(torch_encoder().model.layers[0])) == ["linear1", "linear2"]
    assert list(find_layers(Flat(), ["head", "*.wq"])) == ["blocks.0.wq", "blocks.1.wq", "blocks.2.wq", "head"]
    assert list(find_layers(Flat(), kinds=["Embedding"])) == ["embed"]
    with pytest.raises(NamesError, match="layers='w_q' meets no name. Near it are blocks.0.wq"):
        find_layers(Flat(), "w_q")


def test_a_swapped_layer_has_the_parameters_the_keys_and_the_mode_of_the_old_one(build):
    model = Flat().eval()
    tokens = torch.arange(6)[None]
    plain, keys, parameters = model(tokens), list(model.state_dict()), list(model.parameters())
    old = model.head
    assert swap(model, ["head"], build, "test") == {"head": old}
    assert list(swapped(model, "test")) == ["head"]
    torch.testing.assert_close(model(tokens), 2 * plain)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert not model.head.training
    model.load_state_dict(Flat().state_dict())
    model.train()
    restore(model, "test")
    assert model.head is old
    assert type(model.head) is nn.Linear
    assert model.head.training
    assert not model.head._forward_pre_hooks
    assert "factor" not in vars(model.head)
    assert swapped(model, "test") == {}


def test_copied_and_pickled_models_can_be_taken_back(build):
    model = Flat()
    swap(model, find_layers(model, "*.wq"), build, "test")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        restore(twin, "test")
        assert type(twin.blocks[1].wq) is nn.Linear
        assert not twin.blocks[1].wq._forward_pre_hooks
        assert twin.blocks[1].wq.weight is not model.blocks[1].wq.weight
        assert torch.equal(twin.blocks[1].wq.weight, model.blocks[1].wq.weight)
    assert type(model.blocks[1].wq) is Scaled
    model.blocks[0] = copy.deepcopy(model.blocks[1])  # as a technique that copies blocks does
    restore(model, "test")
    assert all(type(block.wq) is nn.Linear for block in model.blocks)


def test_parameters_that_were_exchanged_meanwhile_go_back_into_the_old_layer():
    model = Flat()
    swap(model, ["head"], scaled, "test")
    new = model.head.weight = nn.Parameter(torch.zeros_like(model.head.weight))
    restore(model, "test")
    assert model.head.weight is new


def test_a_layer_at_two_places_is_built_once_and_stands_at_both():
    model = Flat()
    model.blocks[1] = model.blocks[0]
    model.again = model.head
    swap(model, ["blocks.0.wq", "head"], scaled, "test")
    assert model.again is model.head
    assert type(model.again) is Scaled
    restore(model, "test")
    assert type(model.again) is nn.Linear
    assert model.again is model.head


def test_tied_weights_stay_tied_or_the_swap_is_refused_and_nothing_has_changed():
    model = llama().model
    swap(model, ["lm_head"], scaled, "test")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    restore(model, "test")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(LayersError, match="lm_head.weight is tied to another parameter"):
        swap(model, ["model.layers.0.mlp.up_proj", "lm_head"], Factors, "test", keys="own")
    assert type(model.lm_head) is type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert swapped(model, "test") == {}
    assert issubclass(LayersError, EkeError)


def test_other_keys_have_to_be_meant():
    model = Flat()
    with pytest.raises(LayersError, match="'head' becomes a Factors, whose state has bias, down.weight, up.bias"):
        swap(model, ["blocks.0.wq", "head"], lambda one: Factors(one) if one is model.head else become(one), "test")
    assert type(model.blocks[0].wq) is nn.Linear
    assert not model.blocks[0].wq._forward_pre_hooks
    swap(model, ["head"], Factors, "test", keys="own")
    assert "head.down.weight" in model.state_dict()
    restore(model, "test")
    assert list(model.state_dict()) == list(Flat().state_dict())


def test_what_one_owner_has_put_in_another_neither_replaces_nor_takes_out():
    model = Flat()
    swap(model, ["head"], scaled, "one")
    with pytest.raises(LayersError, match="'head' stands in for another layer already, put there by one"):
        swap(model, ["head"], scaled, "two")
    swap(model, ["blocks.0.wq"], scaled, "two")
    restore(model, "two")
    assert type(model.head) is Scaled


def test_names_with_and_without_the_compilers_part_serve():
    model = Flat()
    model.blocks[1] = torch.compile(model.blocks[1])
    swap(model, ["blocks.1.wq", "blocks._orig_mod.0.wq"], scaled, "test")
    assert list(swapped(model, "test")) == ["blocks.0.wq", "blocks.1.wq"]
    assert type(model.blocks[1]._orig_mod.wq) is Scaled
    place(model, "blocks.1.wk", nn.Identity())
    assert type(model.blocks[1]._orig_mod.wk) is nn.Identity


def test_torchs_encoder_calls_a_swapped_layer_in_evaluation():
    shape = torch_encoder()
    with torch.no_grad():
        plain = shape.run()
        swap(shape.model, ["layers.0.linear1"], become, "test")
        assert not torch.allclose(shape.run(), plain)
        restore(shape.model, "test")
        assert torch.equal(shape.run(), plain)


def test_a_conv1d_is_served_by_a_layer_for_linear_ones():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(6, 4)
    assert is_conv1d(conv)
    layer = Transposed(conv, lambda empty: scaled_of(empty))
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), 2 * conv(x))
    layer(x).sum().backward()
    assert conv.weight.grad is not None
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    model = gpt2().model
    swap(model, find_layers(model, kinds=["Conv1D"]), lambda one: Transposed(one, scaled_of), "test")
    restore(model, "test")
    assert is_conv1d(model.transformer.h[0].mlp.c_fc)


def scaled_of(empty):
    return Scaled(empty.in_features, empty.out_features, device="meta")
