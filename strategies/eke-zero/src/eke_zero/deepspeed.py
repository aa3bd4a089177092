"""DeepSpeed's ZeRO through Lightning's own strategy, on CPUs too, with the refusals that it lacks."""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy

from eke_zero.base import Engine, ZeROError, say_plan


class DeepSpeedZeRO(Engine, DeepSpeedStrategy):
    """ZeRO on DeepSpeed."""

    def _engine_settings(self) -> dict[str, Any]:
        if self.checkpoint == "full":
            raise ZeROError(
                "checkpoint='full' with engine='deepspeed': DeepSpeed writes folders, which its zero_to_fp32.py turns "
                "into one file. Leave checkpoint out."
            )
        if self.compute_dtype:
            raise ZeROError("compute_dtype with engine='deepspeed': give the Trainer's precision instead.")
        if self.blocks and not self.remat:
            raise ZeROError("blocks= has no effect with engine='deepspeed', which divides each weight by itself.")
        if self.reduce_every_batch:
            raise ZeROError("reduce_every_batch= has no effect with engine='deepspeed', which decides that by stage.")
        if "optimizer" in (self.config or {}):
            raise ZeROError(
                "config={'optimizer': ...} would pass configure_optimizers by, and every technique that acts on it. "
                "Build the optimizer there."
            )
        place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        zero: dict[str, Any] = {"stage": self.stage}
        if self.offload:
            zero["offload_optimizer"] = place
        if self.offload == "params":
            zero["offload_param"] = place
        given = dict(self.config or {})
        zero.update(given.pop("zero_optimization", {}))
        return {"config": {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
                           "zero_optimization": zero, **given}}  # fmt: skip

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed asks for its number

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self._begin(super(DeepSpeedStrategy, self).setup_environment)  # DeepSpeedStrategy's own refuses a CPU

    def setup_distributed(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        if not self.lightning_module.automatic_optimization:
            raise ZeROError(f"{type(self.lightning_module).__name__} optimizes by hand. Give engine='torch', stage=1.")
        blocks = self._recompute(self.lightning_module)
        super().setup(trainer)
        say_plan(self, self.lightning_module, blocks)

    def backward(self, closure_loss: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Lightning has divided the loss by the batches of a step, and DeepSpeed would do so again.
        return super().backward(closure_loss, *args, **{"scale_wrt_gas": False, **kwargs})

    def _load_back(self, loaded: dict[str, Any]) -> None:
        pass  # DeepSpeed has put everything in its place by itself

    def _forget_states(self, optimizer: Any) -> None:
        pass  # none were made

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return getattr(tensor, "ds_tensor", tensor)
