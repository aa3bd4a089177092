import eke
import pytest
import torch
from eke.testing import SHAPES, Cut, TinyBlocks, assert_same, checks, fit
from eke.testing.data import shuffled
from {{ cookiecutter.__module }} import {{ cookiecutter.class_name }}
from lightning.pytorch import Callback

# The contract gives accelerator= as well, which Lightning refuses beside a strategy. So the promises are named here.
SUBJECT = checks.Subject(build={{ cookiecutter.class_name }})


class Seen(Callback):
    def on_train_batch_start(self, *_):
        self.threads = torch.get_num_threads()


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_it_trains_and_every_weight_moves(shape):
    if shape.__name__ == "TinyGPT2" and checks.transformers_missing():
        pytest.skip("transformers is not installed, so the Hugging Face shape was not trained")
    checks.trains(checks.Subject(build={{ cookiecutter.class_name }}, model=shape))


@pytest.mark.parametrize(
    "check",
    [
        checks.trains_in_bf16,
        checks.clips_gradients,
        checks.accumulation_equals_the_big_batch,
        checks.does_what_its_record_says,
        checks.leaves_the_random_state_alone,
        checks.weights_only_checkpoint_loads,
        checks.a_command_line_builds_it,
    ],
    ids=lambda check: check.__name__,
)
def test_it_keeps_this_promise_of_the_contract(check):
    check(SUBJECT)


def test_a_killed_run_resumes_to_the_same_bits():
    checks.resumes(SUBJECT, Cut(epochs=1), Cut(steps=6), loader=shuffled, random=True, dropout=0.1)


def test_the_weights_are_those_of_lightnings_own_strategy():
    own, plain = (fit(TinyBlocks(), *given).state["weights"] for given in ([{{ cookiecutter.class_name }}(threads=3)], []))
    assert_same(plain, own, "weights without it, then with it and as many threads")


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
