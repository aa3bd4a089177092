"""The repeated blocks of a model, and its attention, found by structure.

The trick it hides: no two libraries name them alike (``blocks``, ``transformer.h``, ``model.layers``,
``encoder.layer``), but each keeps its blocks in one list of like modules, and each block holds its attention.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from eke.seams import names
from eke.spec import EkeError

_NAMES = {
    letter: re.compile(rf"(to_|w_?|attn_|self_)?{word}(_?(proj|lin|linear))?")
    for letter, word in {"q": "q(uery)?", "k": "k(ey)?", "v": "v(alue)?"}.items()
}
_FUSED = re.compile(r"(to_|w_?|c_|in_|attn_)?(qkv|attn|query_key_value)(_?(proj|lin|linear))?|W_?pack")


class BlocksError(EkeError, ValueError):
    """The blocks of a model are not to be found, or there is more than one list that could be meant."""


@dataclass(frozen=True)
class Blocks:
    """The list of a model's repeated blocks.

    Attributes:
        path: Dotted path of the list in the module that was searched, ``""`` for that module itself.
        container: The ``nn.ModuleList`` or ``nn.Sequential``.
        modules: The blocks, in order.
        shared: Paths of parameters that more than one block uses, as ALBERT does. Empty where each has its own.
    """

    path: str
    container: nn.Module
    modules: list[nn.Module]
    shared: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules)

    def __getitem__(self, index: int) -> nn.Module:
        return self.modules[index]

    def path_of(self, index: int) -> str:
        """Dotted path of one block."""
        name = list(self.container._modules)[index]
        return f"{self.path}.{name}" if self.path else name

    @property
    def alike(self) -> bool:
        """All blocks have one class and the same parameter names, shapes and dtypes."""
        return len({_kind(block) for block in self.modules}) == 1

    @property
    def nearly_alike(self) -> bool:
        """All have one class, and what all have is of one shape: some may hold more, as T5's first its positions, or
        something else in a place, as those of a mixture of experts whose first ones are dense."""
        return _nearly_alike(self.modules)

    @property
    def extra(self) -> dict[int, tuple[str, ...]]:
        """Of blocks that hold more than the others, names of those parameters. Empty where :attr:`alike`."""
        own = [set(names.plain_keys(dict(block.named_parameters(remove_duplicate=False)))) for block in self.modules]
        common = set.intersection(*own) if own else set()
        return {i: tuple(sorted(has - common)) for i, has in enumerate(own) if has - common}


@dataclass(frozen=True)
class Attention:
    """One attention module.

    Attributes:
        path: Dotted path in the module that was searched, ``""`` for that module itself.
        module: The module.
        kind: ``"torch"``: ``nn.MultiheadAttention``. ``"fused"``: one projection gives queries, keys and values.
            ``"separate"``: one projection each. ``"named"``: only its class name says so.
    """

    path: str
    module: nn.Module
    kind: Literal["torch", "fused", "separate", "named"]

    def projection(self, of: Literal["q", "k", "v"]) -> nn.Module:
        """The linear map that gives queries, keys or values; where one gives all three in this order, that one.

        Raises:
            BlocksError: attention of another kind than "fused" and "separate" has none that could be named.
        """
        pattern = {"fused": _FUSED, "separate": _NAMES[of]}.get(self.kind)
        for name, child in self.module.named_children():
            if pattern is not None and pattern.fullmatch(name) and is_linear(child):
                return child
        raise BlocksError(
            f"The attention at {self.path!r}, a {type(self.module).__name__}, has no projection for {of!r}."
        )


def find_blocks(module: nn.Module, path: str | None = None) -> Blocks:
    """Find the repeated blocks of a Transformer.

    Looked for is the longest list of modules with one class, see :func:`find_all_blocks`. Lists whose modules hold
    attention go before all others, so that the experts inside each block are not taken for the blocks.

    Args:
        module: A model, a LightningModule, or anything that holds one.
        path: Dotted path of the list, or of the part of the model to look in, or the end of it (``"encoder.block"``).
            It is needed where several lists could be meant, as with an encoder and a decoder. A list given by path
            need not hold like modules.

    Raises:
        BlocksError: no such path, no such list, or several. The message names what was found.
    """
    if path is not None:
        parts = _parts(module, path)
        if len(parts) > 1:
            met = ", ".join(repr(name) for name, _ in parts)
            raise BlocksError(f"blocks={path!r} meets {met}. Say which one is meant, as blocks={parts[0][0]!r}.")
        path, module = parts[0]
        if _is_stack(module):
            return _blocks(path, module)
    lists = _lists(module, path)
    where = f"{type(module).__name__}{f' at {path!r}' if path else ''}"
    chosen = _chosen(lists, where)
    longest = max(chosen, key=lambda item: len(item[1]))
    rivals = [
        item for item in chosen if len(item[1]) == len(longest[1]) or _kind(item[1][0])[0] == _kind(longest[1][0])[0]
    ]
    if len(rivals) > 1:
        raise BlocksError(
            f"{where} holds {len(rivals)} lists of blocks: {_list(rivals)}. "
            f"Say which one is meant by its path, as blocks={longest[0]!r}."
        )
    return _blocks(*longest)


def find_all_blocks(module: nn.Module, paths: str | Sequence[str] | None = None) -> list[Blocks]:
    """Find every list of a model's repeated blocks: of an encoder and a decoder, of two towers, of each stage.

    Blocks that hold one submodule more than the others are taken too, as T5's first, which holds the positions of all;
    blocks that hold another submodule in a place, as dense ones and experts; a stage of one block, beside longer ones.
    Where a model has nothing else, so is a list of several classes that share parts, as attention beside Mamba.

    Args:
        module: A model, a LightningModule, or anything that holds one.
        paths: Dotted paths of the lists, or of parts of the model, each of which may hold several; or their ends
            (``"encoder.block"``), or patterns as :func:`eke.seams.names.match` takes them (``"*.layers"``). By default
            all lists count whose modules hold attention; where none does, those that :func:`find_blocks` would choose
            from.

    Raises:
        BlocksError: no such path, or no such list. The message names what was found.
    """
    if paths is None:
        return [_blocks(*one) for one in _chosen(_lists(module), type(module).__name__)]
    found: dict[int, Blocks] = {}  # a list that is met twice counts once
    for path in [paths] if isinstance(paths, str) else paths:
        for at, part in _parts(module, path):
            if _is_stack(part):
                found.setdefault(id(part), _blocks(at, part))
                continue
            for name, one in _chosen(_lists(part, at), f"{type(module).__name__} at {at!r}"):
                found.setdefault(id(one), _blocks(name, one))
    if not found:
        raise BlocksError(f"blocks={paths!r} names no list. {_found(_lists(module))}")
    return list(found.values())


def find_attention(module: nn.Module) -> list[Attention]:
    """Find the attention modules of a block or a model, in the order of ``named_modules``.

    A module counts as attention if it is ``nn.MultiheadAttention``, if children of its own are named as a query, a
    key and a value projection, or one child as all three. Where neither holds, the word "attention" in the name of
    the class decides, for the innermost such module with weights.

    Returns:
        All of them, self and cross attention alike: a block of a decoder has two. Empty where there is none.
    """
    return [Attention(path, found, kind) for path, found in module.named_modules() if (kind := _attention_kind(found))]


def is_linear(module: nn.Module) -> bool:
    """A linear map: ``nn.Linear``, Hugging Face's ``Conv1D``, a 1 by 1 convolution, a quantized or adapted one."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and (weight.ndim == 2 or isinstance(module, _ConvNd))
        and not isinstance(module, nn.Embedding)
    )


