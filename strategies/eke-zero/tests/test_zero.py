"""Two and four gloo processes: what DDP computes, divided."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import eke
import eke_zero
import pytest
import torch
from eke.seams.blocks import find_blocks
from eke.seams.wrapped import walk
from eke.testing import build_example, example_model, run_alone, run_ranks
from eke.testing import run as kit
from eke.testing.data import shuffled
from eke.testing.models import SHAPES, TinyBlocks, TinyGPT2, TinyTransformer
from eke.testing.ranks import RankError
from eke_zero import ZeRO, ZeROError
from eke_zero.offload import Offloaded
from eke_zero.sharded import META, finish_move, put_in_place
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

CLIPPED = 1e-6  # largest difference of a weight where clipping has summed squares in another order
SUMS = 1e-4  # where gradients were summed in another order: Adam's first steps make much of it


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Losses(Callback):
    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, model, outputs, *_):
        self.all.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


def train(
    zero=None, world=2, model=TinyBlocks, epochs=2, techniques=list, look=None, save=None, ckpt=None, seed=0, **options
):
    """Losses of the first process, whole weights, and what ``look(trainer)`` finds on each process."""

    def work(rank):
        strategy = [] if zero is None else [ZeRO(**zero)]
        losses = Losses()
        trainer = kit.make_trainer(*techniques(), *strategy, epochs=epochs, world=world, callbacks=[losses], **options)
        module = model(seed=seed)
        dataset = getattr(module, "_orig_mod", module).dataset(4 * 4 * world)
        kit.seed_everything(seed)
        with kit.quiet():
            trainer.fit(module, shuffled(dataset, 4, 0, rank, world), ckpt_path=ckpt)
            if save is not None:
                trainer.save_checkpoint(save)
        weights = {name: whole(p) for name, p in trainer.lightning_module.named_parameters()}
        return losses.all, weights, look(trainer) if look else None

    results = run_ranks(work, world)
    return results[0][0], results[0][1], [one[2] for one in results]


def assert_equal(got, wanted, tolerance=0.0):
    if tolerance == 0:
        assert got[0] == wanted[0]
    elif got[0] is not None:
        assert got[0] == pytest.approx(wanted[0], abs=1e-5)
    largest = max(float((got[1][name] - weight).abs().max()) for name, weight in wanted[1].items())
    assert largest <= tolerance, f"weights differ by {largest}"


# The same numbers as DDP's


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_weights_are_those_of_ddp(stage, world):
    # Two gloo processes add two numbers, in any order; four add them in another order when each reduces a part.
    assert_equal(train({"stage": stage}, world), train(None, world), SUMS if world > 2 and stage > 1 else 0.0)


@pytest.mark.parametrize("model", [shape for shape in SHAPES if shape is not TinyBlocks])
@pytest.mark.parametrize("stage", [1, 3])
def test_they_are_for_other_shapes_of_model(model, stage):
    if model is TinyGPT2:
        pytest.importorskip("transformers")
    assert_equal(train({"stage": stage}, model=model), train(model=model))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_they_are_with_options_of_the_trainer(stage, options):
    tolerance = CLIPPED if options == {"gradient_clip_val": 0.1} and stage > 1 else 0.0
    assert_equal(train({"stage": stage}, **options), train(**options), tolerance)


@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, "offload": "optimizer"},
        {"stage": 2, "offload": "optimizer"},
        {"stage": 3, "offload": "optimizer"},
        {"stage": 3, "offload": "params"},
        {"stage": 1, "remat": True},
        {"stage": 3, "remat": True},
    ],
    ids=lambda zero: " ".join(map(str, zero.values())),
)
def test_they_are_with_offloading_and_recomputing(zero):
    assert_equal(train(zero), train())


def test_accumulation_that_reduces_each_batch_comes_to_the_same():
    got = train({"stage": 3, "reduce_every_batch": True}, accumulate_grad_batches=2)
    assert_equal(got, train(accumulate_grad_batches=2), 1e-6)


def test_blocks_can_compute_in_bfloat16_with_float32_weights():
    got = train({"stage": 3, "compute_dtype": "bfloat16"}, look=lambda t: next(t.lightning_module.parameters()).dtype)
    plain = train()
    assert got[2] == [torch.float32] * 2
    assert got[0] != plain[0]
    assert got[0] == pytest.approx(plain[0], abs=0.02)


@pytest.mark.parametrize("stage", [1, 3])
def test_compiled_blocks_compute_the_same(stage):
    def compiled(seed):
        model = TinyBlocks(seed=seed)
        for block in find_blocks(model):
            block.compile(backend="aot_eager")
        return model

    assert_equal(train({"stage": stage}, model=compiled), train())


def test_processes_that_begin_with_other_weights_take_the_first_ones():
    def unlike(seed):
        return TinyBlocks(seed=seed + int(os.environ["LOCAL_RANK"]))

    assert_equal(train({"stage": 3}, model=unlike), train())


def test_one_process_is_enough():
    assert_equal(train({"stage": 3}, world=1), train({"stage": 1}, world=1))


# Bytes


class Bytes(Callback):
    """Takes down what a process holds of weights, gradients and optimizer states, at the end of a backward pass."""

    def __init__(self):
        self.bytes = {}

    def on_before_optimizer_step(self, trainer, model, optimizer):
        if trainer.global_step == 4:
            local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).nbytes  # noqa: E731
            *_, inner = walk(optimizer)
            self.bytes = {
                "weights": sum(local(p) for p in model.parameters()),
                "gradients": sum(local(p.grad) for p in model.parameters() if p.grad is not None),
                "states": sum(local(v) for s in inner.state.values() for v in s.values() if v.numel() > 1),
            }


@pytest.mark.parametrize("world", [2, 4])
def test_each_process_holds_what_the_formula_says(world):
    def measured(stage):
        def look(trainer):
            return next(one for one in trainer.callbacks if isinstance(one, Bytes)).bytes

        zero = {"stage": stage} if stage else None
        # The kit's sizes divide by 4: no process holds a rest.
        return train(zero, world, epochs=2, techniques=lambda: [Bytes()], look=look)[2]

    weights = 4 * sum(p.numel() for p in TinyBlocks().parameters())
    largest = 8 * max(p.numel() for p in TinyBlocks().parameters())
    for bytes_ in measured(0):
        assert bytes_ == {"weights": weights, "gradients": weights, "states": 2 * weights}
    first = measured(1)
    assert sum(one["states"] for one in first) == 2 * weights  # 8P/W each, as evenly as whole tensors allow
    assert all(abs(one["states"] - 2 * weights / world) <= largest for one in first)
    assert all(one["weights"] == one["gradients"] == weights for one in first)
    for stage in (2, 3):
        for rank, one in enumerate(measured(stage)):
            shard = sum(4 * shard_size(p, rank, world) for p in TinyBlocks().parameters())
            assert one == {"weights": shard, "gradients": shard, "states": 2 * shard}, (stage, rank)


def shard_size(parameter, rank, world):
    """FSDP2 divides the first dimension, rounding up."""
    chunks = parameter.chunk(world)
    return chunks[rank].numel() if rank < len(chunks) else 0


# Checkpoints

KINDS = [
    {"stage": 1},
    {"stage": 1, "offload": "optimizer"},
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "offload": "params"},
    {"stage": 3, "offload": "optimizer"},
    {"stage": 3, "checkpoint": "sharded"},
]


def named(zero):
    return " ".join(map(str, zero.values()))


def dropping(seed):
    return TinyBlocks(dropout=0.1, seed=seed)


@pytest.mark.parametrize("zero", KINDS, ids=named)
@pytest.mark.parametrize("steps", [4, 6], ids=["epoch end", "mid-epoch"])
def test_a_resumed_run_ends_at_the_same_bits(tmp_path, zero, steps):
    save = lambda: [kit.SaveAfter(tmp_path / "cut.ckpt", steps)]  # noqa: E731
    unbroken = train(zero, model=dropping, techniques=save)
    resumed = train(zero, model=dropping, seed=1, ckpt=tmp_path / "cut.ckpt")
    assert resumed[0] == unbroken[0][steps:]
    assert_equal((None, resumed[1]), (None, unbroken[1]), 1e-12)


@pytest.mark.parametrize("zero", KINDS, ids=named)
def test_any_number_of_processes_reads_a_checkpoint(tmp_path, zero):
    saved = train(zero, epochs=1, save=tmp_path / "two.ckpt")
    for world, stage in ((4, 3), (1, 2), (2, 1)):
        if stage == 1 and zero.get("checkpoint") == "sharded":
            continue
        # No batch is left in an epoch that is over, so these are the weights as read.
        read = train({"stage": stage}, world, epochs=1, seed=1, ckpt=tmp_path / "two.ckpt")
        assert_equal(([], read[1]), ([], saved[1]))
    on = train({"stage": 3}, 4, epochs=2, seed=1, ckpt=tmp_path / "two.ckpt")
    assert len(on[0]) == 4


def test_a_forecast_before_a_run_does_not_disturb_it(tmp_path):
    from eke.forecast import forecast

    zero = {"stage": 3, "checkpoint": "sharded"}
    data = TinyBlocks.dataset(4)
    batch = tuple(torch.stack([data[i][part] for i in range(4)]) for part in range(2))
    forecast(lambda: (TinyBlocks(), batch), lambda: {"strategy": ZeRO(**zero)}, ranks=2)
    saved = train(
        zero, epochs=1, save=tmp_path / "x.ckpt"
    )  # torch remembers where shards lie, for processes forked here
    assert_equal(([], train(zero, epochs=1, seed=1, ckpt=tmp_path / "x.ckpt")[1]), ([], saved[1]))


@pytest.mark.parametrize("zero", [kind for kind in KINDS if "checkpoint" not in kind], ids=named)
def test_a_trainer_without_us_goes_on_from_a_full_checkpoint_and_the_other_way_round(tmp_path, zero):
    unbroken = train()
    train(zero, epochs=1, save=tmp_path / "ours.ckpt")
    train(None, epochs=1, save=tmp_path / "plain.ckpt")
    for strategy, file in ((None, "ours.ckpt"), (zero, "plain.ckpt")):
        resumed = train(strategy, ckpt=tmp_path / file)
        assert resumed[0] == unbroken[0][4:], file
        assert_equal((None, resumed[1]), (None, unbroken[1]), 1e-12)
    checkpoint = torch.load(tmp_path / "ours.ckpt", weights_only=True)
    model = TinyBlocks(seed=5)
    model.load_state_dict(checkpoint["state_dict"])
    model.configure_optimizers()["optimizer"].load_state_dict(checkpoint["optimizer_states"][0])


def test_the_trial_changes_nothing_and_leaves_nothing(tmp_path):
    keep = lambda: [ModelCheckpoint(tmp_path, "last", every_n_train_steps=3)]  # noqa: E731
    for zero in ({"stage": 1}, {"stage": 2, "offload": "optimizer"}, {"stage": 3, "checkpoint": "sharded"}):
        with_trial = train(zero, model=dropping, techniques=keep)
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
        without = train({**zero, "trial": False}, model=dropping)
        assert_equal(with_trial, without)
        path = tmp_path / "last.ckpt"
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Unsavable(TinyBlocks):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = lambda: None  # does not pickle


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 3}], ids=named)
def test_a_run_whose_checkpoints_cannot_be_saved_ends_before_its_first_step(tmp_path, zero):
    class Count(Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("a step was taken")

    with pytest.raises(RankError, match="before the first step does not come back"):
        train(zero, 1, model=Unsavable, techniques=lambda: [ModelCheckpoint(tmp_path, "last"), Count()])
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_is_killed_leaves_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    zero = {"stage": 3, "checkpoint": "sharded", "trial": False}
    first = train(zero, epochs=1, save=path)

    class Killed(Callback):
        def on_save_checkpoint(self, *_):
            import torch.distributed.checkpoint as files

            files.save = lambda state, checkpoint_id: (
                Path(checkpoint_id, "__0_0.distcp").write_bytes(b"half"),
                os._exit(9),
            )

    results = run_ranks(lambda rank: train_here(zero, path, Killed()))
    assert results == [None, None]
    assert (tmp_path / "last.ckpt.part" / "__0_0.distcp").read_bytes() == b"half"
    assert_equal(([], train(zero, epochs=1, seed=1, ckpt=path)[1]), ([], first[1]))


def train_here(zero, path, callback):
    trainer = kit.make_trainer(ZeRO(**zero), epochs=1, world=2, callbacks=[callback])
    with kit.quiet():
        trainer.fit(TinyBlocks(), shuffled(TinyBlocks.dataset(32), 4, 0, trainer.global_rank, 2))
        trainer.save_checkpoint(path)


def test_of_two_renames_each_leaves_a_whole_checkpoint(tmp_path):
    path, part = tmp_path / "last.ckpt", tmp_path / "last.ckpt.part"
    for number in range(2):
        part.mkdir()
        (part / META).write_text(str(number))
        put_in_place(part, path)
        assert (path / META).read_text() == str(number)
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]
    path.rename(part)  # as a kill between the two renames leaves it
    finish_move(path)
    assert (path / META).read_text() == "1"


def test_a_checkpoint_of_one_kind_is_not_written_over_the_other(tmp_path):
    train({"stage": 3, "checkpoint": "sharded"}, 1, epochs=1, save=tmp_path / "folder.ckpt")
    train({"stage": 3}, 1, epochs=1, save=tmp_path / "file.ckpt")
    with pytest.raises(RuntimeError, match=r"folder.ckpt is a sharded checkpoint, and one file is to be saved"):
        train({"stage": 3}, 1, epochs=1, save=tmp_path / "folder.ckpt")
    with pytest.raises(RuntimeError, match=r"file.ckpt is a file, and a folder is to be saved"):
        train({"stage": 3, "checkpoint": "sharded"}, 1, epochs=1, save=tmp_path / "file.ckpt")
    assert torch.load(tmp_path / "file.ckpt", weights_only=True)["global_step"] == 4


def test_the_optimizer_of_another_run_is_refused(tmp_path):
    class OneGroup(TinyBlocks):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    train({"stage": 3}, 1, epochs=1, save=tmp_path / "x.ckpt")
    with pytest.raises(RuntimeError, match="groups of .* parameters, and this run's of"):
        train({"stage": 3}, 1, model=OneGroup, epochs=2, ckpt=tmp_path / "x.ckpt")


def test_evaluation_reads_checkpoints_too(tmp_path):
    train({"stage": 3}, epochs=1, save=tmp_path / "x.ckpt")

    def loss(strategy):
        def work(rank):
            trainer = kit.make_trainer(*strategy(), world=2)
            data = kit.Loader(TinyBlocks.dataset(16), 4, 0, rank, 2)
            with kit.quiet():
                trainer.test(TinyBlocks(seed=3), data, ckpt_path=tmp_path / "x.ckpt", verbose=False)
            return float(trainer.callback_metrics["test_loss"])

        return run_ranks(work, 2)

    assert loss(lambda: [ZeRO(stage=3)]) == loss(lambda: [ZeRO(stage=1)]) == loss(list)


def test_fit_validate_and_fit_again_with_one_trainer():
    def work(rank):
        trainer = kit.make_trainer(ZeRO(stage=3), epochs=1, world=2, validate=True)
        model, data = TinyBlocks(), kit.Loader(TinyBlocks.dataset(32), 4, 0, rank, 2)
        with kit.quiet():
            trainer.fit(model, data, data)
            trainer.validate(model, data, verbose=False)
            trainer.fit_loop.max_epochs = 2
            trainer.fit(model, data, data)
        return trainer.global_step

    assert run_ranks(work, 2) == [8, 8]


# Models larger than memory


class Late(TinyBlocks):
    """Builds in ``configure_model``, which Lightning calls under torch's meta device where it may."""

    def make(self, dropout, layers):
        self.sizes = dropout, layers
        self.built_on = None

    def configure_model(self):
        if self.built_on is None:
            super().make(*self.sizes)
            self.built_on = str(next(self.parameters()).device)


