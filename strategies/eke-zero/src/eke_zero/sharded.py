"""Stages 2 and 3: FSDP2, around blocks that the core found."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from eke.seams.names import plain
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import distributed, nn
from torch.distributed import checkpoint as sharded_files
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from eke_zero.base import Engine, ZeROError, say_plan
from eke_zero.offload import Offloaded

META = "meta.pt"  # Lightning's name for what is no tensor of the model or the optimizer


class ShardedZeRO(Engine, ModelParallelStrategy):
    """ZeRO stages 2 and 3 on torch."""

    is_distributed = True  # or Lightning would not give each process its own samples

    # A model's shape and its techniques' state are read back as under DDP, before it is sharded; its weights after.
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True

    def _engine_settings(self) -> dict[str, Any]:
        return {"tensor_parallel_size": 1, "save_distributed_checkpoint": self.checkpoint == "sharded"}

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        if self.offload == "params" and self.root_device.type == "cuda" and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of what lies in CPU memory are summed there
        super().setup_environment()

    def connect(self, model: Any) -> None:
        super().connect(model)
        self._pending: tuple[Any, bool] | None = None

    # ------------------------------------------------------------------ sharding

    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        self._refuse(trainer)
        self.accelerator.setup(trainer)
        if not isinstance(module, FSDPModule):
            self.model = self.precision_plugin.convert_module(module)
            self._shard(module)
        self._recompute(module)
        if self._pending is not None:
            self._load_weights(*self._pending)
            self._pending = None
        self.barrier("eke-zero setup")
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _refuse(self, trainer: Trainer) -> None:
        module = self.lightning_module
        if not isinstance(module, FSDPModule) and any(isinstance(part, FSDPModule) for part in module.modules()):
            raise ZeROError(
                f"{type(module).__name__} has sharded itself, in configure_model or before. Leave that to ZeRO, or "
                "use Lightning's ModelParallelStrategy."
            )
        if not module.automatic_optimization:
            raise ZeROError(
                f"{type(module).__name__} optimizes by hand (automatic_optimization=False), and stages 2 and 3 have to "
                "see the end of forward before backward begins. Give stage=1."
            )

    def _shard(self, module: nn.Module) -> None:
        """Make, equalize and shard one unit after the other, so that no process ever holds the whole model twice."""
        settings: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}
        if self.stage == 2:
            settings["reshard_after_forward"] = False
        if self.compute_dtype:
            settings["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=getattr(torch, self.compute_dtype), reduce_dtype=torch.float32
            )
        if self.offload == "params":
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        units = self.find_units(module)
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for unit in [*units, module]:
            own = [part for part in unit.modules() if unit is not module or not _inside(part, units)]
            for part in own:
                self._make(part, module, made)
            self._equalize(own)
            fully_shard(unit, **settings)
        say_plan(self, module, len(units))

    def _make(self, part: nn.Module, model: nn.Module, made: dict[int, tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Put one module's own tensors on this process's device; those on the meta device are initialized there."""
        on_meta = [
            one for one in (*part._parameters.values(), *part._buffers.values()) if one is not None and one.is_meta
        ]
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self.root_device)
                continue
            if id(parameter) not in made:  # tied weights stay tied
                empty = torch.empty_like(parameter, device=self.root_device)
                made[id(parameter)] = parameter, nn.Parameter(empty, parameter.requires_grad)
            part._parameters[name] = made[id(parameter)][1]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = (
                    torch.empty_like(buffer, device=self.root_device) if buffer.is_meta else buffer.to(self.root_device)
                )
        if on_meta:
            _initialize(part, model)

    def _equalize(self, parts: list[nn.Module]) -> None:
        """Give every process the first one's values, as DDP does."""
        seen: set[int] = set()
        for part in parts:
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    distributed.broadcast(tensor.data, 0)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.offload == "optimizer":
            from eke.seams.optimizer import rebind

            mine = {id(optimizer): Offloaded(optimizer) for optimizer in self.optimizers}
            rebind(self.lr_scheduler_configs, mine)
            self.optimizers = [mine[id(optimizer)] for optimizer in self.optimizers]

    def model_to_device(self) -> None:
        pass  # done unit by unit; what is offloaded stays where it is

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Add gradients up on each process, without reducing them."""
        if self.reduce_every_batch:
            yield
            return
        self.lightning_module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.lightning_module.set_requires_gradient_sync(True)

    def _step(self, what: str, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the step through the module, whose hooks gather what the blocks leave over."""
        module, own = self.lightning_module, vars(self.lightning_module).get("forward")

        def put_back() -> None:
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own

        def forward(*args: Any, **kwargs: Any) -> Any:
            put_back()
            return super(ShardedZeRO, self)._step(what, step, args, kwargs)

        vars(module)["forward"] = forward
        try:
            return module(*args, **kwargs)
        finally:
            put_back()

    # ------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.lightning_module, options=self._whole(cpu_offload=True))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = get_optimizer_state_dict(self.lightning_module, optimizer, options=self._whole(cpu_offload=True))
        return by_number(state) if self.checkpoint == "full" and self.is_global_zero else state

    def _whole(self, **options: Any) -> StateDictOptions:
        return StateDictOptions(full_state_dict=self.checkpoint == "full", **options)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.checkpoint == "full":
            self._tick(f"saving {filepath}")
            path = Path(str(self.broadcast(str(filepath))))
            if self.is_global_zero and _is_sharded(path):
                raise ZeROError(f"{path} is a sharded checkpoint, and one file is to be saved. Give another name.")
            Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise ZeROError("storage_options are for checkpoint='full': a sharded one is written by torch.")
        self._tick(f"saving {filepath}")
        path = Path(str(self.broadcast(str(filepath))))
        if path.is_file():
            raise ZeROError(f"{path} is a file, and a folder is to be saved. Give another name.")
        part = path.with_name(f"{path.name}.part")
        if self.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.barrier("eke-zero folder")
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        for number, state in enumerate(checkpoint.pop("optimizer_states", ())):
            tensors[f"optimizer_{number}"] = state
        sharded_files.save(tensors, checkpoint_id=part)
        self.barrier("eke-zero parts")
        if self.is_global_zero:
            torch.save(checkpoint, part / META)  # last: where it lies, the folder is complete
            put_in_place(part, path)
        self.barrier("eke-zero saved")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._tick(f"loading {checkpoint_path}")
        if "://" in str(checkpoint_path):
            return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        path = Path(str(self.broadcast(str(checkpoint_path))))
        if self.is_global_zero:
            finish_move(path)
        self.barrier("eke-zero load")
        if path.is_file():
            return torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        if not _is_sharded(path):
            raise ZeROError(f"{path} is neither a checkpoint file nor a folder with {META} in it.")
        metadata = torch.load(path / META, map_location="cpu", weights_only=weights_only)
        holds = sharded_files.FileSystemReader(path).read_metadata().state_dict_metadata
        if any(name.startswith("optimizer_0") for name in holds):
            metadata["optimizer_states"] = [path]
        return {**metadata, "state_dict": path}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._pending = checkpoint["state_dict"], strict  # until the model is sharded

    def _load_weights(self, source: Any, strict: bool) -> None:
        module = self.lightning_module
        if not isinstance(source, Path):
            options = StateDictOptions(full_state_dict=True, strict=strict)
            set_model_state_dict(module, dict(source), options=options)
            return
        state = {"state_dict": get_model_state_dict(module)}
        sharded_files.load(state, checkpoint_id=source)
        set_model_state_dict(module, state["state_dict"], options=StateDictOptions(strict=strict))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        module = self.lightning_module
        for number, optimizer in enumerate(self.optimizers):
            source = checkpoint["optimizer_states"]
            if source and isinstance(source[0], Path):
                state = {f"optimizer_{number}": get_optimizer_state_dict(module, optimizer)}
                sharded_files.load(state, checkpoint_id=source[0])
                set_optimizer_state_dict(module, optimizer, state[f"optimizer_{number}"])
            else:
                state = by_name(source[number], optimizer, module)
                set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))

    def _load_back(self, loaded: dict[str, Any]) -> None:
        self._load_weights(loaded["state_dict"], True)
        self.load_optimizer_state_dict(loaded)


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state as a plain ``Optimizer.state_dict()`` has it: parameters numbered in the groups' order."""
    number = {name: i for i, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]]
    return {"state": {number[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def by_name(state: dict[str, Any], optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The reverse of :func:`by_number`, for the groups that this run's optimizer has.

    Raises:
        ZeROError: they are others.
    """
    names = {id(p): plain(name) for name, p in module.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in state["param_groups"]]
    before, now = [len(group) for group in saved], [len(group) for group in groups]
    if before != now:
        raise ZeROError(
            f"the checkpoint's optimizer has groups of {', '.join(map(str, before))} parameters, and this run's of "
            f"{', '.join(map(str, now))}. Build it as it was."
        )
    name_of = {i: name for old, new in zip(saved, groups, strict=True) for i, name in zip(old, new, strict=True)}
    return {
        "state": {name_of[i]: value for i, value in state["state"].items() if i in name_of},
        "param_groups": [{**group, "params": new} for group, new in zip(state["param_groups"], groups, strict=True)],
    }


def put_in_place(part: Path, path: Path) -> None:
    """Rename a complete folder to its name, over an older one, so that at each moment one of the two is whole."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def finish_move(path: Path) -> None:
    """Complete a :func:`put_in_place` that was cut short between its two renames."""
    part = path.with_name(f"{path.name}.part")
    if not path.exists() and _is_sharded(part):
        part.rename(path)


def _is_sharded(path: Path) -> bool:
    return path.is_dir() and (path / META).is_file()


def _inside(part: nn.Module, units: list[nn.Module]) -> bool:
    return isinstance(part, FSDPModule) or any(part is inner for unit in units for inner in unit.modules())


def _initialize(part: nn.Module, model: nn.Module) -> None:
    """Give a module that was built on the meta device its first weights.

    Raises:
        ZeROError: nobody knows how.
    """
    for method in ("reset_parameters", "_reset_parameters"):  # the second is nn.MultiheadAttention's
        if hasattr(part, method):
            getattr(part, method)()
            return
    for owner in model.modules():  # Hugging Face's initialize a part of themselves
        if hasattr(owner, "_init_weights") and any(part is inner for inner in owner.modules()):
            owner._init_weights(part)
            return
    raise ZeROError(
        f"a {type(part).__name__} has weights on the meta device and no reset_parameters() that would initialize them. "
        "Write one, or build the model outside of configure_model."
    )