def _attention_kind(module: nn.Module) -> Literal["torch", "fused", "separate", "named"] | None:
    if isinstance(module, nn.MultiheadAttention):
        return "torch"
    projections = [name for name, child in module.named_children() if is_linear(child)]
    if all(any(pattern.fullmatch(name) for name in projections) for pattern in _NAMES.values()):
        return "separate"
    if any(_FUSED.fullmatch(name) and _widens(getattr(module, name)) for name in projections):
        return "fused"
    named = re.search("attention|attn", type(module).__name__, re.IGNORECASE)
    if named and projections and not any(_attention_kind(child) for child in list(module.modules())[1:]):
        return "named"
    return None


def _widens(module: nn.Module) -> bool:
    """Gives more features than it takes: queries, keys and values in one."""
    one, other = module.weight.shape[:2]
    return one != other


def _parts(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """What a path means, by full names: the module that is there; else lists whose names end so, or meet a pattern;
    else other parts that hold lists. Of nested ones the outer."""
    try:
        return [(path, names.at(module, path))]
    except AttributeError:
        pass
    lists = _lists(module)
    holders = [(name, part) for name, part in module.named_modules() if name and any(map(_is_list, part.modules()))]
    for known in (lists, holders):
        found = [one for one in known if names.meets(names.plain(one[0]), names.plain(path))]
        inside = {id(part) for _, one in found for part in one.modules() if part is not one}
        if found := [one for one in found if id(one[1]) not in inside]:
            return found
    raise BlocksError(f"{type(module).__name__} has no module at {path!r}. {_found(lists)}")


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _is_stack(module: nn.Module) -> bool:
    """A list of blocks, if somebody says so. A Sequential of several classes is a whole model or a part of one."""
    return isinstance(module, nn.ModuleList) or (_is_list(module) and len(set(map(_class, module))) == 1)


def _lists(module: nn.Module, path: str | None = None) -> list[tuple[str, nn.Module]]:
    """All lists of a part of a model, by their paths in the model."""
    found = [(name, one) for name, one in module.named_modules() if _is_list(one)]
    return [(".".join(part for part in (path, name) if part), one) for name, one in found]


def _class(block: nn.Module) -> tuple[str, str]:
    """By name: an interceptor, or FSDP2, has put a class of its own on some of the blocks, under the same name. That of
    a compiled block is the class that it compiles."""
    block = names.at(block, "")
    return type(block).__module__, type(block).__qualname__


def _kind(block: nn.Module) -> tuple[tuple[str, str], tuple[object, ...]]:
    named = names.plain_keys(dict(block.named_parameters(remove_duplicate=False)))
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in named.items())
    return _class(block), shapes


