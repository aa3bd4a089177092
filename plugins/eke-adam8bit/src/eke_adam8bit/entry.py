"""What Eke knows of this technique without importing torch."""

from eke import Offer, Technique, hookimpl


def _tolerates(backend: str = "auto") -> tuple[str, ...]:
    return ("sharded optimizer", *(("sharded parameters",) if backend in ("auto", "torchao") else ()))


RECORD = Technique(
    name="adam8bit",
    kind="plugin",
    factory="eke_adam8bit:Adam8bit",
    paper="https://arxiv.org/abs/2110.02861",
    does="Adam and AdamW with 8-bit states: 2.06 bytes of state per parameter in place of 8",
    topics=("quantized training", "optimizer"),
    effects=("replaces optimizer", "changes optimizer state"),
    tolerates=_tolerates,
    intolerance=(
        "8-bit states of sharded parameters need backend='auto' or 'torchao', and checkpoints of which each process"
        " writes its own part: ZeRO(checkpoint='sharded'), or "
        "ModelParallelStrategy(save_distributed_checkpoint=True). Else use one device or strategy='ddp'."
    ),
    exactness="approximate",
    offers=(Offer("rounding"),),
    exceptions={
        "test_its_checkpoint_loads_without_it_or_says_why_not": (
            "its weights load anywhere, but a Trainer without Eke meets optimizer states that AdamW does not know and "
            "stops with a KeyError at the first step; AdamW8bit.state_dict_32bit() gives states that AdamW loads"
        ),
    },
)

TRY = {  # in random runs; states of few elements stay in 32 bits otherwise
    "min_elements": (1, 64, 4096),
    "backend": ("auto", "torch", "torchao"),
    "compile": (False,),
    "keep_32bit": (["*head*"],),
}


@hookimpl
def eke_technique() -> Technique:
    return RECORD
