"""What is put into a model: peft's layers, and what peft lacks. And where: the targets, when nobody names any.

Sources: BitFit, Ben Zaken, Goldberg, Ravfogel 2021, https://arxiv.org/abs/2106.10199. Adapters, Houlsby and others
2019, https://arxiv.org/abs/1902.00751, section 2; their up projection starts at zero here, which makes the start
exact. Visual prompts, Jia and others 2022, https://arxiv.org/abs/2203.12119, section 3. Intrinsic dimension,
Aghajanyan, Zettlemoyer, Gupta 2020, https://arxiv.org/abs/2012.13255, section 3, by the Fastfood transform.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from eke import EkeError
from eke.seams import interceptor
from eke.seams.anatomy import Anatomy, AnatomyError, anatomy
from eke.seams.blocks import Blocks, BlocksError, find_all_blocks
from eke.seams.linear import features, linear_maps
from eke.seams.names import plain
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

UNTIL_KNOWN = 2**62  # steps of AdaLoRA: peft wants to be told before a run can know
ADAPTER, PROMPTS = "eke_adapter", "eke_prompts"

# Method to peft's configuration and what it sets there.
LIBRARY: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "lora": (LoraConfig, {"r": 16, "lora_alpha": 32}),
    "rslora": (LoraConfig, {"r": 16, "lora_alpha": 8, "use_rslora": True}),
    "dora": (LoraConfig, {"r": 16, "lora_alpha": 32, "use_dora": True}),
    "pissa": (LoraConfig, {"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa"}),
    "loftq": (LoraConfig, {"r": 16, "lora_alpha": 16}),
    "adalora": (AdaLoraConfig, {"init_r": 12, "target_r": 8, "lora_alpha": 32, "total_step": UNTIL_KNOWN}),
    "ia3": (IA3Config, {}),
    "prompt": (PromptTuningConfig, {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prefix": (PrefixTuningConfig, {"num_virtual_tokens": 20}),
    "p-tuning": (PromptEncoderConfig, {"num_virtual_tokens": 20}),
}
OWN: dict[str, dict[str, Any]] = {
    "head": {},
    "bitfit": {},
    "adapters": {"width": 64, "after_attention": True},
    "vpt": {"tokens": 5, "deep": False, "prefix": 1, "dropout": 0.0},
    "intrinsic": {"dimension": 1000, "parameters": "blocks"},
}
TASKS = {
    "SequenceClassification": "SEQ_CLS", "ImageClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS", "CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
    "ConditionalGeneration": "SEQ_2_SEQ_LM", "Model": "FEATURE_EXTRACTION",
}  # fmt: skip
METHODS = (*LIBRARY, *OWN)
PROMPTING = ("prompt", "prefix", "p-tuning")
_LINEAR = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")


class PEFTError(EkeError):
    """A model cannot be tuned so, or a checkpoint does not belong to it."""


def task_of(host: nn.Module) -> str:
    """peft's name of what a Hugging Face model does, by its class.

    Raises:
        PEFTError: the class says nothing that peft has a name for.
    """
    name = type(host).__name__
    found = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    if found is None:
        raise PEFTError(f"what {name} does is not to be told from its name. Give settings={{'task_type': ...}}, one of "
                        f"{', '.join(sorted(set(TASKS.values())))}.")  # fmt: skip
    return found


def linear_layers(host: nn.Module, paths: str | list[str] | None = None) -> list[str]:
    """Names of the linear layers inside the repeated blocks, of an encoder and a decoder alike, but for those inside of
    ``nn.MultiheadAttention``, which computes with their weights alone.

    Raises:
        PEFTError: the blocks are not to be found, or hold none.
    """
    found = {path: linear_maps(block) for path, block in _blocks(host, paths).items()}
    names = [
        f"{path}.{one.path}" if one.path else path
        for path, maps in found.items()
        for one in maps
        if type(one.module).__name__ in _LINEAR
    ]
    if not names:
        raise PEFTError(f"the blocks, {next(iter(found))!r} and on, hold no linear layers. Name targets=[...].")
    return names


def outputs(host: nn.Module, paths: str | list[str] | None = None, attention: bool = True) -> list[str]:
    """Names of the layers that end a block's MLP, and its attention: what they give is added to the residual stream."""
    names = []
    for path, found in _read(host, paths).items():
        ends = [end for branch in found.branches for end in branch.ends if branch.kind == "mlp"]
        if not ends or not all(end.is_layer for end in ends):
            raise PEFTError(f"the block {path!r} has no projection that ends its MLP. Name targets=[...].")
        own = [end.path for end in ends]
        if attention:
            if not found.attention or any(site.output is None for site in found.attention):
                raise PEFTError(f"the block {path!r} has no projection that ends its attention. Name targets=[...].")
            own = [site.output.path if site.output.is_layer else site.path for site in found.attention] + own
        names += [f"{path}.{name}" for name in own]
    return names


