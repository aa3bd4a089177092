"""What progressive stacking promises, exactly: weights, moments, dormant blocks, resuming, cost."""

import copy
import pickle
import warnings

import eke
import pytest
import torch
from eke import strategies
from eke.seams import interceptor
from eke.seams.blocks import find_blocks
from eke.seams.names import plain_keys
from eke.testing import (
    LAYERS,
    TinyBlocks,
    TinyTransformer,
    TinyViT,
    assert_same,
    fit,
    hugging_face,
    run_alone,
    run_ranks,
)
from eke.testing.run import SaveAfter
from eke_stacking import Stacking, copy_blocks, output_projections, sources, trim
from eke_stacking.operators import check_identity, positions
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FORMS = pytest.mark.parametrize("form", ["dormant", "growth"])
STATES = pytest.mark.parametrize("optimizer_state", ["copy", "reset_new", "reset_all"])
HALF = LAYERS // 2


class Look(Callback):
    """Copies weights and optimizer state before the technique's hook of a step, and right after it."""

    def __init__(self, step):
        self.step = step
        self.seen = {}

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if trainer.global_step == self.step and "before" not in self.seen:
            self.seen["before"] = self.look(trainer, model)

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_step == self.step:
            self.seen["after"] = self.look(trainer, model)

    @staticmethod
    def look(trainer, model):
        blocks = find_blocks(model, "blocks").modules
        states = [
            {name: trainer.optimizers[0].state.get(p, {}) for name, p in block.named_parameters()} for block in blocks
        ]
        return copy.deepcopy(
            {"model": model.state_dict(), "blocks": [b.state_dict() for b in blocks], "states": states}
        )


def grown(at=5, **arguments):
    """A run that grows from half at step 5: what it looked like just before and just after."""
    look = Look(at)
    run = fit(TinyBlocks(), Stacking([at], **arguments), callbacks=[look])
    return run, look.seen["before"], look.seen["after"]


# The operators


