"""Attention is caught where it is computed, whoever calls it, and seen in one form."""

import pytest
import torch
from eke.seams.sdpa import Catch, sdpa
from eke.testing.shapes import SHAPES
from torch import nn

CALLS = {"plain_list": 3, "timm_vit": 3, "torch_encoder": 3, "torch_transformer": 7, "llama": 3, "bert": 3, "bart": 7}


@pytest.mark.parametrize("name", CALLS)
def test_each_attention_of_a_model_is_caught_once_and_may_be_left_to_torch(name):
    torch.manual_seed(0)
    shape = SHAPES[name]()
    for part in shape.model.modules():  # torch's encoder layers compute past their modules, but with hooks
        part.register_forward_pre_hook(lambda *_: None)
    calls = []

    def attend(call):
        calls.append(call)
        return sdpa(call)

    def first(output):
        return getattr(output, "logits", output)

    with torch.no_grad():
        plain = first(shape.run())
        with Catch(attend):
            caught = first(shape.run())
    assert len(calls) == CALLS[name]
    torch.testing.assert_close(caught, plain, rtol=1e-4, atol=1e-5)
    (_, heads, key_heads, width, _) = next(iter(shape.lists.values()))
    assert calls[0].query.shape[1] == heads
    assert calls[0].key.shape[1] in (heads, key_heads)


def test_what_is_given_back_takes_the_place_of_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), Catch(lambda call: torch.zeros_like(call.query)):
        output = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(output, attention.out_proj.bias.expand(2, 5, 16))


def test_masks_of_both_meanings_of_true_arrive_in_one_form():
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(1, 4, 16)
    padding = torch.tensor([[False, False, True, True]])  # True forbids there
    seen = []

    def attend(call):
        seen.append(call.mask)
        return sdpa(call)

    with torch.no_grad(), Catch(attend):
        attention(x, x, x, key_padding_mask=padding, need_weights=False)
        q = torch.randn(1, 4, 4, 4)
        nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=~padding[None, None])  # and allows here
    assert seen[1].flatten().tolist() == [True, True, False, False]
    assert seen[0].flatten().tolist() == [0, 0, -torch.inf, -torch.inf]  # torch makes a number of it, to be added
    assert [mask.ndim for mask in seen] == [4, 4]