def scaled(host: nn.Module, paths: str | list[str] | None = None) -> tuple[list[str], list[str]]:
    """What IA3 scales: keys, values, and the input of the layer that ends the MLP."""
    names, ends = [], outputs(host, paths, attention=False)
    for path, found in _read(host, paths).items():
        if not found.attention or not all(site.key.is_layer for site in found.attention):
            raise PEFTError(
                f"the attention at {path!r} has no key and value projections of its own, which IA3 scales. Name "
                "targets=[...] and settings={'feedforward_modules': [...]}."
            )
        for site in found.attention:
            names += dict.fromkeys(f"{path}.{one.path}" for one in (site.key, site.value))
    return names + ends, ends


def _blocks(host: nn.Module, paths: str | list[str] | None) -> dict[str, nn.Module]:
    try:
        lists = find_all_blocks(host, paths)
    except BlocksError as error:
        raise PEFTError(f"{error} Or name the layers: targets=[...].") from None
    return {plain(blocks.path_of(number)): block for blocks in lists for number, block in enumerate(blocks)}


def _read(host: nn.Module, paths: str | list[str] | None) -> dict[str, Anatomy]:
    found = {}
    for path, block in _blocks(host, paths).items():
        try:
            found[path] = anatomy(block)
        except AnatomyError as error:
            raise PEFTError(f"the block {path!r}: {error} Or name the layers: targets=[...].") from None
    return found


# ---------------------------------------------------------------------- what peft lacks


