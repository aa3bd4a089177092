"""RHO-LOSS: training on samples that are worth learning, learnable, and not yet learned."""

from eke.seams.scores import cross_scores, score

from eke_rho_loss.callback import RhoLoss, reducible

__all__ = ["RhoLoss", "cross_scores", "reducible", "score"]
