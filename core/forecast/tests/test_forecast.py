"""The forecast against the CPU allocator's own count of the same step, run for real."""

import warnings

import eke
import pytest
import torch
from eke import compat, measure, registry
from eke.forecast import RUN, ForecastError, batches, forecast, resized
from eke.forecast.fitting import Setup, changes, largest_batch, make_fit
from eke.forecast.scratch import LONGEST, Like, Scratch
from eke.seams.wrapped import walk
from eke.testing import build_example, example_model, run_ranks
from eke.testing import run as kit
from eke.testing.models import SHAPES, TinyBlocks, TinyGPT2, TinyViT
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

WITHIN = 0.02
SAMPLES = 32
COUNTED = 3  # the step that is measured: DDP makes its buckets anew after the first


def example(shape, samples=SAMPLES):
    data = shape.dataset(samples)
    return tuple(torch.stack([torch.as_tensor(data[i][part]) for i in range(samples)]) for part in range(2))


def builder(shape, samples=SAMPLES):
    return lambda: (shape(), example(shape, samples))


def techniques(*names):
    def make():
        given = {}
        for name in names:
            built = build_example(name)
            argument = registry.trainer_argument(built)
            if argument == "strategy":
                given[argument] = built
            else:
                given.setdefault(argument, []).append(built)
        return given

    return make


class Allocator(Callback):
    """What is there when a step begins, by asking for it, and what the allocator hands out during the step."""

    def __init__(self, accumulate):
        self.accumulate, self.batches, self.total = accumulate, 0, 0

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if self.batches == 0:
            self.watching = measure.allocator_peak()
            self.begin = self.watching.__enter__()
        if self.batches == (COUNTED - 1) * self.accumulate:
            self.total = held(trainer, model, batch)
            self.more = self.begin()

    def on_train_batch_end(self, trainer, *_):
        self.batches += 1
        if self.batches == COUNTED * self.accumulate:
            self.watching.__exit__(None, None, None)
            self.total += self.more["bytes"]
            trainer.should_stop = True


def held(trainer, model, batch):
    tensors = [*batch, *model.buffers()]
    for parameter in model.parameters():
        tensors += [parameter.detach()] + ([] if parameter.grad is None else [parameter.grad])
    for optimizer in trainer.optimizers:
        for one in walk(optimizer):
            states = [value for state in one.state.values() for value in state.values()]
            tensors += [value for value in states if isinstance(value, torch.Tensor)]
    storages = {}
    for tensor in tensors:
        storage = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    total = sum(storages.values())
    if isinstance(trainer.strategy.model, DistributedDataParallel):
        total += sum(p.nbytes for p in model.parameters() if p.requires_grad)  # its buckets, in C++
    return total


def allocated(build, techniques=dict, ranks=1, accumulate=1, **options):
    """The higher peak of a step at the beginning of a run and of one at its end."""

    def work(rank, begin):
        model, batch = build()
        counter = Allocator(accumulate)
        settings = {"strategy": "ddp" if ranks > 1 else "auto", **techniques()}
        settings["callbacks"] = [*settings.get("callbacks", ()), counter]
        with kit.quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                accelerator="cpu", devices=ranks, max_steps=RUN, accumulate_grad_batches=accumulate, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                num_sanity_val_steps=0, limit_val_batches=0, use_distributed_sampler=False, **settings, **options,
            )  # fmt: skip
            compat.start_at(trainer, begin)
            trainer.fit(model, batches(batch, RUN * accumulate))
        return counter.total

    return max(run_ranks(lambda rank, begin=begin: work(rank, begin), ranks)[0] for begin in (0, RUN - COUNTED))


def agree(build, techniques=dict, within=WITHIN, **options):
    found, real = forecast(build, techniques, **options), allocated(build, techniques, **options)
    assert found.total == pytest.approx(real, rel=within), (found.total / real, dict(found.peak))
    return found


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Techniques that write where a run is, such as reports, do so in a folder of the test's."""
    monkeypatch.chdir(tmp_path)


