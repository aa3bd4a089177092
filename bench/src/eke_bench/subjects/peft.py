"""A loop by hand over a model that peft has given LoRA to."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model

from eke_bench.store import Run
from eke_bench.subjects.hand import Hand
from eke_bench.workloads import Learner

RANK = 8


class Peft(Hand):
    """LoRA of rank 8 on the attention's input projection, as the library's defaults have it; all else is frozen."""

    def prepare(self, model: Learner, run: Run) -> Learner:
        return inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["qkv"]), model)
