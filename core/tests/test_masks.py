"""Masks on weights: zeros that stay, one owner each, and moments, tied weights, growth, compiling and sharding."""

import copy

import pytest
import torch
from eke.seams.masks import Masks, MasksError, pack, unpack, zero_state
from eke.testing import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


X = torch.randn(12, 6, generator=torch.Generator().manual_seed(7))


def keep(shape, seed=1, density=0.5):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def loss_of(model, x=X):
    return model(x).square().mean() + model(x).mean()


def train(model, optimizer, masks=None, steps=4, clip=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        if masks is not None:
            masks.before_step()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if masks is not None:
            masks.after_step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masked_weights_are_positive_zero_after_each_step_whatever_the_optimizer(kind):
    model = Net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, steps=2)  # moments are there when the mask comes
    mask, masks = keep((6, 6)), Masks(model)
    masks.claim("sparse", {"first.weight": mask})
    for _ in range(3):
        before = model.first.weight.detach().clone()
        train(model, optimizer, masks, steps=1)
        off = model.first.weight[~mask]
        assert torch.equal(off, torch.zeros_like(off))
        assert not off.signbit().any()
        assert (model.first.weight != before)[mask].all()


def test_a_mask_turns_nan_into_zero():
    model, mask = Net(), keep((6, 6))
    masks = Masks(model)
    masks.claim("sparse", {"first.weight": mask})
    with torch.no_grad():
        model.first.weight.masked_fill_(~mask, float("nan"))
    masks.after_step()
    assert torch.equal(model.first.weight == 0, ~mask)


def test_an_open_mask_changes_no_bit():
    plain, masked = Net(), Net()
    masks = Masks(masked)
    masks.claim("sparse", {"first.weight": torch.ones(6, 6, dtype=torch.bool)})
    train(plain, OPTIMIZERS["adamw"](plain.parameters()))
    train(masked, OPTIMIZERS["adamw"](masked.parameters()), masks)
    torch.testing.assert_close(masked.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_masked_training_is_that_of_a_model_multiplied_by_the_mask():
    masked, by_hand, mask = Net(), Net(), keep((6, 6))
    masks = Masks(masked)
    masks.claim("sparse", {"first.weight": mask})
    train(masked, torch.optim.AdamW(masked.parameters(), lr=0.01), masks, clip=0.1)

    weight, optimizer = by_hand.first.weight, torch.optim.AdamW(by_hand.parameters(), lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        torch.func.functional_call(by_hand, {"first.weight": weight * mask}, (X,)).square().mean().add(
            torch.func.functional_call(by_hand, {"first.weight": weight * mask}, (X,)).mean()
        ).backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
    torch.testing.assert_close(masked.first.weight, weight * mask, rtol=0, atol=1e-7)
    torch.testing.assert_close(masked.second.weight, by_hand.second.weight, rtol=0, atol=1e-7)


def test_masked_gradients_do_not_lengthen_the_norm_and_the_dense_ones_are_there_for_who_asks():
    model, mask = Net(), keep((6, 6))
    masks = Masks(model)
    masks.claim("sparse", {"first.weight": mask})
    masks.ask_dense("first.weight")
    loss_of(model).backward()
    dense = model.first.weight.grad.clone()
    masks.before_step()
    assert torch.equal(model.first.weight.grad, dense * mask)
    assert torch.equal(masks.dense_gradient("first.weight"), dense)
    assert (dense[~mask] != 0).all()
    masks.before_step()  # asked once: kept for one step
    with pytest.raises(MasksError, match="no gradient of 'first.weight' was kept: call ask_dense"):
        masks.dense_gradient("first.weight")


def test_moments_are_zero_where_a_mask_turns_off_or_on_and_stay_elsewhere():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    old, new = keep((6, 6)), keep((6, 6), seed=2)
    masks = Masks(model)
    masks.claim("sparse", {"first.weight": old}, optimizers=[optimizer])
    state = optimizer.state[model.first.weight]
    assert torch.equal(state["exp_avg"] == 0, ~old)
    assert torch.equal(state["exp_avg_sq"] == 0, ~old)
    state["exp_avg"].fill_(1.0)
    masks.update("sparse", {"first.weight": new}, optimizers=[optimizer])
    assert torch.equal(state["exp_avg"] == 0, old ^ new)
    assert state["step"] == 4
    assert torch.equal(model.first.weight == 0, ~(old & new))  # what comes back begins at zero


def test_moments_stay_where_no_optimizer_is_given():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state[model.first.weight])
    Masks(model).claim("sparse", {"first.weight": keep((6, 6))})
    torch.testing.assert_close(optimizer.state[model.first.weight], before, rtol=0, atol=0)


def test_the_moments_of_a_wrapped_optimizer_are_found():
    class Around(torch.optim.Optimizer):
        def __init__(self, base):
            super().__init__(base.param_groups, {})
            self.base = base

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, steps=1)
    zero_state(Around(optimizer), model.first.weight, torch.ones(6, 6, dtype=torch.bool))
    assert not optimizer.state[model.first.weight]["exp_avg"].any()


