"""PEFT: train a small part of a model, or something small that is put into it, and save only that.

peft puts its layers in, where it has the method (:mod:`eke_peft.library`); bottleneck adapters, visual prompts and
intrinsic dimension have a module each. Here is when: before weights load and the strategy wraps the model, at each
stage, once.

Source: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
https://arxiv.org/abs/2106.09685; LoRA+, Hayou, Ghosh, Yu 2024, https://arxiv.org/abs/2402.12354; QLoRA, Dettmers,
Pagnoni, Holtzman, Zettlemoyer 2023, https://arxiv.org/abs/2305.14314. Survey section 3, Table 1.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from eke import Run, Technique, TechniqueCallback
from eke.coordinator import arguments
from eke.seams.blocks import Blocks
from eke.seams.names import plain
from eke.seams.patches import patch_blocks, relative_positions
from eke.seams.state import KEY
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import AdaLoraConfig, PeftConfig
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from eke_peft.adapters import put_adapters
from eke_peft.base import completed, fingerprint, frozen_parameters, plain_values, trained_names
from eke_peft.entry import RECORD
from eke_peft.errors import PEFTError
from eke_peft.intrinsic import put_intrinsic, weights_of
from eke_peft.library import LIBRARY, PROMPTING, configuration, put_library
from eke_peft.methods import METHODS, OWN, close_fast_path, tuned
from eke_peft.prompts import PROMPTS, Prompts, patch_size, put_prompts, token_width
from eke_peft.quantized import keep_weights, quantize_layers, quantized_layers, start_at_rest
from eke_peft.ranks import Ranks
from eke_peft.rates import Apart, join
from eke_peft.saved import host_of, merge, say_what_is_tied
from eke_peft.targets import ALL, linear_layers, named, outputs

_ADAPTER = re.compile(r"\.(?=(?:lora|ia3|hada|lokr|vera|oft|eke)_)")  # where a layer's own name ends


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
            ``tokens``, ``deep``, ``prefix`` and ``dropout`` of vpt; ``dimension`` and ``parameters`` of
            intrinsic.
        targets: Patterns of names of the layers inside ``host``, such as ``"q_proj"`` or ``"*.mlp.*"``; for bitfit, of
            biases. ``["all-linear"]``: all linear layers of the blocks. By default, for LoRA and its kin, what peft
            takes in an architecture that it knows, such as queries and values, and all linear layers in another one or
            on a quantized base; for adapters those that end attention and MLP; for ia3 keys, values and the MLP's end.
        train: Patterns of names of further parameters that train, such as ``"head.*"``, or names of modules. By default
            what lies outside of the Hugging Face model and its new head; in a plain model, nothing.
        host: Dotted path of the part that is adapted. By default the Hugging Face model inside, else all of it.
        blocks: Dotted paths of lists of blocks, one or several, in which layers are looked for. By default all of the
            model; for vpt the one that sees images.
        lr_ratio: LoRA+: learning rate of the second matrix over that of the first; 16 in the paper.
        quantize: ``"nf4"`` or ``"int8"``: keep the adapted layers' weights quantized by bitsandbytes (QLoRA).
        checkpoint: ``"adapter"`` saves what trains and a hash of the rest; ``"full"`` all, as is done by itself beside
            a technique that writes to weights which do not train.
        merge: Add the adapter to the weights when the run is over, after its last checkpoint.
        adapter: Name of the adapter; others that are in the model already stay, and act as they did.

    Raises:
        NamesError: a pattern that meets nothing.
        PEFTError: a method that the model has no place for; a checkpoint of another base; settings that nobody knows.
    """

    technique: ClassVar[Technique] = RECORD
    may_change = ("checkpoint", "merge")
    must_not_change = ("method", "settings", "targets", "host", "blocks", "quantize", "adapter")

    def __init__(
        self,
        method: str | Any = "lora",  # a PeftConfig, whose annotations no command line reads
        settings: dict[str, Any] | None = None,
        targets: list[str] | None = None,
        train: list[str] | None = None,
        host: str | None = None,
        blocks: str | list[str] | None = None,
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
        self._writers: list[str] = []  # other techniques of the run that write to weights
        self._module: LightningModule | None = None
        self._ranks: Ranks | None = None
        self._merged = False
        self._said = False

    # ------------------------------------------------------------------ the model

    def check(self, run: Run) -> None:
        self._merged = self._merged and not run.fitting
        self._writers = run.writers("weights") if run.fitting else []

    def refuses(self, others: Sequence[Technique]) -> str:
        writing = [one.name for one in others if "weights" in one.touches("replaces") | one.touches("changes")]
        if self.quantize is None or not writing:
            return ""
        return (
            f"quantize={self.quantize!r} keeps the weights of the base as they were, and {writing[0]!r} writes to "
            "weights. Leave one of them out."
        )

    def alter_model(self, run: Run) -> None:
        pl_module = run.module
        self._module = pl_module
        if self._merged:
            return  # the plain model is what is evaluated now
        if self._missing(pl_module):  # once: a second time would begin the adapter anew
            self._put(pl_module)
        self._base = pl_module.eke_peft["hash"]
        if self._writers:
            if quantized := quantized_layers(host_of(pl_module, self.host)[1]):
                raise PEFTError(
                    f"{quantized[0]!r} is quantized, and {self._writers[0]!r} writes to weights. Leave it out."
                )
            # Of the base as well: a checkpoint of the adapter alone would go on from the weights as they were given.
            pl_module.eke_peft["writers"] = sorted({*pl_module.eke_peft.get("writers", ()), *self._writers})
        config = self._config()
        if isinstance(config, AdaLoraConfig):
            self._ranks = Ranks(host_of(pl_module, self.host)[1], copy.deepcopy(config), self.adapter)
        if self.method == "vpt":
            found = self._seeing(host_of(pl_module, self.host)[1])
            blocks = run.blocks([found])
            put_prompts(getattr(pl_module, PROMPTS), blocks, self._own()["prefix"])

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
        frozen = frozen_parameters(pl_module, path, host, self.method, self.targets, self.train)
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
            parameter.requires_grad_(plain(name) not in frozen and id(parameter) not in copied)
        say_what_is_tied(pl_module)
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
            ends = None if self.targets else outputs(host, self.blocks, own["after_attention"])
            put_adapters(host, ends or self._targets(host), own["width"])
        elif self.method == "vpt":
            blocks = self._seeing(host)
            width = token_width(blocks[0])
            layers = len(blocks) if own["deep"] else 1
            pl_module.add_module(PROMPTS, Prompts(layers, own["tokens"], width, patch_size(host), own["dropout"]))
        elif self.method == "intrinsic":
            put_intrinsic(host, self._moved(pl_module, path, host, own["parameters"]), own["dimension"], seed=0)
        else:
            config, targets = self._config(), self.targets
            free = targets is None and getattr(config, "target_modules", None) is None and self.method != "ia3"
            if self.quantize and free:
                targets = [ALL]  # as QLoRA does, which found that it takes all to keep up with full tuning
            put_library(pl_module, path, host, config, self.adapter, targets, self.blocks)

    def _seeing(self, host: nn.Module) -> Blocks:
        """The blocks that get visual prompts: those that see images."""
        lists = patch_blocks(host, self.blocks, 0, "PEFT('vpt')", "")
        if pairs := [name for one in lists for name in relative_positions(one.container)]:
            raise PEFTError(
                f"The blocks of {type(host).__name__} hold relative positions ({pairs[0]}), for all tokens in their "
                "places: prompts have none. 'vpt' serves blocks without, such as ViT's; here 'lora' or 'adapters' does."
            )
        if len(lists) > 1:
            raise PEFTError(
                f"'vpt' puts tokens before those of one list of blocks, and {type(host).__name__} has "
                f"{', '.join(one.path for one in lists)}. Say which: blocks='{lists[0].path}'."
            )
        return lists[0]

    def _config(self) -> PeftConfig | None:
        """peft's configuration; None for methods that are not peft's."""
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
        return configuration(self.method, self.settings, self.checkpoint)

    def _own(self) -> dict[str, Any]:
        return {**OWN.get(self.method, {}), **self.settings} if isinstance(self.method, str) else {}

    def _targets(self, host: nn.Module) -> list[str]:
        return named(host, self.targets, self.blocks) if self.targets else linear_layers(host, self.blocks)

    def _moved(self, module: LightningModule, path: str, host: nn.Module, parameters: str) -> list[nn.Parameter]:
        """What intrinsic dimension moves."""
        if parameters not in ("blocks", "all") or (parameters == "all" and self.targets):
            raise PEFTError(
                f"settings={{'parameters': {parameters!r}}} with targets={self.targets!r}: give 'blocks', the linear "
                "weights of blocks or of the targets, or 'all' without targets."
            )
        if parameters == "blocks":
            return weights_of(host, self._targets(host))
        return list(frozen_parameters(module, path, host, self.method, self.targets, self.train).values())

    def _description(self) -> dict[str, Any]:
        """The method as plain values, to be compared with a checkpoint's."""
        if isinstance(self.method, PeftConfig):
            given = {key: plain_values(value) for key, value in sorted(self.method.to_dict().items())}
            return {"method": str(self.method.peft_type.value), "settings": given, "adapter": self.adapter}
        settings = {key: plain_values(value) for key, value in sorted(self.settings.items())}
        return {"method": self.method, "settings": settings, "targets": self.targets, "host": self.host,
                "blocks": self.blocks, "quantize": self.quantize, "adapter": self.adapter}  # fmt: skip

    # ------------------------------------------------------------------ training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._said:
            rank_zero_info(self.summary(pl_module))
            if self.checkpoint == "adapter" and self._whole:
                rank_zero_info(
                    f"PEFT: {', '.join(pl_module.eke_peft['writers'])} writes to weights that do not train: "
                    "checkpoints hold them too."
                )
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
                path = _ADAPTER.split(plain(name))[0]
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

    def alter_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        frozen = {id(one) for group in optimizer.param_groups for one in group["params"] if not one.requires_grad}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        if not any(group["params"] for group in optimizer.param_groups):
            held = [name for name, one in run.module.named_parameters() if id(one) in frozen]
            others = f", or let some of its own train, as PEFT(train={held[:1]!r})" if held else ""
            raise PEFTError(
                f"the {type(optimizer).__name__} that configure_optimizers returned holds none of the parameters that "
                f"train. Give it self.parameters(): frozen ones are taken out of it{others}."
            )
        if self.lr_ratio is not None:
            second = {id(p) for name, p in self._module.named_parameters() if ".lora_B." in name}
            optimizer.register_step_pre_hook(Apart(second, self.lr_ratio))
            optimizer.register_step_post_hook(join)
        if self._ranks is not None:
            self._ranks.follow(optimizer)
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
                "checkpoint": "full" if self._whole else "adapter",
                "writers": list(self._module.eke_peft.get("writers", ()))}  # fmt: skip

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
        for key, value in self._description().items():
            if not arguments.same(manifest.get(key), value):
                was, now = arguments.written(key, manifest.get(key), value)
                raise PEFTError(f"the checkpoint was written with {was}, and this run has {now}.")
        if manifest["checkpoint"] == "full":
            self._base = pl_module.eke_peft["hash"] = manifest["hash"]  # which comes with it
            pl_module.eke_peft["writers"] = sorted({*self._writers, *manifest.get("writers", ())})
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

    @property
    def _whole(self) -> bool:
        """Whether checkpoints hold what does not train as well: the user's wish, or since another technique writes to
        it, in this run or in one that the model comes from."""
        written = getattr(self._module, "eke_peft", None) or {}
        return self.checkpoint == "full" or bool(written.get("writers"))

    def state_dict(self) -> dict[str, Any]:
        return {} if self._ranks is None else self._ranks.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._ranks is not None:
            self._ranks.load_state_dict(state)

    def alter_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._whole or self._module is None or not getattr(self._module, "eke_peft", None):
            return
        kept = trained_names(self._module)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if plain(k) in kept}

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
        checkpoint["state_dict"] = completed(pl_module, saved)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_module": None, "_ranks": None}
