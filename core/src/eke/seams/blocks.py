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
        """All have one class, and what all have is of one shape: some may hold more, as T5's first its positions."""
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

    Looked for is the longest list of modules with one class and the same parameter shapes. Lists whose modules hold
    attention go before all others, so that the experts inside each block are not taken for the blocks.

    Args:
        module: A model, a LightningModule, or anything that holds one.
        path: Dotted path of the list, or of the part of the model to look in. It is needed where several lists
            could be meant, as with an encoder and a decoder. A list given by path need not hold like modules.

    Raises:
        BlocksError: no such path, no such list, or several. The message names what was found.
    """
    if path is not None:
        module = _at(module, path)
        # A Sequential of several classes is a whole model or a part of one: look inside.
        if isinstance(module, nn.ModuleList) or (_is_list(module) and len(set(map(_class, module))) == 1):
            return _blocks(path, module)
    prefix = f"{path}." if path else ""
    lists = [
        (prefix + name if name else path or "", found) for name, found in module.named_modules() if _is_list(found)
    ]
    candidates = [(name, found) for name, found in lists if len(found) > 1 and _kinds(found) == 1 and _weights(found)]
    where = f"{type(module).__name__}{f' at {path!r}' if path else ''}"
    chosen = _preferred(candidates)
    if not chosen:
        raise BlocksError(f"{where} holds no list of two or more like blocks. {_found(lists)}")
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

    Blocks that hold one submodule more than the others are taken too, as T5's first, which holds the positions of all.

    Args:
        module: A model, a LightningModule, or anything that holds one.
        paths: Dotted paths of the lists, or of parts of the model that hold one each. By default all lists count
            whose modules hold attention; where none does, those that :func:`find_blocks` would choose from.

    Raises:
        BlocksError: no such path, or no such list. The message names what was found.
    """
    if paths is not None:
        return [find_blocks(module, path) for path in ([paths] if isinstance(paths, str) else paths)]
    lists = [(name, found) for name, found in module.named_modules() if _is_list(found)]
    chosen = _preferred([one for one in lists if len(one[1]) > 1 and _nearly_alike(list(one[1])) and _weights(one[1])])
    if not chosen:
        raise BlocksError(f"{type(module).__name__} holds no list of two or more like blocks. {_found(lists)}")
    return [_blocks(*one) for one in chosen]


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


def _at(module: nn.Module, path: str) -> nn.Module:
    try:
        return names.at(module, path)
    except AttributeError:
        lists = [(name, found) for name, found in module.named_modules() if _is_list(found)]
        raise BlocksError(f"{type(module).__name__} has no module at {path!r}. {_found(lists)}") from None


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


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
    """One class, and one shape for each parameter that more than one block has; most of them in all."""
    if len(set(map(_class, blocks))) != 1:
        return False
    shapes: dict[str, set[tuple[int, ...]]] = {}
    counts: Counter[str] = Counter()
    for block in blocks:
        for name, parameter in block.named_parameters(remove_duplicate=False):
            name = names.plain(name)
            shapes.setdefault(name, set()).add(tuple(parameter.shape))
            counts[name] += 1
    common = [name for name, count in counts.items() if count == len(blocks)]
    return all(len(one) == 1 for one in shapes.values()) and len(common) * 2 > len(counts)


def _kinds(container: nn.Module) -> int:
    return len({_kind(block) for block in container})


def _weights(container: nn.Module) -> bool:
    return next(container.parameters(), None) is not None


def _preferred(candidates: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Lists whose modules hold attention, of nested ones the inner; else of composites, of nested ones the outer."""
    with_attention = [item for item in candidates if any(attention.path for attention in find_attention(item[1][0]))]
    if with_attention:
        return [item for item in with_attention if not _around(item, with_attention)]
    composite = [item for item in candidates if any(True for _ in item[1][0].children())] or candidates
    return [item for item in composite if not any(_around(other, [item]) for other in composite)]


def _around(item: tuple[str, nn.Module], others: list[tuple[str, nn.Module]]) -> bool:
    """Whether one of the other lists lies inside this one."""
    inside = {id(module) for module in item[1].modules()} - {id(item[1])}
    return any(id(other) in inside for _, other in others)


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
