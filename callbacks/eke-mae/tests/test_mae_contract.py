import pytest
from eke.testing import TechniqueContract, TinyViT, checks
from eke_mae import MAE


class TestContract(TechniqueContract):
    model = TinyViT
    shapes = (TinyViT,)
    frozen = ("head.*",)  # of the labels, which pretraining does not see
    arguments = {"decoder_depth": 1, "decoder_heads": 2}

    def build(self):
        return MAE(decoder_depth=1, decoder_heads=2)

    # Without training_step, which pretraining does not run.
    @pytest.mark.parametrize("where", ["validation_step", "configure_optimizers", "on_fit_start"])
    def test_it_fails_cleanly(self, where):
        checks.fails_cleanly(self.subject(), where)

    def shows(self, plain, seen):
        assert 0 < seen.in_blocks() < plain.in_blocks()
        assert "masked_loss" in seen.trainer.callback_metrics
        return seen.share_of(plain)


class TestContractOfSimMIM(TestContract):
    zoo = ("vit",)
    arguments = {"method": "simmim", "unit": 2}
    unseen = {"replaces tokens": "All patches pass, those that are hidden as one learned token."}

    def build(self):
        return MAE(method="simmim", unit=2)

    def build_in_zoo(self, animal):
        return MAE(method="simmim", unit=8)

    def shows(self, plain, seen):
        assert "masked_loss" in seen.trainer.callback_metrics
        return ""
