"""A base whose weights are kept in 4 or 8 bits by bitsandbytes, as QLoRA does.

Sources: QLoRA, Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, https://arxiv.org/abs/2305.14314; LoftQ, Li, Yu, Liang,
He, Karampatziakis, Chen, Zhao 2023, https://arxiv.org/abs/2310.08659, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from eke.seams.layers import is_conv1d, place
from eke.seams.linear import features
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from eke_peft.errors import PEFTError

LAYERS = ("Linear4bit", "Linear8bitLt")


def quantized_layers(host: nn.Module) -> list[str]:
    """Names of layers that bitsandbytes keeps in 4 or 8 bits."""
    return [name for name, part in host.named_modules() if type(part).__name__ in LAYERS]


def keep_weights(host: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew when a layer is first evaluated on a CPU that knows bfloat16:
    it rounds their scales on the way, so that the base after a validation is not the one before.
    """
    for part in host.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False


def quantize_layers(host: nn.Module, names: Iterable[str], kind: str) -> dict[str, Tensor]:
    """Put bitsandbytes' layers in place of linear ones, with their weights quantized.

    Args:
        host: The model, in float32, float16 or bfloat16.
        names: Of ``nn.Linear`` layers, or of Hugging Face's ``Conv1D``, which become linear ones.
        kind: ``"nf4"``: 4-bit normal floats in blocks of 64, scales quantized as well. ``"int8"``: rows, LLM.int8.

    Returns:
        The weights as they were, by name.

    Raises:
        PEFTError: bitsandbytes is not installed, or a layer that is none of these.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise PEFTError("quantize= needs bitsandbytes: pip install 'eke-peft[quantized]'.") from None
    weights = {}
    for name in names:
        layer = host.get_submodule(name)
        if type(layer).__name__ in LAYERS:
            continue  # the base came so
        if type(layer) is not nn.Linear and not is_conv1d(layer):
            raise PEFTError(
                f"{name!r} is a {type(layer).__name__}; bitsandbytes quantizes nn.Linear (and Conv1D). Name "
                "targets=[...]."
            )
        if layer.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise PEFTError(f"{name!r} is of {layer.weight.dtype}; a floating-point base is needed.")
        weight = layer.weight.data.t().contiguous() if is_conv1d(layer) else layer.weight.data
        weights[name] = weight
        place(host, name, _quantized(bitsandbytes.nn, layer, weight, kind))
    return weights


def _quantized(library: Any, layer: nn.Module, weight: Tensor, kind: str) -> nn.Module:
    sizes, bias = features(layer), layer.bias is not None
    if kind == "nf4":
        new = library.Linear4bit(*sizes, bias=bias, compute_dtype=weight.dtype, quant_type="nf4")
        new.weight = library.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", module=new)
    else:
        new = library.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
        new.weight = library.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    if bias:
        new.bias = layer.bias
    return new.to(weight.device)  # which is when it quantizes


@torch.no_grad()
def start_at_rest(host: nn.Module, weights: dict[str, Tensor], adapter: str) -> None:
    """Let LoRA's product begin at the best approximation of what rounding took: LoftQ with one iteration, in which
    the rounded base depends on nothing but the weights, and so is the same when a checkpoint is loaded.

    Args:
        host: The model, with quantized layers and an adapter.
        weights: Of the layers before they were quantized, by name.
        adapter: Its name.
    """
    for name, weight in weights.items():
        layer = host.get_submodule(name)
        rounded = dequantize_module_weight(layer.get_base_layer())
        left, sizes, right = torch.linalg.svd(weight.float() - rounded.float(), full_matrices=False)
        first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        rank, root = len(first), sizes.sqrt()
        first.copy_(root[:rank, None] * right[:rank])
        second.copy_(left[:, :rank] * root[:rank] / layer.scaling[adapter])
