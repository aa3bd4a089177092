"""What a block is made of: norms, queries, keys and values, what ends attention and MLP, and how many heads there are.

The trick it hides: libraries agree neither on names nor on forms. Queries, keys and values are three layers, one layer,
or one parameter; heads may share keys; an MLP may have a gate, two layers in one, or experts stacked in one tensor;
BERT ends its attention outside of its attention module. Shapes tell most of it, names are asked where shapes leave a
choice, and what neither tells is seen by running the model once with hooks.

It knows no Lightning, and changes nothing: a model is read, and run in evaluation mode where ``forward`` is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from eke.seams.blocks import Attention, BlocksError, find_all_blocks, find_attention
from eke.seams.linear import DOWN, UP, Map, features, layer_map, linear_maps, once, parameter_map
from eke.seams.trace import Trace, quiet

_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads", "nhead", "num_q_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "n_head_kv")
_SIZES = ("head_dim", "head_size", "attention_head_size", "size_per_head", "d_kv", "dim_head", "key_value_proj_dim")
_OUTPUT = re.compile(r"(.*\.)?(out_proj|o_proj|c_proj|proj|to_out|w_?o|out|o|dense|out_lin|output|dense_out)(\.\d+)?")
_CROSS = re.compile(r"cross|enc_?(oder)?_?(dec|attn)|multihead_attn", re.IGNORECASE)
_GATE = re.compile(r"(.*[._])?(gate|gate_proj|wi_0|w1|gate_linear)(\.\d+)?")


class AnatomyError(BlocksError):
    """A block whose parts cannot be told from its structure."""


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention of a block or model.

    Attributes:
        path, module, kind: As :class:`~eke.seams.blocks.Attention` has them.
        query, key, value: Three maps; of a fused layer, its rows.
        output: The map that ends it; what it gives is added to the residual stream.
        cross: It takes keys and values from elsewhere, as a decoder's second one does; by its name.
        by_head: In a fused layer each head's query, key and value are one behind the other, as in GPT-NeoX. Known only
            where the model was run; ``rows`` then mean nothing.
    """

    path: str
    module: nn.Module
    kind: str
    query: Map
    key: Map
    value: Map
    output: Map | None
    cross: bool
    _counts: tuple[int, int, int] | str
    by_head: bool = False

    @property
    def heads(self) -> int:
        """Of queries.

        Raises:
            AnatomyError: nothing in the module says it.
        """
        return self._known[0]

    @property
    def key_heads(self) -> int:
        """Of keys and values: fewer than :attr:`heads` where several share one."""
        return self._known[1]

    @property
    def size(self) -> int:
        """Of one head."""
        return self._known[2]

    @property
    def _known(self) -> tuple[int, int, int]:
        if isinstance(self._counts, str):
            raise AnatomyError(self._counts)
        return self._counts

    def split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a fused layer gives, (..., features), as queries, keys and values, each (..., heads, size)."""
        heads, key_heads, size = self._known
        if self.by_head:
            parts = output.unflatten(-1, (key_heads, heads // key_heads + 2, size))
            query = parts[..., :-2, :].flatten(-3, -2)
            return query, parts[..., -2, :], parts[..., -1, :]
        query, key, value = output.split([heads * size, key_heads * size, key_heads * size], -1)
        return tuple(x.unflatten(-1, (-1, size)) for x in (query, key, value))

    @property
    def maps(self) -> tuple[Map, ...]:
        """All of its maps, each layer once."""
        return tuple(once([self.query, self.key, self.value, *([self.output] if self.output else [])]))


@dataclass(frozen=True, eq=False)
class MLP:
    """One MLP of a block: of a block with experts, one of them, or all if they are stacked.

    Attributes:
        up, down: Into the inner width, and back; what the second gives is added to the residual stream.
        gate: The map that the first is multiplied with, None without one. It may be other rows of the same layer.
        inner: The inner width.
    """

    up: Map
    down: Map
    gate: Map | None
    inner: int

    @property
    def maps(self) -> tuple[Map, ...]:
        return tuple(once([*([self.gate] if self.gate else []), self.up, self.down]))


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalization of a block, or of heads inside of its attention."""

    path: str
    module: nn.Module
    width: int