def test_a_factored_state_is_refused_before_anything_is_masked():
    model = Net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    train(model, optimizer, steps=1)
    masks, before = Masks(model), model.first.weight.detach().clone()
    with pytest.raises(MasksError, match="Adafactor keeps 'row_var' of 'first.weight'.*one number for several weights"):
        masks.claim("sparse", {"first.weight": keep((6, 6))}, optimizers=[optimizer])
    assert masks.names == []
    assert torch.equal(model.first.weight, before)


def test_two_techniques_share_a_parameter_only_if_both_say_so():
    model, one, two = Net(), keep((6, 6)), keep((6, 6), seed=2)
    masks = Masks(model)
    masks.claim("sparse", {"first.weight": one}, combine=True)
    with pytest.raises(MasksError, match="'heads' and 'sparse' both mask 'first.weight', and 'heads' cannot share it"):
        masks.claim("heads", {"first.weight": two})
    masks.claim("neurons", {"first.weight": two}, combine=True)
    assert torch.equal(masks.mask("first.weight"), one & two)
    assert masks.density() == {"first.weight": (int((one & two).sum()), 36)}
    masks.release("sparse")
    assert torch.equal(masks.mask("first.weight"), two)
    masks.claim("own", {"second.weight": keep((3, 6))})
    with pytest.raises(MasksError, match="and 'own' cannot share it"):
        masks.claim("neurons", {"second.weight": keep((3, 6))}, combine=True)


def test_turning_off_under_two_masks_resets_only_where_the_two_together_change():
    model, one, two = Net(), keep((6, 6)), keep((6, 6), seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    masks = Masks(model)
    masks.claim("one", {"first.weight": one}, combine=True)
    state = optimizer.state[model.first.weight]["exp_avg"].fill_(1.0)
    masks.claim("two", {"first.weight": two}, combine=True, optimizers=[optimizer])
    assert torch.equal(state == 0, one & ~two)


def test_released_masks_leave_zeros_that_train():
    model, mask = Net(), keep((6, 6))
    masks = Masks(model)
    masks.claim("sparse", {"first.weight": mask})
    masks.release("sparse")
    assert torch.equal(model.first.weight == 0, ~mask)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), masks, steps=1)
    assert (model.first.weight != 0).all()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_parameter_has_one_mask_by_either_name():
    model, mask = Tied(), keep((5, 4))
    masks = Masks(model)
    masks.claim("sparse", {"head.weight": mask})
    assert torch.equal(masks.mask("embed.weight"), mask)
    with pytest.raises(MasksError, match="both mask"):
        masks.claim("other", {"embed.weight": mask})
    with pytest.raises(MasksError, match="'head.weight' and 'embed.weight' are one tied parameter.*two masks"):
        Masks(model).claim("sparse", {"embed.weight": mask, "head.weight": ~mask})
    average = {"embed.weight": torch.ones(5, 4), "head.weight": torch.ones(5, 4)}
    assert all(torch.equal(one != 0, mask) for one in masks.masked(average).values())


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 4), (17,), (0, 3)])
def test_masks_are_packed_to_a_bit_and_come_back(shape):
    mask = keep(shape, density=0.3)
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack(bits, shape), mask)
    assert pack(torch.tensor([True, False, False, True])).tolist() == [0b1001]


