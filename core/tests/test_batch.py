"""Batches of every kind keep their kind."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from eke.seams.batch import mapped, replaced, rows, size, tensors
from torch import Tensor

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sentences:
    tokens: Tensor
    length: int = 3


@dataclass(frozen=True)
class Fixed:
    """Cannot be written to."""

    tokens: Tensor
    length: int = 3


def test_every_container_keeps_its_class_and_its_order():
    one, two = torch.zeros(1), torch.ones(2)
    batches = [one, (one, two), [one, two], Pair(one, two), {"a": one, "b": [two]}, OrderedDict(a=one), UserDict(a=one),
               Sentences(one), [Fixed(one), two]]  # fmt: skip
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


@pytest.mark.parametrize("kind", [dict, UserDict, Sentences, Fixed])
def test_some_samples_of_a_batch_come_in_a_batch_of_the_same_kind(kind):
    batch = kind(tokens=torch.arange(6).view(3, 2), length=3)
    some = rows(batch, torch.tensor([2, 0]))
    assert (type(some), size(batch), size(some)) == (kind, 3, 2)
    tokens, length = (some["tokens"], some["length"]) if hasattr(some, "items") else (some.tokens, some.length)
    assert (tokens.tolist(), length) == ([[4, 5], [0, 1]], 3)
