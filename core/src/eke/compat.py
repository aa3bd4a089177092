"""Every private Lightning or torch name that Eke relies on, in one place."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed._tools import mem_tracker
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = [
    "LOADERS_ARE_THERE",
    "MODULE_CALLS",
    "MemTracker",
    "base_of",
    "batch_hook_owner",
    "batch_is_through",
    "batches_done",
    "before_batch_transfer",
    "believe_resumed",
    "combined_loader",
    "counters",
    "epoch_is_over",
    "expect_no_signals",
    "expect_unused_parameters",
    "finish_epoch",
    "forget_group",
    "forget_processes",
    "has_values",
    "has_workers_running",
    "in_backward",
    "is_checkpoint_wrapped",
    "is_compiled",
    "iterators_of",
    "keeps_state",
    "leave_ddp_out",
    "leave_out_of_ddp",
    "load_loader_states",
    "loader_states",
    "logs_now",
    "loss_scale",
    "means",
    "memory_profile",
    "memoryless",
    "metrics",
    "parse_optimizers",
    "parse_schedulers",
    "plain_means",
    "process_store",
    "refuse_gradient",
    "remember_loading",
    "run_batch_loop",
    "saves_sharded",
    "set_counters",
    "set_epoch_length",
    "set_means",
    "set_metrics",
    "start_at",
    "start_fake_processes",
    "stop_restarting",
    "taken_up",
    "takes_batch_idx",
    "unscale_again",
    "unset_fake_temporarily",
    "validation_loaders",
]


class MemTracker(mem_tracker.MemTracker):
    """torch's memory tracker, for frozen parameters, for optimizers that run forward and backward themselves, and for
    steps of several forward passes.

    It takes all that happens inside an optimizer's step for optimizer states. Lightning hands forward and backward to
    the step as a closure, so that activations would be called that, too.
    """

    _phase = "optimizer"

    @property
    def _in_opt(self) -> bool:
        if not self._stepping:
            return False
        if self._mod_tracker.is_bw:
            self._phase = "backward"
        elif self._phase == "backward":
            self._phase = "optimizer"  # the closure has ended
        elif self._mod_tracker.parents - {"Global"}:
            self._phase = "forward"
        return self._phase == "optimizer"

    @_in_opt.setter
    def _in_opt(self, stepping: bool) -> None:
        self._stepping, self._phase = stepping, "optimizer"

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        for parameter in module.parameters():
            if not parameter.requires_grad:  # a hook on its gradient, which the tracker would install, is an error
                self._param_to_grad_hook_handles[parameter] = (_NoHandle, _NoHandle)
        return super()._track_module_params_and_buffers(module, install_grad_hooks)

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if not self._mod_tracker.is_bw:  # a second forward pass in one step, after a look at the batch, begins anew
            self.memory_tracking.pop(module, None)
        super()._pre_fw_hook(module, inputs)


# The code in which a call of a module runs: on Python's stack it says which modules are being called.
MODULE_CALLS = frozenset((nn.Module._wrapped_call_impl.__code__, nn.Module._call_impl.__code__))


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that this one is a view of, or itself."""
    return tensor._base if tensor._is_view() else tensor


def in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def memoryless(cls: type[torch.Tensor]) -> Any:
    """A tensor of a class that answers every operation by itself: of no use to what does not ask it."""
    return torch.Tensor._make_wrapper_subclass(cls, (), requires_grad=True)


def refuse_gradient(tensor: torch.Tensor, refuse: Any) -> None:
    """Call ``refuse`` if a gradient comes to a leaf, whatever its class makes of being asked."""
    with torch._C.DisableTorchFunctionSubclass():
        tensor.register_hook(refuse)


