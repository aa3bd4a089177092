"""What is measured on a GPU: one function a line of the list in gpu.py, which runs each in a process of its own.

    python tools/gpu_lines.py attention --out results --device cuda --seconds 60

Each result is written the moment it is there. On a CPU (``--device cpu``) sizes are the smallest, and figures say
nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a card must not spoil a fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

REPO = Path(__file__).parents[1]
LIBRARIES = (
    "torch", "triton", "lightning", "transformers", "peft", "torchao", "bitsandbytes", "transformer_engine",
    "flash_attn", "deepspeed", "eke",
)  # fmt: skip


class Book:
    """The results of one line, in a file of its own.

    Args:
        line: Its name.
        out: Folder.
        device: ``"cuda"`` or ``"cpu"``.
        seconds: After which nothing more is begun.
    """

    def __init__(self, line: str, out: Path, device: str, seconds: float) -> None:
        self.file, self.device = out / f"{line}.json", device
        self.end = time.monotonic() + seconds
        self.content: dict[str, Any] = {"line": line, "machine": machine(device), "results": {}, "failed": {}}
        self.save()

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def save(self) -> None:
        temporary = self.file.with_suffix(".part")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.file)

    def add(self, name: str, value: Any) -> None:
        self.content["results"][name] = value
        print(f"{self.content['line']} | {name} | {json.dumps(value)[:300]}", flush=True)
        self.save()

    def attempt(self, name: str, work: Callable[[], Any], needs: float = 3.0) -> Any:
        """Do one thing and keep its result, or why there is none."""
        if self.left < needs:
            self.content.setdefault("left", []).append(name)
            self.save()
            return None
        since = time.monotonic()
        try:
            value = work()
        except Exception as error:  # whatever it is, the others go on
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).strip()
            text = text if len(text) < 900 else f"{text[:300]} ... {text[-600:]}"
            self.content["failed"][name] = (
                f"{type(error).__name__}: {text} [{Path(where.filename).name}:{where.lineno}]"
            )
            print(f"{self.content['line']} | {name} | FAILED {self.content['failed'][name][:300]}", flush=True)
            traceback.print_exc()
            value = None
        if isinstance(value, dict):
            value["took_s"] = round(time.monotonic() - since, 1)
        if value is not None:
            self.add(name, value)
        self.save()
        forget(self.device)
        return value


def machine(device: str) -> dict[str, Any]:
    """Card, driver and versions."""
    found: dict[str, Any] = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "python": sys.version.split()[0]}
    if device == "cuda":
        asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True)
        name, driver, memory = (told.stdout.strip().splitlines() or [",,"])[0].split(",")
        found.update(device=name.strip(), driver=driver.strip(), memory=memory.strip(), cuda=torch.version.cuda)
    else:
        found.update(device="cpu")
    found["cores"] = os.cpu_count()
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found


def forget(device: str) -> None:
    import gc

    gc.collect()
    if device == "cuda" and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], device: str, seconds: float = 0.8, least: int = 5, warm: int = 3) -> dict[str, Any]:
    """Median milliseconds of a call, quartiles, and the allocator's peak above what was there before."""
    for _ in range(warm if device == "cuda" else 1):
        work()
    wait(device)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    taken: list[float] = []
    end = time.perf_counter() + (seconds if device == "cuda" else 0.05)
    while len(taken) < least or time.perf_counter() < end:
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            taken.append(start.elapsed_time(stop))
        else:
            start = time.perf_counter()
            work()
            taken.append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(taken, n=4)
    found = {"ms": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "calls": len(taken)}
    if device == "cuda":
        found["peak_mib"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    return found


def module_of(path: str) -> Any:
    """A script of the repository, as a module."""
    file = REPO / path
    name = re.sub(r"\W", "_", path)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def dtype_of(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Where weights are made on the device, in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------- lines


def contract(book: Book) -> None:
    """The contract of every technique in its shortest form."""
    import gpu_contract

    def write(results: dict[str, Any]) -> None:
        book.content["results"] = results
        book.save()

    workers = min(14, os.cpu_count() or 1) if book.cuda else 2
    gpu_contract.run_all(book.device, book.left, workers, write)
    failed = {
        name: [check for check, outcome in one.items() if str(outcome).startswith("FAILED")]
        for name, one in book.content["results"].items()
    }
    print("contract | not passed:", {name: checks for name, checks in failed.items() if checks}, flush=True)


def tests(book: Book) -> None:
    """``pytest -m gpu``, some processes side by side where pytest-xdist is there."""
    many = ["-n", "4"] if importlib.util.find_spec("xdist") and book.cuda else []
    marked = "gpu" if book.cuda else "gpu or not gpu"
    files = [file for file in REPO.glob("**/tests/test_*.py") if ".venv" not in file.parts]
    where = [str(file) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]
    where += ["--continue-on-collection-errors"] if book.cuda else ["-k", "shuffled or (sdpa and gpu)"]
    report = book.file.with_suffix(".xml")
    command = [sys.executable, "-m", "pytest", "-q", "-m", marked, "-p", "no:cacheprovider", "--tb=short", "-ra"]
    command += [f"--junitxml={report}", *many, *where]
    try:
        subprocess.run(command, cwd=REPO, timeout=book.left)
    except subprocess.TimeoutExpired:
        book.content["failed"]["pytest"] = "no time left"
    if report.exists():
        from xml.etree import ElementTree

        for case in ElementTree.parse(report).iter("testcase"):
            problem = next((one for one in case if one.tag in ("failure", "error", "skipped")), None)
            outcome = "passed" if problem is None else f"{problem.tag}: {(problem.get('message') or '')[:600]}"
            book.content["results"][f"{case.get('classname')}.{case.get('name')}"] = outcome
        report.unlink()
    book.save()


def forecast(book: Book) -> None:
    """``eke forecast`` against the allocator's peak of the same steps."""
    import eke
    from eke.forecast import forecast as foretell
    from eke_bench.workloads.gpt import ByteGPT
    from lightning.pytorch import Callback, LightningModule, Trainer

    big = book.cuda

    class Peak(Callback):
        """The peak of the third step, whose optimizer has its states."""

        peak = held = 0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2 and big:
                torch.cuda.synchronize()
                self.held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2 and big:
                torch.cuda.synchronize()
                self.peak = torch.cuda.max_memory_allocated()

    class Llama(LightningModule):
        def __init__(self, fused: bool = False, **shape: int) -> None:
            super().__init__()
            from transformers import LlamaConfig, LlamaForCausalLM

            self.model, self.fused = LlamaForCausalLM(LlamaConfig(use_cache=False, **shape)), fused

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-4, fused=self.fused or None)

    def gpt(blocks: int, width: int, length: int, batch: int) -> tuple[Any, Tensor]:
        model = ByteGPT(blocks, width, length, lr=1e-4, steps=1000)
        return model, torch.zeros(batch, length + 1, dtype=torch.int64)

    def llama(width: int, layers: int, length: int, batch: int, fused: bool = False) -> tuple[Any, Tensor]:
        shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64 or 1}
        shape |= {"intermediate_size": 4 * width, "vocab_size": 32000 if big else 64}
        return Llama(fused, **shape), torch.zeros(batch, length, dtype=torch.int64)

    small = partial(gpt, 12, 768, 1024, 16) if big else partial(gpt, 2, 32, 32, 2)
    wide = partial(llama, 1024, 12, 1024, 8) if big else partial(llama, 64, 2, 32, 2)
    fused = partial(wide, fused=True)
    cases: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
        "GPT, 12 blocks of 768, 16 by 1024, float32": (small, {}, "32-true"),
        "GPT, 12 blocks of 768, 16 by 1024, bf16-mixed": (small, {}, "bf16-mixed"),
        "the same, bf16-true": (small, {}, "bf16-true"),
        "Llama, 12 layers of 1024, 8 by 1024, bf16-mixed": (wide, {}, "bf16-mixed"),
        "the same, bf16-true, fused AdamW": (fused, {}, "bf16-true"),
        "Llama, float32": (wide, {}, "32-true"),
        "GPT, bf16-mixed, adam8bit": (small, {"adam8bit": {"backend": "torch"}}, "bf16-mixed"),
        "GPT, bf16-mixed, layer_drop": (small, {"layer_drop": {"schedule": "constant", "keep": 0.5}}, "bf16-mixed"),
    }

    def measured(build: Callable[[], Any], recipe: dict[str, Any], precision: str) -> dict[str, Any]:
        found = foretell(build, lambda: eke.trainer_kwargs(**recipe) if recipe else {}, precision=precision)
        told = {"forecast": found.total, "causes": dict(found.peak), "held_forecast": sum(found.held.values())}
        if not big:
            return told
        torch.cuda.empty_cache()
        watch = Peak()
        settings = eke.trainer_kwargs(**recipe) if recipe else {}
        settings["callbacks"] = [*settings.get("callbacks", ()), watch]
        torch.manual_seed(0)
        model, batch = build()
        data = torch.utils.data.DataLoader(batch.repeat(3, 1), len(batch))
        trainer = Trainer(
            accelerator="gpu", devices=1, max_steps=3, precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, **settings,
        )  # fmt: skip
        trainer.fit(model, data)
        told.update(measured=watch.peak, held=watch.held, off=round(found.total / watch.peak - 1, 4))
        return told

    for name, case in cases.items():
        book.attempt(name, partial(measured, *case), needs=8)


