"""A block's attention replaced: each query sees the keys at most ``window`` places away."""

import torch
from eke import Technique, TechniqueCallback
from eke.seams.sdpa import Catch, sdpa


class Window(TechniqueCallback):
    technique = Technique(name="window", kind="callback", effects=("replaces attention",), exactness="model-changing")

    def __init__(self, window: int = 2):
        self.window = window

    def attend(self, call):
        queries = torch.arange(call.query.shape[2], device=call.query.device)
        keys = torch.arange(call.key.shape[2], device=call.query.device)
        near = ((queries[:, None] - keys).abs() <= self.window)[None, None]
        if call.causal:
            near = near & (keys <= queries[:, None])
        mask = (
            near
            if call.mask is None
            else near & call.mask
            if call.mask.dtype == torch.bool
            else call.mask + (torch.zeros(near.shape, device=near.device).masked_fill(~near, -torch.inf))
        )
        return sdpa(call._replace(mask=mask, causal=False))

    def around_step(self, run, call_next, batch, *args):
        with Catch(self.attend):
            return call_next(batch, *args)