def _nearly_alike(blocks: Sequence[nn.Module]) -> bool:
    """One class, and one shape for each parameter that several blocks have: most of them in all; or each block holds
    attention, and half of what all have is of one shape."""
    if len(set(map(_class, blocks))) != 1:
        return False
    shapes = _shapes(blocks)
    common, equal = _common(blocks, shapes)
    if all(len(set(one)) == 1 for one in shapes.values()) and len(common) * 2 > len(shapes):
        return True
    return 0 < len(common) <= len(equal) * 2 and all(_holds_attention(block) for block in blocks)


def _share_parts(container: nn.Module) -> bool:
    """Modules of any class that have two parameters in common, of one shape: the norms at least. Some hold attention.
    A list of what one block consists of is not meant, nor one of lists."""
    blocks = list(container)
    if not isinstance(container, nn.ModuleList) or any(
        _is_list(block) or not any(block.children()) for block in blocks
    ):
        return False
    common, equal = _common(blocks, _shapes(blocks))
    return len(equal) > 1 and len(equal) * 2 >= len(common) and any(map(_holds_attention, blocks))


def _shapes(blocks: Sequence[nn.Module]) -> dict[str, list[tuple[int, ...]]]:
    """Name of a parameter to its shape in each block that has it."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for block in blocks:
        for name, parameter in block.named_parameters():
            shapes.setdefault(names.plain(name), []).append(tuple(parameter.shape))
    return shapes


def _common(blocks: Sequence[nn.Module], shapes: dict[str, list[tuple[int, ...]]]) -> tuple[list[str], list[str]]:
    """Names of parameters that all blocks have, and of those that are of one shape in all."""
    common = [name for name, one in shapes.items() if len(one) == len(blocks)]
    return common, [name for name in common if len(set(shapes[name])) == 1]


def _holds_attention(block: nn.Module) -> bool:
    return any(attention.path for attention in find_attention(block))


def _kinds(container: nn.Module) -> int:
    return len({_kind(block) for block in container})


def _weights(container: nn.Module) -> bool:
    return next(container.parameters(), None) is not None


def _chosen(lists: list[tuple[str, nn.Module]], where: str) -> list[tuple[str, nn.Module]]:
    """Those that are lists of blocks, in order.

    Raises:
        BlocksError: none is.
    """
    filled = [one for one in lists if len(one[1]) and _weights(one[1])]
    several = [one for one in filled if len(one[1]) > 1]
    chosen = _preferred([one for one in several if _nearly_alike(list(one[1]))])
    singles = [one for one in filled if len(one[1]) == 1 and _holds_attention(one[1][0])]
    if chosen:
        classes = {_class(one[1][0]) for one in chosen}
        chosen += [one for one in singles if _class(one[1][0]) in classes and not _inside(one, chosen)]
        return [one for one in lists if any(one is other for other in chosen)]
    mixed = [one for one in several if _share_parts(one[1])]
    if mixed:
        return [one for one in mixed if not _inside(one, mixed)]
    counts = Counter(_class(one[1][0]) for one in singles)
    chosen = [one for one in singles if counts[_class(one[1][0])] > 1]
    if not chosen:
        likely = [one for one in filled if any(map(_holds_attention, one[1]))]
        likely = max((one for one in likely if not _around(one, likely)), key=lambda one: len(one[1]), default=None)
        advice = f" If {likely[0]!r} holds the blocks, say so: blocks={likely[0]!r}." if likely and likely[0] else ""
        raise BlocksError(f"{where} holds no list of two or more like blocks. {_found(lists)}{advice}")
    return chosen


def _preferred(candidates: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Lists whose modules hold attention, of nested ones the inner; else of composites, of nested ones the outer."""
    with_attention = [item for item in candidates if _holds_attention(item[1][0])]
    if with_attention:
        return [item for item in with_attention if not _around(item, with_attention)]
    composite = [item for item in candidates if any(True for _ in item[1][0].children())] or candidates
    return [item for item in composite if not _inside(item, composite)]


