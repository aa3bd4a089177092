import pytest
import torch
from eke.seams.optimizer import map_optimizers, rebind, transplant
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, SequentialLR, StepLR


def weight():
    return torch.nn.Parameter(torch.ones(3))


def fresh():
    return AdamW([weight()], lr=1.0)


def replaced(optimizer):
    return torch.optim.SGD(optimizer.param_groups, lr=optimizer.param_groups[0]["lr"])


def forms():
    optimizer = fresh()
    yield "one", optimizer, lambda got: [got]
    yield "list", [fresh(), fresh()], lambda got: list(got)
    yield "tuple of lists", ([fresh()], [StepLR(fresh(), 1)]), lambda got: got[0]
    one = fresh()
    yield (
        "dictionary",
        {"optimizer": one, "lr_scheduler": {"scheduler": StepLR(one, 1), "interval": "step"}},
        lambda got: [got["optimizer"]],
    )
    two = [fresh(), fresh()]
    yield (
        "dictionaries",
        [{"optimizer": item, "lr_scheduler": StepLR(item, 1)} for item in two],
        lambda got: [item["optimizer"] for item in got],
    )


@pytest.mark.parametrize(("returned", "optimizers"), [form[1:] for form in forms()], ids=[form[0] for form in forms()])
def test_every_form_of_configure_optimizers_is_mapped_and_kept(returned, optimizers):
    mapped = map_optimizers(returned, replaced)
    assert type(mapped) is type(returned) or isinstance(returned, Optimizer)
    assert all(type(item) is torch.optim.SGD for item in optimizers(mapped))


def test_no_optimizer_stays_none():
    assert map_optimizers(None, replaced) is None


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: StepLR(optimizer, 1, 0.5),
        lambda optimizer: SequentialLR(
            optimizer, [StepLR(optimizer, 1, 0.5), LambdaLR(optimizer, lambda step: 2.0)], [3]
        ),
        lambda optimizer: ChainedScheduler([StepLR(optimizer, 1, 0.5), StepLR(optimizer, 2, 0.1)]),
    ],
    ids=["single", "sequential", "chained"],
)
@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*")
def test_schedulers_drive_the_new_optimizer_as_they_drove_the_old(schedule):
    def trace(change):
        optimizer = fresh()
        scheduler = schedule(optimizer)
        mapped = map_optimizers(
            {"optimizer": optimizer, "lr_scheduler": scheduler}, lambda old: replaced(old) if change else old
        )
        rates = []
        for _ in range(6):
            mapped["optimizer"].step()
            scheduler.step()
            rates.append(mapped["optimizer"].param_groups[0]["lr"])
        return rates

    assert trace(change=True) == trace(change=False)
    assert len(set(trace(change=True))) > 1


def test_state_moves_by_identity_and_copies_are_independent():
    kept, source, new = weight(), weight(), weight()
    old = AdamW([kept, source], lr=0.5)
    for parameter in (kept, source):
        parameter.grad = torch.full((3,), 2.0)
    old.step()
    old.param_groups[0]["lr"] = 0.25
    after = AdamW([kept, source, new], lr=9.0)
    transplant(old, after, {new: source})
    assert after.param_groups[0]["lr"] == 0.25
    assert after.state[kept] is old.state[kept]
    torch.testing.assert_close(after.state[new], dict(after.state[source]), rtol=0, atol=0)
    after.state[new]["exp_avg"].zero_()
    assert after.state[source]["exp_avg"].ne(0).all()


def test_a_parameter_without_an_origin_starts_without_state():
    kept, new = weight(), weight()
    old = AdamW([kept])
    kept.grad = torch.ones(3)
    old.step()
    after = AdamW([kept, new])
    transplant(old, after, {})
    assert new not in after.state


def test_groups_that_do_not_match_are_refused():
    old, after = AdamW([weight()]), AdamW([{"params": [weight()]}, {"params": [weight()]}])
    with pytest.raises(
        ValueError, match="2 parameter groups after the change and had 1 before.*Group parameters by kind"
    ):
        transplant(old, after, {})


def test_rebinding_leaves_other_schedulers_alone():
    optimizer, other = fresh(), fresh()
    scheduler = StepLR(other, 1)
    rebind([scheduler], {id(optimizer): replaced(optimizer)})
    assert scheduler.optimizer is other
