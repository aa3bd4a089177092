"""ZeRO: optimizer states (stage 1), gradients (2) and weights (3) divided among data-parallel processes.

torch's engines do the dividing: ``ZeroRedundancyOptimizer`` around DDP for stage 1, FSDP2 for stages 2 and 3; or
DeepSpeed does it. Here are Lightning's seams: blocks found, weights made block by block, checkpoints that other
Trainers read, a trial save before the first step, and an end to runs in which a process has died.

Source: Rajbhandari, Rasley, Ruwase, He, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2019,
https://arxiv.org/abs/1910.02054, section 5. Survey section 3, [73]. Departure: stage 2 keeps the weights of FSDP2's
units divided between steps too, and whole from their first use in forward to the end of backward.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any, ClassVar, Literal

from eke import Technique
from lightning.pytorch.strategies import StrategyRegistry

from eke_zero.base import Engine
from eke_zero.deepspeed import DeepSpeedZeRO
from eke_zero.entry import RECORD
from eke_zero.replicated import ReplicatedZeRO
from eke_zero.sharded import ShardedZeRO

NAMES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2_offload": {"stage": 2, "offload": "optimizer"},
    "zero3_offload": {"stage": 3, "offload": "params"},
}


class ZeRO(Engine):
    """Divide what DDP keeps a copy of on each process. Give it to ``strategy=``, or one of its names: ``"zero1"``,
    ``"zero2"``, ``"zero3"``, ``"zero2_offload"``, ``"zero3_offload"``, once ``eke_zero`` is imported.

    Losses and weights are those of DDP: to the bit in stage 1; in stages 2 and 3 up to the order in which processes
    are summed, in gradients of more than two of them and in clipping by norm.

    Example::

        trainer = Trainer(strategy=ZeRO(stage=3), devices=8, precision="bf16-mixed")

    Args:
        stage: 1 divides optimizer states, 2 gradients too, 3 weights too.
        offload: ``"optimizer"`` keeps states, and a copy of this process's weights, in CPU memory and updates there.
            ``"params"``, in stage 3 alone, keeps the weights there too, and copies each block over when it is needed.
        engine: ``"torch"`` or ``"deepspeed"``.
        blocks: Dotted path of the list of blocks, or several, where the search for them needs help. Each block is
            gathered as a whole.
        remat: Compute each block's activations again in backward instead of keeping them.
        checkpoint: ``"full"`` gathers everything into one file as other Trainers write it; ``"sharded"`` lets each
            process write its own part into a folder. Both are read by any number of processes. By default full on
            torch; DeepSpeed only writes folders.
        compute_dtype: ``"bfloat16"``: blocks are gathered and computed in it, and weights kept as they are. For
            stages 2 and 3; next to it, leave the Trainer's ``precision`` alone.
        reduce_every_batch: With accumulated gradients, reduce after each batch instead of once a step: more
            communication, but gradients stay divided in between.
        trial: Save and load a checkpoint before the first step, next to where the Trainer's own will lie, and remove
            it. Skipped where the Trainer saves none.
        timeout: Seconds that a step may take before the run is ended with words about which process hangs.
        config: For DeepSpeed: further settings of its JSON.

    Raises:
        ZeROError: settings that exclude each other; a model that is sharded already, or whose blocks share weights;
            weights on the meta device that nobody initializes; a trial that fails.
    """

    technique: ClassVar[Technique] = RECORD

    def __new__(cls, stage: int = 3, offload: Any = None, engine: str = "torch", *args: Any, **kwargs: Any) -> Any:
        if engine == "deepspeed":
            chosen = DeepSpeedZeRO
        else:
            chosen = ReplicatedZeRO if stage == 1 else ShardedZeRO
        return chosen(stage, offload, engine, *args, **kwargs)

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 3,
        offload: Literal["optimizer", "params"] | None = None,
        engine: Literal["torch", "deepspeed"] = "torch",
        blocks: str | list[str] | None = None,
        remat: bool = False,
        checkpoint: Literal["full", "sharded"] | None = None,
        compute_dtype: Literal["bfloat16"] | None = None,
        reduce_every_batch: bool = False,
        trial: bool = True,
        timeout: float = 1800.0,
        config: dict[str, Any] | None = None,
    ) -> None:
        """For its signature: what is built is an engine."""


for _engine in (ReplicatedZeRO, ShardedZeRO, DeepSpeedZeRO):
    ZeRO.register(_engine)
# An engine leaves nothing abstract; command lines look before they ask, and for the arguments at __new__ first.
ZeRO.__abstractmethods__ = frozenset()
ZeRO.__signature__ = signature(partial(ZeRO.__init__, None))


def register() -> None:
    """Make the names in :data:`NAMES` known to ``Trainer(strategy=...)``."""
    for name, settings in NAMES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, ZeRO, description=f"ZeRO({settings})", **settings)