def is_checkpoint_wrapped(module: nn.Module) -> bool:
    """Whether it is torch's wrapper that recomputes the module inside."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    return isinstance(module, CheckpointWrapper)


class _NoHandle:
    @staticmethod
    def remove() -> None:
        pass


def parse_optimizers(returned: Any) -> tuple[list[Optimizer], list[Any]]:
    """Optimizers and schedulers in whatever form ``configure_optimizers`` returned them."""
    optimizers, schedulers, _ = _configure_optimizers(returned)
    return list(optimizers), [item["scheduler"] if isinstance(item, dict) else item for item in schedulers]


def parse_schedulers(returned: Any) -> tuple[list[Optimizer], list[dict[str, Any]]]:
    """Optimizers, and each schedule as a mapping that ``configure_optimizers`` may return."""
    optimizers, schedulers, monitor = _configure_optimizers(returned)
    configs = [dict(item) if isinstance(item, dict) else {"scheduler": item} for item in schedulers]
    for config in configs:
        if monitor is not None and isinstance(config["scheduler"], ReduceLROnPlateau):
            config.setdefault("monitor", monitor)
    return list(optimizers), configs


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers in it, which it has not in a forecast's dry run."""
    return not isinstance(tensor, FakeTensor)


def takes_batch_idx(step: Any) -> bool:
    """Whether Lightning hands a ``training_step`` the batch's index: it goes to a second argument of any name."""
    return is_param_in_hook_signature(step, "batch_idx", min_args=2)


def logs_now(trainer: Trainer) -> bool:
    """Whether a training step is being taken after which the Trainer writes what is logged."""
    return trainer.training and trainer._logger_connector.should_update_logs


def loss_scale(trainer: Trainer) -> float:
    """The gradient scaler's factor, 1 without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler is not None else 1.0


def unscale_again(trainer: Trainer, optimizer: Optimizer, module: nn.Module) -> None:
    """Divide gradients by the scaler's factor where it has unscaled those of this step already, and let it see if these
    overflowed."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return
    factor = 1 / scaler.get_scale()
    gradients = [one.grad for one in module.parameters() if one.grad is not None]
    for gradient in gradients:
        gradient.mul_(factor)
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for device, seen in found.items():
        mine = [one for one in gradients if one.device == device]
        if mine and not all(bool(one.isfinite().all()) for one in mine):
            seen.fill_(1.0)


def batches_done(trainer: Trainer) -> int:
    """Batches of the running epoch that have been trained on; 0 once the epoch's last batch is through."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch else progress.current.processed


def forget_empty_loader_states(checkpoint: dict[str, Any]) -> None:
    """Leave out what Lightning noted of loaders that gave no state. It would refuse to resume without them."""
    noted = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    if not any(noted.get("combined_loader", [])):
        noted.pop("combined_loader", None)


def combined_loader(trainer: Trainer) -> Any:
    """The iterator over all train loaders of a run."""
    return trainer.fit_loop._combined_loader


# ------------------------------------------------------------------ where a run stands in Lightning's loops

# The method that Lightning calls once the train loaders are there, and before it begins to draw from them.
LOADERS_ARE_THERE = "_load_combined_loader_states"


def counters(trainer: Trainer) -> dict[str, Any]:
    """What Lightning counts, and remembers of reloading, between two batches."""
    loop = trainer.fit_loop
    batch = loop.epoch_loop.batch_progress
    return {
        "epoch": loop.epoch_progress.current.completed,
        "batch": batch.current.ready,
        "total": batch.total.ready,
        "last": batch.is_last_batch,
        "logged": loop.epoch_loop._batches_that_stepped,
        "loaded": loop._last_train_dl_reload_epoch,
        "evaluated": loop.epoch_loop.val_loop._last_val_dl_reload_epoch,
    }


def set_counters(loops: dict[str, Any], point: dict[str, Any], *, within: bool) -> dict[str, Any]:
    """The ``fit_loop`` of a checkpoint, as Lightning writes it between two batches of an epoch, or between two epochs.

    Args:
        loops: As it is.
        point: From :func:`counters`.
        within: The epoch's end is still to come.
    """
    whole, more = point["epoch"], int(within)
    batch = point["batch"] if within else 0
    epochs = {"ready": whole + more, "started": whole + more, "processed": whole, "completed": whole}
    loops = {**loops, "epoch_progress": {"total": dict(epochs), "current": dict(epochs)}}
    loops["epoch_loop.batch_progress"] = {
        "total": dict.fromkeys(("ready", "started", "processed", "completed"), point["total"]),
        "current": dict.fromkeys(("ready", "started", "processed", "completed"), batch),
        "is_last_batch": within and point["last"],
    }
    val = loops["epoch_loop.val_loop.batch_progress"]
    loops["epoch_loop.val_loop.batch_progress"] = {
        **val,
        **{
            part: dict.fromkeys(val[part], 0 if part == "current" else val[part]["ready"])
            for part in ("total", "current")
        },
    }
    loops["epoch_loop.state_dict"] = {**loops["epoch_loop.state_dict"], "_batches_that_stepped": point["logged"]}
    return loops


def remember_loading(trainer: Trainer, point: dict[str, Any]) -> None:
    """Let Lightning reload loaders in the epochs in which the run that was cut would have."""
    trainer.fit_loop._last_train_dl_reload_epoch = point["loaded"]
    trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = point["evaluated"]


def believe_resumed(trainer: Trainer, *, within: bool, begins: bool) -> None:
    """Say to Lightning's loops whether they go on within an epoch, and whether an iterator for it is there already."""
    loop = trainer.fit_loop
    loop._restarting = loop.epoch_loop._restarting = within
    loop.epoch_loop.val_loop._restarting = False
    loop._resuming_from_checkpoint = within or begins
    if not within:
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()


