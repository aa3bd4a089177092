"""A saved-tensor codec: what backward needs waits as bfloat16."""

import torch
from eke import Technique, TechniqueCallback
from eke.seams.saved import COMPRESS, Codec


class Half(Codec):
    def encode(self, tensor, place):
        if tensor.dtype != torch.float32 or not place.needs_grad:
            return None
        return [tensor.bfloat16()], None

    def decode(self, parts, how):
        return parts[0].float()


class HalfActivations(TechniqueCallback):
    technique = Technique(
        name="half_activations", kind="callback", effects=("changes saved tensors",), exactness="approximate"
    )

    def alter_model(self, run):
        run.saved.register(run.name, Half(), COMPRESS)
