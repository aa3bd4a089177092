"""PEFT beside techniques that write to the weights beneath an adapter, or that skip its blocks."""

import eke
import pytest
import torch
from eke.__main__ import main
from eke.testing import TinyBlocks, assert_same, fit
from eke.testing.data import shuffled
from eke.testing.run import SaveAfter
from eke_layer_drop import LayerDrop
from eke_peft import PEFT, PEFTError, export
from eke_stacking import Stacking

OUTSIDE = ["embed*", "norm*", "head*", "pos*"]


class Writes(eke.TechniqueCallback):
    """Moves what does not train, after each step."""

    technique = eke.Technique(name="writes", kind="callback", effects=("changes weights",), exactness="approximate")

    @torch.no_grad()
    def after_optimizer_step(self, run, optimizer):
        for weight in run.module.parameters():
            if not weight.requires_grad:
                weight.mul_(0.9)


@pytest.mark.parametrize("method", ["lora", "bitfit", "adapters"])
@pytest.mark.parametrize("beside", [lambda: Stacking([3]), Writes], ids=["stacking", "writes"])
def test_what_another_technique_writes_beneath_the_adapter_is_in_the_checkpoint(tmp_path, method, beside):
    """The resumed run starts from the base as it was given, and ends where the unbroken one does."""
    ckpt, given = tmp_path / "a.ckpt", {"train": OUTSIDE}
    whole = fit(TinyBlocks(), beside(), PEFT(method, **given), loader=shuffled, callbacks=[SaveAfter(ckpt, 6)])
    resumed = fit(TinyBlocks(), beside(), PEFT(method, **given), loader=shuffled, ckpt=ckpt, seed=1)
    assert_same(
        whole.state["weights"], resumed.state["weights"], "weights of the unbroken run, then of the resumed one"
    )
    fresh = eke.load_from_checkpoint(TinyBlocks, ckpt, callbacks=[PEFT(method, **given)], seed=0)
    if method == "lora":
        with pytest.raises(PEFTError, match="has written to the weights beneath the adapter.*merge"):
            export(fresh, tmp_path / "adapter")
    later = tmp_path / "later.ckpt"  # of a run that goes on from there without the other technique
    fit(fresh, PEFT(method, **given), callbacks=[SaveAfter(later, 2)])
    loaded = eke.load_from_checkpoint(TinyBlocks, later, callbacks=[PEFT(method, **given)], seed=0)
    frozen = [name for name, weight in fresh.named_parameters() if not weight.requires_grad]
    pair = [{name: dict(model.named_parameters())[name] for name in frozen} for model in (fresh, loaded)]
    assert_same(*pair, "what does not train in the run, then in its file")


def test_alone_its_checkpoints_stay_small(tmp_path):
    fit(TinyBlocks(), PEFT("lora", train=OUTSIDE), callbacks=[SaveAfter(tmp_path / "a.ckpt", 2)])
    assert all(
        "lora" in name or not name.startswith("blocks") for name in torch.load(tmp_path / "a.ckpt")["state_dict"]
    )


def test_true_growth_is_refused_where_weights_are_frozen_and_quantizing_where_they_are_written_to(capsys):
    with pytest.raises(
        eke.ConflictError, match="'peft' goes by weights that stay as they were given. Use form='dormant'"
    ):
        fit(TinyBlocks(), Stacking([3], form="growth"), PEFT("lora", train=OUTSIDE))
    with pytest.raises(eke.ConflictError, match="'peft': quantize='nf4' keeps .* and 'writes' writes to weights"):
        fit(TinyBlocks(), Writes(), PEFT("lora", train=OUTSIDE, quantize="nf4"))
    asked = {"stacking": {"stages": [3], "form": "growth"}, "peft": {}}
    with pytest.raises(eke.ConflictError, match="Use form='dormant'"):
        eke.trainer_kwargs(**asked)
    assert main(["check", "stacking:form=growth", "peft"]) == 1
    assert "REFUSED: 'stacking': form='growth' frees" in capsys.readouterr().out


def test_a_step_in_which_all_adapted_blocks_are_skipped_moves_nothing():
    run = fit(TinyBlocks(), LayerDrop(0.05, schedule="constant"), PEFT("lora"), epochs=1)
    skipped = [step["gradient norm"] for step in run.state["steps"].values()]
    assert 0 in [norm or 0 for norm in skipped]  # else the test shows nothing
    assert all(weight.isfinite().all() for weight in run.model.parameters())