@dataclass(frozen=True, eq=False)
class Branch:
    """What is added to the residual stream: attention, or an MLP with all its experts.

    Attributes:
        kind: ``"attention"``, ``"cross attention"`` or ``"mlp"``.
        ends: Maps whose sum is added: several where there are experts.
        before: Norms that its input passes through.
        after: Norms behind it: inside of the branch, or of the sum, as in BERT.
    """

    kind: str
    ends: tuple[Map, ...]
    before: tuple[Norm, ...] = ()
    after: tuple[Norm, ...] = ()


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A block's parts.

    Attributes:
        block: The block.
        width: Of the residual stream.
        attention: Its attention, a decoder's cross attention behind its own. Empty in a block without.
        mlps: Its MLP, or its experts.
        routers: Maps that choose between experts.
        norms: All of the block's normalizations but those of heads, which are ``head_norms``.
        others: Linear maps that are none of these, by path.
        branches: Attention, cross attention, MLP, in this order.
        order: ``"pre"``, ``"post"``, or ``"sandwich"`` (before and behind each branch); None where neither the block
            nor a run of the model told. Only where it is known do branches know their norms.
    """

    block: nn.Module
    width: int
    attention: tuple[AttentionSite, ...]
    mlps: tuple[MLP, ...]
    routers: tuple[Map, ...]
    norms: tuple[Norm, ...]
    head_norms: tuple[Norm, ...]
    others: tuple[Map, ...]
    branches: tuple[Branch, ...] = ()
    order: str | None = None

    @property
    def ends(self) -> tuple[Map, ...]:
        """All maps through which the block writes into the residual stream."""
        return tuple(end for branch in self.branches for end in branch.ends)

    def maps(self) -> dict[str, tuple[Map, ...]]:
        """Every linear map of the block, each layer once, by what it is: ``qkv``, ``attention output``, ``mlp up``,
        ``mlp down``, ``router``, ``other``."""
        inner = [one for site in self.attention for one in (site.query, site.key, site.value)]
        return {
            "qkv": tuple(once(inner)),
            "attention output": tuple(site.output for site in self.attention if site.output is not None),
            "mlp up": tuple(once([m for mlp in self.mlps for m in (mlp.gate, mlp.up) if m is not None])),
            "mlp down": tuple(once([mlp.down for mlp in self.mlps])),
            "router": self.routers,
            "other": self.others,
        }


# ---------------------------------------------------------------------- reading


def anatomy(block: nn.Module, forward: Callable[[], Any] | Trace | None = None) -> Anatomy:
    """Read one block.

    Args:
        block: Of any of the shapes that :func:`~eke.seams.blocks.find_all_blocks` finds.
        forward: Runs the model that holds the block, once, without gradients. Needed for :attr:`Anatomy.order` and the
            norms of branches, for the layout of a fused layer, and where names say nothing. Or a run that was seen
            already: ``Trace(model, forward)`` serves all blocks of a model.

    Raises:
        AnatomyError: its attention's or its MLP's parts cannot be told apart.
    """
    trace = _trace(block, forward)
    sites = tuple(_site(block, one, trace) for one in find_attention(block) if one.kind != "named")
    width = _width(block, sites)
    used = {(id(one.module), one.weight) for site in sites for one in site.maps}
    inside = {id(part) for site in sites if isinstance(site.module, nn.MultiheadAttention)
              for part in site.module.modules()}  # fmt: skip
    left = [one for one in linear_maps(block, width) if (id(one.module), one.weight) not in used
            and id(one.module) not in inside]  # fmt: skip
    mlps, left = _mlps(block, left, width, trace)
    routers = [one for one in left if _is_router(one, mlps, width)]
    norms, head_norms = _norms(block, sites, width)
    found = Anatomy(
        block, width, sites, tuple(mlps), tuple(routers), norms, head_norms,
        tuple(one for one in left if one not in routers),
    )  # fmt: skip
    branches = [
        Branch("cross attention" if site.cross else "attention", () if site.output is None else (site.output,))
        for site in sites
    ]
    if mlps:
        branches.append(Branch("mlp", tuple(once([mlp.down for mlp in mlps]))))
    return _ordered(replace(found, branches=tuple(branches)), trace)


def read_blocks(
    module: nn.Module, paths: str | list[str] | None = None, forward: Callable[[], Any] | None = None
) -> dict[str, Anatomy]:
    """Read all blocks of all lists of a model, by dotted path.

    Raises:
        BlocksError: the blocks are not to be found.
        AnatomyError: a block cannot be read; the message begins with its path.
    """
    found, trace = {}, _trace(module, forward)
    for blocks in find_all_blocks(module, paths):
        for index, block in enumerate(blocks):
            path = blocks.path_of(index)
            try:
                found[path] = anatomy(block, trace)
            except AnatomyError as error:
                raise AnatomyError(f"The block {path!r}: {error}") from None
    return found


def attention_sites(module: nn.Module, forward: Callable[[], Any] | Trace | None = None) -> list[AttentionSite]:
    """Read all attention of a block or model whose projections can be named, in the order of ``named_modules``."""
    trace = _trace(module, forward)
    return [_site(module, one, trace) for one in find_attention(module) if one.kind != "named"]


def _trace(module: nn.Module, forward: Callable[[], Any] | Trace | None) -> Trace | None:
    return forward if forward is None or isinstance(forward, Trace) else Trace(module, forward)


# ---------------------------------------------------------------------- attention


def _site(root: nn.Module, found: Attention, trace: Trace | None) -> AttentionSite:
    inner = _projections(found)
    output = _output(root, found, inner, trace)
    counts = _counts(root, found, inner, output)
    site = AttentionSite(
        found.path, found.module, found.kind, *inner, output,
        bool(_CROSS.search(found.path.rpartition(".")[2])), counts,
    )  # fmt: skip
    if found.kind != "fused" or isinstance(counts, str):
        return site
    heads, key_heads, size = counts
    ends = heads * size, (heads + key_heads) * size, (heads + 2 * key_heads) * size
    rows = ((0, ends[0]), (ends[0], ends[1]), (ends[1], ends[2]))
    parts = [replace(inner[0], rows=one, outputs=one[1] - one[0]) for one in rows]
    by_head = trace is not None and _is_by_head(site, trace)
    return replace(site, query=parts[0], key=parts[1], value=parts[2], by_head=by_head)


def _projections(found: Attention) -> list[Map]:
    module, path = found.module, found.path
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_weight is None:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            return [parameter_map(path, module, name, getattr(module, name)) for name in names]
        whole, size = parameter_map(path, module, "in_proj_weight", module.in_proj_weight), module.embed_dim
        return [replace(whole, rows=(i * size, (i + 1) * size), outputs=size) for i in range(3)]
    maps = []
    for of in ("q", "k", "v"):
        layer = found.projection(of)
        name = next(name for name, child in module.named_children() if child is layer)
        maps.append(layer_map(f"{path}.{name}" if path else name, layer))
    return maps


def _output(root: nn.Module, found: Attention, inner: list[Map], trace: Trace | None) -> Map | None:
    """In the attention module, or beside it, where BERT has it."""
    if isinstance(found.module, nn.MultiheadAttention):
        path = f"{found.path}.out_proj" if found.path else "out_proj"
        return replace(layer_map(path, found.module.out_proj), is_layer=False)  # its weight is read
    taken = {id(one.module) for one in inner}
    where, path = found.module, found.path
    others = {id(m) for one in find_attention(root) if one.module is not where for m in one.module.modules()}
    while True:
        # Layers of another attention in the same module are that one's.
        own = [replace(one, path=".".join(filter(None, (path, one.path)))) for one in linear_maps(where)]
        own = [one for one in own if id(one.module) not in taken and (where is found.module
               or id(one.module) not in others)]  # fmt: skip
        if own or not path:
            break
        path = path.rpartition(".")[0]
        where = root.get_submodule(path) if path else root
    prefix = len(path) + 1 if path else 0
    width = inner[0].inputs
    # Those that could be: they give the width of the stream, and take what values give, as often as heads share them.
    able = [one for one in own if one.outputs == width and one.inputs % _values(inner, one) == 0]
    if len(able) < 2:
        return able[0] if able else None
    if trace is not None and (first := trace.first_after(inner, able)) is not None:
        return first
    named = [one for one in able if _OUTPUT.fullmatch(one.path[prefix:])]
    direct = [one for one in named if "." not in one.path[prefix:].removesuffix(".0")] or named
    if where is not found.module:  # BERT's: the one of its own inputs goes before the MLP's
        direct = [one for one in direct if one.inputs == inner[2].outputs] or direct
    if len(direct) == 1:
        return direct[0]
    raise AnatomyError(
        f"the attention at {found.path!r} could end in {', '.join(repr(one.path) for one in able)}, and neither "
        "shapes nor names say in which. Give forward=, which runs the model once: anatomy(block, lambda: model(batch))."
    )


def _values(inner: list[Map], output: Map) -> int:
    """Features of which an output layer has to take a multiple."""
    if inner[0].module is inner[2].module and inner[2].rows is None:
        return 1
    return max(1, min(inner[2].outputs, output.inputs))


def _counts(root: nn.Module, found: Attention, inner: list[Map], output: Map | None) -> tuple[int, int, int] | str:
    """Heads, key heads and the size of one, or what to say where they are not to be told."""
    module = found.module
    size, heads, key_heads = (_number(root, found, names) for names in (_SIZES, _HEADS, _KEY_HEADS))
    query, key = inner[0].outputs, inner[1].outputs
    fused = found.kind == "fused" and inner[0].rows is None
    if fused:
        query = output.inputs if output is not None else query // 3  # values of all heads come in
        key = (inner[0].outputs - query) // 2
    if heads and query % heads == 0 and (not size or heads * size != query):
        size = query // heads  # heads are said more reliably than their size
    if size and query % size == 0 and key % size == 0:
        return query // size, key // size, size
    if key_heads and key % key_heads == 0:
        size = key // key_heads
        return query // size, key_heads, size
    where = f"the attention at {found.path!r}, a {type(module).__name__}"
    return (
        f"{where}, names no number of heads: its projections give {query} features of queries and {key} of keys. "
        f"Give the module an attribute such as {_HEADS[0]} (or {_SIZES[0]})."
    )


def _number(root: nn.Module, found: Attention, names: tuple[str, ...]) -> int | None:
    """An attribute of the attention, its configuration, or of modules around it, the nearest first."""
    places: list[Any] = [found.module, getattr(found.module, "config", None)]
    path = found.path
    while path:
        path = path.rpartition(".")[0]
        around = root.get_submodule(path) if path else root
        places += [around, getattr(around, "config", None)]
    for place in places:
        for name in names:
            value = getattr(place, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _is_by_head(site: AttentionSite, trace: Trace) -> bool:
    """Whether a fused layer gives each head's three one behind the other.

    What attention gives is a mean of values, so that it lies between the smallest and the largest of each feature.
    Of the two layouts only one need fit. (Queries and keys may be turned by their places first; values are not.)
    """
    if site.output is None or id(site.output.module) not in trace.inputs or id(site.query.module) not in trace.outputs:
        return False
    given, taken = trace.outputs[id(site.query.module)], trace.inputs[id(site.output.module)]
    heads, key_heads, size = site._known
    if given.ndim != 3 or given.shape[-1] != (heads + 2 * key_heads) * size:
        return False
    fits = []
    for by_head in (False, True):
        value = replace(site, by_head=by_head).split(given)[2].repeat_interleave(heads // key_heads, -2)
        low, high = (getattr(value, one)(1, keepdim=True).flatten(-2) for one in ("amin", "amax"))
        slack = 1e-4 * (high - low).abs().amax()
        fits.append(bool(((taken >= low - slack) & (taken <= high + slack)).all()) if taken.ndim == 3 else False)
    return fits == [False, True]


# ---------------------------------------------------------------------- MLPs


def _mlps(block: nn.Module, left: list[Map], width: int, trace: Trace | None) -> tuple[list[MLP], list[Map]]:
    """Pairs of maps into an inner width and back, the nearest to each other; and what is left."""
    found: list[MLP] = []
    for down in _downs(block, left, width, trace):
        if down not in left:
            continue
        scope = down.path
        while True:
            inside = [one for one in left if one is not down and _within(one.path, scope)]
            ups = [one for one in inside if one.inputs == width and one.experts == down.experts
                   and one.outputs in (down.inputs, 2 * down.inputs) and not _ends(one, down, trace)]  # fmt: skip
            if ups or not scope:
                break
            scope = scope.rpartition(".")[0]
        if not ups:
            continue
        mlp = _pair(ups, down, trace)
        found.append(mlp)
        left = [one for one in left if one is not down and all(one is not up for up in ups)]
    order = {one.path: place for place, one in enumerate(linear_maps(block, width))}
    return sorted(found, key=lambda one: order.get(one.down.path, 0)), left


def _within(path: str, scope: str) -> bool:
    return not scope or path == scope or path.startswith(f"{scope}.")


def _downs(block: nn.Module, left: list[Map], width: int, trace: Trace | None) -> list[Map]:
    """Maps that could end an MLP: back to the width. Where the inner width is the width itself, by order or name."""
    able = [one for one in left if one.outputs == width]
    sure = [one for one in able if one.inputs != width]
    square = [one for one in able if one.inputs == width]
    if trace is not None and all(trace.place(one) is not None for one in square):
        return sure + sorted(square, key=trace.place, reverse=True)[:1]
    named = [one for one in square if DOWN.fullmatch(one.path) and not UP.fullmatch(one.path)]
    named = named or [one for one in square if _is_last(block, one, square)]
    if len(square) > 1 and not sure and not named:
        raise AnatomyError(
            f"{', '.join(repr(one.path) for one in square)} all map {width} features to {width}, and no name says "
            "which ends the MLP. Give forward=, which runs the model once: anatomy(block, lambda: model(batch))."
        )
    return sure + named


def _is_last(block: nn.Module, one: Map, others: list[Map]) -> bool:
    """Behind another one in the same ``nn.Sequential``."""
    parent, _, name = one.path.rpartition(".")
    holder = block.get_submodule(parent) if parent else block
    inside = [other.path for other in others if other.path.rpartition(".")[0] == parent]
    return isinstance(holder, nn.Sequential) and len(inside) > 1 and inside[-1] == one.path


def _ends(one: Map, down: Map, trace: Trace | None) -> bool:
    """Of square maps: this one runs behind the other, or is named as an end."""
    if down.inputs != down.outputs:
        return one.outputs == one.inputs != down.inputs
    return trace is None and bool(DOWN.fullmatch(one.path)) and not UP.fullmatch(one.path)


def _pair(ups: list[Map], down: Map, trace: Trace | None) -> MLP:
    inner = down.inputs
    if len(ups) == 1:
        up = ups[0]
        if up.outputs == inner:
            return MLP(up, down, None, inner)
        gate, up = (replace(up, rows=rows, outputs=inner) for rows in ((0, inner), (inner, 2 * inner)))
        return MLP(up, down, gate, inner)
    if len(ups) == 2 and all(one.outputs == inner for one in ups):
        named = [one for one in ups if _GATE.fullmatch(one.path)]
        if len(named) == 1:
            return MLP(next(one for one in ups if one is not named[0]), down, named[0], inner)
    raise AnatomyError(
        f"the MLP that ends in {down.path!r} could begin in {', '.join(repr(one.path) for one in ups)}, and neither "
        "shapes nor names say which is its gate."
    )


def _is_router(one: Map, mlps: list[MLP], width: int) -> bool:
    experts = max([mlp.down.experts for mlp in mlps] + [len(mlps)], default=0)
    return one.inputs == width and experts > 1 and one.outputs <= experts


# ---------------------------------------------------------------------- norms and order


def is_norm(module: nn.Module) -> bool:
    """A normalization of any library: by its class's name, without children."""
    named = re.search(r"norm", type(module).__name__, re.IGNORECASE)
    return bool(named) and next(module.children(), None) is None and "parametriz" not in type(module).__name__.lower()


