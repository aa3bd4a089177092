import eke
import pytest
import torch
from eke.testing import TechniqueContract, TinyBlocks, fit
from {{ cookiecutter.__module }} import {{ cookiecutter.class_name }}
from lightning.pytorch import Callback


class TestContract(TechniqueContract):
    def build(self):
        return {{ cookiecutter.class_name }}(threads=1)


class Seen(Callback):
    def on_train_batch_start(self, *_):
        self.threads = torch.get_num_threads()


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_a_run_computes_with_its_threads_and_gives_them_back():
    seen = Seen()
    fit(TinyBlocks(), {{ cookiecutter.class_name }}(threads=2), epochs=1, callbacks=[seen])
    assert seen.threads == 2
    assert torch.get_num_threads() == 3


def test_a_run_that_fails_gives_them_back():
    class Fails(Callback):
        def on_train_batch_start(self, *_):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(TinyBlocks(), {{ cookiecutter.class_name }}(threads=2), epochs=1, callbacks=[Fails()])
    assert torch.get_num_threads() == 3


def test_threads_below_one_are_refused_at_once():
    with pytest.raises(ValueError, match="threads=0 .* Give 1 or more"):
        {{ cookiecutter.class_name }}(threads=0)


def test_the_registry_builds_it():
    assert isinstance(eke.create("{{ cookiecutter.__entry }}"), {{ cookiecutter.class_name }})