def test_a_model_built_in_configure_model_is_sharded():
    got = train(
        {"stage": 3}, model=Late, look=lambda trainer: type(next(trainer.lightning_module.parameters())).__name__
    )
    assert got[2] == ["DTensor"] * 2


def meta(shape):
    def build(seed):
        with torch.device("meta"):
            return shape(seed=seed)

    return build


class Initialized(TinyTransformer):
    def reset_parameters(self):
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)


@pytest.mark.parametrize("shape", [TinyGPT2, Initialized])
def test_weights_on_the_meta_device_are_made_and_the_same_everywhere(shape, tmp_path):
    if shape is TinyGPT2:
        pytest.importorskip("transformers")

    def checked(trainer):
        assert not any(p.is_meta for p in trainer.lightning_module.parameters())
        return {name: whole(p) for name, p in trainer.lightning_module.named_parameters()}

    losses, weights, looks = train({"stage": 3}, model=meta(shape), epochs=3, look=checked, save=tmp_path / "x.ckpt")
    assert all(torch.equal(looks[0][name], looks[1][name]) for name in weights)
    assert sum(losses[-4:]) < sum(losses[:4])
    shape().load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])


def test_weights_on_the_meta_device_that_nobody_initializes_are_refused():
    with pytest.raises(RuntimeError, match="a TinyBlocks has weights on the meta device and no reset_parameters"):
        train({"stage": 3}, 1, model=meta(TinyBlocks))


