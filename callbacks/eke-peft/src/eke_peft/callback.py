"""PEFT: train a small part of a model, or something small that is put into it, and save only that.

peft puts its layers in, where it has the method; BitFit, bottleneck adapters, visual prompts and intrinsic dimension
are in :mod:`eke_peft.methods`. Here is when: before weights load and the strategy wraps the model, at each stage, once.

Source: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
https://arxiv.org/abs/2106.09685; LoRA+, Hayou, Ghosh, Yu 2024, https://arxiv.org/abs/2402.12354; QLoRA, Dettmers,
Pagnoni, Holtzman, Zettlemoyer 2023, https://arxiv.org/abs/2305.14314. Survey section 3, Table 1.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from eke import Technique, TechniqueCallback
from eke.seams import gate
from eke.seams.blocks import find_blocks
from eke.seams.state import KEY
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import AdaLoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from eke_peft.entry import RECORD
from eke_peft.methods import (
    LIBRARY,
    METHODS,
    OWN,
    PROMPTING,
    PROMPTS,
    PEFTError,
    Prompts,
    close_fast_path,
    fingerprint,
    linear_layers,
    outputs,
    patch_size,
    put_adapters,
    put_intrinsic,
    put_prompts,
    scaled,
    task_of,
    token_width,
    tuned,
)  # fmt: skip
from eke_peft.quantized import keep_weights, quantize_layers, quantized_layers, start_at_rest
from eke_peft.ranks import Ranks
from eke_peft.rates import Apart, join
from eke_peft.saved import host_of, merge

_ADAPTER = re.compile(r"\.(?=(?:lora|ia3|hada|lokr|vera|oft|eke)_)")  # where a layer's own name ends
HEADS = ("classifier", "score", "qa_outputs", "classification_head")  # what from_pretrained makes anew


class PEFT(TechniqueCallback):
    """Tune a model by training little of it. Give it to ``callbacks=``.

    Example::

        trainer = Trainer(callbacks=[PEFT("lora", settings={"r": 8}, train=["head.*"])])

    Args:
        method: ``"lora"``, ``"rslora"``, ``"dora"``, ``"pissa"``, ``"loftq"``, ``"adalora"``, ``"ia3"``, ``"bitfit"``,
            ``"adapters"`` (Houlsby's bottlenecks), ``"vpt"`` (visual prompts), ``"intrinsic"``, ``"head"`` (nothing but
            ``train``); for Hugging Face models also ``"prompt"``, ``"prefix"``, ``"p-tuning"``; or any configuration
            of peft's.
        settings: Of the method: those of peft's configuration; ``width`` and ``after_attention`` of adapters;
            ``tokens``, ``deep``, ``prefix`` and ``dropout`` of vpt; ``dimension`` of intrinsic.
        targets: Dotted names of the layers, inside ``host``; for bitfit, patterns of biases. By default all linear
            layers of the blocks; for adapters those that end attention and MLP; for ia3 keys, values and the MLP's end.
        train: Patterns of names of further parameters that train, such as ``"head.*"``. By default what lies
            outside of the Hugging Face model and its new head; in a plain model, nothing.
        host: Dotted path of the part that is adapted. By default the Hugging Face model inside, else all of it.
        blocks: Dotted path of the list of blocks, where the search for them needs help.
        lr_ratio: LoRA+: learning rate of the second matrix over that of the first; 16 in the paper.
        quantize: ``"nf4"`` or ``"int8"``: keep the adapted layers' weights quantized by bitsandbytes (QLoRA).
        checkpoint: ``"adapter"`` saves what trains and a hash of the rest; ``"full"`` all.
        merge: Add the adapter to the weights when the run is over, after its last checkpoint.
        adapter: Name of the adapter; others that are in the model already stay, and act as they did.

    Raises:
        PEFTError: a method that the model has no place for; a checkpoint of another base; settings that nobody knows.
    """

    technique: ClassVar[Technique] = RECORD

    def __init__(
        self,
        method: str | Any = "lora",  # a PeftConfig, whose annotations no command line reads
        settings: dict[str, Any] | None = None,
        targets: list[str] | None = None,
        train: list[str] | None = None,
        host: str | None = None,
        blocks: str | None = None,
        lr_ratio: float | None = None,
        quantize: Literal["nf4", "int8"] | None = None,
        checkpoint: Literal["adapter", "full"] = "adapter",
        merge: bool = False,
        adapter: str = "default",
    ) -> None:
        if isinstance(method, str) and method not in METHODS:
            raise PEFTError(f"method={method!r}: one of {', '.join(METHODS)}, or a configuration of peft's, is needed.")
        if quantize not in (None, "nf4", "int8"):
            raise PEFTError(f"quantize={quantize!r}: 'nf4' or 'int8' is needed.")
        if method == "loftq" and quantize is None:
            raise PEFTError("'loftq' makes up for rounding, and nothing is rounded. Give quantize='nf4' or 'int8'.")
        if checkpoint not in ("adapter", "full"):
            raise PEFTError(f"checkpoint={checkpoint!r}: 'adapter' or 'full' is needed.")
        if quantize and checkpoint == "full":
            raise PEFTError(
                "quantize= with checkpoint='full': quantized weights are made anew from the base. Give 'adapter'."
            )
        if quantize and merge:
            raise PEFTError("quantize= with merge=True would round merged weights again. Export the adapter instead.")
        if merge and method in ("adapters", "vpt", *PROMPTING):
            raise PEFTError(f"merge=True with {method!r}, which is no sum of weights.")
        if lr_ratio is not None and (
            lr_ratio <= 0 or (isinstance(method, str) and LIBRARY.get(method, (None,))[0] is not LIBRARY["lora"][0])
        ):
            raise PEFTError(f"lr_ratio={lr_ratio} with {method!r}: LoRA+ needs a positive ratio and a LoRA.")
        self.method = method
        self.settings = dict(settings or {})
        self.targets = targets
        self.train = train
        self.host = host
        self.blocks = blocks
        self.lr_ratio = lr_ratio
        self.quantize = quantize
        self.checkpoint = checkpoint
        self.merge = merge
        self.adapter = adapter
        self._config()  # a wrong setting should fail now
        self._base = ""  # hash of the base
        self._gated: list[nn.Module] = []
        self._module: LightningModule | None = None
        self._ranks: Ranks | None = None
        self._merged = False
        self._said = False

    # ------------------------------------------------------------------ the model

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._merged = self._merged and trainer.state.fn != "fit"
        whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if isinstance(self._config(), AdaLoraConfig) and (not whole or isinstance(trainer.strategy, DeepSpeedStrategy)):
            raise PEFTError(
                f"AdaLoRA looks at whole gradients, which {type(trainer.strategy).__name__} shards. Give "
                "strategy='ddp' or ZeRO(stage=1)."
            )

    def alter_model(self, pl_module: LightningModule) -> None:
        self._module = pl_module
        if self._merged:
            return  # the plain model is what is evaluated now
        if self._missing(pl_module):  # once: a second time would begin the adapter anew
            self._put(pl_module)
        self._base = pl_module.eke_peft["hash"]
        config = self._config()
        if isinstance(config, AdaLoraConfig):
            self._ranks = Ranks(host_of(pl_module, self.host)[1], copy.deepcopy(config), self.adapter)
        if self.method == "vpt":
            blocks = find_blocks(host_of(pl_module, self.host)[1], self.blocks)
            self._gated = put_prompts(
                pl_module, getattr(pl_module, PROMPTS), blocks, self._own()["prefix"], RECORD.name
            )

    def _missing(self, pl_module: LightningModule) -> bool:
        """Whether the model has yet to be given this adapter.

        Raises:
            PEFTError: it has another one of this name.
        """
        there = (getattr(pl_module, "eke_peft", None) or {}).get("description")
        if there and there["adapter"] == self.adapter and there != self._description():
            raise PEFTError(
                f"{type(pl_module).__name__} is tuned by {there['method']} already, with other settings. Merge that "
                "(eke_peft.merge), or give another adapter= beside it."
            )
        merged = self.method not in ("bitfit", "head") and not tuned(pl_module)
        return there is None or there["adapter"] != self.adapter or merged

    def _put(self, pl_module: LightningModule) -> None:
        path, host = host_of(pl_module, self.host)
        before = dict(pl_module.named_parameters())
        frozen = self._frozen(pl_module, path, host)
        if self.checkpoint == "full" and (quantized := quantized_layers(host)):
            raise PEFTError(f"{quantized[0]!r} is quantized, and such weights do not load from a checkpoint. Give "
                            "checkpoint='adapter', which leaves them to the base.")  # fmt: skip
        hashed = fingerprint(frozen)
        cards = [torch.cuda.current_device()] if torch.cuda.is_available() else []  # which manual_seed seeds too
        with torch.random.fork_rng(devices=cards):  # first values of the technique's own, and the user's stream stays
            torch.manual_seed(int(torch.randint(2**40, (), generator=self.generator)))
            weights = quantize_layers(host, self._targets(host), self.quantize) if self.quantize else {}
            keep_weights(host)
            self._put_method(pl_module, path, host)
            if self.method == "loftq":
                start_at_rest(host, weights, self.adapter)
        for part in host.modules():
            if isinstance(part, nn.TransformerEncoderLayer):
                close_fast_path(part)
        copied = {
            id(p)
            for part in host_of(pl_module, self.host)[1].modules()
            if isinstance(part, ModulesToSaveWrapper)
            for p in part.original_module.parameters()
        }  # peft trains a copy
        for name, parameter in before.items():
            parameter.requires_grad_(name not in frozen and id(parameter) not in copied)
        pl_module.eke_peft = {"hash": hashed, "description": self._description()}
        if getattr(host, "is_gradient_checkpointing", False) and hasattr(host, "enable_input_require_grads"):
            host.enable_input_require_grads()  # or recomputing would find nothing that needs a gradient
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise PEFTError(f"with {self.method!r} nothing in {type(pl_module).__name__} would train.")

    def _put_method(self, pl_module: LightningModule, path: str, host: nn.Module) -> None:
        own = self._own()
        if self.method in ("bitfit", "head"):
            return  # nothing is put in
        if self.method == "adapters":
            names = self.targets or outputs(host, self.blocks, own["after_attention"])
            put_adapters(host, names, own["width"])
        elif self.method == "vpt":
            blocks = find_blocks(host, self.blocks)
            width = token_width(blocks[0])
            layers = len(blocks) if own["deep"] else 1
            pl_module.add_module(PROMPTS, Prompts(layers, own["tokens"], width, patch_size(host), own["dropout"]))
        elif self.method == "intrinsic":
            put_intrinsic(host, self.targets or linear_layers(host, self.blocks), own["dimension"], seed=0)
        else:
            self._put_library(pl_module, path, host)

    def _put_library(self, pl_module: LightningModule, path: str, host: nn.Module) -> None:
        config = copy.deepcopy(self._config())
        if config.is_prompt_learning:
            if not hasattr(host, "prepare_inputs_for_generation") and not hasattr(host, "config"):
                raise PEFTError(
                    f"{self.method!r} puts tokens before a Hugging Face model's own, and {type(host).__name__} is none."
                )
            if not path:
                raise PEFTError(
                    f"{self.method!r} puts a model around yours: keep it in an attribute of the LightningModule."
                )
            config.task_type = config.task_type or task_of(host)
            self._wrap(pl_module, path, host, config)
            return
        if tuned(host) == "peft" and self.adapter in getattr(host, "peft_config", {}):
            raise PEFTError(
                f"the model has an adapter {self.adapter!r} already, which would begin anew. Give another adapter=."
            )
        if self.targets is not None:
            config.target_modules = self.targets
        elif self.method == "ia3":
            config.target_modules, config.feedforward_modules = scaled(host, self.blocks)
        elif hasattr(config, "target_modules") and config.target_modules is None:
            config.target_modules = linear_layers(host, self.blocks)
        wanted = config.target_modules if isinstance(config.target_modules, (list, set)) else ()
        for name, part in host.named_modules():
            if isinstance(part, nn.MultiheadAttention) and any(f".{name}".endswith(f".{one}") for one in wanted):
                raise PEFTError(  # before anything is put in
                    "peft adds its matrices to nn.MultiheadAttention's weights in each forward pass and takes them "
                    f"off again, so that the base drifts by rounding. Leave {name!r} out of targets=."
                )
        acted = {part: list(part.active_adapters) for part in host.modules() if isinstance(part, BaseTunerLayer)}
        try:
            with _unmeshed(pl_module):
                inject_adapter_in_model(config, host, adapter_name=self.adapter)
            cast_adapter_dtype(host, self.adapter)  # what trains is kept in float32 beside a half-precision base
        except ValueError as error:
            if "get_peft_model" not in str(error) or not path:
                raise PEFTError(
                    f"peft does not put {config.peft_type.value} into {type(host).__name__}: {error}"
                ) from error
            self._wrap(pl_module, path, host, config)
            return
        for part in host.modules():
            if isinstance(part, BaseTunerLayer) and acted.get(part):
                part.set_adapter([*acted[part], self.adapter])  # peft switches to the new one alone

    def _wrap(self, pl_module: LightningModule, path: str, host: nn.Module, config: PeftConfig) -> None:
        """Put peft's own model around the host, in the attribute that holds it."""
        parent, _, child = path.rpartition(".")
        setattr(pl_module.get_submodule(parent), child, get_peft_model(host, config, adapter_name=self.adapter))

    def _config(self) -> PeftConfig | None:
        """peft's configuration, with targets where they are known."""
        if isinstance(self.method, PeftConfig):
            if self.settings:
                raise PEFTError("settings= beside a configuration of peft's: put them into it.")
            return self.method
        if self.method in OWN:
            if unknown := [key for key in self.settings if key not in OWN[self.method]]:
                raise PEFTError(
                    f"settings of {self.method!r} are {', '.join(OWN[self.method]) or 'none'}, not {unknown[0]!r}."
                )
            return None
        kind, defaults = LIBRARY[self.method]
        given = {**defaults, **self.settings}
        if str(given.get("init_lora_weights")).startswith("pissa_niter") and self.checkpoint == "adapter":
            raise PEFTError(
                "init_lora_weights='pissa_niter_...' leaves another rest of the base each time, which a checkpoint of "
                "the adapter does not hold. Give 'pissa', or checkpoint='full'."
            )
        try:
            return kind(**given)
        except TypeError as error:
            raise PEFTError(f"settings of {self.method!r}: {error}.") from None

    def _own(self) -> dict[str, Any]:
        return {**OWN.get(self.method, {}), **self.settings} if isinstance(self.method, str) else {}

    def _targets(self, host: nn.Module) -> list[str]:
        return self.targets or linear_layers(host, self.blocks)

    def _frozen(self, pl_module: LightningModule, path: str, host: nn.Module) -> dict[str, nn.Parameter]:
        """Parameters of the model as it came that will not train, by name."""
        inside = f"{path}." if path else ""
        frozen, biases = {}, False
        for name, parameter in pl_module.named_parameters():
            relative = name.removeprefix(inside)
            outside = not name.startswith(inside)
            if self.method == "bitfit" and not outside and name.endswith("bias"):
                trains = self.targets is None or any(fnmatchcase(relative, pattern) for pattern in self.targets)
                biases = biases or trains
            else:
                trains = False
            if self.train is not None:
                trains = trains or any(fnmatchcase(name, pattern) for pattern in self.train)
            elif path:
                trains = trains or outside or relative.split(".")[0] in HEADS
            if trains and not (parameter.is_floating_point() or parameter.is_complex()):
                part = relative.rpartition(".")[0]
                raise PEFTError(
                    f"{name!r} should train, and is quantized ({parameter.dtype}). Load the model with "
                    f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{part!r}]), or leave it out of train=."
                )
            if not trains:
                frozen[name] = parameter
        if self.method == "bitfit" and not biases:
            raise PEFTError(f"{type(host).__name__} has no biases that BitFit could train. Try method='lora'.")
        return frozen

    def _description(self) -> dict[str, Any]:
        """The method as plain values, to be compared with a checkpoint's."""
        if isinstance(self.method, PeftConfig):
            given = {key: _plain(value) for key, value in sorted(self.method.to_dict().items())}
            return {"method": str(self.method.peft_type.value), "settings": given, "adapter": self.adapter}
        settings = {key: _plain(value) for key, value in sorted(self.settings.items())}
        return {"method": self.method, "settings": settings, "targets": self.targets, "host": self.host,
                "blocks": self.blocks, "quantize": self.quantize, "adapter": self.adapter}  # fmt: skip

    def restore_model(self, pl_module: LightningModule) -> None:
        gate.detach(self._gated, RECORD.name)
        self._gated = []

    # ------------------------------------------------------------------ training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._said:
            rank_zero_info(self.summary(pl_module))
            self._said = True

    def summary(self, pl_module: LightningModule) -> str:
        """What trains, in words."""
        parameters = list(pl_module.parameters())
        trained = [p for p in parameters if p.requires_grad]
        count, total = sum(map(Tensor.numel, trained)), sum(map(Tensor.numel, parameters))
        method = self.method if isinstance(self.method, str) else self.method.peft_type.value
        places: dict[str, list[str]] = {}  # to the modules and numbers of each
        sizes: dict[str, int] = {}
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                path = _ADAPTER.split(name.replace("_orig_mod.", ""))[0]
                place = re.sub(r"\.\d+(?=\.)", ".*", path)
                sizes[place] = sizes.get(place, 0) + parameter.numel()
                places.setdefault(place, []).append(path)
        lines = [
            f"  {place}: {len(set(paths))} x {sizes[place] // len(set(paths)):,}" for place, paths in places.items()
        ]
        return (
            f"PEFT {method}: {count:,} of {total:,} parameters train ({100 * count / total:.2f} %), "
            f"{sum(p.nbytes for p in trained):,} bytes of {sum(p.nbytes for p in parameters):,}:\n" + "\n".join(lines)
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ranks is not None:
            self._ranks.begin(trainer.estimated_stepping_batches)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._ranks is not None:
            self._ranks.regularize()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.method == "vpt":  # the backbone is as in evaluation while prompts train
            host_of(pl_module, self.host)[1].eval()
            getattr(pl_module, PROMPTS).train()

    def alter_optimizer(self, optimizer: Optimizer) -> Optimizer:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        if not any(group["params"] for group in optimizer.param_groups):
            raise PEFTError(
                "the optimizer that configure_optimizers returned holds none of the parameters that train. Give it "
                "self.parameters(): frozen ones are taken out of it."
            )
        if self.lr_ratio is not None:
            second = {id(p) for name, p in self._module.named_parameters() if ".lora_B." in name}
            optimizer.register_step_pre_hook(Apart(second, self.lr_ratio))
            optimizer.register_step_post_hook(join)
        if self._ranks is not None:
            optimizer.register_step_post_hook(self._ranks.step)
        return optimizer

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.merge:
            merge(pl_module)
            self._merged = True

    # ------------------------------------------------------------------ checkpoints

    def manifest(self) -> dict[str, Any] | None:
        if self._module is None or not getattr(self._module, "eke_peft", None):
            return None
        base = getattr(getattr(host_of(self._module, self.host)[1], "config", None), "_name_or_path", "")
        return {**self._description(), "base": str(base), "hash": self._base, "train": self.train,
                "checkpoint": self.checkpoint}  # fmt: skip

    def shape_from(self, manifest: dict[str, Any], pl_module: LightningModule) -> None:
        if self._merged:
            raise PEFTError(
                "the adapter has been merged into this model, which is no more the checkpoint's base. Load it into "
                "a fresh one: eke.load_from_checkpoint(Model, path)."
            )
        if not getattr(pl_module, "eke_peft", None):
            self._adopt(manifest)
            self._module = pl_module
            self._put(pl_module)
            self._base = pl_module.eke_peft["hash"]
        mine = {key: value for key, value in self._description().items() if manifest.get(key) != value}
        if mine:
            key, value = next(iter(mine.items()))
            raise PEFTError(f"the checkpoint was written with {key}={manifest.get(key)!r}, and this run has {value!r}.")
        if manifest["checkpoint"] == "full":
            self._base = pl_module.eke_peft["hash"] = manifest["hash"]  # which comes with it
        elif manifest["hash"] != self._base:
            of = f" of {manifest['base']}" if manifest["base"] else ""
            raise PEFTError(
                f"the checkpoint belongs to another base: the frozen parameters{of} had the hash "
                f"{manifest['hash'][:12]}, and {type(pl_module).__name__}'s have {self._base[:12]}. Load the same "
                "pretrained weights first."
            )

    def _adopt(self, manifest: dict[str, Any]) -> None:
        """Be what a checkpoint says, where a model is loaded without the callback of its run."""
        if manifest["method"] not in METHODS or self.method != "lora" or self.settings:
            return
        for key in ("method", "settings", "targets", "host", "blocks", "quantize", "adapter", "train"):
            setattr(self, key, manifest[key])

    def state_dict(self) -> dict[str, Any]:
        return {} if self._ranks is None else self._ranks.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._ranks is not None:
            self._ranks.load_state_dict(state)

    def alter_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.checkpoint == "full" or self._module is None or not getattr(self._module, "eke_peft", None):
            return
        kept = trained_names(self._module)
        checkpoint["state_dict"] = {
            k: v for k, v in checkpoint["state_dict"].items() if k.replace("_orig_mod.", "") in kept
        }

    def complete_checkpoint(self, checkpoint: dict[str, Any], pl_module: LightningModule) -> None:
        if not getattr(pl_module, "eke_peft", None):
            return
        entry = checkpoint.get(KEY, {}).get("techniques", {}).get(RECORD.name, {})
        if (entry.get("manifest") or {}).get("checkpoint", self.checkpoint) == "full":
            return
        saved = checkpoint["state_dict"]
        if not isinstance(saved, dict):
            raise PEFTError(
                "a checkpoint of the adapter is one file, and this one is sharded. Give ZeRO(checkpoint='full')."
            )
        if lost := sorted(trained_names(pl_module) - set(saved)):
            raise PEFTError(
                f"the checkpoint holds no {lost[0]!r}, which trains in this run: its train= or method differ."
            )
        own = {
            name
            for name, _ in (
                *pl_module.named_parameters(remove_duplicate=False),
                *pl_module.named_buffers(remove_duplicate=False),
            )
        }
        base = {name: value for name, value in pl_module.state_dict().items() if name in own}  # no notes of quantizers
        checkpoint["state_dict"] = {**base, **saved}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_module": None, "_ranks": None, "_gated": []}


def trained_names(module: nn.Module) -> set[str]:
    """Names of what a checkpoint of the adapter holds: parameters that train, and buffers, which training may move."""
    names = {
        name.replace("_orig_mod.", "") for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    state = {name.replace("_orig_mod.", "") for name in module.state_dict()}
    floating = {
        name.replace("_orig_mod.", "")
        for name, one in module.named_buffers()
        if "running_" in name or "num_batches" in name
    }
    return (names | floating) & state


@contextmanager
def _unmeshed(module: LightningModule) -> Iterator[None]:
    """Hide the processes' mesh, which Lightning keeps on the module, and peft takes for tensor parallelism."""
    mesh, module._device_mesh = module._device_mesh, None
    try:
        yield
    finally:
        module._device_mesh = mesh


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
