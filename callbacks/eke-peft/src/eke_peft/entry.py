"""Tells the eke registry what this distribution provides."""

from eke import Technique, hookimpl


def _tolerates(method: object = "lora") -> tuple[str, ...]:
    adalora = "adalora" in str(getattr(method, "peft_type", method)).lower()  # a name, or a configuration of peft's
    others = () if adalora else ("sharded gradients", "sharded parameters", "gathered states", "own optimizer")
    return ("sharded optimizer", *others)


_STAYS = "What it puts into the model is what was trained: it stays there when a run ends, or fails."

RECORD = Technique(
    name="peft",
    kind="callback",
    factory="eke_peft:PEFT",
    paper="https://arxiv.org/abs/2106.09685",
    does="LoRA and peft's other methods, BitFit, adapters, visual prompts; small checkpoints that resume",
    topics=("parameter-efficient tuning",),
    survey=("lora", "adapter", "bitfit", "vpt", "prompt-tuning", "intrinsic-dim", "alpaca-lora"),
    effects=("changes module tree", "replaces requires_grad", "changes optimizer", "reads gradients"),
    tolerates=_tolerates,
    intolerance="AdaLoRA looks at whole gradients. Use one device, strategy='ddp' or ZeRO(stage=1), or another method.",
    exactness="model-changing",
    exceptions={
        "test_after_a_run_the_model_is_as_before": _STAYS,
        "test_it_fails_cleanly": _STAYS,
        "test_its_checkpoint_loads_without_it_or_says_why_not": (
            "It holds the adapter alone: a Trainer without PEFT names the weights of the base as missing."
        ),
        "test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which an adapter has nothing to do.",
    },
)

EXAMPLE = {
    "settings": {"r": 4},
    "checkpoint": "full",
    "train": ["embed*|position*|norm*|head*|*wte*|*wpe*|*ln_f*"],  # of any of the kit's models
}

TRY = {  # in random runs
    "method": ("lora", "dora", "rslora", "adalora", "ia3", "loha", "lokr", "vera", "oft", "bitfit", "adapters", "vpt"),
    "settings": ({}, {"r": 2}),
    "train": (["*norm*|*ln_*|*bias*"],),
}


@hookimpl
def eke_technique() -> Technique:
    return RECORD
