"""A layer swap: linear layers multiply by weights rounded to 8 bits a row; gradients pass the rounding by."""

from eke import Technique, TechniqueCallback
from eke.seams.layers import Transposed, find_layers, is_conv1d, restore, swap
from torch import nn


class Rounded(nn.Linear):
    def forward(self, x):
        scale = self.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        rounded = (self.weight.detach() / scale).round() * scale
        return nn.functional.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


def rounded(layer):
    if is_conv1d(layer):  # GPT-2's
        return Transposed(layer, rounded)
    twin = Rounded(layer.in_features, layer.out_features, layer.bias is not None, "meta")
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin


class RoundWeights(TechniqueCallback):
    technique = Technique(
        name="round_weights",
        kind="callback",
        effects=("changes precision",),
        exactness="approximate",
    )

    def alter_model(self, run):
        swap(run.module, find_layers(run.module), rounded, run.name)
        run.at_end(lambda: restore(run.module, run.name))
