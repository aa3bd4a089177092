"""Stacking on models of several lists of blocks, and of blocks of which the first holds more than the others."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from eke.seams.blocks import find_all_blocks
from eke.testing import shapes
from eke_stacking import Stacking
from torch.utils.data import DataLoader


class Watched(pl.LightningModule):
    """Any of the kit's shapes, on one batch, without dropout; what a step saw is kept."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        built = shapes.SHAPES[name]()
        self.net, self.inputs, self.losses, self.blocks = built.model, (built.args, built.batch), [], []
        self.lists = [found.container for found in find_all_blocks(self.net)]

    def loss(self, net):
        args, batch = self.inputs
        out = net(*args, **batch)
        return (out if isinstance(out, torch.Tensor) else out[0]).float().square().mean()

    def training_step(self, batch, batch_idx):
        self.net.eval()
        loss = self.loss(self.net)
        self.losses.append(loss.item())
        state = [[{k: v.clone() for k, v in block.state_dict().items()} for block in one]
                 for one in self.lists]  # fmt: skip
        self.blocks.append(state)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(name, **arguments):
    model = Watched(name)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_steps=3, accelerator="cpu", callbacks=[Stacking([1], depths=[1], **arguments)], **options).fit(
        model, DataLoader([torch.zeros(1)] * 3)
    )
    return model


@pytest.mark.filterwarnings("ignore::eke.NoEffectWarning")
@pytest.mark.parametrize("name", ["t5", "bart", "clip", "whisper", "swin", "torch_transformer"])
def test_all_lists_grow_together_in_both_forms_to_the_same_bits(name):
    plain = Watched(name)
    lists = find_all_blocks(plain.net)
    counts = [len(found) for found in lists]
    assert len(lists) > 1
    for found in lists:
        del found.container[1:]
    shallow = plain.loss(plain.net).item()
    dormant, grown = (train(name, form=form) for form in ("dormant", "growth"))
    assert dormant.losses[0] == shallow
    assert dormant.losses == grown.losses
    weights = grown.net.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in dormant.net.state_dict().items())
    assert [len(found) for found in find_all_blocks(grown.net)] == counts
    for blocks in dormant.blocks[1]:  # right after the growth
        for block in blocks[1:]:
            same = [key for key in block if "relative" not in key and "index" not in key]
            assert all(torch.equal(block[key], blocks[0][key]) for key in same)


def test_lists_that_are_named_grow_and_the_others_stay():
    model = train("bart", blocks="decoder.layers")
    first, later = model.blocks[0], model.blocks[1]
    encoder, decoder = ([key for key in later[i][1] if key.endswith("fc1.weight")][0] for i in (0, 1))
    assert not torch.equal(later[0][1][encoder], later[0][0][encoder])
    assert torch.equal(later[1][1][decoder], later[1][0][decoder])
    assert not torch.equal(first[1][1][decoder], later[1][1][decoder])


@pytest.mark.parametrize("form", ["dormant", "growth"])
def test_a_run_that_is_cut_before_the_growth_goes_on_to_the_same_bits(form, tmp_path):
    def fit(steps, path=None):
        model = Watched("t5")
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(max_steps=steps, accelerator="cpu",
                             callbacks=[Stacking([2], depths=[1], form=form)], **options)  # fmt: skip
        trainer.fit(model, DataLoader([torch.zeros(1)] * 4), ckpt_path=path)
        return model, trainer

    whole, _ = fit(4)
    _, trainer = fit(1)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")
    resumed, _ = fit(4, tmp_path / "cut.ckpt")
    assert resumed.losses == whole.losses[1:]
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in resumed.state_dict().items())


def test_a_depth_that_one_of_the_lists_does_not_have_is_refused_with_what_to_name():
    model = Watched("bart")  # whose decoder has two blocks
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, callbacks=[Stacking([1], depths=[2])])
    with pytest.raises(ValueError, match=r"depths=\[2\] leave nothing.*blocks=\['net.model.encoder.layers'\]"):
        trainer.fit(model, DataLoader([torch.zeros(1)]))


def test_identity_leaves_what_a_deeper_model_of_two_towers_computes():
    before = copy.deepcopy(train("clip", operator="identity").losses)
    assert before[1] != before[0]
    model = Watched("clip")
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_steps=2, accelerator="cpu", callbacks=[Stacking([1], depths=[1], operator="identity")],
               **options).fit(model, DataLoader([torch.zeros(1)] * 2))  # fmt: skip
    assert model.losses[1] == model.losses[0]
