import os
import re
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from eke.testing import (
    SHAPES,
    CallbackContract,
    Cut,
    Loader,
    RankError,
    TinyBlocks,
    TinyViT,
    assert_same,
    differences,
    fit,
    hugging_face,
    resume,
    run_alone,
    run_ranks,
    shuffled,
)
from eke.testing.checks import Subject, resumes, trains_or_refuses
from eke.testing.compare import checksum
from eke.testing.data import Images, Order, Tokens
from eke.testing.ranks import die
from lightning.pytorch import Callback

# Data and models


def test_the_same_data_comes_each_time_and_each_sample_is_another():
    for dataset in (Tokens(16), Images(16)):
        first, again = ([checksum(dataset[index]) for index in range(16)] for _ in range(2))
        assert first == again
        assert len(set(first)) == 16


def test_ranks_together_see_what_one_process_sees():
    whole, parts = Order(16), [Order(16, rank, 2) for rank in range(2)]
    for order in (whole, *parts):
        order.set_epoch(3)
    first, second = (list(part) for part in parts)
    assert [index for pair in zip(first, second, strict=True) for index in pair] == list(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_its_state_says(workers):
    loader = Loader(Tokens(16), batch_size=4, workers=workers)
    batches = [checksum(batch) for batch in loader]
    iterator = iter(loader)
    next(iterator)
    other = Loader(Tokens(16), batch_size=4, workers=workers)
    other.load_state_dict(loader.state_dict())
    assert [checksum(batch) for batch in other] == batches[1:]
    assert [checksum(batch) for batch in other] == batches


def _needs_transformers():
    pytest.importorskip("transformers", reason="one of the shapes is a Hugging Face model")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_builds_the_same_weights_from_the_same_seed_and_draws_nothing(shape):
    _needs_transformers()
    before = torch.get_rng_state()
    first, again, other = shape(), shape(), shape(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not differences(dict(first.state_dict()), dict(again.state_dict()))
    assert differences(dict(first.state_dict()), dict(other.state_dict()))


def test_a_dropout_rate_reaches_every_shape():
    _needs_transformers()
    for shape in SHAPES:
        model = shape(dropout=0.5)
        batch = next(iter(model.train_dataloader()))
        assert model.loss(batch) != model.loss(batch), shape.__name__


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "vit"])
def test_hugging_face_models_have_the_depth_asked_for(kind):
    _needs_transformers()
    assert hugging_face(kind, layers=3).config.num_hidden_layers == 3


def test_another_kind_is_refused_by_name():
    _needs_transformers()
    with pytest.raises(ValueError, match="kind='mamba'.*Use gpt2, llama, bert or vit"):
        hugging_face("mamba")


# Processes


def test_ranks_form_one_group_and_return_by_rank():
    def meet(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        total = torch.tensor([rank + 1])
        torch.distributed.all_reduce(total)
        return rank, total.item()

    assert run_ranks(meet) == [(0, 3), (1, 3)]


def test_an_error_of_a_rank_is_reported_and_the_waiting_one_is_ended(tmp_path):
    def fails(rank):
        if rank == 1:
            while not (tmp_path / "waiting").exists():
                time.sleep(0.01)
            raise KeyError("of rank one")
        (tmp_path / "waiting").write_text(str(os.getpid()))
        time.sleep(3600)

    with pytest.raises(RankError, match="(?s)process 1 raised.*KeyError: 'of rank one'"):
        run_ranks(fails)
    assert not _running(int((tmp_path / "waiting").read_text()))


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path):
    def hangs():
        child = os.fork()
        if child:
            (tmp_path / "child").write_text(str(child))
        time.sleep(60)

    with pytest.raises(RankError, match="still running after 1 s and was ended"):
        run_alone(hangs, timeout=1)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # until whoever inherits it has taken note
        if not _running(child):
            break
        time.sleep(0.05)
    assert not _running(child)


def _running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_process_that_dies_unasked_is_an_error():
    with pytest.raises(RankError, match="ended with status 3 and returned nothing"):
        run_alone(lambda: os._exit(3))