OPTIONS = {
    "plain": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulated": {"accumulate": 2},
}


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param(shape, options, id=f"{name}-{shape.__name__}",
                     marks=[] if name == "plain" or shape is TinyBlocks else [pytest.mark.slow])
        for shape in SHAPES for name, options in OPTIONS.items()
    ],
)  # fmt: skip
def test_it_is_what_the_allocator_counts(shape, options):
    if shape is TinyGPT2:
        pytest.importorskip("transformers")
    agree(builder(shape), **options)


# On models this small recomputing keeps 5 kB of random state a block, which a dry run does not have, and the scratch of
# sorting and of products by groups of tokens is learned at other sizes.
FARTHER = {"remat": 0.05, "token_merge": 0.04}
# At random, or by the values of tensors, which a dry run does not have; or not without a file or a data module.
NOT_COMPARED = {"layer_drop", "infobatch", "rais", "data_pruning", "data_scores", "zero"}


@pytest.mark.parametrize("name", [name for name in eke.available() if name not in NOT_COMPARED])
def test_it_is_with_each_technique(name):
    # Methods that look at a batch and choose from it see ones instead of losses: they may choose more.
    agree(builder(example_model(name)), techniques(name), within=FARTHER.get(name, WITHIN))


def test_layer_drop_needs_no_more_than_all_blocks_do():
    if "layer_drop" not in eke.available():
        pytest.skip("eke-layer-drop is not installed")
    assert forecast(builder(TinyBlocks), techniques("layer_drop")).total <= forecast(builder(TinyBlocks)).total


def test_a_technique_that_needs_values_says_where():
    if "infobatch" not in eke.available():
        pytest.skip("eke-infobatch is not installed")
    with pytest.raises(ForecastError, match=r"depends on values of tensors \(aten.nonzero.default\).*infobatch"):
        forecast(builder(TinyBlocks), techniques("infobatch"))


def test_ddp_keeps_gradients_twice():
    found = agree(builder(TinyBlocks), ranks=2)
    weights = 4 * sum(p.numel() for p in TinyBlocks().parameters())
    assert found.held["gradients"] == 2 * weights


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": 1},
        {"stage": 2},
        {"stage": 3},
        {"stage": 2, "compute_dtype": "bfloat16"},
        {"stage": 3, "accumulate": 2},
        {"stage": 1, "remat": True, "ranks": 1, "samples": 128},  # recomputing keeps 5 kB of random state a block
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_it_is_with_each_stage_of_zero(settings):
    zero = pytest.importorskip("eke_zero")
    settings = dict(settings)
    options = {"ranks": settings.pop("ranks", 2), "accumulate": settings.pop("accumulate", 1)}
    # Two processes' buffers in C++ come and go when their threads find time.
    build = builder(TinyBlocks, settings.pop("samples", SAMPLES))
    agree(build, lambda: {"strategy": zero.ZeRO(**settings)}, WITHIN if options["ranks"] == 1 else 0.04, **options)


def test_what_zero_holds_is_the_formula_to_the_byte_for_any_number_of_processes():
    zero = pytest.importorskip("eke_zero")

    class Even(LightningModule):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128)) for _ in range(3))

        def training_step(self, batch, batch_idx):
            for block in self.blocks:
                batch = block(batch)
            return batch.mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    model = Even()
    count, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    for ranks in (2, 16, 128):
        found = forecast(lambda: (Even(), torch.zeros(4, 128)), lambda: {"strategy": zero.ZeRO(stage=3)}, ranks=ranks)
        assert found.held["parameters"] == found.held["gradients"] == 4 * count // ranks
        assert found.held["optimizer"] == 8 * count // ranks + 4 * tensors  # and the count of steps of each


def test_what_is_offloaded_counts_apart():
    zero = pytest.importorskip("eke_zero")
    plain = forecast(builder(TinyBlocks), lambda: {"strategy": zero.ZeRO(stage=3)}, ranks=2)
    states = forecast(builder(TinyBlocks), lambda: {"strategy": zero.ZeRO(stage=3, offload="optimizer")}, ranks=2)
    everything = forecast(builder(TinyBlocks), lambda: {"strategy": zero.ZeRO(stage=3, offload="params")}, ranks=2)
    assert plain.host == 0
    assert states.held["optimizer"] == 0
    assert states.host == plain.held["optimizer"] + plain.held["parameters"]  # and a copy of the weights
    assert everything.held == {**plain.held, "parameters": 0, "gradients": 0, "optimizer": 0}
    assert everything.peak["parameters"] > 0  # gathered


