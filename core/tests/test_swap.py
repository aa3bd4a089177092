import pytest
import torch
from eke.seams.swap import Swap
from torch import nn


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def test_values_change_and_identities_stay(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    others = {"0.weight": torch.full((3, 3), 7.0), "1.running_mean": torch.full((3,), 5.0)}
    swap = Swap(model)
    swap.enter(others)
    assert model[0].weight.eq(7).all()
    assert model[1].running_mean.eq(5).all()
    assert [id(parameter) for parameter in model.parameters()] == identities
    swap.leave()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_entering_twice_does_not_lose_the_training_weights(model):
    before = model[0].weight.clone()
    swap = Swap(model)
    swap.enter({"0.weight": torch.zeros(3, 3)})
    swap.enter({"0.weight": torch.ones(3, 3)})
    swap.leave()
    swap.leave()
    assert torch.equal(model[0].weight, before)


def test_a_tensor_that_the_module_lacks_is_named(model):
    with pytest.raises(KeyError, match="no tensor '0.wieght'.*0.weight"):
        Swap(model).enter({"0.wieght": torch.zeros(3, 3)})
