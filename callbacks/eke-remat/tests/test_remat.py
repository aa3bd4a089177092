import copy
import pickle
import warnings

import eke
import pytest
import torch
from eke import measure
from eke.seams.blocks import find_blocks
from eke.seams.recompute import RecomputeError, recompute
from eke.testing import fit
from eke.testing.models import STEPS, TinyBlocks, TinyGPT2, TinyModel, hugging_face
from eke_remat import POLICIES, Keep, Remat
from lightning.pytorch import Callback


class Watch(Callback):
    """Takes down what a step holds for backward, how often each block and each operator runs."""

    def __init__(self, step=1):
        self.step, self.calls = step, []
        self.counting, self.counter = None, measure.OperatorCounter()

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.now = trainer.global_step == self.step
        if self.now:
            blocks = find_blocks(model).modules
            self.hooks = [
                next(block.children()).register_forward_hook(lambda *_, number=number: self.calls.append(number))
                for number, block in enumerate(blocks)
            ]
            self.saving = measure.saved_bytes(model)
            self.result = self.saving.__enter__()
            self.counter.__enter__()

    def on_before_backward(self, trainer, model, loss):
        if self.now:
            self.saving.__exit__(None, None, None)

    def on_train_batch_end(self, trainer, model, *_):
        if self.now:
            self.counter.__exit__(None, None, None)
            for hook in self.hooks:
                hook.remove()

    @property
    def bytes(self):
        return self.result["bytes"]

    def times(self, layers=4):
        return [self.calls.count(number) for number in range(layers)]


def run(*techniques, model=TinyBlocks, **settings):
    watch = Watch()
    done = fit(model(dropout=0.1), *techniques, callbacks=[watch], epochs=1, **settings)
    return watch, done


@pytest.fixture(scope="module")
def plain():
    return run()


INPUT = 4 * 8 * 16 * 4  # batch, length, width, bytes: the kit's


@pytest.mark.parametrize(
    "settings", [{}, {"every": 2}, {"span": 2}, {"span": 4}, {"span": 2, "every": 2}], ids=lambda s: str(s) or "all"
)
def test_a_step_holds_the_inputs_of_spans_and_what_lies_outside_of_them(plain, settings):
    span, every = settings.get("span", 1), settings.get("every", 1)
    everything, _ = run(Remat())
    per_block = (plain[0].bytes - everything.bytes + 4 * INPUT) / 4
    spans = 4 // span // every
    got, _ = run(Remat(**settings))
    assert got.bytes == plain[0].bytes - spans * (span * per_block - INPUT)
    assert sorted(got.times()) == [1] * (4 - spans * span) + [2] * (spans * span)


