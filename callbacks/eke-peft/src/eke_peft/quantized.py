"""A base whose weights are kept in 4 or 8 bits by bitsandbytes, as QLoRA does."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from eke_peft.methods import PEFTError


def quantize_layers(host: nn.Module, names: Iterable[str], kind: str) -> None:
    """Put bitsandbytes' layers in place of linear ones, with their weights quantized.

    Args:
        host: The model, in float32, float16 or bfloat16.
        names: Of ``nn.Linear`` layers.
        kind: ``"nf4"``: 4-bit normal floats in blocks of 64, scales quantized as well. ``"int8"``: rows, LLM.int8.

    Raises:
        PEFTError: bitsandbytes is not installed, or a layer that is no ``nn.Linear``.
    """
    try:
        import bitsandbytes
    except ImportError:
        raise PEFTError("quantize= needs bitsandbytes: pip install 'eke-peft[quantized]'.") from None
    for name in names:
        layer = host.get_submodule(name)
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            continue  # the base came so
        if type(layer) is not nn.Linear:
            raise PEFTError(
                f"{name!r} is a {type(layer).__name__}; bitsandbytes quantizes nn.Linear. Name targets=[...]."
            )
        if layer.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise PEFTError(f"{name!r} is of {layer.weight.dtype}; a floating-point base is needed.")
        sizes, bias, weight = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight.data
        if kind == "nf4":
            compute = weight.dtype if weight.dtype != torch.float32 else torch.float32
            new = bitsandbytes.nn.Linear4bit(*sizes, bias=bias, compute_dtype=compute, quant_type="nf4")
            new.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", module=new)
        else:
            new = bitsandbytes.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
            new.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        if bias:
            new.bias = layer.bias
        new.to(weight.device)  # which is when it quantizes
        parent, _, child = name.rpartition(".")
        setattr(host.get_submodule(parent), child, new)
