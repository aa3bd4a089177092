"""What the engines have in common: arguments, blocks, recomputing, the watch, a trial save before the first step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from eke import EkeError, Technique, TechniqueStrategy, compat
from eke.seams.blocks import BlocksError, find_all_blocks
from eke.seams.recompute import Recomputing, recompute
from eke.seams.state import rng_state, set_rng_state
from eke.seams.wrapped import forget_state
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eke_zero.entry import RECORD
from eke_zero.watch import Watch


class ZeROError(EkeError):
    """What was asked for cannot be sharded, saved or loaded so."""


class Engine(TechniqueStrategy, Strategy):
    """Inherited by each engine, before a strategy of Lightning's. The arguments are :class:`~eke_zero.ZeRO`'s."""

    technique: ClassVar[Technique] = RECORD
    shards_in_setup: ClassVar[bool] = True

    def __init__(
        self,
        stage: int = 3,
        offload: str | None = None,
        engine: str = "torch",
        blocks: str | list[str] | None = None,
        remat: bool = False,
        checkpoint: str | None = None,
        compute_dtype: str | None = None,
        reduce_every_batch: bool = False,
        trial: bool = True,
        timeout: float = 1800.0,
        config: dict[str, Any] | None = None,
    ) -> None:
        _one_of("stage", stage, (1, 2, 3))
        _one_of("offload", offload, (None, "optimizer", "params"))
        _one_of("engine", engine, ("torch", "deepspeed"))
        _one_of("checkpoint", checkpoint, (None, "full", "sharded"))
        _one_of("compute_dtype", compute_dtype, (None, "bfloat16"))
        if offload == "params" and stage != 3:
            raise ZeROError(
                f"offload='params' with stage={stage}: weights that each process needs whole cannot wait in CPU "
                "memory. Give stage=3, or offload='optimizer'."
            )
        if engine == "torch" and stage == 1:
            if compute_dtype:
                raise ZeROError("compute_dtype needs weights that are gathered: stage 2 or 3. Use precision=.")
            if checkpoint == "sharded":
                raise ZeROError("checkpoint='sharded' with stage=1: only stages 2 and 3 have parts to write.")
        if config and engine != "deepspeed":
            raise ZeROError("config= is for engine='deepspeed'.")
        if timeout <= 0:
            raise ZeROError(f"timeout={timeout}: seconds, more than 0, are needed.")
        self.stage = stage
        self.offload = offload
        self.engine = engine
        self.blocks = blocks
        self.remat = remat
        self.checkpoint = checkpoint or ("full" if engine == "torch" else None)
        self.compute_dtype = compute_dtype
        self.reduce_every_batch = reduce_every_batch
        self.trial = trial
        self.limit = timeout
        self.config = config
        self._watch: Watch | None = None
        self._recomputed: Recomputing | None = None
        # The watch speaks first: it knows who hangs.
        super().__init__(timeout=timedelta(seconds=timeout + 60), **self._engine_settings())

    def _engine_settings(self) -> dict[str, Any]:
        return {}

    @property
    def keeps_on_host(self) -> tuple[str, ...]:
        """What is in CPU memory, beside the GPU's, for a forecast."""
        kept = {"optimizer": ("optimizer",), "params": ("parameters", "gradients", "optimizer")}
        return kept.get(self.offload, ())

    # ------------------------------------------------------------------ a run

    def setup_environment(self) -> None:
        self._begin(super().setup_environment)

    def _begin(self, connect: Callable[[], None]) -> None:
        connect()
        store = compat.process_store() if self.world_size > 1 and self._watch is None else None
        if store is not None:
            self._watch = Watch(store, self.global_rank, self.world_size, self.limit, self._end_children)
            self._watch.start()

    def _end_children(self) -> None:
        """Lightning's launcher ends the other processes of its machine when one dies, but not when it does itself."""
        if self.launcher is not None and hasattr(self.launcher, "kill"):
            self.launcher.kill(9)

    def find_units(self, module: nn.Module) -> list[nn.Module]:
        """The blocks, each of which is gathered as a whole.

        Raises:
            ZeROError: none found, or two that share weights.
        """
        try:
            found = [block for blocks in find_all_blocks(module, self.blocks) for block in blocks]
        except BlocksError as error:
            raise ZeROError(f"{error} ZeRO's argument blocks takes the path of a list, or several.") from None
        users: dict[int, set[int]] = {}
        inside = {id(part) for unit in found for part in unit.modules()}
        outside = [part for part in module.modules() if id(part) not in inside]
        for number, parts in enumerate([outside, *(unit.modules() for unit in found)]):
            for parameter in (p for part in parts for p in part._parameters.values() if p is not None):
                users.setdefault(id(parameter), set()).add(number)
        shared = [name for name, parameter in module.named_parameters() if len(users[id(parameter)]) > 1]
        if shared and self.stage > 1:
            raise ZeROError(
                f"{shared[0]!r} is used in several blocks, or in a block and outside, and each block is gathered by "
                "itself. Give stage=1, or untie it."
            )
        return found

    def _recompute(self, module: nn.Module) -> int:
        """Let the blocks be recomputed if that is asked for; how many."""
        if self.remat and self._recomputed is None:
            units = self.find_units(module)
            self._recomputed = recompute(units, owner=RECORD.name, model=module)
        return len(self._recomputed.wrappers) if self._recomputed is not None else 0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("the training step", super().training_step, args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("a validation step", super().validation_step, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("a test step", super().test_step, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("a prediction step", super().predict_step, args, kwargs)

    def _step(self, what: str, step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trainer = self.lightning_module.trainer
        self._tick(f"in {what}, after {trainer.global_step} steps")
        return step(*args, **kwargs)

    def _tick(self, doing: str) -> None:
        if self._watch is not None:
            self._watch.tick(doing)

    def teardown(self) -> None:
        if self._recomputed is not None:
            self._recomputed.undo()
            self._recomputed = None
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        if self._watch is not None:
            self._watch.explain(exception)
        super().on_exception(exception)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_watch": None}

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self._tick(f"saving {filepath}")
        super().save_checkpoint(checkpoint, filepath, storage_options)
        self._tick(f"having saved {filepath}")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self._tick(f"loading {checkpoint_path}")
        return super().load_checkpoint(checkpoint_path, weights_only)

    def on_train_start(self) -> None:
        super().on_train_start()
        trainer = self.lightning_module.trainer
        if self.trial and any(isinstance(one, Checkpoint) for one in trainer.callbacks) and not trainer.fast_dev_run:
            self._try_saving(trainer)

    def _try_saving(self, trainer: Trainer) -> None:
        """Save and load once, and see that nothing has changed by it.

        Raises:
            ZeROError: it fails, or what was loaded differs from what was saved.
        """
        folders = [getattr(one, "dirpath", None) for one in trainer.callbacks if isinstance(one, Checkpoint)]
        folder = next((one for one in folders if one), trainer.default_root_dir)
        path = Path(str(self.broadcast(os.path.join(str(folder), f".eke-trial-{os.getpid()}.ckpt"))))
        if "://" in str(folder):
            return  # a store that may charge for it, or keep what is removed
        fresh = [optimizer for optimizer in trainer.optimizers if not optimizer.state]
        random, before = rng_state(), self._fingerprint()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            trainer.save_checkpoint(path)
            loaded = self.load_checkpoint(path)
            self._load_back(loaded)
            self.barrier("eke-zero trial")
            changed = [name for name, value in self._fingerprint().items() if value != before[name]]
            if changed:
                raise ZeROError(f"after loading it {changed[0]!r} differs from what was saved")
        except Exception as error:
            raise ZeROError(
                f"a checkpoint saved to {path.parent} before the first step does not come back: {error}. Nothing has "
                "been trained. ZeRO(trial=False) leaves this check out."
            ) from error
        finally:
            if self.is_global_zero:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            for optimizer in fresh:  # to save an optimizer without states, torch lets it make them by a step
                self._forget_states(optimizer)
            set_rng_state(random)

    def _load_back(self, loaded: dict[str, Any]) -> None:
        """Put a checkpoint's weights and optimizer states into the running model."""
        raise NotImplementedError

    def _forget_states(self, optimizer: Any) -> None:
        forget_state(optimizer)

    def _tensor(self, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def _fingerprint(self) -> dict[str, float]:
        """A number for each tensor that this process holds, equal for equal contents."""
        module = self.lightning_module
        return {
            name: float(self._tensor(tensor).detach().double().nan_to_num().flatten().cumsum(0).sum())
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ZeROError(f"{name}={value!r}: one of {', '.join(map(repr, allowed))} is needed.")


def say_plan(strategy: Engine, module: LightningModule, units: int) -> None:
    """Tell once what is divided among whom."""
    total = sum(parameter.numel() for parameter in module.parameters())
    rank_zero_info(
        f"ZeRO stage {strategy.stage}: {total:,} parameters among {strategy.world_size} processes, {units} blocks."
    )