def test_a_resumed_run_ends_at_the_same_bits(tmp_path):
    def begin(seed):
        model = Net(seed)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01), Masks(model)

    model, optimizer, masks = begin(0)
    masks.claim("sparse", {"first.weight": keep((6, 6)), "second.weight": keep((3, 6))}, combine=True)
    train(model, optimizer, masks)
    torch.save([model.state_dict(), optimizer.state_dict(), masks.state_dict()], tmp_path / "cut")
    train(model, optimizer, masks)

    weights, moments, state = torch.load(tmp_path / "cut", weights_only=True)
    assert set(weights) == set(Net().state_dict())  # keys are the plain model's
    rest, its_optimizer, its_masks = begin(1)
    rest.load_state_dict(weights)
    its_optimizer.load_state_dict(moments)
    its_masks.load_state_dict(state)
    train(rest, its_optimizer, its_masks)
    torch.testing.assert_close(rest.state_dict(), model.state_dict(), rtol=0, atol=0)
    its_masks.claim("other", {"first.weight": keep((6, 6))}, combine=True)  # whether it shares came through as well


def test_masks_of_another_model_are_refused():
    state_of = Masks(model := Net())
    state_of.claim("sparse", {"first.weight": keep((6, 6))})
    state = state_of.state_dict()
    with pytest.raises(MasksError, match="'first.weight' of shape \\(6, 6\\), and the module has 'fist.weight'"):
        Masks(nn.ModuleDict({"fist": nn.Linear(6, 6)})).load_state_dict(state)
    model.first = nn.Linear(6, 5)
    with pytest.raises(MasksError, match="and the module has \\(5, 6\\) there. Build the model as it was"):
        Masks(model).load_state_dict(state)


def test_a_deep_copy_has_masks_of_its_own():
    model, mask = Net(), keep((6, 6))
    masks = Masks(model)
    masks.claim("sparse", {"first.weight": mask})
    twin, its = copy.deepcopy((model, masks))
    masks.release("sparse")
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), its)
    assert torch.equal(twin.first.weight == 0, ~mask)
    assert its.module is twin


def test_masks_follow_parameters_through_growth_and_copies_take_them_along():
    model = nn.ModuleList([nn.Linear(4, 4, bias=False)])
    masks, mask = Masks(model), keep((4, 4))
    masks.claim("sparse", {"0.weight": mask})
    old, twin, new = model[0], copy.deepcopy(model[0]), nn.Linear(4, 4, bias=False)
    grown = nn.ModuleList([new, twin, old])
    del model[0]
    model.extend(grown)
    masks.follow({twin.weight: old.weight})
    assert sorted(masks.names) == ["1.weight", "2.weight"]
    with torch.no_grad():
        for one in grown:
            one.weight.fill_(1.0)
    masks.after_step()
    assert new.weight.all()
    assert torch.equal(twin.weight == 0, ~mask)
    assert torch.equal(old.weight == 0, ~mask)
    masks.update("sparse", {"1.weight": ~mask})  # the copy's mask is its own
    assert torch.equal(masks.mask("2.weight"), mask)


def test_a_layer_that_is_taken_out_takes_its_mask_along():
    model = Net()
    masks = Masks(model)
    masks.claim("sparse", {"first.weight": keep((6, 6))})
    model.first = nn.Identity()
    assert masks.names == []


