"""Averages of weights: the right numbers, what they leave alone, and that they come back from files and shards."""

import copy

import pytest
import torch
from eke.seams.averages import AveragesError, LatestAverage, RunningAverage, batch_statistics, ema, equal
from eke.seams.swap import Swap
from eke.testing import run_ranks
from torch import nn
from torch.distributed import checkpoint as sharded_files
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard


def model_of(seed=0, dtype=None):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)


def path_of(model, average, steps, seed=5):
    """Weights at each of some steps of a random walk, on which the average goes along."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean, model[1].running_var):
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
        average.update()
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return seen


def mixture(seen, counts):
    """The mean of weights that count so much each."""
    total = sum(counts)
    return {
        name: sum(c * one[name].double() for c, one in zip(counts, seen, strict=True)) / total
        for name, value in seen[0].items()
        if value.is_floating_point()
    }


def assert_is(average, wanted, atol=1e-6):
    found = {name: value.double() for name, value in average.weights().items()}
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def test_a_corrected_ema_counts_each_weight_by_its_age():
    model = model_of()
    average = RunningAverage(model, ema(0.9))
    seen = path_of(model, average, 7)
    assert_is(average, mixture(seen, [0.9 ** (6 - i) for i in range(7)]))


def test_an_ema_that_begins_at_the_first_weights_lets_them_stand_for_the_past():
    model = model_of()
    average = RunningAverage(model, ema(0.9, bias="first"))
    seen = path_of(model, average, 7)
    assert_is(average, mixture(seen, [0.9**6, *(0.1 * 0.9 ** (5 - i) for i in range(6))]))


def test_a_warming_ema_follows_the_recursion():
    model = model_of()
    average = RunningAverage(model, ema(0.5, bias="warm up"))
    seen = path_of(model, average, 12)
    wanted = {name: value.double() for name, value in seen[0].items() if value.is_floating_point()}
    for n in range(2, 13):
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = {name: decay * value + (1 - decay) * seen[n - 1][name].double() for name, value in wanted.items()}
    assert (1 + 12) / (10 + 12) > 0.5 > (1 + 2) / (10 + 2)  # both halves of the rule were in it
    assert_is(average, wanted)


def test_swa_is_the_equal_mean():
    model = model_of()
    average = RunningAverage(model, equal())
    assert_is(average, {})
    seen = path_of(model, average, 7)
    assert_is(average, mixture(seen, [1] * 7))


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_lawa_is_the_equal_mean_of_the_last_ones(steps):
    model = model_of()
    average = LatestAverage(model, 3)
    seen = path_of(model, average, steps)
    assert_is(average, mixture(seen[-3:], [1] * min(3, steps)))


def test_several_averages_go_along_at_once_and_leave_the_weights_alone():
    model, plain = model_of(), model_of()
    averages = [RunningAverage(model, ema(0.9)), RunningAverage(model, equal()), LatestAverage(model, 2)]

    class All:
        def update(self):
            for one in averages:
                one.update()

    class Nothing:
        def update(self):
            pass

    seen = path_of(model, All(), 5)
    path_of(plain, Nothing(), 5)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert_is(averages[1], mixture(seen, [1] * 5))
    assert_is(averages[2], mixture(seen[-2:], [1] * 2))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_small_steps_of_bf16_weights_reach_an_average_in_float32_and_none_in_bf16(dtype):
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
        average = RunningAverage(model, ema(0.999, bias="first"), dtype=dtype)
        average.update()
        model.weight.fill_(1.5)
        for _ in range(100):
            average.update()
    (kept,) = average._average().values()
    assert kept.dtype == (dtype or torch.float32)
    assert average.weights()["weight"].dtype == torch.bfloat16
    if dtype is None:
        assert float(kept) == pytest.approx(1.5 - 0.5 * 0.999**100, abs=1e-5)
    else:
        assert float(kept) == 1.0


def test_double_weights_are_averaged_in_double():
    average = RunningAverage(model_of(dtype=torch.float64), equal())
    average.update()
    assert {value.dtype for value in average._average().values()} == {torch.float64}


def test_frozen_weights_and_whole_numbers_have_no_average_and_buffers_only_if_asked():
    model = model_of()
    model[0].weight.requires_grad_(False)
    model.register_buffer("cache", torch.ones(2), persistent=False)
    trained = {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}
    average, without = RunningAverage(model, equal()), LatestAverage(model, 2, buffers=False)
    average.update()
    without.update()
    assert set(average.weights()) == trained | {"1.running_mean", "1.running_var"}
    assert set(without.weights()) == trained


def test_a_weight_that_is_frozen_later_keeps_its_average():
    model = model_of()
    average = RunningAverage(model, equal())
    average.update()
    model[0].weight.requires_grad_(False)
    average.update()
    assert "0.weight" in average.weights()


def test_a_tied_weight_has_one_average_by_both_names():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    average = RunningAverage(model, equal())
    average.update()
    first = model["embed"].weight.detach().clone()
    with torch.no_grad():
        model["embed"].weight.add_(2)
    average.update()
    weights = average.weights()
    torch.testing.assert_close(weights["head.weight"], first + 1)
    assert weights["embed.weight"] is weights["head.weight"]
    swap = Swap(model)
    with swap.holding(weights):
        torch.testing.assert_close(model["head"].weight.detach(), first + 1)
    assert torch.equal(model["head"].weight.detach(), first + 2)


@pytest.mark.parametrize("build", [lambda m: RunningAverage(m, ema(0.9)), lambda m: LatestAverage(m, 3)])
def test_a_resumed_average_goes_on_to_the_same_bits(tmp_path, build):
    model = model_of()
    average = build(model)
    path_of(model, average, 4)
    torch.save([model.state_dict(), average.state_dict()], tmp_path / "cut")
    path_of(model, average, 4, seed=6)
    weights, state = torch.load(tmp_path / "cut", weights_only=True)
    rest = torch.compile(model_of(1), backend="eager")  # names in the file are those of the plain model
    its = build(rest)
    its.load_state_dict(state)
    rest._orig_mod.load_state_dict(weights)
    path_of(rest._orig_mod, its, 4, seed=6)
    assert its.updates == 8
    theirs = {name.removeprefix("_orig_mod."): value for name, value in its.weights().items()}
    torch.testing.assert_close(theirs, average.weights(), rtol=0, atol=0)


def test_a_saved_state_does_not_move_when_the_run_goes_on():
    model = model_of()
    average = RunningAverage(model, ema(0.9))
    path_of(model, average, 2)
    state = average.state_dict()
    before = copy.deepcopy(state)
    path_of(model, average, 2)
    torch.testing.assert_close(state["saved"], before["saved"], rtol=0, atol=0)
    other = RunningAverage(model, ema(0.9))
    other.load_state_dict(state)
    path_of(model, other, 1)
    torch.testing.assert_close(state["saved"], before["saved"], rtol=0, atol=0)


def test_an_average_of_another_model_is_refused():
    average = RunningAverage(model_of(), equal())
    average.update()
    other = RunningAverage(nn.Sequential(nn.Linear(3, 4)), equal())
    other.load_state_dict(average.state_dict())
    with pytest.raises(AveragesError, match="an average of '1.weight', which the module does not have. Near"):
        other.weights()


@pytest.mark.parametrize("build", [lambda m: RunningAverage(m, equal()), lambda m: LatestAverage(m, 4)])
def test_averages_follow_growth_by_identity(build):
    model = nn.ModuleList([nn.Linear(2, 2, bias=False)])
    average = build(model)
    old = model[0]
    with torch.no_grad():
        old.weight.fill_(1.0)
    average.update()
    twin, new = copy.deepcopy(old), nn.Linear(2, 2, bias=False)
    del model[0]
    model.extend([new, twin, old])
    average.follow({twin.weight: old.weight})
    with torch.no_grad():
        for one, value in ((new, 8.0), (twin, 5.0), (old, 3.0)):
            one.weight.fill_(value)
    average.update()
    found = {name: float(value[0, 0]) for name, value in average.weights().items()}
    assert found == {"0.weight": 8.0, "1.weight": 3.0, "2.weight": 2.0}


def test_statistics_of_batch_norms_are_those_of_the_other_weights_and_nothing_else_moves():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=0.3))
    others = {"0.weight": torch.randn(4, 3), "0.bias": torch.randn(4)}
    batches = [torch.randn(6, 3), torch.randn(6, 3) + 2]
    model(batches[0])  # statistics of its own
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = batch_statistics(model, model, batches, others)

    hidden = [one @ others["0.weight"].T + others["0.bias"] for one in batches]
    mean = sum(one.mean(0) for one in hidden) / 2
    variance = sum(one.var(0) for one in hidden) / 2
    torch.testing.assert_close(found["1.running_mean"], mean)
    torch.testing.assert_close(found["1.running_var"], variance)
    normed = [(one - one.mean(0)) / (one.var(0, unbiased=False) + 1e-5).sqrt() for one in hidden]
    torch.testing.assert_close(found["3.running_var"], sum(one.var(0) for one in normed) / 2)  # no dropout between
    assert set(found) == {f"{n}.running_{kind}" for n in (1, 3) for kind in ("mean", "var")}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].training
    assert (model[1].momentum, model[3].momentum) == (0.1, 0.3)


def test_an_exception_in_the_pass_leaves_the_model_as_it_was():
    model = model_of()
    before = copy.deepcopy(model.state_dict())

    def fails(batch):
        model(batch)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        batch_statistics(model, fails, [torch.randn(5, 3)], {"0.weight": torch.zeros(4, 3)})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model[1].momentum == 0.1
    with pytest.raises(ValueError, match="batches is empty"):
        batch_statistics(model, model, [])


def test_a_model_without_batch_norms_is_not_run():
    assert batch_statistics(nn.Linear(2, 2), lambda batch: 1 / 0, [1]) == {}


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: ema(1.0), "decay=1.0: it has to be from 0 to below 1"),
        (lambda: ema(0.9, bias="none"), "bias='none': use 'correct', 'warm up' or 'first'"),
        (lambda: LatestAverage(model_of(), 0), "count=0 averages over nothing"),
    ],
)
def test_arguments_without_a_meaning_are_refused_at_once(act, said):
    with pytest.raises(ValueError, match=said):
        act()


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def averages_of(model):
    return {"ema": RunningAverage(model, ema(0.9)), "lawa": LatestAverage(model, 2)}


def test_each_process_averages_its_shards_and_saves_them(tmp_path):
    """FSDP2 on two processes: averages are sharded, saved in parts, and go on in a fresh process to the same bits."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))

    def begin(rank, seed=0):
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        model = net(seed)
        for part in (model[0], model[2], model):
            fully_shard(part)
        return model, averages_of(model)

    def train(model, averages, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            for one in averages.values():
                one.update()

    def whole(weights):
        return {name: one.full_tensor().tolist() for name, one in weights.items()}

    def sharded(rank):
        model, averages = begin(rank)
        train(model, averages, 3)
        held = [local.to_local().numel() for local in averages["ema"]._average().values()]
        checkpoint = {"state_dict": get_model_state_dict(model)}
        states = {name: one.state_dict(checkpoint, name) for name, one in averages.items()}
        sharded_files.save(checkpoint, checkpoint_id=tmp_path)
        one_file = averages["ema"].state_dict()["saved"]["tensors"]["0/0.weight"]
        train(model, averages, 3)
        with Swap(model).holding(averages["lawa"].weights()), torch.no_grad():
            swapped = model(x).tolist()
        after = model(x).detach().tolist()
        return held, states, one_file.tolist(), {n: whole(a.weights()) for n, a in averages.items()}, swapped, after

    def resumed(rank, states):
        model, averages = begin(rank, seed=1)
        for name, one in averages.items():
            one.load_state_dict(states[name], tmp_path)
        state = {"state_dict": get_model_state_dict(model)}
        sharded_files.load(state, checkpoint_id=tmp_path)
        model.load_state_dict(state["state_dict"])
        train(model, averages, 3)
        return {name: whole(one.weights()) for name, one in averages.items()}

    alone, theirs = net(), averages_of(net())
    theirs = averages_of(alone)
    train(alone, theirs, 3)
    early = theirs["ema"].weights()["0.weight"].clone()
    train(alone, theirs, 3)

    first, second = run_ranks(sharded)
    held, states, one_file, weights, swapped, after = first
    assert sum(held) < sum(p.numel() for p in alone.parameters())  # a part
    assert "tensors" not in states["ema"]["saved"]  # nothing whole is in what one process writes
    torch.testing.assert_close(torch.tensor(one_file), early, rtol=0, atol=1e-6)
    for name, average in theirs.items():
        for key, value in average.weights().items():
            torch.testing.assert_close(torch.tensor(weights[name][key]), value, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(after), alone(x), rtol=0, atol=1e-6)
        with Swap(alone).holding(theirs["lawa"].weights()):
            torch.testing.assert_close(torch.tensor(swapped), alone(x), rtol=0, atol=1e-6)
    assert run_ranks(lambda rank: resumed(rank, states)) == [weights, weights]