def test_each_operator_maps_new_blocks_to_sources_as_its_formula_says():
    new = range(8)
    assert sources([0, 1, 2, 3], new, "stack") == {j: j % 4 for j in range(4, 8)}
    assert sources([0, 1], new, "stack") == {j: j % 2 for j in range(2, 8)}  # a growth by 4, as in G_stack
    assert sources([0, 1, 2, 3], new, "identity") == {4: 0, 5: 1, 6: 2, 7: 3}
    assert sources([0, 2, 4, 6], new, "interleave") == {1: 0, 3: 2, 5: 4, 7: 6}
    assert sources([0, 1, 2, 3], new, "random") == {}
    # s(j) = ceil(j * k / L), blocks counted from 1
    for k, deeper in ((2, 8), (3, 8), (4, 6)):
        active = positions([k, deeper], "interleave")[0]
        expected = {j - 1: active[-(-j * k // deeper) - 1] for j in range(1, deeper + 1) if j - 1 not in active}
        assert sources(active, range(deeper), "interleave") == expected


def test_the_blocks_that_run_are_nested_from_depth_to_depth():
    assert positions([2, 4, 8], "stack") == [[0, 1], [0, 1, 2, 3], list(range(8))]
    assert positions([2, 4, 8], "interleave") == [[0, 4], [0, 2, 4, 6], list(range(8))]
    for depths in ([1, 2, 5, 7], [3, 4, 12]):
        active = positions(depths, "interleave")
        assert [len(one) for one in active] == depths
        assert all(set(one) < set(more) for one, more in zip(active, active[1:], strict=False))


@FORMS
@pytest.mark.parametrize("operator", ["stack", "interleave"])
def test_new_blocks_are_their_sources_to_the_bit_and_the_rest_is_untouched(operator, form):
    _, before, after = grown(operator=operator, form=form)
    from_old = {"stack": [0, 1, 0, 1], "interleave": [0, 0, 1, 1]}[operator]
    trained = before["blocks"][:HALF] if form == "growth" or operator == "stack" else before["blocks"][::2]
    assert_same([trained[i] for i in from_old], after["blocks"], "sources, then blocks")
    outside = [{n: v for n, v in one["model"].items() if not n.startswith("blocks.")} for one in (before, after)]
    assert_same(*outside, "everything but the blocks before the growth, then after it")


def test_after_the_growth_the_model_applies_the_trained_blocks_twice():
    look = Look(5)
    fit(TinyBlocks(), Stacking([5]), callbacks=[look])
    deep, shallow = TinyBlocks(), TinyBlocks()
    deep.load_state_dict(look.seen["after"]["model"])
    shallow.load_state_dict(look.seen["before"]["model"])
    half = list(shallow.blocks)[:HALF]
    shallow.blocks = nn.ModuleList([*half, *copy.deepcopy(half)])
    x = next(iter(deep.train_dataloader()))[0]
    assert torch.equal(deep(x), shallow(x))


@FORMS
def test_grown_as_identity_the_model_computes_what_it_did(form):
    class Logits(Callback):
        values = {}

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            self.values[trainer.global_step] = model(self.x)

        def on_train_batch_end(self, trainer, model, *_):
            self.x = next(iter(model.val_dataloader()))[0]
            self.values["before"] = model(self.x) if trainer.global_step == 5 else None
            if trainer.global_step == 5:
                self.kept = self.values["before"]

    watch = Logits()
    watch.x = next(iter(TinyBlocks().val_dataloader()))[0]
    run = fit(TinyBlocks(), Stacking([5], operator="identity", form=form), callbacks=[watch])
    assert torch.equal(watch.values[5], watch.kept)
    assert not torch.equal(watch.values[6], watch.values[5])
    zeroed = [layer.matrix() for block in run.model.blocks[HALF:] for layer in output_projections(block)]
    assert all(weight.abs().sum() > 0 for weight in zeroed)  # and trains from there


def test_with_random_blocks_nothing_is_copied():
    fresh = TinyBlocks().blocks.state_dict()
    _, before, after = grown(operator="random")
    assert_same(before["blocks"], after["blocks"], "blocks before the growth, then after it")
    start = {f"{i}.{name}": value for i in (2, 3) for name, value in after["blocks"][i].items()}
    assert_same({name: fresh[name] for name in start}, start, "blocks as built, then when they begin to train")


# The optimizer's state


@FORMS
def test_copied_moments_are_those_of_the_source(form):
    _, before, after = grown(form=form)
    assert before["states"][0]["attn.qkv.weight"]["exp_avg"].abs().sum() > 0
    assert_same(
        [before["states"][i] for i in (0, 1, 0, 1)], after["states"], "states of the sources, then of all blocks"
    )


@FORMS
def test_reset_new_leaves_old_moments_alone_and_gives_new_blocks_none(form):
    _, before, after = grown(form=form, optimizer_state="reset_new")
    assert_same(before["states"][:HALF], after["states"][:HALF], "states of the trained blocks before, then after")
    assert all(not state for block in after["states"][HALF:] for state in block.values())


@FORMS
def test_reset_all_leaves_no_moments(form):
    _, _, after = grown(form=form, optimizer_state="reset_all")
    assert all(not state for block in after["states"] for state in block.values())


def test_weights_set_to_zero_do_not_take_the_state_of_what_they_were_copied_from():
    _, before, after = grown(operator="identity")
    assert not after["states"][2]["attn.proj.weight"]
    assert not after["states"][2]["mlp.fc2.bias"]
    assert_same(before["states"][0]["mlp.fc1.weight"], after["states"][2]["mlp.fc1.weight"], "source, then copy")


@FORMS
@STATES
def test_the_learning_rate_goes_on_as_if_nothing_had_happened(form, optimizer_state):
    rates = [
        [step["learning rate"] for step in fit(TinyBlocks(), *extra).state["steps"].values()]
        for extra in ([], [Stacking([5], form=form, optimizer_state=optimizer_state)])
    ]
    assert rates[0] == rates[1]


# Dormant blocks


def test_dormant_blocks_keep_every_bit_and_have_no_gradient_and_no_state():
    model = TinyBlocks()
    start = copy.deepcopy(model.blocks[HALF:].state_dict())
    with pytest.warns(UserWarning, match="before the growth at step 99: 2 of 4 blocks were trained. trim"):
        run = fit(model, Stacking([99]))
    optimizer = run.trainer.optimizers[0]
    assert optimizer.param_groups[0]["weight_decay"] > 0
    assert_same(start, model.blocks[HALF:].state_dict(), "dormant blocks before training, then after it")
    for parameter in model.blocks[HALF:].parameters():
        assert parameter.grad is None
        assert parameter not in optimizer.state
        assert parameter.requires_grad


@FORMS
def test_a_step_costs_the_share_of_the_blocks_that_run(form):
    class Flops(Callback):
        def __init__(self):
            self.block_flops = {}

        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            with FlopCounterMode(display=False) as counter:
                model.loss(batch).backward()
            model.zero_grad()
            head = 3 * 2 * batch[0].numel() * model.head.weight.numel()
            self.block_flops[trainer.global_step] = counter.get_total_flops() - head

    flops = Flops()
    fit(TinyBlocks(), Stacking([5], form=form), callbacks=[flops])
    assert flops.block_flops[2] * 2 == flops.block_flops[7]


def test_true_growth_holds_no_weights_that_do_not_train():
    class Bytes(Callback):
        def __init__(self):
            self.held = {}

        def on_train_batch_end(self, trainer, model, *_):
            stacking = eke.techniques(trainer)[0]
            kept = {id(p): p.nbytes for block in stacking._full for p in block.parameters() if not p.is_meta}
            self.held[trainer.global_step] = sum({**kept, **{id(p): p.nbytes for p in model.parameters()}}.values())

    whole, watch = TinyBlocks(), Bytes()
    block = sum(parameter.nbytes for parameter in whole.blocks[0].parameters())
    everything = sum(parameter.nbytes for parameter in whole.parameters())
    fit(TinyBlocks(), Stacking([5], form="growth"), callbacks=[watch])
    assert watch.held[4] == everything - HALF * block
    assert watch.held[7] == everything


def test_both_forms_train_to_the_same_bits():
    states = [fit(TinyBlocks(), Stacking([5], form=form)).state for form in ("dormant", "growth")]
    assert_same(states[0]["weights"], states[1]["weights"], "weights with dormant blocks, then with true growth")


@FORMS
def test_before_the_growth_it_trains_as_the_shallow_model_does(form):
    shallow, deep = TinyBlocks(), TinyBlocks()
    del shallow.blocks[HALF:]
    plain = fit(shallow).state["weights"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = fit(deep, Stacking([99], form=form)).state["weights"]
    assert_same(plain, {name: weights[name] for name in plain}, "weights of the shallow model, then of the deep one")


@FORMS
def test_depth_doubles_at_each_stage_and_validation_has_the_depth_of_training(form):
    class Depth(Callback):
        def __init__(self):
            self.train, self.val, self.kinds = {}, {}, {}

        def on_train_batch_end(self, trainer, model, *_):
            self.train[trainer.global_step] = calls(model)
            self.kinds[trainer.global_step] = eke.techniques(trainer)[0].step_kind()

        def on_validation_batch_end(self, trainer, model, *_):
            self.val[trainer.global_step] = calls(model)

    def calls(model):
        return sum(not interceptor.actions(block) for block in model.blocks)

    depth = Depth()
    fit(TinyBlocks(), Stacking([3, 6], form=form), validate=True, callbacks=[depth])
    assert depth.train == {
        **dict.fromkeys((1, 2, 3), 1),
        **dict.fromkeys((4, 5, 6), 2),
        **dict.fromkeys(range(7, 13), 4),
    }
    assert depth.val == {4: 2, 8: 4, 12: 4}
    assert depth.kinds == {step: f"{blocks} of 4 blocks" for step, blocks in depth.train.items()}


def test_before_a_run_no_kind_of_step_is_known():
    assert Stacking([3]).step_kind() == ""


def test_stages_as_shares_are_those_of_the_whole_run():
    stacking = Stacking([0.25, 0.5])
    fit(TinyBlocks(), stacking)  # 12 steps
    assert stacking.steps == [3, 6]


def test_a_growth_waits_for_the_start_of_an_accumulation_window():
    class Growths(Callback):
        def __init__(self):
            self.at = []

        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            self.at.append((batch_idx, len(eke.techniques(trainer)[0].active)))

    growths = Growths()
    fit(TinyBlocks(), Stacking([2]), steps=8, epochs=1, accumulate_grad_batches=3, callbacks=[growths])
    assert growths.at == [(i, 2 if i < 6 else 4) for i in range(8)]


# Checkpoints


@FORMS
@pytest.mark.parametrize("at", [3, 9])
def test_a_checkpoint_gives_its_depth_back(tmp_path, form, at):
    class Save(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "mid.ckpt", weights_only=True)
                with torch.no_grad():
                    trainer.mid = model(next(iter(model.val_dataloader()))[0])

    run = fit(TinyBlocks(), Stacking([at], form=form), callbacks=[Save()])
    x = next(iter(run.model.val_dataloader()))[0]
    for callbacks in ([Stacking([at], form=form)], None):
        loaded = eke.load_from_checkpoint(TinyBlocks, tmp_path / "mid.ckpt", callbacks=callbacks, seed=5)
        with torch.no_grad():
            assert torch.equal(loaded(x), run.trainer.mid)
    tested = TinyBlocks(seed=5)
    fresh = Stacking([at], form=form)
    from eke.testing.run import make_trainer

    trainer = make_trainer(fresh)
    trainer.limit_test_batches = 1
    seen = []
    tested.test_step = lambda batch, batch_idx: seen.append(tested(x))
    trainer.test(tested, ckpt_path=tmp_path / "mid.ckpt", weights_only=True, verbose=False)
    assert torch.equal(seen[0], run.trainer.mid)
    if at == 3:  # grown to the full depth: Lightning alone loads it
        with torch.no_grad():
            assert torch.equal(TinyBlocks.load_from_checkpoint(tmp_path / "mid.ckpt")(x), run.trainer.mid)


def test_the_other_form_cannot_resume_it(tmp_path):
    with pytest.warns(UserWarning, match="before the growth"):
        run = fit(TinyBlocks(), Stacking([99]), epochs=1)
    run.trainer.save_checkpoint(tmp_path / "shallow.ckpt")
    with pytest.raises(ValueError, match=r"Stacking\(form='dormant'\).*Stacking\(form='growth'\).*cannot be read on"):
        fit(TinyBlocks(), Stacking([99], form="growth"), ckpt=tmp_path / "shallow.ckpt")


def test_other_stages_are_refused_and_by_the_users_word_they_are_the_ones_that_count(tmp_path):
    ckpt = tmp_path / "shallow.ckpt"
    fit(TinyBlocks(), Stacking([0.9]), callbacks=[SaveAfter(ckpt, 3)])
    with pytest.raises(
        eke.ResumeError, match=r"Stacking\(stages=\[0.9\]\), and this run has Stacking\(stages=\[0.25, 0.5\]\)"
    ):
        fit(TinyBlocks(), Stacking([0.25, 0.5]), ckpt=ckpt)
    willing = Stacking([0.25, 0.5], depths=[1, 2])
    willing.on_changed_arguments = "warn"
    with pytest.warns(UserWarning, match="Eke: .*Stacking"):
        run = fit(TinyBlocks(), willing, ckpt=ckpt)
    total = run.trainer.global_step
    assert willing.steps == [-(-total // 4), -(-total // 2)]


@pytest.mark.parametrize("operator", ["stack", "interleave", "identity"])
def test_after_an_exception_true_growth_gives_all_blocks_back_and_a_file_of_that_moment_resumes(tmp_path, operator):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                raise RuntimeError("of the user's")

        def on_exception(self, trainer, model, exception):
            trainer.save_checkpoint(tmp_path / "now.ckpt")

    model = TinyBlocks()
    with pytest.raises(RuntimeError, match="of the user's"):
        fit(model, Stacking([5], form="growth", operator=operator), callbacks=[Fails()])
    blocks = find_blocks(model)
    assert len(blocks) == LAYERS
    assert not any(weight.is_meta for weight in model.parameters())
    active = positions([HALF, LAYERS], operator)[0]
    for new, old in sources(active, range(LAYERS), operator).items():
        zeroed = {id(p) for one in output_projections(blocks[new]) for p in one.parameters()}
        for mine, its in zip(blocks[new].parameters(), blocks[old].parameters(), strict=True):
            assert torch.equal(mine, 0 * its if operator == "identity" and id(mine) in zeroed else its)
    saved = torch.load(tmp_path / "now.ckpt")["state_dict"]
    path = plain_keys({find_blocks(model).path: 0}).popitem()[0]
    for place, number in enumerate(active):
        for name, value in blocks[number].state_dict().items():
            assert torch.equal(saved[f"{path}.{place}.{name}"], value)
    again = fit(TinyBlocks(seed=1), Stacking([5], form="growth", operator=operator), ckpt=tmp_path / "now.ckpt")
    assert len(find_blocks(again.model)) == LAYERS


def test_trimmed_for_export_the_model_computes_what_was_trained(tmp_path):
    class Keep(Callback):
        def on_train_end(self, trainer, model):
            with torch.no_grad():
                self.value = model(next(iter(model.val_dataloader()))[0])

    keep, stacking = Keep(), Stacking([99], operator="interleave")
    with pytest.warns(UserWarning, match="before the growth"):
        run = fit(TinyBlocks(), stacking, callbacks=[keep])
    third = run.model.blocks[2]
    stacking.trim(run.model)
    assert len(run.model.blocks) == HALF
    assert run.model.blocks[1] is third
    with torch.no_grad():
        assert torch.equal(run.model(next(iter(run.model.val_dataloader()))[0]), keep.value)
    alone = TinyViT()
    trim(find_blocks(alone), [1])
    assert len(alone.blocks) == 1


def test_evaluating_a_model_that_was_never_stacked_leaves_it_whole():
    from eke.testing.run import make_trainer

    model = TinyBlocks()
    trainer = make_trainer(Stacking([4]), validate=True)
    trainer.validate(model, verbose=False)
    assert len(model.blocks) == LAYERS
    assert not any(isinstance(block, interceptor.InterceptedBlock) for block in model.blocks)


# Processes


@FORMS
def test_under_ddp_two_stages_end_as_in_one_process(form):
    def train(**options):
        return fit(TinyBlocks(), Stacking([3, 6], form=form), **options).state["weights"]

    first, second = run_ranks(lambda rank: train(world=2))
    assert_same(first, second, "weights of rank 0, then of rank 1")
    assert_same(run_alone(lambda: train(batch=8)), first, "weights of one process, then of two", 1e-5)


# What models it works on


@pytest.mark.parametrize("kind", ["gpt2", "llama", "vit"])
def test_identity_is_exact_on_hugging_face_blocks(kind):
    pytest.importorskip("transformers")
    model = hugging_face(kind).eval()
    blocks = find_blocks(model)
    check_identity(blocks[0])
    inputs = torch.randn(1, 3, 8, 8) if kind == "vit" else torch.arange(6).view(1, 6)
    shallow = copy.deepcopy(model)
    trim(find_blocks(shallow), [0, 1])
    copy_blocks(blocks.modules, {2: 0, 3: 1}, identity=True)
    assert torch.equal(model(inputs).logits, shallow(inputs).logits)


def test_what_belongs_to_a_place_is_not_copied():
    pytest.importorskip("transformers")
    blocks = find_blocks(hugging_face("llama")).modules
    copy_blocks(blocks, {2: 0})
    assert blocks[2].self_attn.layer_idx == 2
    one, other = (nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)) for _ in range(2))
    one(torch.randn(9, 2))
    other.register_buffer("mask", torch.zeros(2))
    one.register_buffer("mask", torch.ones(2))
    copy_blocks([one, other], {1: 0})
    assert torch.equal(other[0].running_mean, one[0].running_mean)
    assert torch.equal(other.mask, torch.zeros(2))


def test_a_weight_tied_within_its_block_is_copied_once_and_stays_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
            self.two.weight = self.one.weight

    blocks = [Tied(), Tied()]
    origin = copy_blocks(blocks, {1: 0})
    assert len(origin) == 3
    assert blocks[1].one.weight is blocks[1].two.weight
    assert torch.equal(blocks[1].one.weight, blocks[0].one.weight)
    from eke_stacking.callback import _free, _materialize

    _free(blocks[1])
    assert all(parameter.is_meta for parameter in blocks[1].parameters())
    _materialize(blocks[1], blocks[0])
    assert blocks[1].one.weight is blocks[1].two.weight
    assert not blocks[1].one.weight.is_meta


def test_eight_bit_states_are_copied_like_any():
    class Bytes(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure() if closure else None
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        codes = self.state[parameter].setdefault("codes", torch.zeros(3, dtype=torch.uint8))
                        codes += 1
                        self.state[parameter]["nested"] = {"scale": codes.float()}
            return loss

    class Model(TinyBlocks):
        def configure_optimizers(self):
            return Bytes(self.parameters(), lr=0.1)

    look = Look(5)
    fit(Model(), Stacking([5]), callbacks=[look])
    states = look.seen["after"]["states"]
    assert states[3]["mlp.fc1.weight"]["codes"].tolist() == [5, 5, 5]
    assert states[3]["mlp.fc1.weight"]["nested"]["scale"].tolist() == [5, 5, 5]


def test_the_callback_can_be_copied_and_pickled_in_any_state():
    stacking = Stacking([4], form="growth")
    fit(TinyBlocks(), stacking)
    for twin in (copy.deepcopy(stacking), pickle.loads(pickle.dumps(stacking))):
        fit(TinyBlocks(), twin)
        assert twin.active == [0, 1, 2, 3]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stages": []}, r"stages=\[\] are no times of growth"),
        ({"stages": [0.5, 0.3]}, "rising shares of the run"),
        ({"stages": [0.5, 3]}, "rising shares of the run"),
        ({"stages": [0]}, "rising numbers of optimizer steps"),
        ({"stages": [2.5]}, "rising numbers of optimizer steps"),
        ({"depths": [0]}, r"depths=\[0\] do not rise from 1"),
        ({"stages": [1, 2], "depths": [2, 2]}, r"depths=\[2, 2\] do not rise"),
        ({"depths": [1, 2]}, "give one depth for each growth"),
        ({"operator": "copy"}, "operator='copy' is none of: stack, interleave, identity, random"),
        ({"form": "lazy"}, "form='lazy' is none of: dormant, growth"),
        ({"optimizer_state": "keep"}, "none of: copy, reset_new, reset_all"),
        ({"operator": "random", "form": "growth"}, "frees them. Use form='dormant'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(arguments, words):
    with pytest.raises(ValueError, match=words):
        Stacking(**arguments)


def test_a_depth_that_cannot_be_halved_asks_for_depths():
    with pytest.raises(
        ValueError, match=r"4 blocks cannot be halved 3 times. Give depths=, such as depths=\[1, 1, 2\]"
    ):
        fit(TinyBlocks(), Stacking([1, 2, 3]))
    with pytest.raises(ValueError, match=r"7 blocks cannot be halved 1 times. Give depths=, such as depths=\[3\]"):
        fit(TinyBlocks(layers=7), Stacking([1]))
    run = fit(TinyBlocks(layers=7), Stacking([1], depths=[3]))
    assert len(run.model.blocks) == 7
    with pytest.raises(ValueError, match=r"depths=\[4\] leave nothing to grow to: the model has 4 blocks"):
        fit(TinyBlocks(), Stacking([1], depths=[4]))


def test_a_path_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(ValueError, match=r"TinyBlocks has no module at 'layers'. Its lists are: 'blocks' \(4 Block\)"):
        fit(TinyBlocks(), Stacking([1], blocks="layers"))


def test_shared_blocks_unlike_blocks_and_mixed_layer_types_are_refused():
    class Shared(TinyBlocks):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.blocks = nn.ModuleList([self.blocks[0]] * 4)

    with pytest.raises(ValueError, match="share 'blocks.1.norm1.weight'.*weights of their own"):
        fit(Shared(), Stacking([1]))

    class Unlike(TinyBlocks):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.blocks[3].mlp = nn.Identity()

    with pytest.raises(ValueError, match="'blocks' differ in class or shape"):
        fit(Unlike(), Stacking([1], blocks="blocks"))

    class Windows(TinyBlocks):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            for i, block in enumerate(self.blocks):
                block.attention_type = ("sliding", "sliding", "full")[i % 3]

    with pytest.raises(ValueError, match="multiples of the period"):
        fit(Windows(), Stacking([1]))


def test_identity_refuses_post_norm_blocks_and_blocks_it_cannot_read():
    class PostNorm(TinyTransformer):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            for block in self.encoder.layers:
                block.norm_first = False

    with pytest.raises(ValueError, match=r"as a post-norm block does: .*norm_first=True"):
        fit(PostNorm(), Stacking([1], operator="identity"))
    fit(TinyTransformer(), Stacking([1], operator="identity"))
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="post-norm"):
        check_identity(find_blocks(hugging_face("bert"))[0])
    with pytest.raises(ValueError, match="no output projection of its attention"):
        output_projections(nn.Sequential(nn.Linear(2, 2)))


def test_a_strategy_that_shards_is_refused():
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises(MisconfigurationException, match="FSDPStrategy imposes.*cannot follow.*strategy='ddp'"):
        strategies.check([Stacking()], FSDPStrategy())


def test_shares_of_a_run_without_an_end_are_refused():
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with pytest.raises(
        MisconfigurationException,
        match=r"Stacking\(stages=0.5\) goes by the length of the run.*Give Trainer\(max_steps=...\)",
    ):
        fit(TinyBlocks(), Stacking([0.5]), epochs=-1)


# Compiled parts


class Inner(torch.nn.Module):
    """The model itself, compiled inside of the module that trains it."""

    def __init__(self, of):
        super().__init__()
        self.blocks, self.ends = of.blocks, nn.ModuleList([of.embed, of.norm, of.head])

    def forward(self, x):
        x = self.ends[0](x)
        for block in self.blocks:
            x = block(x)
        return self.ends[2](self.ends[1](x))


class Around(TinyBlocks):
    compiles = False

    def make(self, dropout, layers):
        super().make(dropout, layers)
        inner = Inner(self)
        del self.embed, self.blocks, self.norm, self.head, self.position
        self.net = torch.compile(inner, backend="eager") if self.compiles else inner

    def forward(self, x):
        return self.net(x)


class AroundCompiled(Around):
    compiles = True


class SomeCompiled(TinyBlocks):
    def make(self, dropout, layers):
        super().make(dropout, layers)
        self.blocks[1] = torch.compile(self.blocks[1], backend="eager")


@FORMS
@pytest.mark.parametrize(("compiled", "plain"), [(AroundCompiled, Around), (SomeCompiled, TinyBlocks)])
def test_compiled_parts_grow_as_plain_ones_do(compiled, plain, form):
    weights = [fit(kind(), Stacking([5], form=form)).model.state_dict() for kind in (compiled, plain)]
    assert_same(plain_keys(weights[0]), weights[1], "weights of the compiled model and of the plain one")


@FORMS
def test_a_checkpoint_of_a_compiled_model_says_depth_by_plain_names(form, tmp_path):
    run = fit(AroundCompiled(), Stacking([100], form=form))
    run.trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=False)
    assert saved["eke"]["techniques"]["stacking"]["manifest"]["path"] == "net.blocks"