def fp8(book: Book) -> None:
    """FP8 by torchao and Transformer Engine against bf16: one linear layer, and blocks, eager and compiled."""
    from eke_bench.workloads.blocks import Block
    from eke_fp8.hardware import te_autocast, te_linear, torchao_linear
    from eke_fp8.plugin import choose, put

    cuda = book.cuda
    tokens = 16384 if cuda else 64
    widths = (4096, 2048) if cuda else (64,)

    def recipes() -> dict[str, tuple[Callable[[nn.Linear], nn.Module], Callable[[], Any]]]:
        found: dict[str, Any] = {"bf16": (lambda layer: layer, nullcontext)}
        for recipe in ("tensorwise", "rowwise"):
            found[f"torchao {recipe}"] = (partial(_torchao, torchao_linear, recipe, cuda), nullcontext)
        if importlib.util.find_spec("transformer_engine") and cuda:
            for recipe in ("tensorwise", "delayed"):
                found[f"te {recipe}"] = (lambda layer: te_linear()(layer), partial(te_autocast, recipe, 1024, 0))
        return found

    def layer(width: int, label: str, compiled: bool) -> dict[str, Any]:
        build, around = recipes()[label]
        torch.manual_seed(0)
        with dtype_of(torch.bfloat16, book.device):
            one = build(nn.Linear(width, 4 * width, bias=False))
            x = torch.randn(tokens, width, requires_grad=True)
            g = torch.randn(tokens, 4 * width)
        call = torch.compile(one) if compiled else one

        def work() -> None:
            with around():
                y = call(x)
            y.backward(g)
            x.grad = None
            for weight in one.parameters():
                weight.grad = None

        found = timed(work, book.device)
        found["tflops"] = round(6 * tokens * width * 4 * width / found["ms"] / 1e9, 1)
        return found

    def stack(width: int, label: str, compiled: bool) -> dict[str, Any]:
        build, around = recipes()[label]
        torch.manual_seed(0)
        batch, length = (8, 2048) if cuda else (2, 32)
        with dtype_of(torch.bfloat16, book.device):
            model = nn.Sequential(*(Block(width, width // 128 or 1, causal=True) for _ in range(2)))
            x = torch.randn(batch, length, width)
        if label != "bf16":
            assert len(choose(model).taken) == 8, choose(model)
            for name in choose(model).taken:
                put(model, name, build(model.get_submodule(name)))
        for part in model if compiled else ():
            part.compile()

        def work() -> None:
            with around():
                y = model(x)
            y.float().square().mean().backward()
            for weight in model.parameters():
                weight.grad = None

        return timed(work, book.device)

    for compiled in (False, True):
        for width in widths:
            for label in recipes():
                words = f"{label}, width {width}, {'compiled' if compiled else 'eager'}"
                book.attempt(f"layer | {words}", partial(layer, width, label, compiled), needs=10 if compiled else 3)
                book.attempt(f"2 blocks | {words}", partial(stack, width, label, compiled), needs=14 if compiled else 3)
                torch._dynamo.reset()


def _torchao(build: Any, recipe: str, cuda: bool, layer: nn.Linear) -> nn.Module:
    return build(recipe, emulate=not cuda)(layer)


def attention(book: Book) -> None:
    """SDPA's kernels and FlexAttention, forward and backward, and attention replaced in a GPT."""
    from eke_attention import Call, SlidingWindow
    from eke_attention.kernels import KERNELS, block_pattern, flex, gathered, naive, sdpa
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cuda = book.cuda
    batch, heads, length, size = (4, 16, 4096, 128) if cuda else (1, 2, 256, 16)
    window = 512 if cuda else 64

    def one() -> Call:
        torch.manual_seed(0)
        parts = (
            torch.randn(batch, heads, length, size, device=book.device, dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        return Call(*parts, causal=True)

    def demanded(backend: SDPBackend, call: Call) -> Tensor:
        with sdpa_kernel([backend]):
            return sdpa(call)

    kinds: dict[str, Callable[[Call], Tensor]] = {
        "sdpa, torch's choice": sdpa,
        "flash": KERNELS["flash"],
        "cudnn": KERNELS["cudnn"],
        "efficient": partial(demanded, SDPBackend.EFFICIENT_ATTENTION),
        "math": partial(demanded, SDPBackend.MATH),
        "written out": naive,
    }

    def measured(kernel: Callable[[Call], Tensor], flops: float) -> dict[str, Any]:
        call = one()
        g = torch.randn_like(call.query)
        with torch.no_grad():
            forward = timed(lambda: kernel(call), book.device, 0.5)

        def both() -> None:
            kernel(call).backward(g)
            for part in call[:3]:
                part.grad = None

        found = {"forward": forward, "forward and backward": timed(both, book.device, 0.7)}
        if cuda:
            found["tflops"] = round(3.5 * flops / found["forward and backward"]["ms"] / 1e9, 1)
        return found

    causal = 2 * batch * heads * length * length * size  # of two products, half of the pairs
    for name, kernel in kinds.items():
        book.attempt(f"causal | {name}", partial(measured, kernel, causal), needs=4)
    every = block_pattern(lambda b, h, q, k: q >= k, 1, 1, length, length, 128, torch.device(book.device))
    near = block_pattern(
        SlidingWindow(window).mod(one(), {}, True), 1, 1, length, length, 128, torch.device(book.device)
    )
    if cuda:
        book.attempt("causal | flex", partial(measured, lambda call: flex(call, every), causal), needs=15)
        book.attempt(f"window {window} | flex", partial(measured, lambda call: flex(call, near), causal), needs=15)
    book.attempt(f"window {window} | gather", partial(measured, lambda call: gathered(call, near), causal), needs=5)
    mask = near.mod(*(torch.arange(n, device=book.device).view([-1 if at == place else 1 for place in range(4)])
                      for at, n in enumerate((1, 1, length, length))))  # fmt: skip

    def masked(call: Call) -> Tensor:
        return sdpa(call._replace(mask=mask))

    book.attempt(f"window {window} | sdpa under a mask", partial(measured, masked, causal), needs=4)

    bench = module_of("plugins/eke-attention/benchmark.py")
    chosen = [bench.PLAIN, bench.SDPA, bench.WINDOW, "window of 128, by a mask", "Sanger", "ViTCoD"]

    def step(label: str) -> dict[str, Any]:
        where = "gpu" if cuda else "smoke"
        made = bench.Step(where, bench.KINDS[label]() if label in bench.KINDS else None)
        with torch.autocast(book.device, torch.bfloat16):
            return timed(made, book.device, 1.5)

    for label in chosen:
        book.attempt(f"step of a GPT | {label}", partial(step, label), needs=12)


def optimizers(book: Book) -> None:
    """8-bit optimizers of all back ends against fused AdamW: step, bytes of state, the allocator's peak."""
    from eke_adam8bit import AdamW8bit, eight_bit, state_bytes

    def shapes(blocks: int, width: int) -> list[tuple[int, ...]]:
        block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
        return [(32000 if book.cuda else 64, width), *(blocks * block)]

    sizes = {"1 B": (24, 2048), "100 M": (12, 768)} if book.cuda else {"small": (2, 64)}
    kinds: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "AdamW, fused": lambda weights: torch.optim.AdamW(weights, 1e-4, fused=True),
        "AdamW, foreach": lambda weights: torch.optim.AdamW(weights, 1e-4, foreach=True),
        "ours, torch": lambda weights: AdamW8bit(weights, 1e-4),
        "bitsandbytes": lambda weights: eight_bit(torch.optim.AdamW(weights, 1e-4), backend="bitsandbytes"),
        "torchao": lambda weights: eight_bit(torch.optim.AdamW(weights, 1e-4), backend="torchao"),
        "ours, torch, not compiled": lambda weights: AdamW8bit(weights, 1e-4, compile=False),
    }

    def measured(size: tuple[int, int], dtype: torch.dtype, build: Callable[[list[nn.Parameter]], Any]) -> Any:
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(s, device=book.device, dtype=dtype) * 0.02) for s in shapes(*size)]
        for weight in weights:
            weight.grad = torch.randn_like(weight) * 1e-3
        count = sum(weight.numel() for weight in weights)
        optimizer = build(weights)
        since = time.perf_counter()
        optimizer.step()
        wait(book.device)
        first = time.perf_counter() - since
        found = timed(optimizer.step, book.device, 0.7, warm=2)
        bytes_of = state_bytes(optimizer)
        wrapped = [one for state in optimizer.state.values() for one in state.values() if hasattr(one, "codes")]
        if wrapped:  # torchao's: a tensor that holds others
            bytes_of = sum(
                part.nbytes for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)
                for part in ((one.codes, one.scale) if hasattr(one, "codes") else (one,))
            )  # fmt: skip
        return {
            **found, "parameters": count, "first_step_s": round(first, 2),
            "state_bytes_a_parameter": round(bytes_of / count, 3),
            "ns_a_parameter": round(1e6 * found["ms"] / count, 5),
        }  # fmt: skip

    for name, size in sizes.items():
        for label, build in kinds.items():
            needs = 12 if label == "torchao" and book.cuda else 4
            book.attempt(f"{name} | float32 | {label}", partial(measured, size, torch.float32, build), needs=needs)
    for label in ("AdamW, fused", "ours, torch", "bitsandbytes", "torchao"):
        name, size = next(iter(sizes.items()))
        book.attempt(f"{name} | bfloat16 | {label}", partial(measured, size, torch.bfloat16, kinds[label]), needs=12)


def peft(book: Book) -> None:
    """Full tuning, LoRA and LoRA on 4 and 8 bits of a Llama with random weights."""
    from eke_peft import PEFT
    from lightning.pytorch import Callback, LightningModule, Trainer
    from transformers import LlamaConfig, LlamaForCausalLM

    cuda = book.cuda
    shape = {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 8192, "vocab_size": 32000,
    } if cuda else {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 64,
    }  # fmt: skip
    batch, length, steps = (4, 1024, 12) if cuda else (1, 16, 4)

    class Llama(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            with dtype_of(torch.bfloat16, book.device):
                self.model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False, tie_word_embeddings=False))
            self.model.train()

        def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=tokens, labels=tokens).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = [weight for weight in self.parameters() if weight.requires_grad]
            return torch.optim.AdamW(trained, 1e-4, fused=True)

    class Watch(Callback):
        def __init__(self) -> None:
            self.taken, self.peak, self.held, self.losses = [], 0, 0, []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            wait(book.device)
            if cuda and batch_idx == 3:
                self.held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            self.since = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            wait(book.device)
            self.taken.append(1000 * (time.perf_counter() - self.since))
            self.losses.append(float(outputs["loss"]))
            if cuda:
                self.peak = torch.cuda.max_memory_allocated()

    ways: dict[str, Callable[[], list[Any]]] = {
        "full tuning": list,
        "LoRA, r 16, all linear layers": lambda: [PEFT("lora")],
        "LoRA on NF4": lambda: [PEFT("lora", quantize="nf4")],
        "LoRA on int8": lambda: [PEFT("lora", quantize="int8")],
        "head alone": lambda: [PEFT("head", train=["model.lm_head*"])],
        "BitFit or norms": lambda: [PEFT("head", train=["*norm*"])],
        "IA3": lambda: [PEFT("ia3")],
        "adapters, width 64": lambda: [PEFT("adapters")],
        "20 prompt tokens": lambda: [PEFT("prompt", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 20})],
        "LoftQ": lambda: [PEFT("loftq", quantize="nf4")],
    }

    def measured(build: Callable[[], list[Any]]) -> dict[str, Any]:
        watch = Watch()
        model = Llama()
        trainer = Trainer(
            accelerator="gpu" if cuda else "cpu", devices=1, max_steps=steps, precision="bf16-true",
            callbacks=[*build(), watch], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        tokens = torch.randint(shape["vocab_size"], (steps * batch, length))
        trainer.fit(model, torch.utils.data.DataLoader(tokens, batch))
        assert all(math.isfinite(loss) for loss in watch.losses), watch.losses
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        return {
            "ms": round(statistics.median(watch.taken[3:]), 2), "peak_mib": round(watch.peak / 2**20),
            "held_mib": round(watch.held / 2**20), "trained": trained,
            "loss": [round(watch.losses[0], 4), round(watch.losses[-1], 4)],
        }  # fmt: skip

    for name, build in ways.items():
        book.attempt(name, partial(measured, build), needs=6)


def zero(book: Book) -> None:
    """ZeRO on one card: each stage, and offload, each in a process of its own."""
    import gpu_contract

    gpu_contract.with_capability_told(book.device)
    from eke.testing import run_ranks
    from eke.testing.run import make_trainer, quiet
    from eke_zero import ZeRO
    from lightning.pytorch import Callback

    bench = module_of("strategies/eke-zero/benchmark.py")
    cuda = book.cuda
    length, batch, blocks, width, steps = (1024, 4, 8, 2048, 7) if cuda else (16, 1, 2, 32, 4)

    class Watch(Callback):
        def __init__(self) -> None:
            self.taken, self.peak, self.held, self.losses = [], 0, 0, []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            wait(book.device)
            if cuda and batch_idx == 2:
                self.held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            self.since = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            wait(book.device)
            self.taken.append(1000 * (time.perf_counter() - self.since))
            self.losses.append(float(outputs["loss"]))
            if cuda:
                self.peak = torch.cuda.max_memory_allocated()

    def work(settings: dict[str, Any] | None, rank: int) -> dict[str, Any]:
        if cuda:
            torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(0)
        watch = Watch()
        strategy = [ZeRO(**settings)] if settings else []
        where = {"accelerator": "gpu", "devices": 1} if cuda else {}
        trainer = make_trainer(*strategy, epochs=1, callbacks=[watch], precision="bf16-mixed", **where)
        data = torch.utils.data.DataLoader(torch.randint(256, (steps * batch, length + 1)), batch)
        with torch.device(book.device) if not settings else nullcontext():
            model = bench.GPT(length, blocks, width)
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, data)
        return {
            "ms": round(statistics.median(watch.taken[2:]), 2), "peak_mib": round(watch.peak / 2**20),
            "held_mib": round(watch.held / 2**20), "losses": [round(loss, 5) for loss in watch.losses],
        }  # fmt: skip

    kinds: dict[str, dict[str, Any] | None] = {
        "one device": None,
        "stage 1": {"stage": 1},
        "stage 2": {"stage": 2},
        "stage 3": {"stage": 3},
        "stage 2, optimizer offloaded": {"stage": 2, "offload": "optimizer"},
        "stage 3, weights offloaded": {"stage": 3, "offload": "params"},
        "stage 1, optimizer offloaded": {"stage": 1, "offload": "optimizer"},
        "stage 3, recomputing": {"stage": 3, "remat": True},
    }
    for name, settings in kinds.items():
        if settings and settings["stage"] < 3:
            settings = {**settings, "trial": False}  # the trial of one stage is enough
        limit = min(45.0, max(5.0, book.left))
        job = partial(work, settings)
        book.attempt(name, lambda job=job, limit=limit: run_ranks(job, 1, timeout=limit)[0], needs=10)