def test_the_port_of_a_group_is_nobody_elses_while_it_runs():
    ports = run_ranks(lambda rank: os.environ["MASTER_PORT"])
    assert len(set(ports)) == 1

    def both(rank):
        inner = run_ranks(lambda rank: os.environ["MASTER_PORT"], world=1)
        return os.environ["MASTER_PORT"] not in inner and meet(rank)

    def meet(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        return True

    assert run_ranks(both) == [True, True]


def test_what_a_process_leaves_in_the_temporary_folder_goes_with_it(tmp_path):
    left = run_alone(lambda: tempfile.mkdtemp())
    assert not os.path.exists(left)


def test_a_process_that_was_told_to_die_gives_none():
    assert run_alone(die) is None


def test_what_a_process_does_stays_in_it():
    before = torch.get_rng_state()
    assert run_alone(lambda: torch.rand(3).shape) == (3,)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_process_whose_parent_has_met_a_card_sees_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run_alone(torch.cuda.is_available)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not run_alone(lambda: torch.cuda.is_available())


# Runs


def test_the_same_call_gives_the_same_bits():
    assert_same(fit(TinyBlocks(dropout=0.1)).state, fit(TinyBlocks(dropout=0.1)).state, "two runs")


def test_another_seed_gives_another_run_where_something_is_random():
    assert differences(
        fit(TinyBlocks(dropout=0.1)).state["weights"], fit(TinyBlocks(dropout=0.1), seed=1).state["weights"]
    )


def test_each_step_is_taken_down():
    steps = fit(TinyBlocks(), epochs=2, steps=3).state["steps"]
    assert list(steps) == [f"epoch {epoch} batch {batch}" for epoch in range(2) for batch in range(3)]
    rates = [step["learning rate"] for step in steps.values()]
    assert len({rate for pair in rates for rate in pair}) == 6
    assert len({step["batch"] for step in steps.values()}) == 6


def test_a_resumed_run_starts_after_the_kill_from_what_the_checkpoint_holds():
    unbroken, (resumed,) = resume(TinyViT, Callback, [Cut(steps=5)])
    assert list(resumed["steps"]) == list(unbroken["steps"])[5:]
    assert_same(unbroken["weights"], resumed["weights"], "weights")


def test_a_stock_loader_that_shuffles_does_not_resume_without_eke():
    with pytest.raises(AssertionError, match="trained|differs|'batch'"):
        resumes(Subject(Callback), Cut(steps=6), loader=shuffled)


def test_dropout_does_not_resume_without_eke():
    with pytest.raises(AssertionError, match="loss"):
        resumes(Subject(Callback), Cut(epochs=1), dropout=0.1)


# Refusals


class Refuses(Callback):
    def __init__(self, error, hook="setup"):
        setattr(self, hook, lambda *_, **__: self.refuse(error))

    def refuse(self, error):
        raise error


WORDS = "Refuses finds no block in TinyBlocks. Give path=."


def test_a_model_outside_shapes_may_be_refused_with_words():
    assert trains_or_refuses(Subject(lambda: Refuses(ValueError(WORDS))), may_refuse=True) == WORDS


@pytest.mark.parametrize(
    ("error", "hook", "may_refuse", "message"),
    [
        (ValueError(WORDS), "setup", False, "TinyBlocks is declared in shapes and was refused"),
        (ValueError(WORDS), "on_train_batch_end", True, "refused only after the first step"),
        (ValueError("no"), "setup", True, "a refusal has to say why; it said 'no'"),
    ],
)
def test_a_bad_refusal_is_found(error, hook, may_refuse, message):
    with pytest.raises(AssertionError, match=message):
        trains_or_refuses(Subject(lambda: Refuses(error, hook)), may_refuse=may_refuse)


def test_a_crash_is_no_refusal():
    with pytest.raises(KeyError):
        trains_or_refuses(Subject(lambda: Refuses(KeyError("blocks"))), may_refuse=True)


# Comparison


@pytest.mark.parametrize(
    ("second", "line"),
    [
        ({"a": [torch.zeros(2)], "b": 1}, r"^a\[0\] differs by 1$"),
        ({"a": [torch.ones(2, dtype=torch.float64)], "b": 1}, r"^a\[0\] is torch.float32, then torch.float64$"),
        ({"a": [torch.ones(3)], "b": 1}, r"^a\[0\] has shape \(2,\), then \(3,\)$"),
        ({"a": [], "b": 1}, r"^a has 1 entries, then 0$"),
        ({"a": [torch.ones(2)], "b": True}, r"^b is 1, then True$"),
        ({"a": [torch.ones(2)]}, r"^b is missing in the second$"),
        ({"a": [torch.tensor([1.0, torch.nan])], "b": 1}, r"^a\[0\] differs by inf$"),
    ],
)
def test_a_difference_is_named_by_its_place(second, line):
    (found,) = differences({"a": [torch.ones(2)], "b": 1}, second)
    assert re.search(line, found)


def test_a_tolerance_holds_for_floating_numbers_only_up_to_it():
    assert not differences({"a": torch.ones(1), "b": 1.0}, {"a": torch.ones(1) + 1e-3, "b": 1.001}, tolerance=2e-3)
    assert (
        len(differences({"a": torch.ones(1), "b": 1.0}, {"a": torch.ones(1) + 1e-3, "b": 1.001}, tolerance=5e-4)) == 2
    )
    assert differences(torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), tolerance=9)


def test_not_a_number_equals_itself_in_the_same_place_only():
    nan = torch.tensor([torch.nan, 1.0])
    assert not differences(nan, nan.clone())
    assert differences(nan, nan.flip(0))


# The contract as a class


class Misspelt(CallbackContract):
    exceptions = {"test_it_trains_in_bfloat": "It has no bf16 kernel yet.", "test_gradients_are_clipped": "no"}

    def build(self):
        return Callback()


def test_a_misspelt_exception_is_an_error():
    with pytest.raises(
        AssertionError, match="names no test: test_it_trains_in_bfloat. The tests: .*test_it_trains_in_bf16"
    ):
        Misspelt().test_every_exception_names_a_test_of_the_contract()


def test_an_exception_needs_a_sentence():
    class Short(Misspelt):
        exceptions = {"test_gradients_are_clipped": "no"}

    with pytest.raises(AssertionError, match="a sentence why it cannot hold: test_gradients_are_clipped"):
        Short().test_every_exception_names_a_test_of_the_contract()


# Misspelt is here for two tests only.
del CallbackContract
Misspelt.__test__ = False


# A plain callback that does nothing keeps every promise.
class TestPlainCallback(Misspelt):
    __test__ = True
    exceptions = {}


def test_a_forked_process_is_in_no_process_group_of_its_parents():
    """The group's threads were not copied: who asked the others for something would wait for ever."""

    def joins():
        assert not dist.is_initialized()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        told = [3]
        dist.broadcast_object_list(told)
        dist.destroy_process_group()
        return told[0]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert run_alone(joins, timeout=60) == 3
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_a_seed_that_lightning_has_left_in_the_environment_seeds_no_run_of_two_processes(monkeypatch):
    def losses():
        ranks = run_ranks(lambda rank: fit(TinyBlocks(dropout=0.1), world=2, epochs=1).state["steps"])
        return [[step["loss"] for step in steps.values()] for steps in ranks]

    before = losses()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert losses() == before