def _around(item: tuple[str, nn.Module], others: list[tuple[str, nn.Module]]) -> bool:
    """Whether one of the other lists lies inside this one."""
    inside = {id(module) for module in item[1].modules()} - {id(item[1])}
    return any(id(other) in inside for _, other in others)


def _inside(item: tuple[str, nn.Module], others: list[tuple[str, nn.Module]]) -> bool:
    """Whether this list lies inside one of the others."""
    return any(_around(other, [item]) for other in others)


def _blocks(path: str, container: nn.Module) -> Blocks:
    modules = list(container)
    seen: set[int] = set()
    shared = []
    for name, block in zip(container._modules, modules, strict=True):
        for parameter_name, parameter in block.named_parameters():
            if id(parameter) in seen:
                shared.append(".".join(part for part in (path, name, parameter_name) if part))
        seen.update(id(parameter) for parameter in block.parameters())
    return Blocks(path, container, modules, tuple(shared))


def _list(lists: list[tuple[str, nn.Module]]) -> str:
    return ", ".join(f"{path or 'itself'!r} ({_content(found)})" for path, found in lists)


def _content(container: nn.Module) -> str:
    kinds = [type(names.at(block, "")).__name__ for block in container]
    classes = [(name, len(list(group))) for name, group in groupby(kinds)]
    text = ", ".join(f"{count} {name}" for name, count in classes) or "empty"
    unlike = len({name for name, _ in classes}) == 1 and _kinds(container) > 1
    return f"{text}, not of one shape" if unlike else text


def _found(lists: list[tuple[str, nn.Module]]) -> str:
    return f"Its lists are: {_list(lists)}." if lists else "It holds no nn.ModuleList and no nn.Sequential."
