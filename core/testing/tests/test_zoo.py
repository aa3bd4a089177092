"""The zoo: every model is what its tags say, gives a finite loss, and comes out of a seed."""

import pickle
import subprocess
import sys
from dataclasses import is_dataclass

import pytest
import torch
from eke.testing.zoo import BATCH, IGNORED, ZOO
from torch import Tensor

HERE = {name: animal for name, animal in ZOO.items() if not animal.missing}


@pytest.fixture(params=HERE)
def animal(request):
    return HERE[request.param]


def parts(batch):
    """Tensors of a batch by name or place."""
    if is_dataclass(batch):
        return vars(batch)
    return dict(batch.items()) if hasattr(batch, "items") else dict(enumerate(batch))


def batches(animal):
    torch.manual_seed(0)
    return list(animal.loader(0))


def test_it_gives_a_finite_loss_whose_gradient_reaches_what_trains(animal):
    model = animal.build(0)
    assert model.training
    loss = model.loss(batches(animal)[0])
    loss.backward()
    assert loss.isfinite()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without in ([], ["model.embeddings.mask_token"])  # DINOv2's, which only its own pretraining needs


def test_a_seed_makes_the_model_and_leaves_the_global_random_state(animal):
    state = torch.random.get_rng_state()
    first, second, other = animal.build(3), animal.build(3), animal.build(4)
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, same) for one, same in pairs)
    assert any(not torch.equal(one, same) for one, same in zip(first.parameters(), other.parameters(), strict=True))


def test_samples_follow_from_seed_and_number(animal):
    one, same = ([str(animal.dataset(seed)[number]) for number in range(4)] for seed in (1, 1))
    assert one == same
    assert one != [str(animal.dataset(2)[number]) for number in range(4)]


def test_its_loader_goes_to_another_process(animal):
    loader = pickle.loads(pickle.dumps(animal.loader(0)))
    assert len(list(loader)) == 16 // animal.batch


def test_its_batches_are_what_its_tags_say(animal):
    seen = batches(animal)
    tags, first = set(animal.tags), parts(seen[0])
    assert ("dictionary" in tags) == (type(seen[0]) is dict)
    assert ("tuple" in tags) == (type(seen[0]) is tuple)
    assert ("dataclass" in tags) == is_dataclass(seen[0])
    assert ("one sample" in tags) == (animal.batch == 1)
    assert all(len(part) == (1 if "one sample" in tags else BATCH) for part in first.values())
    ignored = any((part == IGNORED).any() for batch in seen for part in parts(batch).values())
    assert ("ignored labels" in tags) == bool(ignored)
    shapes = {tuple(tuple(part.shape[1:]) for part in parts(batch).values()) for batch in seen}
    assert ("lengths differ" in tags) >= (len(shapes) > 1) or "audio" in tags
    if "attention_mask" in first:
        masks = [batch["attention_mask"] for batch in seen]
        assert ("pads left" in tags) == any(bool((mask[:, 0] == 0).any()) for mask in masks)
        assert ("pads right" in tags) == any(bool((mask[:, -1] == 0).any()) for mask in masks)


def test_its_model_is_what_its_tags_say(animal):
    model, tags = animal.build(0), set(animal.tags)
    batch = batches(animal)[0]
    assert ("dropout" in tags) == (not torch.equal(model.loss(batch), model.loss(batch)))
    named = [weight for _, weight in model.named_parameters(remove_duplicate=False)]
    assert ("tied" in tags) == (len(named) > len({id(weight) for weight in named}))
    assert ("manual optimization" in tags) == (not model.automatic_optimization)
    assert all(isinstance(part, Tensor) for part in model.state_dict().values())


def test_the_zoo_has_every_kind():
    tags = {tag for animal in ZOO.values() for tag in animal.tags}
    assert tags >= {"text", "images", "audio", "labels", "causal", "masked", "classes", "seq2seq", "contrastive"}
    assert tags >= {"pads left", "pads right", "ignored labels", "one sample", "lengths differ"}
    assert tags >= {"dictionary", "tuple", "dataclass", "encoder-decoder", "towers", "experts", "manual optimization"}
    assert all(animal.name == name for name, animal in ZOO.items())


def test_importing_the_zoo_loads_no_library_of_models():
    # Lightning's metrics load transformers themselves, where they find it.
    code = (
        "import sys, lightning.pytorch, eke.testing; before = set(sys.modules); import eke.testing.zoo;"
        "sys.exit(any(name.startswith(('transformers', 'timm')) for name in set(sys.modules) - before))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
