"""What the survey names: Zhuang and others, "A Survey on Efficient Training of Transformers", IJCAI 2023,
https://arxiv.org/abs/2302.01107.

Data alone: sections, topics, and each method with the numbers of its references. It knows no technique; records name
topics and keys, and ``eke list --survey`` puts the two together. Not here: references [8], [72] and [87], which are
a framework and two models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Number and title of each section to its topics.
SECTIONS: dict[str, tuple[str, ...]] = {
    "2.1 Optimization": (
        "optimizer",
        "initialization",
        "sparse training",
        "overparameterization",
        "large batch training",
        "incremental learning",
    ),
    "2.2 Data selection": ("token masking", "importance sampling"),
    "3 Memory efficiency": (
        "parallelism",
        "quantized training",
        "rematerialization and offloading",
        "parameter-efficient tuning",
    ),
    "4 Hardware/algorithm co-design": (
        "sparse matrix multiplication",
        "hardware-aware low precision",
        "efficient attention",
    ),
    "5 Future directions": ("future directions",),
}

TOPICS: tuple[str, ...] = tuple(topic for topics in SECTIONS.values() for topic in topics)


class Entry(NamedTuple):
    """A method that the survey names.

    Args:
        key: Short name.
        references: Its numbers in the survey's list; empty where the survey names it without one.
        name: What it is called.
        topic: One of :data:`TOPICS`.
        note: Where it is to be had, or why no technique of Eke will serve it.
    """

    key: str
    references: tuple[int, ...]
    name: str
    topic: str
    note: str = ""


ENTRIES: tuple[Entry, ...] = (
    Entry("nag", (67,), "Nesterov accelerated gradient", "optimizer", "in torch"),
    Entry("prox-momentum", (55,), "Proximal gradient with momentum", "optimizer"),
    Entry("sgd-momentum", (9, 60), "SGD with momentum", "optimizer", "in torch"),
    Entry("adam", (50,), "Adam", "optimizer", "in torch"),
    Entry("adamw", (62,), "AdamW", "optimizer", "in torch"),
    Entry("acclip", (96,), "ACClip: adaptive coordinate clipping", "optimizer"),
    Entry("lion", (18,), "Lion", "optimizer"),
    Entry("sam", (28, 17), "SAM: sharpness-aware minimization (and for ViT)", "optimizer"),
    Entry("esam", (23,), "Efficient SAM", "optimizer"),
    Entry("saf", (24,), "SAF and MESA: sharpness-aware training for free", "optimizer"),
    Entry("fixup", (95,), "Fixup", "initialization"),
    Entry("rezero", (5,), "ReZero", "initialization"),
    Entry("skipinit", (22,), "SkipInit", "initialization"),
    Entry("t-fixup", (40,), "T-Fixup", "initialization"),
    Entry("layerscale", (85,), "LayerScale (CaiT)", "initialization"),
    Entry("conv-attn", (19,), "Attention reparameterized as convolution", "initialization"),
    Entry("convit", (25,), "ConViT / GPSA", "initialization"),
    Entry("lth", (29,), "Lottery ticket (iterative magnitude pruning)", "sparse training"),
    Entry("snip", (52,), "SNIP", "sparse training"),
    Entry("grasp", (88,), "GraSP", "sparse training"),
    Entry("early-bird", (90,), "Early-bird tickets", "sparse training"),
    Entry("earlybert", (16,), "EarlyBERT", "sparse training"),
    Entry("rigl", (26,), "RigL", "sparse training"),
    Entry("svite", (14,), "SViTE / S2ViTE", "sparse training"),
    Entry(
        "overparam-theory",
        (2, 3, 4, 57),
        "Overparameterization: convergence and generalization",
        "overparameterization",
        "theory",
    ),
    Entry("train-big", (58,), "Train big, then compress", "overparameterization"),
    Entry("lr-scaling", (31,), "Linear LR scaling with warm-up", "large batch training"),
    Entry("lars", (92,), "LARS", "large batch training"),
    Entry("lamb", (93,), "LAMB", "large batch training"),
    Entry("lawa", (46,), "LAWA (latest weight averaging)", "large batch training"),
    Entry("compute-optimal", (37,), "Compute-optimal scaling (Chinchilla)", "large batch training", "a planner"),
    Entry("stacking", (30,), "Progressive stacking", "incremental learning"),
    Entry("compound-growth", (32,), "Transformer growth (CompoundGrow)", "incremental learning"),
    Entry("pld", (97,), "Progressive layer dropping", "incremental learning"),
    Entry("autoprog", (54,), "AutoProg", "incremental learning"),
    Entry("progressive-res", (54,), "Progressive resolution / patch schedule", "incremental learning"),
    Entry("mlm", (48,), "Masked language modelling (BERT)", "token masking"),
    Entry("causal-lm", (10,), "Causal language modelling (GPT-3)", "token masking", "any language model's loss"),
    Entry("mim", (6,), "Masked image modelling (BEiT)", "token masking"),
    Entry("mass", (80,), "MASS", "token masking"),
    Entry("mae", (35,), "MAE (drop masked patches)", "token masking"),
    Entry("flip", (56,), "FLIP", "token masking"),
    Entry("is-upper-bound", (47,), "Importance sampling by a bound of gradient norms", "importance sampling"),
    Entry("rais", (44,), "RAIS", "importance sampling"),
    Entry("data-diet", (70,), "Data diet: GraNd and EL2N", "importance sampling"),
    Entry("proto-prune", (81,), "Beyond neural scaling laws: pruning by prototypes", "importance sampling"),
    Entry("dp", (), "Data parallelism", "parallelism", "in Lightning"),
    Entry("param-sharing", (51,), "ALBERT parameter sharing", "parallelism"),
    Entry("zero", (73,), "ZeRO 1/2/3", "parallelism"),
    Entry("tp", (77,), "Tensor parallelism (Megatron)", "parallelism"),
    Entry("pp", (41, 49), "Pipeline parallelism (GPipe, torchgpipe)", "parallelism"),
    Entry("3d", (66, 74, 78), "TP+PP+DP together", "parallelism"),
    Entry("qnn", (42, 98), "QNN / DoReFa (low-bit weights, activations, gradients)", "quantized training"),
    Entry("amp", (64,), "Automatic mixed precision", "quantized training", "in Lightning"),
    Entry("int16-dfp", (21,), "Integer mixed precision (dynamic fixed point)", "quantized training"),
    Entry("fp8", (89,), "FP8 training", "quantized training"),
    Entry("s2fp8", (11,), "S2FP8 (shifted and squeezed FP8)", "quantized training"),
    Entry("actnn", (12,), "ActNN (2-bit activation compression)", "quantized training"),
    Entry("mesa", (69,), "Mesa (8-bit activations for Transformers)", "quantized training"),
    Entry("gact", (61,), "GACT", "quantized training"),
    Entry("act-ckpt", (15,), "Activation checkpointing", "rematerialization and offloading"),
    Entry("rotor", (36,), "rotor: optimal checkpointing of heterogeneous chains", "rematerialization and offloading"),
    Entry("zero-offload", (75,), "ZeRO-Offload", "rematerialization and offloading"),
    Entry("pofo", (7,), "POFO: offloading and rematerialization together", "rematerialization and offloading"),
    Entry("prompt-tuning", (53,), "Prompt tuning", "parameter-efficient tuning"),
    Entry("vpt", (43,), "Visual prompt tuning", "parameter-efficient tuning"),
    Entry("adapter", (38,), "Houlsby adapters", "parameter-efficient tuning"),
    Entry("bitfit", (94,), "BitFit", "parameter-efficient tuning"),
    Entry("lora", (39,), "LoRA", "parameter-efficient tuning"),
    Entry("intrinsic-dim", (1,), "Intrinsic dimension (SAID)", "parameter-efficient tuning"),
    Entry("alpaca-lora", (83, 86), "Alpaca / Alpaca-LoRA recipe", "parameter-efficient tuning"),
    Entry(
        "spgemm", (), "SpGEMM libraries (MKL, cuSPARSE, CUSP)", "sparse matrix multiplication", "libraries of kernels"
    ),
    Entry("sparse-2to4", (65,), "2:4 structured sparsity", "sparse matrix multiplication"),
    Entry("outerspace", (68,), "OuterSPACE", "sparse matrix multiplication", "a chip"),
    Entry("vitcod", (91,), "ViTCoD", "sparse matrix multiplication"),
    Entry("sanger", (63,), "Sanger", "hardware-aware low precision"),
    Entry("dota", (71,), "DOTA", "hardware-aware low precision"),
    Entry("tpu", (45,), "TPU / ASIC study", "hardware-aware low precision", "a chip"),
    Entry("a3", (33,), "A3", "efficient attention"),
    Entry("elsa", (34,), "ELSA", "efficient attention"),
    Entry("flash-attn", (20,), "FlashAttention", "efficient attention"),
    Entry("supernet", (13,), "Elastic supernet (AutoFormer)", "future directions"),
    Entry("moe", (27,), "Mixture of experts (Switch)", "future directions"),
    Entry("on-device", (59,), "On-device training (MCUNet line)", "future directions"),
    Entry(
        "combine-approx",
        (),
        "Approximations that complement one another",
        "future directions",
        "the order and the refusals of Eke",
    ),
    Entry(
        "evolved-nas",
        (79,),
        "NAS for Transformers (Evolved Transformer)",
        "future directions",
        "a search for architectures",
    ),
    Entry("green", (76, 82), "Green AI: energy accounting", "future directions"),
    Entry("std-benchmark", (), "A standard benchmark of efficient training", "future directions", "eke-bench"),
    Entry("distil-token", (84,), "DeiT distillation token (cited as workload)", "future directions"),
)

KEYS: dict[str, Entry] = {entry.key: entry for entry in ENTRIES}

REFERENCES: frozenset[int] = frozenset(number for entry in ENTRIES for number in entry.references)


def section_of(topic: str) -> str:
    """Number and title of the section that a topic stands in."""
    return next(section for section, topics in SECTIONS.items() if topic in topics)


def cited(keys: Iterable[str]) -> str:
    """``["lora", "bitfit"]`` as ``LoRA [39], BitFit [94]``."""
    return ", ".join(" ".join([KEYS[key].name, *(f"[{number}]" for number in KEYS[key].references)]) for key in keys)
