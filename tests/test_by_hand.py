"""Modules that optimize by hand, with one optimizer or several: every technique does to them what it does to a module
that Lightning optimizes, to the same bits, or refuses them in one sentence before the first step."""

import eke
import pytest
import torch
from eke.testing import fit
from eke.testing.compare import assert_same
from eke.testing.models import warm_up_then_decay
from eke.testing.pairs import build_example, example_model
from torch.optim.lr_scheduler import LambdaLR

EPOCHS = 3
NAMES = [
    name
    for name in eke.available()
    if eke.get(name).kind != "strategy" and name not in ("data_pruning", "data_scores")  # they need a file
]


class ByHand:
    """Does what Lightning does, in ``training_step``."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizers, schedules = several(self.optimizers()), several(self.lr_schedulers())
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for one in (*optimizers, *schedules):
            one.step()
        return loss


class ByTwo(ByHand):
    """One optimizer for each group of the parameters: AdamW looks at each by itself, so that nothing changes."""

    def configure_optimizers(self):
        given = super().configure_optimizers()["optimizer"]
        optimizers = [torch.optim.AdamW([group], lr=1e-2, eps=1e-4) for group in given.param_groups]
        return [
            {
                "optimizer": one,
                "lr_scheduler": {"scheduler": LambdaLR(one, warm_up_then_decay), "interval": "step"},
            }
            for one in optimizers
        ]


def several(one):
    return one if isinstance(one, list) else [one]


def weights(model, name, **length):
    torch.manual_seed(0)
    return fit(model(), build_example(name), **length).state["weights"]


@pytest.mark.parametrize("name", NAMES)
def test_every_technique_serves_modules_that_optimize_by_hand_or_says_why_not(name):
    model = example_model(name)
    by_hand = [type(f"{way.__name__}{model.__name__}", (way, model), {}) for way in (ByHand, ByTwo)]
    if "automatic optimization" in eke.get(name).needs:
        for one in by_hand:
            with pytest.raises(eke.EkeError, match=r"by hand \(automatic_optimization=False\).*let Lightning optimize"):
                weights(one, name, epochs=1)
        return
    wanted = weights(model, name, epochs=EPOCHS)
    for one in by_hand:
        assert_same(wanted, weights(one, name, epochs=EPOCHS), f"{name}: optimized by Lightning, then {one.__name__}")


def test_a_run_of_steps_counts_those_of_all_optimizers_and_its_points_lie_where_they_would():
    """``max_steps`` counts the steps of each optimizer; half of the run is half of the batches."""
    model = example_model("stacking")
    two = type("Two", (ByTwo, model), {})
    wanted = weights(model, "stacking", epochs=-1, max_steps=8)
    assert_same(wanted, weights(two, "stacking", epochs=-1, max_steps=16), "8 steps of one, then 16 of two optimizers")