# With the other techniques

TOGETHER = [name for name in eke.available() if name != "zero" and example_model(name)]


@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])  # 1 is DDP with another optimizer
def test_every_technique_trains_as_under_ddp_or_is_refused_in_words(name, stage, tmp_path):
    if name in ("data_pruning", "data_scores"):
        pytest.skip("it needs a Trainer's data module or a file, and its own tests run it")
    settings = {"model": example_model(name), "techniques": lambda: [build_example(name)]}
    try:
        got = train({"stage": stage}, **settings)
    except RuntimeError as error:
        words = str(error)
        assert any(word in words for word in ("Misconfiguration", "EkeError", "ConflictError", "StrategyError")), words
        assert name in REFUSED[stage], words
        return
    assert name not in REFUSED[stage]
    assert_equal(got, train(**settings), 0.0 if name != "layer_drop" else 1e-6)


REFUSED = {
    1: {"stacking"},
    3: {"adam8bit", "mae", "stacking"},  # 8-bit states: from full files only, see the next test
}


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_eight_bit_states_are_sharded_saved_and_resumed(stage, tmp_path):
    zero = {"stage": stage, "checkpoint": "sharded"}

    class Wide(TinyBlocks):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    adam8bit = pytest.importorskip("eke_adam8bit")

    def eight():
        return [adam8bit.Adam8bit()]

    first = train(zero, model=Wide, epochs=1, techniques=eight, save=tmp_path / "x.ckpt")
    resumed = train(zero, model=Wide, techniques=eight, ckpt=tmp_path / "x.ckpt", seed=1)
    unbroken = train(zero, model=Wide, techniques=eight)
    assert first[0] + resumed[0] == unbroken[0]
    assert_equal((None, resumed[1]), (None, unbroken[1]), 1e-12)