class Adapted(TinyBlocks):
    """Frozen but for a small matrix in each block, as with LoRA."""

    def make(self, dropout, layers):
        super().make(dropout, layers)
        self.requires_grad_(False)
        for block in self.blocks:
            block.adapter = nn.Linear(16, 16, bias=False)
            block.register_forward_hook(lambda module, inputs, output: output + module.adapter(inputs[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3)


def test_frozen_weights_have_neither_gradients_nor_states():
    found = agree(builder(Adapted))
    training = 4 * 4 * 16 * 16
    assert found.held["gradients"] == training
    assert found.parameters[1] == training // 4


# What kernels take for themselves


class Counted(Scratch):
    """Counts the floating-point operations that learning costs."""

    def _run(self, calls):
        with measure.count_flops() as self.cost:
            super()._run(calls)


def learned(func, *args, **limits):
    """What an operator takes for itself, and the floating-point operations that it cost to learn it."""
    kernels = Counted(**limits)
    with FakeTensorMode() as fake:
        key = kernels.ask(func, [fake.from_tensor(one) for one in args], {})
    return kernels.answer()[key], kernels.cost["flops"]


def test_a_large_product_in_a_slow_dtype_is_learned_from_small_ones(monkeypatch):
    monkeypatch.setattr(measure, "speed", lambda dtype: 1.3e8)  # of bfloat16 on a processor that has AVX2 alone
    a, b = torch.empty(2048, 4096, dtype=torch.bfloat16), torch.empty(4096, 4096, dtype=torch.bfloat16)
    _, flops = learned(torch.ops.aten.mm.default, a, b)
    assert 0 < flops <= 2 * LONGEST * 1.3e8


def test_what_is_scaled_is_what_the_large_one_takes():
    single, half = torch.empty(64, 128, 512), torch.empty(64, 128, 512, dtype=torch.bfloat16)
    cast = 2 * single.numel()  # bytes: the kernel makes a float32 of the one, or a part of it at a time
    exact, _ = learned(torch.ops.aten.add.Tensor, single, half, longest=1e9)
    scaled, _ = learned(torch.ops.aten.add.Tensor, single, half, longest=1e-3)
    assert exact >= cast
    assert scaled == exact


def test_the_order_of_dimensions_in_memory_outlives_the_scaling():
    given = Like((8, 4, 100, 6), (2400, 6, 24, 1), torch.float32)
    assert given.resized((8, 4, 50, 6)) == Like((8, 4, 50, 6), (1200, 6, 24, 1), torch.float32)
    expanded = Like((8, 100, 6), (6, 0, 1), torch.float32)
    assert expanded.resized((8, 50, 6)).stride == (6, 0, 1)


def test_where_patience_has_run_out_nothing_is_run():
    half = torch.empty(64, 64, dtype=torch.bfloat16)
    assert learned(torch.ops.aten.mm.default, half, half, patience=-1) == (0, 0)


def test_for_another_device_no_kernel_is_run(monkeypatch):
    monkeypatch.setattr(Scratch, "answer", lambda self: pytest.fail("a CPU kernel was run"))
    found = forecast(builder(TinyBlocks), device="cuda")
    assert found.held == Setup(builder(TinyBlocks), device="cuda").forecast().held


# Other batches


def test_batch_and_length_can_be_others_than_those_given():
    few = lambda: (TinyBlocks(), example(TinyBlocks, 2))  # noqa: E731
    assert forecast(few, batch_size=SAMPLES) == forecast(builder(TinyBlocks))
    tokens, labels = resized(example(TinyBlocks, 2), None, 5)
    assert tokens.shape == labels.shape == (2, 5)
    assert resized({"x": torch.zeros(2, 3, 8, 8), "y": torch.zeros(2)}, 7, None)["x"].shape == (7, 3, 8, 8)
    assert forecast(few, length=4).total < forecast(few).total
    with pytest.raises(ForecastError, match="needs a tensor of integers"):
        forecast(builder(TinyViT), length=4)
    with pytest.raises(ForecastError, match="without tensors"):
        resized("words", 2, None)


def test_a_batch_that_is_no_plain_collection_of_tensors_is_fed_as_it_is():
    class Named(TinyBlocks):
        def training_step(self, batch, batch_idx):
            return self.loss((batch["tokens"], batch["labels"]))

    def build():
        tokens, labels = example(TinyBlocks)
        return Named(), {"tokens": tokens, "labels": labels, "names": ["a"] * SAMPLES}

    assert forecast(build).total == forecast(builder(TinyBlocks)).total


def test_it_leaves_torch_and_the_random_state_as_they_were():
    before = torch.get_rng_state()
    patched = nn.Module._apply, torch.UntypedStorage.resize_, dict(vars(torch._subclasses.FakeTensor))

    class Broken(TinyBlocks):
        def training_step(self, batch, batch_idx):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        forecast(builder(Broken), ranks=3)
    assert not torch.distributed.is_initialized()
    assert (nn.Module._apply, torch.UntypedStorage.resize_) == patched[:2]
    assert dict(vars(torch._subclasses.FakeTensor)) == patched[2]
    forecast(builder(TinyBlocks), ranks=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_that_reads_values_gets_ones():
    class Reads(TinyBlocks):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.log("loss", loss, prog_bar=True)
            return loss * (2 if loss.item() == 1.0 else 0)

    assert forecast(builder(Reads)).total == pytest.approx(forecast(builder(TinyBlocks)).total, rel=0.001)


# What fits


def test_the_largest_batch_fits_and_one_more_sample_does_not():
    setup = Setup(builder(TinyBlocks, 4))
    given = setup.forecast()
    for budget in (3 * given.total, int(1.3 * given.total), given.total):
        batch, found = largest_batch(setup, budget, given, 4)
        assert found.total <= budget
        assert Setup(builder(TinyBlocks, 4), batch_size=batch + 1).forecast().total > budget
    assert largest_batch(setup, 1000, given, 4) == (0, None)


def test_changes_come_in_the_order_of_their_cost():
    found = list(changes(Setup(builder(TinyBlocks, 4), ranks=2), 4))
    order = [eke.spec.COSTS.index(cost) for _, cost, _ in found]
    assert order == sorted(order)
    words = [one for one, _, _ in found]
    assert "precision=bf16-mixed" in words
    assert "batch=2 accumulate=2" in words
    assert "zero:stage=1" not in [one for one, _, _ in changes(Setup(builder(TinyBlocks, 4)), 4)]


def test_what_a_run_has_already_is_not_offered_nor_anything_weaker():
    pytest.importorskip("eke_zero")
    words = [one for one, _, _ in changes(Setup(builder(TinyBlocks, 4), {"zero": {"stage": 3}}, ranks=2), 4)]
    assert "zero:remat=true" in words
    assert not {"zero:stage=1", "zero:stage=2", "zero:stage=3"} & set(words)


def test_the_first_change_that_fits_is_found_and_those_before_it_do_not():
    setup = Setup(builder(TinyBlocks), ranks=2)
    given = setup.forecast()
    tried, fitting = make_fit(setup, int(0.6 * given.total), given, SAMPLES)
    assert fitting is tried[-1]
    assert fitting.forecast.total <= 0.6 * given.total
    assert all(one.forecast.total > 0.6 * given.total for one in tried[:-1])
    assert fitting.setup.forecast() == fitting.forecast


@pytest.mark.slow
def test_where_no_single_change_is_enough_several_are_added_up():
    pytest.importorskip("eke_zero")
    setup = Setup(builder(TinyBlocks, 4), ranks=8)
    given = setup.forecast()
    budget = int(0.24 * given.total)
    tried, fitting = make_fit(setup, budget, given, 4)
    assert fitting is not None, [(one.words, one.forecast.total / given.total) for one in tried]
    assert fitting is tried[-1]
    assert fitting.forecast.total <= budget
    singles = {one for one, _, _ in changes(setup, 4)}
    assert fitting.words not in singles
    assert all(one.forecast.total > budget for one in tried[:-1])


@pytest.mark.slow
def test_nothing_fits_a_card_of_a_byte():
    setup = Setup(builder(TinyBlocks, 2))
    tried, fitting = make_fit(setup, 1, setup.forecast(), 2)
    assert fitting is None
    assert tried