def stop_restarting(trainer: Trainer, *, skip_validation: bool = False) -> None:
    """From here on Lightning does what it does in a run that was not resumed."""
    loop = trainer.fit_loop
    loop._restarting = loop.epoch_loop.val_loop._restarting = False
    loop.epoch_loop._skip_next_val = skip_validation


def run_batch_loop(trainer: Trainer, restarting: bool) -> None:
    """Whether the loop over batches takes itself for resumed: it then enters although all batches are through."""
    trainer.fit_loop.epoch_loop._restarting = restarting


def epoch_is_over(trainer: Trainer) -> bool:
    """Whether the running epoch's last batch is through, and not only as many as the run has steps."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def batch_is_through(trainer: Trainer) -> bool:
    """Whether the running batch has been trained on, although its end was not announced to all yet."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.processed == progress.ready > progress.completed


def metrics(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What was logged last, by which schedules and callbacks go."""
    return {name: one.detach().cpu().clone() for name, one in trainer.callback_metrics.items()}


def set_metrics(trainer: Trainer, logged: dict[str, torch.Tensor]) -> None:
    """Let schedules and callbacks find what was logged before the run was cut."""
    trainer._logger_connector._callback_metrics.update(logged)


def means(trainer: Trainer) -> list[tuple[Any, Any, Any]]:
    """What the running epoch has logged so far, of which its end shows the mean, sum or extreme: each with its value
    and count, which are replaced, and not changed, as more is logged."""
    results, found = trainer.fit_loop.epoch_loop._results, []
    for key in results:
        one = results[key]
        if one.is_tensor and one.meta.on_epoch and one._update_count:
            found.append((one, one.value, vars(one).get("cumulated_batch_size")))
    return found


def plain_means(noted: list[tuple[Any, Any, Any]]) -> list[dict[str, Any]]:
    """What :func:`means` gave, in plain values. Metrics of torchmetrics keep their own states, and are left out."""
    found = []
    for one, value, count in noted:
        meta = one.meta
        if getattr(torch, meta.reduce_fx.__name__, None) is meta.reduce_fx and meta.sync.group is None:
            plain = {name: getattr(meta, name) for name in _LOGGED}
            sync = {"sync_dist": meta.sync.should, "rank_zero_only": meta.sync.rank_zero_only}
            found.append({**plain, **sync, "reduce_fx": meta.reduce_fx.__name__, "value": value, "count": count})
    return found


_LOGGED = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")


def set_means(trainer: Trainer, logged: list[dict[str, Any]]) -> None:
    """Let the running epoch go on with what it had logged."""
    results = trainer.fit_loop.epoch_loop._results
    if logged:
        trainer._logger_connector._first_loop_iter = (
            True  # else the next batch passes for the epoch's first, and resets
        )
    for one in logged:
        value, count = one["value"].to(trainer.strategy.root_device), one["count"]
        rest = {name: item for name, item in one.items() if name not in ("value", "count")}
        results.log(value=value, sync_dist_fn=trainer.strategy.reduce, batch_size=1, **rest)
        result = results[f"{one['fx']}.{one['name']}"]
        result.value = value
        if count is not None:
            result.cumulated_batch_size = count.to(value.device)


def finish_epoch(trainer: Trainer) -> None:
    """What Lightning does after the hooks of an epoch's end: schedules that go by a metric, and the count."""
    loop = trainer.fit_loop
    epochs = loop.epoch_progress
    epochs.current.completed, epochs.total.completed = epochs.current.completed - 1, epochs.total.completed - 1
    loop.epoch_loop._update_learning_rates("epoch", update_plateau_schedulers=True)
    epochs.increment_completed()


def loader_states(trainer: Trainer) -> list[dict[str, Any]]:
    """Of the train loaders that keep a state of their own, in the order in which Lightning saves them."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined._state_dicts()


def load_loader_states(trainer: Trainer, states: list[dict[str, Any]], left_out: Iterable[Any]) -> None:
    """Give them back, but to those ``left_out``, and let Lightning not do it again."""
    loop = trainer.fit_loop
    loop._combined_loader_states_to_load = []
    left = {id(one) for one in left_out}
    own = [one for one in loop._combined_loader.flattened if keeps_state(one)]
    if len(own) == len(states):
        for loader, one in zip(own, states, strict=True):
            if id(loader) not in left:
                loader.load_state_dict(one)


def keeps_state(loader: Any) -> bool:
    """Whether a loader saves and restores where it is by itself."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def iterators_of(combined: Any) -> list[Any]:
    """Of the running epoch, one for each loader; a shorter loader's is replaced where it begins anew."""
    return combined._iterator.iterators


def taken_up(combined: Any, batches: int, again: Iterable[int]) -> None:
    """Let the combination know how many batches were drawn from its iterators, and which loaders began ``again``."""
    combined._iterator._idx = batches
    for number in again:
        combined._iterator._consumed[number] = True


def has_workers_running(loader: Any) -> bool:
    """Whether a loader keeps its workers from one epoch to the next, and has started them."""
    return getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is not None


def validation_loaders(trainer: Trainer) -> list[Any]:
    """Of the run, as far as they are there."""
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    return [] if combined is None else combined.flattened


def set_epoch_length(trainer: Trainer, batches: int) -> None:
    """Tell Lightning how many batches the epoch that begins has: for validation and progress it keeps the first's."""
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    trainer.fit_loop.max_batches = batches
    trainer.fit_loop._data_fetcher.length = batches  # a resumed run has made its iterator already
    interval = trainer.val_check_interval
    if trainer.val_check_batch is not None and isinstance(interval, float) and trainer.val_check_batch != float("inf"):
        trainer.val_check_batch = max(1, int(batches * interval))


def batch_hook_owner(trainer: Trainer, pl_module: LightningModule) -> object:
    """Whose ``on_after_batch_transfer`` Lightning calls: the DataModule's where it overrides it, else the module's."""
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.utilities.model_helpers import is_overridden

    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and is_overridden("on_after_batch_transfer", datamodule, LightningDataModule):
        return datamodule
    return pl_module


def before_batch_transfer(trainer: Trainer, batch: Any) -> Any:
    """What ``on_before_batch_transfer`` makes of a batch, the DataModule's or the module's."""
    return trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return module._compiled_call_impl is not None


def leave_out_of_ddp(pl_module: LightningModule, modules: Iterable[nn.Module]) -> bool:
    """Let DDP not wait for gradients of these modules when it next wraps ``pl_module``; with none, of all again.

    Else it needs ``find_unused_parameters``, or it stops with an error at the second step.

    Returns:
        Whether these are others than before: what DDP has wrapped already goes by those.
    """
    mine = {id(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers())}
    names = [name for name, tensor in (*pl_module.named_parameters(), *pl_module.named_buffers()) if id(tensor) in mine]
    before = vars(pl_module).pop("_ddp_params_and_buffers_to_ignore", [])
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(pl_module, names)
    return set(names) != set(before)


def expect_unused_parameters(strategy: object) -> None:
    """Let DDP, when it next wraps a model, look which parameters took part in a step. Others need nothing of this."""
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs["find_unused_parameters"] = True


def process_store() -> Any:
    """The process group's key-value store, by a connection of its own: others on it may wait for long.

    None where the other processes are made up, as in a forecast.
    """
    return None if torch.distributed.get_backend() == "fake" else _get_default_store().clone()


def saves_sharded(strategy: ModelParallelStrategy) -> bool:
    """Whether each process writes its own part of a checkpoint."""
    return strategy._save_distributed_checkpoint


def start_fake_processes(world: int) -> None:
    """Begin a process group in which this is the first process and nobody else exists: collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


def leave_ddp_out(strategy: Any) -> list[torch.Tensor]:
    """Let a strategy not wrap its model in DDP, whose C++ part takes no fake tensors, and allocate DDP's buckets.

    Returns:
        A list that will hold the buckets. Empty for other strategies, and where gradients are views of buckets.
    """
    buckets: list[torch.Tensor] = []
    if isinstance(strategy, DDPStrategy):
        views = strategy._ddp_kwargs.get("gradient_as_bucket_view", False)

        def wrap(model: nn.Module) -> nn.Module:
            if not views:
                buckets.extend(torch.empty_like(one) for one in model.parameters() if one.requires_grad)
            return model

        strategy._setup_model = wrap
        strategy._register_ddp_hooks = lambda: None
    return buckets


def expect_no_signals(trainer: Trainer) -> None:
    """Let the processes not tell each other of a SIGTERM, which under fake tensors each would seem to have got."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


@dataclass
class MemoryProfile:
    """Peaks of parts of a block, in bytes that torch's CPU allocator handed out over those at the part's beginning."""

    peaks: dict[Any, int] = field(default_factory=dict)
    _names: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def part(self, key: Any) -> Iterator[None]:
        name = f"eke: part {len(self._names)}"
        self._names[name] = key
        with torch.profiler.record_function(name):
            pass
        try:
            yield
        finally:
            with torch.profiler.record_function(_END):
                pass


@contextmanager
def memory_profile() -> Iterator[MemoryProfile]:
    """Watch the CPU allocator, kernels' own scratch included. Of memory that was there before it sees no release."""
    found = MemoryProfile()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        yield found
    now, key = 0, None
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda one: one.start_ns()):
        if event.name() in found._names:
            now, key = 0, found._names[event.name()]
            found.peaks[key] = 0
        elif event.name() == _END:
            key = None
        elif event.name() == "[memory]" and key is not None:
            now += event.nbytes()
            found.peaks[key] = max(found.peaks[key], now)


_END = "eke: end of a part"


def start_at(trainer: Trainer, step: int) -> None:
    """Let a run of automatic optimization believe that it has done a number of steps already."""
    done = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    done.ready = done.completed = step


_left_groups: list[Any] = []


def forget_group() -> None:
    """In a process that was forked from one with a process group: be in none. The group's threads were not copied, so
    that whoever asks the others for something, or ends the group, waits for ever."""
    c10d = torch.distributed.distributed_c10d
    if not torch.distributed.is_initialized():
        return
    world = c10d._world
    _left_groups.extend(world.pg_map)  # for to free one is to wait for its threads
    for held in ("pg_map", "pg_names", "pg_group_ranks", "pg_backend_config", "tags_to_pg", "pg_to_tag"):
        getattr(world, held).clear()
    c10d._unregister_all_process_groups()
    c10d._update_default_pg(None)
    world.group_count = 0


def forget_processes() -> None:
    """Empty what torch remembers of sharded tensors: it goes by how many processes there are, not by which."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("torch.distributed.tensor", "torch.distributed.device_mesh", "torch.distributed._")):
            for value in list(vars(module).values()):
                if not isinstance(value, type) and callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()
    _clear_sharding_prop_cache()
