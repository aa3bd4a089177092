"""InfoBatch: unbiased dynamic pruning of well-learned samples."""

from eke_infobatch.callback import InfoBatch, plan_epoch

__all__ = ["InfoBatch", "plan_epoch"]