def _norms(block: nn.Module, sites: tuple[AttentionSite, ...], width: int) -> tuple[tuple[Norm, ...], ...]:
    inner = {id(part) for site in sites if site.module is not block for part in site.module.modules()}
    outer, heads = [], []
    for path, part in block.named_modules():
        if not is_norm(part):
            continue
        shape = [p.numel() for p in part.parameters()] or list(getattr(part, "normalized_shape", ())) or [width]
        (heads if id(part) in inner else outer).append(Norm(path, part, shape[0]))
    return tuple(outer), tuple(heads)


def _width(block: nn.Module, sites: tuple[AttentionSite, ...]) -> int:
    for site in sites:
        if site.output is not None:
            return site.output.outputs
        return site.query.inputs
    norms = [p for part in block.modules() if is_norm(part) for p in part.parameters()]
    if norms:
        return norms[0].numel()
    maps = linear_maps(block)
    if not maps:
        raise AnatomyError(f"a {type(block).__name__} holds no linear layer.")
    return maps[0].inputs


def _ordered(found: Anatomy, trace: Trace | None) -> Anatomy:
    """With norms at their branches: by the order in which the parts ran, or by what torch's own layers say."""
    if trace is None or not found.branches:
        first = getattr(found.block, "norm_first", None)
        return found if first is None else replace(found, order="pre" if first else "post")
    spans = [_span(found, i, trace) for i in range(len(found.branches))]
    places = {norm.path: trace.at.get(id(norm.module)) for norm in found.norms}
    if any(span is None for span in spans) or any(place is None for place in places.values()):
        return found
    norms = sorted(found.norms, key=lambda one: places[one.path])
    start, end = min(span[0] for span in spans), max(span[1] for span in spans)
    before, behind = any(places[n.path] < start for n in norms), any(places[n.path] > end for n in norms)
    order = "sandwich" if before and behind else "pre" if before else "post" if behind else None
    branches, turn = list(found.branches), sorted(range(len(spans)), key=lambda i: spans[i])
    for norm in norms:
        previous = [i for i in turn if spans[i][1] < places[norm.path]]
        following = [i for i in turn if spans[i][0] > places[norm.path]]
        inside = [i for i in turn if spans[i][0] < places[norm.path] < spans[i][1]]
        behind_one = previous and (not following or order == "post" or (order == "sandwich" and trace.behind(
            norm.module, branches[previous[-1]].ends)))  # fmt: skip
        if inside:
            continue  # of the branch's own
        if behind_one:
            one = branches[previous[-1]]
            branches[previous[-1]] = replace(one, after=(*one.after, norm))
        elif following:
            one = branches[following[0]]
            branches[following[0]] = replace(one, before=(*one.before, norm))
    return replace(found, branches=tuple(branches), order=order)


def _span(found: Anatomy, index: int, trace: Trace) -> tuple[int, int] | None:
    """When a branch ran, from its first map to its last."""
    if index < len(found.attention):
        site = found.attention[index]
        maps = [site.module] if isinstance(site.module, nn.MultiheadAttention) else [m.module for m in site.maps]
    else:
        maps = [m.module for mlp in found.mlps for m in mlp.maps]
    places = [trace.at[id(one)] for one in maps if id(one) in trace.at]
    return (min(places), max(places)) if places else None


__all__ = [
    "MLP",
    "Anatomy",
    "AnatomyError",
    "AttentionSite",
    "Branch",
    "Map",
    "Norm",
    "Trace",
    "anatomy",
    "attention_sites",
    "features",
    "is_norm",
    "linear_maps",
    "quiet",
    "read_blocks",
]
