"""What each parameter of a model is: hidden matrix, embedding, head, norm, bias, or other.

Optimizers treat them differently: Muon and its kin orthogonalize hidden matrices alone, weight decay spares norms and
biases, learning rates of embeddings and heads scale otherwise with width.

The trick it hides: a parameter's shape does not tell a head from a hidden matrix, and one parameter may be both
embedding and head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd

from eke.seams.anatomy import is_norm
from eke.seams.blocks import BlocksError, find_all_blocks, is_linear
from eke.seams.linear import features
from eke.seams.names import parameter_names, plain
from eke.spec import ArgumentError

Kind = Literal["hidden", "embedding", "head", "norm", "bias", "other"]
KINDS: tuple[str, ...] = get_args(Kind)

_HEAD = re.compile(r"(.*[._])?(lm_head|heads?|classifier|score|qa_outputs|fc|proj_out|output|decoder|fc_norm)")
_EMBEDDING = re.compile(
    r"(.*[._])?(\w*embed\w*|wte|wpe|patch\w*|pos|position\w*|(cls|mask|dist|class|register)_tokens?)"
)
_ADAPTER = re.compile(r"(^|\.)(lora_(embedding_)?[AB]|hada_w|lokr_w|oft_r|vera_lambda)")


@dataclass(frozen=True, eq=False)
class Role:
    """What one parameter is.

    Attributes:
        names: All its dotted names, without torch.compile's part; the first is that of ``named_parameters()``.
        parameter: The parameter.
        kinds: One; of a tied parameter one for each thing it is, as ``("embedding", "head")``.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    kinds: tuple[Kind, ...]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def kind(self) -> Kind:
        """The first of its kinds."""
        return self.kinds[0]

    @property
    def tied(self) -> bool:
        """It is several things at once."""
        return len(self.kinds) > 1


def roles(module: nn.Module) -> dict[str, Role]:
    """The role of each parameter of a model, by its first name, in the order of ``named_parameters()``.

    - ``"hidden"``: matrices inside of the model, of LoRA adapters too; routers and stacks of experts; filters of
      convolutions, the first one's too where it does not cut patches.
    - ``"embedding"``: what maps input to the width: embedding layers, the convolution that cuts patches, positions,
      class and mask tokens. Tables of relative positions are ``"other"``.
    - ``"head"``: what maps the width to the output: by ``get_output_embeddings``, by name, or the last linear layer
      outside of the blocks.
    - ``"norm"``: weights and biases of normalizations. ``"bias"``: all other biases.
    - ``"other"``: what is none of these: gains, gates, vectors of adapters.
    """
    blocks = _in_blocks(module)
    heads = _heads(module, blocks)
    kinds: dict[str, Kind] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        for own, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            full = plain(f"{name}.{own}" if name else own)
            kinds[full] = _kind(full, own, parameter, part, id(part) in blocks, id(part) in heads)
    found = {}
    for parameter, names in parameter_names(module).items():
        own = dict.fromkeys(kinds[name] for name in names)
        found[names[0]] = Role(names, parameter, tuple(own))
    return found