# Death and hanging

SCRIPT = """
    import os, sys, time, warnings
    warnings.filterwarnings("ignore")
    from eke.testing import run as kit
    from eke.testing.models import TinyBlocks
    from eke_zero import ZeRO
    from lightning.pytorch import Callback

    class Trouble(Callback):
        def on_train_batch_start(self, trainer, *_):
            print("process", trainer.global_rank, os.getpid(), flush=True)
            if trainer.global_rank == {rank} and trainer.global_step == 2:
                {what}

    trainer = kit.make_trainer(ZeRO(stage={stage}, timeout={timeout}), epochs=9, world=2, callbacks=[Trouble()])
    trainer.fit(TinyBlocks(), kit.Loader(TinyBlocks.dataset(64), 4, 0, trainer.global_rank, 2))
"""


@pytest.mark.parametrize(
    ("what", "rank", "stage", "words"),
    [
        ("os._exit(7)", 1, 3, "process 1|exit|terminated"),
        ("time.sleep(600)", 1, 1, "has got nowhere for 8 s.*ZeRO\\(timeout"),
        ("os.kill(os.getpid(), 9)", 0, 3, "process 1 of 2"),
    ],
    ids=["dies", "hangs", "the first is killed"],
)
def test_a_process_that_dies_or_hangs_ends_the_run_and_leaves_none_behind(tmp_path, what, rank, stage, words):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(what=what, rank=rank, stage=stage, timeout=8))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False)
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert re.search(words, output, re.DOTALL), output[-3000:]
    pids = {
        int(line.split()[2])
        for line in output.splitlines()
        if line.startswith("process ") and line.split()[2].isdigit()
    }
    assert len(pids) == 2
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.2)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


# Refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": 4}, "stage=4: one of 1, 2, 3"),
        ({"offload": "disk"}, "offload='disk': one of None, 'optimizer', 'params'"),
        ({"engine": "fsdp"}, "engine='fsdp'"),
        ({"stage": 2, "offload": "params"}, "offload='params' with stage=2"),
        ({"stage": 1, "compute_dtype": "bfloat16"}, "compute_dtype needs weights that are gathered"),
        ({"stage": 1, "checkpoint": "sharded"}, "only stages 2 and 3 have parts"),
        ({"config": {"x": 1}}, "config= is for engine='deepspeed'"),
        ({"timeout": 0}, "timeout=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ZeROError, match=words):
        ZeRO(**settings)


class ByHand(TinyBlocks):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False


def test_models_that_cannot_be_sharded_are_refused_in_words():
    with pytest.raises(RuntimeError, match="optimizes by hand"):
        train({"stage": 3}, 1, model=ByHand)

    def shared(seed):
        model = TinyBlocks(seed=seed)
        blocks = find_blocks(model)
        blocks[1].__dict__["_modules"].update(blocks[0]._modules)
        return model

    with pytest.raises(RuntimeError, match="is used in several blocks"):
        train({"stage": 3}, 1, model=shared)
    with pytest.raises(RuntimeError, match="has no module at 'nowhere'.*takes the path of a list"):
        train({"stage": 3, "blocks": "nowhere"}, 1)


def test_names_are_registered():
    assert Trainer(strategy="zero3_offload", accelerator="cpu", devices=1, logger=False).strategy.offload == "params"
    for number in (1, 2, 3):
        assert Trainer(strategy=f"zero{number}", accelerator="cpu", devices=1, logger=False).strategy.stage == number


@pytest.mark.parametrize("strategy", [{"class_path": "eke_zero.ZeRO", "init_args": {"stage": 2}}, "zero2"], ids=str)
def test_a_command_line_builds_it(tmp_path, strategy):
    pytest.importorskip("jsonargparse")
    import yaml
    from lightning.pytorch import LightningModule
    from lightning.pytorch.cli import LightningCLI

    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "strategy": strategy, "max_epochs": 1,
               "use_distributed_sampler": False, "default_root_dir": str(tmp_path)}  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"class_path": "eke.testing.models.TinyBlocks"}, "trainer": trainer}))

    def build():
        cli = LightningCLI(
            LightningModule,
            subclass_mode_model=True,
            run=False,
            save_config_callback=None,
            args=["--config", str(file)],
        )
        cli.trainer.fit(cli.model)
        return cli.trainer.strategy.stage, cli.trainer.global_step

    stage, steps = run_alone(build)
    assert stage == 2
    assert steps > 0