def ratios(book: Book) -> None:
    """Steps of techniques that leave something out, of the whole step's time."""
    from eke_bench import Timing
    from eke_bench.workloads import load

    size = "gpu" if book.cuda else "smoke"
    for name in ("layer-drop", "random-ltd", "token-drop"):
        bench = module_of(f"callbacks/eke-{name}/benchmark.py")

        def measured(bench: Any = bench, name: str = name) -> dict[str, Any]:
            rows = Timing(name, "step", bench.steps, rounds=15).measure(size)["timing"]
            return {label: {"ms": round(1e3 * row["seconds"], 3), "ratio": row["ratio"]} for label, row in rows.items()}

        book.attempt(name, measured, needs=8)

    def depths(width: int, precision: torch.dtype | None) -> dict[str, Any]:
        workload = load("gpt", size)
        batch = next(iter(workload.train_loader(seed=0))).to(book.device)
        rows = {}
        for blocks in (24, 12) if book.cuda else (2, 1):
            torch.manual_seed(0)
            model = workload.model({"blocks": blocks, "width": width}, 1e-4, 10**9).to(book.device)
            optimizer = model.configure_optimizers()["optimizer"]

            def step(model: Any = model, optimizer: Any = optimizer) -> None:
                with torch.autocast(book.device, precision) if precision else nullcontext():
                    loss = model.loss(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            rows[blocks] = timed(step, book.device, 1.5)
        (deep, whole), (shallow, half) = rows.items()
        return {f"{deep} blocks": whole, f"{shallow} blocks": half, "ratio": round(half["ms"] / whole["ms"], 4)}

    wide = 1024 if book.cuda else 32
    book.attempt("stacking, half depth, width 512, float32", partial(depths, 512 if book.cuda else 32, None), needs=8)
    book.attempt("stacking, half depth, width 1024, bf16", partial(depths, wide, torch.bfloat16), needs=8)


def ceilings(book: Book) -> None:
    """The best matrix products and the best copy of this card."""
    from eke import measure

    book.attempt("ceilings", lambda: measure.ceilings(device=book.device, seconds=0.7 if book.cuda else 0.05), needs=1)


def train(book: Book) -> None:
    """The project's train.py."""
    script = REPO / "templates/project/{{cookiecutter.folder}}/train.py"
    given = ["--accelerator", "gpu", "--precision", "bf16-mixed", "--width", "512", "--layers", "12"]
    given += ["--steps", "200"]
    command = [
        sys.executable,
        str(script),
        *(given if book.cuda else ["--steps", "6", "--layers", "2", "--plain-only"]),
    ]
    command += ["--out", str(book.file.parent / "train")]

    def work() -> dict[str, Any]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=book.left)
        if done.returncode:
            raise RuntimeError(f"status {done.returncode}: {done.stdout[-300:]} {done.stderr[-900:]}")
        return {"printed": done.stdout[-3000:]}

    book.attempt("train.py", work, needs=15)


LINES: dict[str, Callable[[Book], None]] = {
    one.__name__: one
    for one in (contract, tests, forecast, fp8, attention, optimizers, peft, zero, ratios, ceilings, train)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("line", choices=LINES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=600)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    given.out.mkdir(parents=True, exist_ok=True)
    book = Book(given.line, given.out, given.device, given.seconds)
    since = time.monotonic()
    LINES[given.line](book)
    book.content["seconds"] = round(time.monotonic() - since, 1)
    book.content["through"] = True
    book.save()


if __name__ == "__main__":
    main()
