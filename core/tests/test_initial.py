"""Weights that are kept and rewound to: every bit, from memory, a file, a checkpoint and shards."""

import pytest
import torch
from eke.seams.initial import InitialError, InitialWeights
from eke.seams.masks import Masks
from eke.testing import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard


def model_of(seed=0, dtype=None):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def move(model):
    with torch.no_grad():
        for one in model.parameters():
            one.add_(1.5)


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rewind_gives_every_bit_and_identity_back(tmp_path, dtype, in_file):
    model = model_of(dtype=dtype)
    with torch.no_grad():
        model[0].bias[:2] = torch.tensor([float("nan"), -0.0])
    before, identities = weights(model), [id(one) for one in model.parameters()]
    initial = InitialWeights(model, file=tmp_path / "kept" / "initial.pt" if in_file else None)
    initial.keep()
    move(model)
    initial.rewind()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0, equal_nan=True)
    assert model[0].bias[1].signbit()
    assert [id(one) for one in model.parameters()] == identities
    assert (tmp_path / "kept" / "initial.pt").exists() == in_file


def test_only_what_was_asked_for_is_kept_and_rewound():
    model = model_of()
    before = weights(model)
    initial = InitialWeights(model, names=["*.weight"])
    initial.keep()
    move(model)
    initial.rewind(["0.*"])
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"] + 1.5)
    assert torch.equal(model[2].weight, before["2.weight"] + 1.5)


def test_keeping_again_at_a_later_step_takes_its_weights(tmp_path):
    model = model_of()
    initial = InitialWeights(model, file=tmp_path / "initial.pt")
    initial.keep()
    move(model)
    initial.keep()
    later = weights(model)
    move(model)
    initial.rewind()
    torch.testing.assert_close(weights(model), later, rtol=0, atol=0)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_resumed_run_rewinds_to_the_same_bits(tmp_path, in_file):
    model = model_of()
    before = weights(model)
    initial = InitialWeights(model, file=tmp_path / "one.pt" if in_file else None)
    initial.keep()
    move(model)
    torch.save(initial.state_dict(), tmp_path / "cut")
    (tmp_path / "one.pt").unlink(missing_ok=True)  # the checkpoint is enough
    other = model_of(seed=1)
    rest = InitialWeights(torch.compile(other, backend="eager"), file=tmp_path / "two.pt" if in_file else None)
    rest.load_state_dict(torch.load(tmp_path / "cut", weights_only=True))
    rest.rewind()
    torch.testing.assert_close(weights(other), before, rtol=0, atol=0)
    torch.testing.assert_close(rest.state_dict(), initial.state_dict(), rtol=0, atol=0)


def test_a_masked_ticket_has_its_first_weights_and_zeros():
    model = model_of()
    before, mask = weights(model), torch.rand(5, 3) < 0.5
    initial, masks = InitialWeights(model), Masks(model)
    initial.keep()
    move(model)
    masks.claim("ticket", {"0.weight": mask})
    initial.rewind()
    masks.after_step()
    assert torch.equal(model[0].weight, torch.where(mask, before["0.weight"], 0))


def test_a_tied_weight_is_kept_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    initial = InitialWeights(model)
    initial.keep()
    assert list(initial.kept) == ["embed.weight"]


def test_what_cannot_be_rewound_is_refused_before_anything_is():
    model = model_of()
    with pytest.raises(InitialError, match="no weights were kept: call keep"):
        InitialWeights(model).rewind()
    with pytest.raises(InitialError, match="meets 'head.*'. Near"):
        InitialWeights(model, names=["head.*"])
    initial = InitialWeights(model)
    initial.keep()
    move(model)
    moved = weights(model)
    model[2] = nn.Linear(5, 3)
    with pytest.raises(InitialError, match="'2.weight' was kept with shape \\(2, 5\\) and has shape \\(3, 5\\)"):
        initial.rewind()
    assert torch.equal(model[0].weight, moved["0.weight"])
    smaller = InitialWeights(model_of()[:1])
    smaller.load_state_dict(initial_state_of(model_of()))
    with pytest.raises(InitialError, match="kept the weights of '2.weight', which the module does not have"):
        smaller.rewind()


def initial_state_of(model):
    initial = InitialWeights(model)
    initial.keep()
    return initial.state_dict()


def test_sharded_weights_are_kept_in_parts_and_come_back(tmp_path):
    def one(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        model = model_of()
        fully_shard(model)
        initial = InitialWeights(model, file=tmp_path / "initial.pt")
        initial.keep()
        held = {name: tuple(value.shape) for name, value in initial.kept.items()}
        move(model)
        state = initial.state_dict()
        initial.rewind()
        first = {name: value.full_tensor().tolist() for name, value in model.named_parameters()}
        move(model)
        rest = InitialWeights(model)
        rest.load_state_dict(state)
        rest.rewind()
        return held, first, {name: value.full_tensor().tolist() for name, value in model.named_parameters()}

    wanted = {name: value.tolist() for name, value in weights(model_of()).items()}
    results = run_ranks(one)
    for _, first, again in results:
        assert first == wanted
        assert again == wanted
    assert [held["0.weight"] for held, *_ in results] == [(3, 3), (2, 3)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["initial.pt.0", "initial.pt.1"]
