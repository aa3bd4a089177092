"""What peft puts into a model: which configuration a method is, and how it gets there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eke.seams.names import at
from lightning.pytorch import LightningModule
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import nn

from eke_peft.errors import PEFTError
from eke_peft.targets import named, scaled, usual_layers

UNTIL_KNOWN = 2**62  # steps of AdaLoRA: peft wants to be told before a run can know

# Method to peft's configuration and what it sets there.
LIBRARY: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "lora": (LoraConfig, {"r": 16, "lora_alpha": 32}),
    "rslora": (LoraConfig, {"r": 16, "lora_alpha": 8, "use_rslora": True}),
    "dora": (LoraConfig, {"r": 16, "lora_alpha": 32, "use_dora": True}),
    "pissa": (LoraConfig, {"r": 16, "lora_alpha": 16, "init_lora_weights": "pissa"}),
    "loftq": (LoraConfig, {"r": 16, "lora_alpha": 16}),
    "adalora": (AdaLoraConfig, {"init_r": 12, "target_r": 8, "lora_alpha": 32, "total_step": UNTIL_KNOWN}),
    "ia3": (IA3Config, {}),
    "prompt": (PromptTuningConfig, {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prefix": (PrefixTuningConfig, {"num_virtual_tokens": 20}),
    "p-tuning": (PromptEncoderConfig, {"num_virtual_tokens": 20}),
}
PROMPTING = ("prompt", "prefix", "p-tuning")
TASKS = {
    "SequenceClassification": "SEQ_CLS", "ImageClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS", "CausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
    "ConditionalGeneration": "SEQ_2_SEQ_LM", "Model": "FEATURE_EXTRACTION",
}  # fmt: skip


def task_of(host: nn.Module) -> str:
    """peft's name of what a Hugging Face model does, by its class.

    Raises:
        PEFTError: the class says nothing that peft has a name for.
    """
    name = type(host).__name__
    found = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    if found is None:
        raise PEFTError(f"what {name} does is not to be told from its name. Give settings={{'task_type': ...}}, one of "
                        f"{', '.join(sorted(set(TASKS.values())))}.")  # fmt: skip
    return found


def configuration(method: str, settings: dict[str, Any], checkpoint: str) -> PeftConfig:
    """peft's configuration of a method of :data:`LIBRARY`.

    Raises:
        PEFTError: settings that peft does not know, or whose base would be another one each time.
    """
    kind, defaults = LIBRARY[method]
    given = {**defaults, **settings}
    if str(given.get("init_lora_weights")).startswith("pissa_niter") and checkpoint == "adapter":
        raise PEFTError(
            "init_lora_weights='pissa_niter_...' leaves another rest of the base each time, which a checkpoint of "
            "the adapter does not hold. Give 'pissa', or checkpoint='full'."
        )
    try:
        return kind(**given)
    except TypeError as error:
        raise PEFTError(f"settings of {method!r}: {error}.") from None


def put_library(
    module: LightningModule,
    path: str,
    host: nn.Module,
    config: PeftConfig,
    adapter: str,
    targets: list[str] | None,
    blocks: str | list[str] | None,
) -> None:
    """Let peft put an adapter into the part of a model at ``path``.

    Raises:
        PEFTError: a model that the method has no place for.
        NamesError: a pattern of ``targets`` that meets no layer.
    """
    config = copy.deepcopy(config)
    if config.is_prompt_learning:
        kind = config.peft_type.value
        if not hasattr(host, "prepare_inputs_for_generation") and not hasattr(host, "config"):
            raise PEFTError(f"{kind} puts tokens before a Hugging Face model's own, and {type(host).__name__} is none.")
        if not path:
            raise PEFTError(f"{kind} puts a model around yours: keep it in an attribute of the LightningModule.")
        config.task_type = config.task_type or task_of(host)
        _wrap(module, path, host, config, adapter)
        return
    if adapter in getattr(host, "peft_config", {}) and any(isinstance(p, BaseTunerLayer) for p in host.modules()):
        raise PEFTError(f"the model has an adapter {adapter!r} already, which would begin anew. Give another adapter=.")
    if targets is not None:
        config.target_modules = named(host, targets, blocks)
    elif isinstance(config, IA3Config) and config.target_modules is None:
        config.target_modules, config.feedforward_modules = scaled(host, blocks)
    elif hasattr(config, "target_modules") and config.target_modules is None:
        config.target_modules = usual_layers(host, config, blocks)
    wanted = config.target_modules if isinstance(config.target_modules, (list, set)) else ()
    for name, part in host.named_modules():
        if isinstance(part, nn.MultiheadAttention) and any(f".{name}".endswith(f".{one}") for one in wanted):
            raise PEFTError(  # before anything is put in
                "peft adds its matrices to nn.MultiheadAttention's weights in each forward pass and takes them "
                f"off again, so that the base drifts by rounding. Leave {name!r} out of targets=."
            )
    acted = {part: list(part.active_adapters) for part in host.modules() if isinstance(part, BaseTunerLayer)}
    try:
        with _unmeshed(module):
            inject_adapter_in_model(config, host, adapter_name=adapter)
        cast_adapter_dtype(host, adapter)  # what trains is kept in float32 beside a half-precision base
    except (ValueError, AttributeError, RuntimeError) as error:  # whatever peft meets in a model that it does not know
        if "get_peft_model" not in str(error) or not path:
            raise PEFTError(
                f"peft does not put {config.peft_type.value} into {type(host).__name__}: {error}"
            ) from error
        _wrap(module, path, host, config, adapter)
        return
    for part in host.modules():
        if isinstance(part, BaseTunerLayer) and acted.get(part):
            part.set_adapter([*acted[part], adapter])  # peft switches to the new one alone


def _wrap(module: LightningModule, path: str, host: nn.Module, config: PeftConfig, adapter: str) -> None:
    """Put peft's own model around the host, in the attribute that holds it."""
    parent, _, child = path.rpartition(".")
    setattr(at(module, parent), child, get_peft_model(host, config, adapter_name=adapter))


@contextmanager
def _unmeshed(module: LightningModule) -> Iterator[None]:
    """Hide the processes' mesh, which Lightning keeps on the module, and peft takes for tensor parallelism."""
    mesh, module._device_mesh = module._device_mesh, None
    try:
        yield
    finally:
        module._device_mesh = mesh
