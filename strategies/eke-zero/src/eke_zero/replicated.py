"""Stage 1: DDP, with torch's ``ZeroRedundancyOptimizer`` around the optimizer that the user built."""

from __future__ import annotations

from typing import Any

from eke.seams.optimizer import rebind
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from eke_zero.base import Engine, ZeROError, say_plan
from eke_zero.offload import Offloaded


class ReplicatedZeRO(Engine, DDPStrategy):
    """ZeRO stage 1 on torch."""

    _looked = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """After the first one: what has no gradient would end the run at the second step, in DDP's words.

        Raises:
            ZeROError: a parameter trains and takes no part in the loss.
        """
        super().post_backward(closure_loss)
        model = self.lightning_module
        if self._looked or not model.automatic_optimization or self._ddp_kwargs.get("find_unused_parameters"):
            return
        self._looked = True
        without = [name for name, one in model.named_parameters() if one.requires_grad and one.grad is None]
        if without:
            more = f" and {len(without) - 3} more" if len(without) > 3 else ""
            raise ZeROError(
                f"The loss does not reach {', '.join(without[:3])}{more}, and processes would wait for the gradients. "
                "Freeze them in the model, by requires_grad_(False), or leave ZeRO out."
            )

    def setup(self, trainer: Trainer) -> None:
        blocks = self._recompute(self.lightning_module)
        super().setup(trainer)
        say_plan(self, self.lightning_module, blocks)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        mine = {id(optimizer): divide(optimizer, self.offload == "optimizer") for optimizer in self.optimizers}
        rebind(self.lr_scheduler_configs, mine)
        self.optimizers = [mine[id(optimizer)] for optimizer in self.optimizers]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return super().optimizer_state(optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer)

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            take_part(optimizer, state)

    def _load_back(self, loaded: dict[str, Any]) -> None:
        self.load_model_state_dict(loaded)
        if loaded["optimizer_states"][0]["state"]:
            self.load_optimizer_state_dict(loaded)

    def _forget_states(self, optimizer: Any) -> None:
        pass  # none were made


def divide(optimizer: Optimizer, offload: bool) -> ZeroRedundancyOptimizer:
    """Let an optimizer, however it was built, step only this process's share of its parameters."""

    def narrow(groups: list[dict[str, Any]], **_: Any) -> Optimizer:
        optimizer.param_groups.clear()
        optimizer.state.clear()
        for group in groups:
            optimizer.add_param_group(dict(group))  # its own: the list of groups belongs to the engine
        return Offloaded(optimizer) if offload else optimizer

    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    return ZeroRedundancyOptimizer(groups, optimizer_class=narrow, **optimizer.defaults)


def take_part(optimizer: ZeroRedundancyOptimizer, state: dict[str, Any]) -> None:
    """Load this process's share of a whole optimizer's state.

    torch's own ``load_state_dict`` goes past that of the optimizer inside, which may have more to do.
    """
    place = {id(p): number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    saved, inner, count = state["state"], optimizer.optim, 0
    here: dict[str, Any] = {"state": {}, "param_groups": []}
    for settings, group in zip(state["param_groups"], inner.param_groups, strict=True):
        numbers = list(range(count, count + len(group["params"])))
        here["param_groups"].append({**settings, "params": numbers})
        for number, parameter in zip(numbers, group["params"], strict=True):
            if (of_one := saved.get(place[id(parameter)])) is not None:
                here["state"][number] = of_one
        count += len(numbers)
    inner.load_state_dict(here)
    for settings, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
