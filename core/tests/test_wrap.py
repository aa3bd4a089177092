import copy
import pickle

import pytest
from eke.seams.wrap import Wrapper
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden


class Module(LightningModule):
    def __init__(self, factor=2):
        super().__init__()
        self.factor = factor

    def training_step(self, batch):
        return self.factor * batch


def test_layers_run_outermost_first_and_see_what_the_inner_ones_return():
    module = Module()
    Wrapper(module, "training_step", [lambda call, x: call(x) + 1, lambda call, x: call(10 * x)])
    assert module.training_step(3) == 2 * 30 + 1


def test_removing_leaves_nothing_behind():
    module = Module()
    before = dict(vars(module))
    Wrapper(module, "training_step", [lambda call, x: 0]).remove()
    assert vars(module) == before
    assert module.training_step(3) == 6


def test_a_method_that_the_user_put_on_the_instance_comes_back():
    module = Module()
    module.training_step = own = lambda batch: -1
    wrapper = Wrapper(module, "training_step", [lambda call, x: call(x) * 5])
    assert module.training_step(3) == -5
    wrapper.remove()
    assert module.training_step is own


def test_lightning_calls_configure_model_only_where_it_is_told_to():
    module = Module()
    assert not is_overridden("configure_model", module)
    Wrapper(module, "configure_model", [lambda call: call()])
    assert not is_overridden("configure_model", module)
    Wrapper(module, "configure_model", [lambda call: call()], looks_overridden=True)
    assert is_overridden("configure_model", module)


def test_lightning_sees_the_users_arguments_through_the_wrapper():
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

    module = Module()
    Wrapper(module, "training_step", [lambda call, *args: call(*args)])
    assert not is_param_in_hook_signature(module.training_step, "batch_idx", explicit=True)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_runs_its_own_weights_and_none_of_the_layers(duplicate):
    module = Module()
    Wrapper(module, "training_step", [Shout()])
    twin = duplicate(module)
    twin.factor = 7
    assert module.training_step(1) == 102
    assert twin.training_step(1) == 7


class Shout:
    def __call__(self, call, x):
        return call(x) + 100