class Adapter(nn.Module):
    """A bottleneck beside a layer's output, added to it. At the start it adds nothing."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.trunc_normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.up(F.gelu(self.down(hidden.to(self.down.weight.dtype)))).to(hidden.dtype)


def _adapt(module: nn.Module, inputs: Any, output: Any) -> Any:
    adapter = getattr(module, ADAPTER)
    return (adapter(output[0]), *output[1:]) if isinstance(output, tuple) else adapter(output)


def put_adapters(host: nn.Module, names: Iterable[str], width: int) -> None:
    """Put a bottleneck behind each of these layers."""
    for name in names:
        layer = host.get_submodule(name)
        given = layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else features(layer)[1]
        layer.add_module(ADAPTER, Adapter(given, width))
        layer.register_forward_hook(_adapt)


class Prompts(nn.Module):
    """Learned tokens: of the first block, or of each.

    Args:
        layers: 1, or the number of blocks.
        tokens: Of one block.
        width: Of a token.
        patch: Features of what a patch is made from, for the size of the first values.
        dropout: Of prompts, while training.
    """

    def __init__(self, layers: int, tokens: int, width: int, patch: int, dropout: float) -> None:
        super().__init__()
        bound = math.sqrt(6 / (patch + width))
        self.tokens = nn.Parameter(torch.empty(layers, tokens, width).uniform_(-bound, bound))
        self.dropout = dropout

    def of(self, layer: int) -> Tensor:
        return F.dropout(self.tokens[layer], self.dropout, self.training)


def token_width(block: nn.Module) -> int:
    """Of a token, by a block's LayerNorm.

    Raises:
        PEFTError: it has none.
    """
    norms = [part for part in block.modules() if isinstance(part, nn.LayerNorm)]
    if not norms:
        raise PEFTError(f"the width of a token is not to be seen from {type(block).__name__}, which has no LayerNorm.")
    return norms[0].normalized_shape[-1]


def patch_size(host: nn.Module) -> int:
    """Features of a patch: of the convolution that cuts an image, 3 x 16 x 16 where there is none."""
    found = next((part for part in host.modules() if isinstance(part, nn.Conv2d)), None)
    return found.weight[0].numel() if found is not None else 768


def put_prompts(host: nn.Module, prompts: Prompts, blocks: Blocks, prefix: int, owner: str) -> list[nn.Module]:
    """Let blocks see the prompts, behind the first ``prefix`` tokens, and nobody after the last block."""
    modules, count = list(blocks), prompts.tokens.shape[1]
    interceptor.attach(modules, owner)
    for layer, block in enumerate(modules):
        before = after = None
        if layer == 0:
            before = partial(_insert, prompts, prefix)
        elif len(prompts.tokens) > 1:
            before = partial(_replace, prompts, layer, prefix)
        if layer == len(modules) - 1:
            after = partial(_remove, count, prefix)
        interceptor.put(block, owner, *([interceptor.Edit(before, after)] if before or after else []))
    return modules


def _insert(prompts: Prompts, prefix: int, hidden: Tensor) -> Tensor:
    return interceptor.insert_tokens(hidden, prompts.of(0), prefix)


def _replace(prompts: Prompts, layer: int, prefix: int, hidden: Tensor) -> Tensor:
    return interceptor.replace_tokens(hidden, prompts.of(layer), prefix)


def _remove(count: int, prefix: int, hidden: Tensor) -> Tensor:
    return torch.cat([hidden[:, :prefix], hidden[:, prefix + count :]], dim=1)


class Fastfood(nn.Module):
    """Adds to a weight a random linear map of a few numbers, H G P H B z, structured so that it is never stored whole.

    Each number moves a weight along a direction of length 1, however large the weight is.

    Args:
        numbers: The numbers, shared by all weights.
        shape: Of the weight.
        seed: Of the map.

    Source:
        Aghajanyan et al. 2020, section 3, and ``fastfood_torched`` of
        https://github.com/rabeehk/compacter, which divides by ``sqrt(LL sum(G^2)) sqrt(DD / LL)``. There one transform
        has the size of the weight; here it has that of the numbers and is drawn anew for each part of the weight.
    """

    def __init__(self, numbers: nn.Parameter, shape: torch.Size, seed: int) -> None:
        super().__init__()
        self.numbers, self.shape = numbers, shape
        self.size = 2 ** math.ceil(math.log2(max(numbers.numel(), 2)))
        self.parts = math.ceil(shape.numel() / self.size)
        draw = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (self.parts, self.size), generator=draw) * 2 - 1
        gauss = torch.randn(self.parts, self.size, generator=draw)
        order = torch.stack([torch.randperm(self.size, generator=draw) for _ in range(self.parts)])
        self.register_buffer("signs", signs.to(torch.int8), persistent=False)
        self.register_buffer("gauss", gauss, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        padded = F.pad(self.numbers.float(), (0, self.size - self.numbers.numel()))
        mixed = walsh_hadamard(padded * self.signs)
        mixed = walsh_hadamard(mixed.gather(1, self.order) * self.gauss)
        mixed = mixed / (self.gauss.norm(dim=1, keepdim=True) * math.sqrt(self.size))  # each part of length 1
        mixed = mixed / math.sqrt(weight.numel() / self.size)
        return weight + mixed.flatten()[: weight.numel()].view(self.shape).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def walsh_hadamard(rows: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of each row, (n, 2^k), without its factor."""
    size, step = rows.shape[1], 1
    while step < size:
        pairs = rows.view(len(rows), size // (2 * step), 2, step)
        rows = torch.cat([pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], dim=2).reshape(
            -1, size
        )
        step *= 2
    return rows


def put_intrinsic(host: nn.Module, names: Iterable[str], dimension: int, seed: int) -> None:
    """Let all these parameters move together along a few random directions.

    Args:
        names: Of parameters, such as ``"blocks.0.fc1.weight"``. One that several modules share moves in all of them.
        dimension: How many directions.
        seed: Of them.
    """
    numbers = nn.Parameter(torch.zeros(dimension))
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in host.modules():
        for local, parameter in part._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((part, local))
    for place, name in enumerate(names):
        path, _, local = name.rpartition(".")
        layer = host.get_submodule(path)
        if local == "weight" and isinstance(layer, nn.MultiheadAttention):
            raise PEFTError(
                f"{path!r} is an nn.MultiheadAttention, whose weights are several. Name other targets=[...]."
            )
        parameter = getattr(layer, local)
        for part, own in owners[id(parameter)]:
            parametrize.register_parametrization(part, own, Fastfood(numbers, parameter.shape, seed + place))


def remove_intrinsic(host: nn.Module) -> None:
    """Leave each parameter where it has moved to."""
    moved: set[int] = set()
    for part in list(host.modules()):
        if not parametrize.is_parametrized(part):
            continue
        for name, one in list(part.parametrizations.items()):
            if isinstance(one[0], Fastfood):  # of a parameter that several share, the first owner leaves it moved
                original = one.original
                parametrize.remove_parametrizations(part, name, leave_parametrized=id(original) not in moved)
                moved.add(id(original))


def close_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Keep torch from computing a layer in one piece, from the base's weights alone, where they do not train."""
    layer.eke_activation, layer.activation_relu_or_gelu = layer.activation_relu_or_gelu, 0


def open_fast_path(layer: nn.TransformerEncoderLayer) -> None:
    """Undo :func:`close_fast_path`."""
    if hasattr(layer, "eke_activation"):
        layer.activation_relu_or_gelu = layer.eke_activation
        del layer.eke_activation


def tuned(module: nn.Module) -> str:
    """What a module has been given already; empty where nothing."""
    for part in module.modules():
        if isinstance(part, (BaseTunerLayer, PeftModel)):
            return "peft"
        if isinstance(part, (Adapter, Prompts, Fastfood)):
            return type(part).__name__
    return ""


# ---------------------------------------------------------------------- which base


def fingerprint(parameters: Mapping[str, Tensor], sample: int = 4096) -> str:
    """A hash of parameters: names, shapes, dtypes, and evenly spaced numbers of each.

    Args:
        parameters: By name, before anything is put into the model.
        sample: Numbers of each tensor that are looked at, first and last among them.
    """
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in parameters.items():
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), min(sample, flat.numel()), dtype=torch.float64).long()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        if flat.numel() and not isinstance(tensor, FakeTensor):  # a forecast's have no content
            found.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return found.hexdigest()