def test_what_is_built_is_an_engine_and_a_ZeRO():
    for settings in ({"stage": 1}, {"stage": 2}, {"stage": 3}):
        assert isinstance(ZeRO(**settings), ZeRO)
        assert type(ZeRO(**settings)) is not ZeRO


def test_no_module_imports_one_that_imports_it():
    folder = Path(eke_zero.__file__).parent
    imports = {
        file.stem: set(re.findall(r"^ *from eke_zero\.(\w+) import", file.read_text(), re.MULTILINE))
        for file in folder.glob("*.py")
    }
    assert "base" in imports["sharded"]
    for name in imports:
        reached, new = set(), {name}
        while new:
            new = set().union(*(imports[one] for one in new)) - reached
            reached |= new
        assert name not in reached


def test_an_offloaded_optimizer_says_what_it_wraps_and_what_it_keeps_in_cpu_memory():
    weight = nn.Parameter(torch.ones(3))
    inner = torch.optim.AdamW([weight])
    outer = Offloaded(inner)
    assert list(walk(outer)) == [outer, inner]
    assert [tensor.tolist() for tensor in outer.host_tensors()] == [[1.0] * 3]


@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_that_recomputes_by_itself_is_not_recomputed_twice(stage):
    pytest.importorskip("transformers")

    class Own(TinyGPT2):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the newest version has another name for it
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for block in self.model.transformer.h:
                block.ln_1.register_forward_hook(lambda *_: calls.append(1))

    calls = []

    def look(trainer):
        return len(calls), all(block.gradient_checkpointing for block in trainer.lightning_module.model.transformer.h)

    got = train({"stage": stage, "remat": True}, 1, model=Own, epochs=1, look=look)
    assert got[2] == [(2 * 4 * 4, True)]  # steps, blocks, forward and backward; given back at the end


def test_it_pickles():
    assert pickle.loads(pickle.dumps(ZeRO(stage=2, remat=True))).remat
