"""What the blocks of a deeper model start from. Works on any list of like blocks, without a Trainer.

Source: Gong, He, Li, Qin, Wang, Liu, "Efficient Training of BERT by Progressively Stacking", ICML 2019,
https://proceedings.mlr.press/v97/gong19a.html, algorithm 1. Interleaving and starting as identity came later (G_stack,
LLaMA Pro).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence

import torch
from eke import ArgumentError
from eke.seams.anatomy import AnatomyError, Map, anatomy, attention_sites
from eke.seams.blocks import Blocks
from eke.seams.names import at, plain, plain_keys
from torch import Tensor, nn

OPERATORS = ("stack", "interleave", "identity", "random")

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def positions(depths: Sequence[int], operator: str) -> list[list[int]]:
    """Which of the last depth's blocks run at each depth, counted from 0.

    Interleaved, the blocks of a depth are spread over the next: of 8, 4 run as 0, 2, 4, 6. Else they are the lowest.
    """
    active = [list(range(depths[-1]))]
    for k, deeper in zip(reversed(depths[:-1]), reversed(depths[1:]), strict=True):
        chosen = [i * deeper // k for i in range(k)] if operator == "interleave" else range(k)
        active.insert(0, [active[0][i] for i in chosen])
    return active


def sources(old: Sequence[int], new: Sequence[int], operator: str) -> dict[int, int]:
    """Map each block that is in ``new`` and not in ``old`` to the block of ``old`` that it is copied from.

    With k = ``len(old)`` and blocks counted from 0, block j copies block j mod k (``"stack"``, ``"identity"``), or the
    nearest one below (``"interleave"``). ``"random"`` copies nothing.
    """
    if operator == "random":
        return {}
    if operator == "interleave":
        return {j: max(i for i in old if i < j) for j in new if j not in old}
    return {j: old[place % len(old)] for place, j in enumerate(new) if j not in old}


def pairs(block: nn.Module, like: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Each parameter of a block beside its namesake in another, which may hold more."""
    others = plain_keys(dict(like.named_parameters(remove_duplicate=False)))
    return [(one, others[plain(name)]) for name, one in block.named_parameters()]


def copyable(found: Blocks) -> bool:
    """Whether each block can be copied to those above it: all are alike, but for the first, which may hold more, as
    T5's holds the positions of all."""
    shapes = [
        {plain(name): (one.shape, one.dtype) for name, one in block.named_parameters(remove_duplicate=False)}
        for block in found
    ]
    first = shapes[0]
    classes = {type(at(block, "")).__qualname__ for block in found}
    return len(classes) == 1 and all(one == shapes[-1] for one in shapes[1:]) and shapes[-1].items() <= first.items()


@torch.no_grad()
def copy_blocks(
    blocks: Sequence[nn.Module], sources: Mapping[int, int], identity: bool = False
) -> dict[Tensor, Tensor]:
    """Copy blocks over others of the same list, in place.

    Parameters and running statistics are copied. Everything else that a block holds (its index, its drop-path rate,
    its masks) belongs to its place and stays.

    Args:
        blocks: The whole list.
        sources: Block to the block that it is copied from.
        identity: Zero the output projections of attention and MLP in the copies: a pre-norm block then passes its
            input on, to the bit, and the deeper model computes what the shallow one did.

    Returns:
        Copied parameter to its source, for the optimizer's state. Those set to zero are left out.
    """
    origin: dict[Tensor, Tensor] = {}
    for target, source in sources.items():
        origin.update(dict(pairs(blocks[target], blocks[source])))  # a parameter tied within its block is met once
        buffers = dict(blocks[source].named_buffers())
        for name, buffer in blocks[target].named_buffers():
            if name.rpartition(".")[2] in _STATISTICS:
                buffer.copy_(buffers[name])
    for target, source in origin.items():
        target.copy_(source)
    if identity:
        for target in sources:
            for zeroed in zero_outputs(blocks[target]):
                origin.pop(zeroed, None)
    return origin


