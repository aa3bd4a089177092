"""Which samples an epoch sees: distributed once each, in the loader's own order, whatever the number of processes."""

from types import SimpleNamespace

import pytest
import torch
from eke.seams.data import Position
from eke.seams.samples import Chosen, Samples, SamplesError
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

TRAINER = SimpleNamespace(fit_loop=SimpleNamespace(batch_idx=1))
ALONE = SimpleNamespace(world_size=1, trainer=TRAINER, at_end=lambda undo: None, position=Position())
DATA = TensorDataset(torch.arange(20))


def samples(*left_out):
    chosen = Samples()
    chosen.count, chosen.kept, chosen._begun = 20, torch.ones(20, dtype=torch.bool), True
    chosen.kept[list(left_out)] = False
    return chosen


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_processes_share_out_what_is_kept_and_repeat_only_what_is_missing(world, shuffle):
    chosen = samples(3, 4, 5)
    parts = []
    for rank in range(world):
        inner = DistributedSampler(DATA, world, rank, shuffle=shuffle, seed=7)
        sampler = Chosen(inner, chosen, rank, world)
        sampler.set_epoch(2)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler)
    assert len({len(part) for part in parts}) == 1
    dealt = [index for turn in zip(*parts, strict=True) for index in turn]
    assert sorted(dealt[:17]) == [index for index in range(20) if index not in (3, 4, 5)]
    assert dealt[17:] == dealt[: -17 % world]
    assert (dealt[:17] == sorted(dealt[:17])) != shuffle


def test_alone_the_order_is_the_loaders_own_and_draws_what_it_would_draw():
    torch.manual_seed(0)
    plain = list(RandomSampler(DATA))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert list(Chosen(RandomSampler(DATA), samples(3, 4), 0, 1)) == [index for index in plain if index not in (3, 4)]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loader_gets_its_own_sampler_back():
    loader = DataLoader(DATA, 4)
    before, chosen = loader.batch_sampler.sampler, Samples()
    chosen.attach(ALONE, loader)
    chosen.kept[:10] = False
    assert chosen.batches == 5  # schedules are made by the full length
    chosen._begun = True
    assert (chosen.full, chosen.batches) == (5, 3)
    assert [batch[0].tolist() for batch in loader] == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    assert chosen.batch().tolist() == [14, 15, 16, 17]
    assert chosen.attach(ALONE, loader) is loader  # a loader may be asked for again
    chosen.detach()
    assert loader.batch_sampler.sampler is before
    assert type(loader.batch_sampler) is BatchSampler


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_what_cannot_be_chosen_from_is_refused_with_the_reason():
    for loader, said in (
        ([1, 2], "The train loader is a list"),
        (DataLoader(Stream()), "A Stream gives its samples in an order of its own"),
        (DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 20, 5)), "WeightedRandomSampler gives 5 samples of 20"),
        (DataLoader(DATA, batch_sampler=[[0, 1], [2]]), "makes its batches by a sampler of its own"),
    ):
        with pytest.raises(SamplesError, match=said):
            Samples().attach(ALONE, loader)
    chosen = Samples()
    chosen.attach(ALONE, DataLoader(DATA, 4))
    with pytest.raises(SamplesError, match="several train loaders"):
        chosen.attach(ALONE, DataLoader(DATA, 4))
    resumed = Samples()
    resumed.load_state_dict({"count": 19, "kept": torch.ones(19, dtype=torch.bool)})
    with pytest.raises(SamplesError, match="a run on 19 samples, and the data has 20"):
        resumed.attach(ALONE, DataLoader(DATA, 4, sampler=SequentialSampler(DATA)))