@pytest.mark.parametrize("settings", [{}, {"every": 3}, {"span": 3}, *({"policy": name} for name in POLICIES)], ids=str)
def test_losses_and_weights_have_the_bits_of_a_plain_run(plain, settings):
    _, done = run(Remat(**settings))
    for name, weight in plain[1].model.state_dict().items():
        assert torch.equal(weight, done.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("policy", "products", "attention"),
    [(None, 4, 1), ("attention", 4, 0), ("every second", 2, 0), ("matmuls", 0, 0), (Keep(False, 1), 0, 1)],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_policy_says_how_many_products_and_attentions_run_again(plain, policy, products, attention):
    got, _ = run(Remat(policy))
    again = {name: got.counter.counts[name] - plain[0].counter.counts[name] for name in got.counter.counts}
    flash = next(name for name in again if "scaled_dot_product" in name and "backward" not in name)
    assert again["aten.addmm.default"] == 4 * products
    assert again[flash] == 4 * attention
    assert again["aten.native_layer_norm.default"] == 2 * 4


def test_operators_can_be_named_and_a_function_given(plain):
    for policy in ([torch.ops.aten.addmm.default], lambda context, operator, *args, **kwargs: False):
        _, done = run(Remat(policy))
        for name, weight in plain[1].model.state_dict().items():
            assert torch.equal(weight, done.model.state_dict()[name]), name


def test_blocks_that_come_in_mid_run_are_recomputed_too():
    class Grow(Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if trainer.global_step == 0 and len(model.blocks) == 4:
                model.blocks.append(copy.deepcopy(model.blocks[-1]))

    for settings in ({}, {"span": 5}):
        watch = Watch(2)
        done = fit(TinyBlocks(), Remat(**settings), callbacks=[Grow(), watch], epochs=1)
        assert watch.times(5) == [2] * 5
        assert not any("forward" in vars(block) for block in done.model.blocks[:4])


class Both(TinyModel):
    """An encoder and a decoder: two lists."""

    def make(self, dropout, layers):
        self.one, self.two = TinyBlocks(dropout=dropout, layers=2), TinyBlocks(dropout=dropout, layers=2)

    def forward(self, x):
        return self.one(x) + self.two(x)


@pytest.mark.parametrize(("blocks", "times"), [(None, [2, 2, 2, 2]), ("two.blocks", [1, 1, 2, 2])])
def test_all_lists_are_recomputed_or_those_that_are_given_by_path(blocks, times):
    model, calls = Both(), []
    for number, block in enumerate([*model.one.blocks, *model.two.blocks]):
        block.norm1.register_forward_hook(lambda *_, number=number: calls.append(number))
    fit(model, Remat(blocks=blocks), epochs=1)
    assert [calls.count(number) for number in range(4)] == [STEPS * one for one in times]


class Own(TinyGPT2):
    def make(self, dropout, layers):
        self.model = hugging_face("gpt2", layers, dropout)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the newest version has another name for it
            self.model.gradient_checkpointing_enable({"use_reentrant": False})


@pytest.mark.parametrize("own", ["take over", "leave"])
def test_a_model_that_recomputes_by_itself_is_recomputed_once_and_has_its_switch_back(own, caplog):
    pytest.importorskip("transformers")
    with caplog.at_level("INFO"):
        watch, done = run(Remat(own=own), model=Own)
    assert watch.times() == [2] * 4
    assert all(block.gradient_checkpointing for block in done.model.model.transformer.h)


def test_what_makes_no_sense_is_refused_at_once():
    for settings, words in (
        ({"every": 0}, "every=0: 1 or more"),
        ({"span": 0}, "length=0: 1 or more"),
        ({"policy": "most"}, "policy='most' is none of 'attention', 'matmuls', 'every second', a list and a function"),
        ({"own": "no"}, "own='no' is neither 'take over' nor 'leave'"),
    ):
        with pytest.raises(ValueError, match=words):
            Remat(**settings)


def test_blocks_that_somebody_else_recomputes_are_refused():
    model = TinyBlocks()
    recompute(model.blocks, owner="zero")
    with pytest.raises(RecomputeError, match="Block 0, a Block, is recomputed already, by zero"):
        fit(model, Remat(), epochs=1)


def test_validation_computes_nothing_again_and_a_policy_pickles():
    assert pickle.loads(pickle.dumps(Remat("every second", span=2))).span == 2
    model = TinyBlocks()
    done = fit(model, Remat(), epochs=1, validate=True)
    assert done.trainer.global_step == STEPS


def test_switched_off_for_some_steps_it_stays_off_and_comes_back():
    class Switch(Callback):
        """As a report does it."""

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            (remat,) = eke.techniques(trainer)
            if batch_idx == 1:
                remat.run.close()
            if batch_idx == 3:
                remat.alter_model(remat.run)

    def runs(step):
        seen = Watch(step)
        fit(TinyBlocks(), Remat(), epochs=1, callbacks=[Switch(), seen])
        return len(seen.calls)

    assert [runs(step) for step in range(STEPS)] == [8, 4, 4, 8]


def test_the_registry_builds_it():
    assert isinstance(eke.create("remat", every=2), Remat)