def output_projections(block: nn.Module) -> list[Map]:
    """The maps through which a block's attention and MLP write into the residual stream.

    Raises:
        ValueError: the attention's or the MLP's is not to be found.
    """
    try:
        found = anatomy(block)
    except AnatomyError as error:
        raise ArgumentError(
            f"operator='identity' sets output projections to zero: {error} Use operator='stack'."
        ) from None
    part = "attention" if not found.attention or any(one.output is None for one in found.attention) else "MLP"
    if part == "attention" or not found.mlps:
        raise ArgumentError(
            f"{type(block).__name__} shows no output projection of its {part}, which operator='identity' has to set "
            "to zero. Use operator='stack'."
        )
    return list(found.ends)


@torch.no_grad()
def zero_outputs(block: nn.Module) -> list[nn.Parameter]:
    """Set the output projections of a block to zero and return their parameters."""
    parameters = [parameter for one in output_projections(block) for parameter in one.parameters()]
    for parameter in parameters:
        parameter.zero_()
    return parameters


@torch.no_grad()
def check_identity(block: nn.Module) -> None:
    """Refuse a block that does not pass its input on when its output projections are zero, as post-norm blocks do.

    Raises:
        ValueError: it changes its input, or cannot be run on hidden states alone.
    """
    trial = copy.deepcopy(block).eval()
    zero_outputs(trial)
    output = output_projections(trial)[0]
    weight = output.matrix()
    like = {"dtype": weight.dtype, "device": weight.device}
    # Not drawn: a check leaves the random state alone.
    hidden = torch.linspace(-2, 3, 4 * output.outputs, **like).view(1, 4, -1)
    turns = torch.ones(1, 4, attention_sites(trial)[0].size, **like)
    needed = {
        name: None
        for name, one in list(inspect.signature(trial.forward).parameters.items())[1:]
        if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD  # such as a mask
    }
    for side in (needed, {**needed, "position_embeddings": (turns, 0 * turns)}):
        try:
            output = trial(hidden, **side)
        except Exception:  # whatever a block raises that needs more inputs than we can know
            continue
        if torch.equal(output[0] if isinstance(output, tuple) else output, hidden):
            return
        raise ArgumentError(
            f"{type(block).__name__} changes its input even with zeroed output projections, as a post-norm block does: "
            "operator='identity' needs pre-norm blocks (norm_first=True). Use operator='stack'."
        )
    raise ArgumentError(
        f"{type(block).__name__} does not run on hidden states alone, so it could not be checked that "
        "operator='identity' keeps the model's function. Use operator='stack'."
    )


def check_kinds(blocks: Sequence[nn.Module], sources: Mapping[int, int]) -> None:
    """Refuse to copy between layers of different types, as sliding-window and full attention.

    Raises:
        ValueError: a block and its source differ in type.
    """
    for target, source in sources.items():
        kinds = [_layer_type(blocks[i]) for i in (target, source)]
        if kinds[0] != kinds[1]:
            raise ArgumentError(
                f"Block {target} is of type {kinds[0]} and would be copied from block {source} of type {kinds[1]}. "
                "Give depths= that are multiples of the period with which the types alternate."
            )


def trim(blocks: Blocks, active: Sequence[int]) -> None:
    """Take the blocks that are not ``active`` out of the model, in place: what has been trained, for export."""
    replace_modules(blocks.container, [blocks.modules[i] for i in active])


def replace_modules(container: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Make ``modules`` the content of an ``nn.ModuleList`` or ``nn.Sequential``."""
    for _ in range(len(container)):
        del container[-1]
    for module in modules:
        container.append(module)


def _layer_type(block: nn.Module) -> tuple[object, ...]:
    words = ("attention_type", "layer_type", "is_sliding", "sliding_window")
    said = [getattr(module, word, None) for module in at(block, "").modules() for word in words]
    return tuple(word for word in said if word is not None)
