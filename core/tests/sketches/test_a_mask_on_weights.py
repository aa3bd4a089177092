"""The sketch of a mask on weights: gradual magnitude pruning, with sparse training to the end of the run.

Source of the schedule: Zhu and Gupta, "To prune, or not to prune", 2017, https://arxiv.org/abs/1710.01878, equation 1.
"""

import eke
import pytest
from eke.testing import Cut, TechniqueContract, TinyBlocks, assert_same, fit
from eke.testing.run import resume
from sketch_mask import Prune


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(eke, "get", lambda name: Prune.technique)


class TestContract(TechniqueContract):
    exceptions = {
        "test_it_costs_nothing_when_it_has_nothing_to_do": "it puts masks on in every step, two operators each"
    }

    zoo = ("blocks", "by_hand")

    def build(self):
        return Prune()

    def build_in_zoo(self, animal):
        return Prune(until=1.0, every=1)

    def shows(self, plain, seen):
        zeros = [float((weight == 0).float().mean()) for path, weight in seen.weights.items() if ".mlp.fc1.w" in path]
        share = 0.5 * (1 - (1 - 0.5) ** 3)  # half of the run is through at the second step
        assert zeros == [share] * len(zeros)
        return ""


def test_at_the_end_each_matrix_has_the_density_that_was_asked_for_and_its_zeros_have_no_moments():
    done = fit(TinyBlocks(), Prune(density=0.3, until=0.75, every=1))
    optimizer = done.trainer.optimizers[0]
    for name, weight in done.model.named_parameters():
        zeros = int((weight == 0).sum())
        if "mlp" in name and weight.ndim == 2:
            assert weight.numel() - zeros == round(0.3 * weight.numel())
            assert not optimizer.state[weight]["exp_avg"][weight == 0].any()
        elif weight.ndim == 2:
            assert zeros == 0


def test_a_resumed_run_has_the_masks_of_the_unbroken_one():
    unbroken, (resumed,) = resume(lambda seed: TinyBlocks(seed=seed), Prune, [Cut(steps=6)])
    masks = [state["saved"]["eke"]["masks"] for state in (unbroken, resumed)]
    assert_same(*masks, "masks in the checkpoint of the unbroken run, then of the resumed one")
    assert len(masks[0]["prune"]["masks"]) == 8
