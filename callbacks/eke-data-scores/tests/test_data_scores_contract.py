import pytest
import torch
from eke.seams.scores import Scores
from eke.testing import TechniqueContract, TinyViT, ZooContract
from eke_data_scores import Pruned, Score

ALWAYS = {
    "test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which it has nothing to do: every sample "
    "is scored.",
}


class TestContract(TechniqueContract):
    model = TinyViT
    shapes = (TinyViT,)
    exceptions = {
        **ALWAYS,
        "test_two_processes_equal_one": "Under several processes it deals the samples out itself, in an order that one "
        "process does not have.",
        "test_under_torch_compile_it_reaches_the_same_weights": "A step that is compiled as a whole hides its losses; "
        "it is refused.",
    }
    arguments = {"file": "scores.npz"}

    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def build(self):
        return Score("scores.npz")

    def build_in_zoo(self, animal):
        type(self).number = getattr(type(self), "number", 0) + 1
        return Score(f"scores-{self.number}.npz")  # a file that is there is not written over

    def shows(self, plain, seen):
        scores = Scores.load(seen.technique.file).values
        assert len(scores) == 2 * seen.animal.batch
        assert scores.isfinite().all()
        return ""


class TestPruningInTheZoo(ZooContract):
    def build_in_zoo(self, animal):
        data = animal.dataset(0, 2 * animal.batch)
        Scores.of(data, "own", torch.arange(float(len(data)))).save("own.npz")
        return Pruned("own.npz", keep=0.5)

    def shows(self, plain, seen):
        assert len(seen.losses) == 1  # of two batches
        return ""
