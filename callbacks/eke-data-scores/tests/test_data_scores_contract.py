import pytest
from eke.testing import TechniqueContract, TinyViT
from eke_data_scores import Score

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