def decay_groups(
    module: nn.Module,
    weight_decay: float | Mapping[str, float],
    kinds: Iterable[str] = ("hidden", "embedding", "head"),
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with weight decay on some kinds of parameters and none on the others.

    Args:
        module: Only parameters with ``requires_grad`` are taken.
        weight_decay: Of the kinds that decay; or one for each kind, by its name, where those left out have none.
        kinds: Those that decay. A tied parameter decays if one of its kinds does, by the largest decay.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``names``, one for each decay, the largest first.

    Raises:
        ValueError: a kind that is none of :data:`KINDS`.
    """
    decays = dict(weight_decay) if isinstance(weight_decay, Mapping) else dict.fromkeys(kinds, weight_decay)
    if unknown := [kind for kind in decays if kind not in KINDS]:
        raise ArgumentError(f"{unknown[0]!r} is no kind of parameter: give {', '.join(KINDS)}.")
    groups: dict[float, dict[str, Any]] = {}
    for role in roles(module).values():
        if role.parameter.requires_grad:
            decay = max(decays.get(kind, 0.0) for kind in role.kinds)
            group = groups.setdefault(decay, {"params": [], "weight_decay": decay, "names": []})
            group["params"].append(role.parameter)
            group["names"].append(role.name)
    return [groups[decay] for decay in sorted(groups, reverse=True)]


def table(found: Mapping[str, Role]) -> str:
    """Roles as text: one line for parameters that differ by the number of their block alone."""
    rows: dict[tuple[str, str, str], int] = {}
    for role in found.values():
        names = " = ".join(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in role.names)
        key = " and ".join(role.kinds), names, " x ".join(map(str, role.parameter.shape)) or "1"
        rows[key] = rows.get(key, 0) + 1
    lines = [
        (kind, names, f"{count} of {shape}" if count > 1 else shape) for (kind, names, shape), count in rows.items()
    ]
    lines.sort(key=lambda line: KINDS.index(line[0].split(" and ")[0]))
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
    return "\n".join(f"{kind:<{widths[0]}}  {names:<{widths[1]}}  {shape}" for kind, names, shape in lines)


def _kind(name: str, own: str, parameter: nn.Parameter, part: nn.Module, inside: bool, head: bool) -> Kind:
    holder = name.rpartition(".")[0]
    if _ADAPTER.search(name):
        return "hidden" if parameter.ndim > 1 else "other"
    if is_norm(part):
        return "norm"
    if re.search(r"(^|_)bias(_[kqv])?$", own):
        return "bias" if max(parameter.shape, default=1) == parameter.numel() else "other"  # a table of positions
    if head and parameter.ndim > 1:
        return "head"
    if isinstance(part, nn.Embedding):
        return "other" if inside else "embedding"
    if not inside and not is_linear(part) and (_EMBEDDING.fullmatch(own) or _EMBEDDING.fullmatch(holder)):
        return "embedding"
    if parameter.ndim < 2 or "relative_position" in own or "rel_pos" in own:
        return "other"
    if isinstance(part, _ConvNd):
        return "embedding" if not inside and part.stride == part.kernel_size != (1,) * len(part.stride) else "hidden"
    return "hidden" if inside or is_linear(part) or isinstance(part, nn.MultiheadAttention) else "other"


def _in_blocks(module: nn.Module) -> set[int]:
    """All that lies in a list of blocks."""
    try:
        lists = find_all_blocks(module)
    except BlocksError:
        return set()
    return {id(part) for blocks in lists for block in blocks for part in block.modules()}


def _heads(module: nn.Module, blocks: set[int]) -> set[int]:
    """Linear layers that give the model's output."""
    found = set()
    for part in module.modules():
        if hasattr(part, "get_output_embeddings"):
            head = part.get_output_embeddings()
            found |= {id(head)} if head is not None else set()
    parts = list(module.named_modules())
    linear = [(name, part) for name, part in parts if is_linear(part) and not isinstance(part, _ConvNd)]
    outside = [(name, part) for name, part in linear if id(part) not in blocks]
    named = [(name, part) for name, part in outside if any(_HEAD.fullmatch(one) for one in name.split(".")[-2:])]
    found |= {id(part) for i, (name, part) in enumerate(named) if not _goes_on(name, part, named[i + 1 :])}
    if not found:
        last = max((i for i, (_, part) in enumerate(parts) if id(part) in blocks), default=-1)
        behind = {id(part) for _, part in parts[last + 1 :]}
        found = {id(part) for _, part in [one for one in outside if id(one[1]) in behind][-1:]}
    return found


def _goes_on(name: str, layer: nn.Module, later: list[tuple[str, nn.Module]]) -> bool:
    """Another layer of the same head takes what this one gives."""
    around = name.rpartition(".")[0]
    return any(
        other.rpartition(".")[0] == around != "" and features(part)[0] == features(layer)[1] for other, part in later
    )
