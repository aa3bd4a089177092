"""Measure MaskedLM: a step of a small BERT whose prediction head runs on every position, and on the hidden ones alone.

python benchmark.py --size cpu --out ../../benchmarks/cpu-2core
"""

import sys
from functools import partial

import torch
from eke_bench import Timing, main_of
from eke_bench.steps import device_of
from eke_masked_lm import MaskedLM
from eke_masked_lm.callback import _keep_hidden
from torch.nn import functional as F

VOCABULARY, MASK = 30522, 103


def steps(size):
    """Masked language modelling steps of MiniLM's size, 15 % hidden; on the CPU 8 sequences of 128 tokens."""
    try:
        import transformers as hf
    except ImportError:
        return {}
    device = device_of(size)
    torch.manual_seed(0)
    width, layers = {"smoke": (32, 2), "cpu": (384, 6), "gpu": (384, 6)}[size]
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    config = hf.BertConfig(vocab_size=VOCABULARY, intermediate_size=4 * width, **shape)
    model = hf.BertForMaskedLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(1000, VOCABULARY, (8 if size != "gpu" else 256, 128), device=device)
    hidden = []
    model.cls.register_forward_pre_hook(partial(_keep_hidden, hidden))

    def step(head):
        masking = MaskedLM(MASK, VOCABULARY, head=head)
        masking._hidden = hidden
        hidden.clear()
        inputs, labels = masking.hide(ids, 0)
        logits = model(input_ids=inputs).logits
        F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"head on all positions": lambda: step(None), "head on hidden positions": lambda: step("cls")}


STEP = Timing(
    "masked_lm",
    "step with a sparse head",
    steps,
    rounds=12,
    headline="a step of a BERT of MiniLM's size with the head on hidden positions alone takes {1:.2f} of its time",
)

if __name__ == "__main__":
    sys.exit(main_of(STEP))