def test_a_compiled_model_has_its_plain_names_and_is_not_compiled_again():
    model, mask = Net(), keep((6, 6))
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph

    model.first = torch.compile(model.first, backend=backend)
    masks = Masks(model)
    masks.claim("sparse", {"first.weight": mask})
    assert masks.names == ["first.weight"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, masks, steps=1)
    seen = len(compiles)
    masks.update("sparse", {"first.weight": ~mask})
    train(model, optimizer, masks, steps=2)
    assert len(compiles) == seen
    assert not model.first.weight[mask].any()


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"frist.weight": keep((6, 6))}, "no parameter 'frist.weight' to mask. Near to it: 'first.weight'"),
        ({"first.weight": keep((6, 5))}, "shape \\(6, 5\\): it has to be torch.bool of \\(6, 6\\)"),
        ({"first.weight": torch.ones(6, 6)}, "is torch.float32 of shape"),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(masks, said):
    with pytest.raises(MasksError, match=said):
        Masks(Net()).claim("sparse", masks)


def test_claiming_twice_and_updating_what_was_not_claimed_are_refused():
    masks = Masks(Net())
    with pytest.raises(MasksError, match="'sparse' has no mask on 'first.weight': claim"):
        masks.update("sparse", {"first.weight": keep((6, 6))})
    masks.claim("sparse", {"first.weight": keep((6, 6))})
    with pytest.raises(MasksError, match="has a mask on 'first.weight' already. Change it by update"):
        masks.claim("sparse", {"first.weight": keep((6, 6))})
    with pytest.raises(MasksError, match="combine=False before"):
        masks.claim("sparse", {"second.weight": keep((3, 6))}, combine=True)


def test_masks_that_differ_between_processes_are_refused_and_equal_ones_are_not():
    def one(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        masks = Masks(Net())
        masks.claim("sparse", {"first.weight": keep((6, 6))})
        try:
            masks.claim("drawn", {"second.weight": keep((3, 6), seed=rank)})
        except MasksError as error:
            return str(error), masks.names
        return None

    for said, names in run_ranks(one):
        assert "process 1 has another mask of 'drawn' on 'second.weight' than process 0" in said
        assert names == ["first.weight"]


@pytest.mark.parametrize("kind", ["ddp and zero 1", "fsdp2", "fsdp2, masked before sharding"])
def test_sharded_training_gives_the_weights_of_one_process(kind):
    mask, seconds = keep((6, 6)), keep((3, 6), seed=3)

    def run(model, optimizer, masks, x, reduce=lambda: None):
        for step in range(6):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            reduce()
            if step in (2, 4):  # there and back: moments that were not reset would move what comes back
                masks.update("sparse", {"first.weight": ~mask if step == 2 else mask}, optimizers=[optimizer])
            masks.before_step()
            optimizer.step()
            masks.after_step()

    def claims(masks):
        masks.claim("sparse", {"first.weight": mask, "second.weight": seconds})

    def sharded(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        model = Net()
        masks = Masks(model)
        x = X.reshape(6, 2, 6)[:, rank]
        if kind == "ddp and zero 1":
            whole = nn.parallel.DistributedDataParallel(model)
            optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
            claims(masks)
            run(whole, optimizer, masks, x)
        else:
            if "before" in kind:
                claims(masks)
            fully_shard(model.first)
            fully_shard(model)
            if "before" in kind:
                masks.follow()
            else:
                claims(masks)
            run(model, torch.optim.AdamW(model.parameters(), lr=0.01), masks, x)
        weights = {name: (one.full_tensor() if hasattr(one, "full_tensor") else one).detach().tolist()
                   for name, one in model.named_parameters()}  # fmt: skip
        bits = {name: one["bits"].tolist() for name, one in masks.state_dict()["sparse"]["masks"].items()}
        return weights, bits, masks.density()

    alone = Net()
    masks = Masks(alone)
    claims(masks)
    run(alone, torch.optim.AdamW(alone.parameters(), lr=0.01), masks, X)
    for weights, bits, density in run_ranks(sharded):
        for name, one in alone.named_parameters():
            torch.testing.assert_close(torch.tensor(weights[name]), one.detach(), rtol=0, atol=1e-6)
        assert not torch.tensor(weights["first.weight"])[~mask].any()
        assert bits == {"first.weight": pack(mask).tolist(), "second.weight": pack(seconds).tolist()}
        assert density == {"first.weight": (int(mask.sum()), 36), "second.weight": (int(seconds.sum()), 18)}
