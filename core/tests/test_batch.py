"""Batches of every kind keep their kind."""

from collections import OrderedDict, UserDict, namedtuple

import torch
from eke.seams.batch import mapped, replaced, tensors

Pair = namedtuple("Pair", ["x", "y"])


def test_every_container_keeps_its_class_and_its_order():
    one, two = torch.zeros(1), torch.ones(2)
    batches = [one, (one, two), [one, two], Pair(one, two), {"a": one, "b": [two]}, OrderedDict(a=one), UserDict(a=one)]
    for batch in batches:
        changed = mapped(batch, lambda tensor: tensor + 1)
        assert type(changed) is type(batch)
        assert all(torch.equal(new, old + 1) for new, old in zip(tensors(changed), tensors(batch), strict=True))
    assert one.item() == 0
    assert batches[4]["a"] is one  # the user's own is left alone


def test_what_is_no_tensor_stays_and_one_tensor_is_replaced_by_identity():
    one, twin = torch.zeros(1), torch.zeros(1)
    changed = replaced({"a": one, "b": twin, "names": ["x"], "n": 3}, one, torch.ones(1))
    assert changed["a"].item() == 1
    assert changed["b"] is twin
    assert (changed["names"], changed["n"]) == (["x"], 3)
