"""InfoBatch: unbiased dynamic pruning of well-learned samples."""

from eke_infobatch.callback import InfoBatch, by_step, plan_epoch

__all__ = ["InfoBatch", "by_step", "plan_epoch"]
