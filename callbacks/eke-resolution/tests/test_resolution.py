"""What Resolution promises: the schedule, embeddings resized as the papers do, a model left whole."""

import eke
import pytest
import torch
from eke.seams.patches import find_images
from eke.testing import TinyBlocks, TinyViT, fit, hugging_face
from eke.testing.data import CLASSES, Images
from eke_resolution import Resolution, resize_kernel, resize_positions, scale_at
from eke_resolution.callback import _fewest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.nn import functional as F


def test_the_scale_holds_then_rises_on_a_line_and_ends_full():
    shares = [scale_at(u, 0.5, 0.5, 0.2) for u in (0, 0.49, 0.5, 0.65, 0.8, 1)]
    assert shares == pytest.approx([0.5, 0.5, 0.5, 0.75, 1, 1])
    assert scale_at(0.5, 0.25, 0.5, 0.5) == 1


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 5)])
def test_an_enlarged_patch_gives_the_same_token(size):
    """FlexiViT's property: <B x, resized w> = <x, w> for every patch x that is enlarged."""
    torch.manual_seed(0)
    kernel, patch = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 4, 4)
    larger = F.interpolate(patch, size=size, mode="bilinear", align_corners=False)
    before = F.conv2d(patch, kernel, stride=4)
    after = F.conv2d(larger, resize_kernel(kernel, size), stride=size)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_a_smaller_patch_gets_the_closest_kernel_and_the_same_size_the_same():
    kernel = torch.randn(5, 3, 4, 4)
    assert resize_kernel(kernel, (4, 4)) is kernel
    enlarge = F.interpolate(torch.eye(16).view(16, 1, 4, 4), size=(2, 2), mode="bilinear").flatten(1)  # B^T
    small = resize_kernel(kernel, (2, 2)).flatten(2)
    solved = torch.linalg.lstsq(enlarge, kernel.flatten(2).flatten(0, 1).T).solution.T.view(5, 3, 4)
    torch.testing.assert_close(small, solved, rtol=1e-4, atol=1e-4)


def test_positions_keep_own_tokens_and_a_constant_map_and_grids_that_are_not_square():
    positions = torch.cat([torch.full((1, 2, 3), 9.0), torch.ones(1, 24, 3)], dim=1)
    small = resize_positions(positions, (4, 6), (2, 3))
    assert small.shape == (1, 2 + 6, 3)
    assert (small[:, :2] == 9).all()
    torch.testing.assert_close(small[:, 2:], torch.ones(1, 6, 3))
    ramp = torch.arange(4.0).repeat_interleave(6)[:, None]  # rises from row to row only
    rows = resize_positions(ramp, (4, 6), (2, 3)).view(2, 3)
    torch.testing.assert_close(rows[:, 0], rows[:, 2])
    assert rows[1, 0] > rows[0, 0]
    assert torch.equal(resize_positions(positions, (4, 6), (4, 6)), positions)


def triangle(old, new):
    """Linear interpolation with antialiasing from ``old`` to ``new`` places, as jax.image.resize's: (new, old)."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale - 0.5
    weights = (1 - (torch.arange(old) - centres[:, None]).abs() / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def test_positions_are_linear_where_that_is_asked_for():
    grid = torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.einsum("ih,jw,hwc->ijc", triangle(8, 5), triangle(6, 4), grid)
    linear = resize_positions(grid.view(48, 5).float(), (8, 6), (5, 4), "linear").view(5, 4, 5)
    torch.testing.assert_close(linear.double(), wanted, atol=1e-5, rtol=0)
    bicubic = resize_positions(grid.view(48, 5).float(), (8, 6), (5, 4)).view(5, 4, 5)
    assert (bicubic - linear).abs().max() > 0.05


@pytest.mark.parametrize("interpolation", ["bicubic", "linear"])
def test_a_step_takes_the_interpolation_that_was_asked_for(interpolation):
    seen = []

    class Watch(TinyViT):
        def forward(self, x):
            seen.append(self.pos_embed.detach().clone())
            return super().forward(x)

    model = Watch()
    wanted = resize_positions(model.pos_embed.detach(), (4, 4), (2, 2), interpolation)
    fit(model, Resolution(0.5, interpolation=interpolation), epochs=1, validate=False)
    assert torch.equal(seen[0], wanted)


def test_patches_divide_the_image():
    assert [_fewest(28, 4, wanted) for wanted in (7, 6.9, 3.5, 2, 1)] == [7, 4, 2, 2, 1]
    assert _fewest(30, 4, 3) == 7  # seven patches of 4 leave a rest: it stays as it is


class Seen(Callback):
    """What went into the convolution and into the last block, in training and in validation."""

    def __init__(self, conv="patch_embed", last="blocks.3"):
        self.conv, self.last = conv, last
        self.trained, self.validated, self.kinds, self.stride = [], [], [], []

    def on_train_start(self, trainer, model):
        sizes = {}

        def image(module, args):
            sizes["image"] = tuple(args[0].shape[2:])
            sizes["stride"] = tuple(module.stride)

        def tokens(module, args, kwargs):
            (self.trained if model.training else self.validated).append(
                (sizes["image"][0], sizes["stride"][0], args[0].shape[1])
            )

        model.get_submodule(self.conv).register_forward_pre_hook(image)
        model.get_submodule(self.last).register_forward_pre_hook(tokens, with_kwargs=True)

    def on_train_batch_end(self, trainer, model, *_):
        self.kinds.append(next(t for t in eke.techniques(trainer) if isinstance(t, Resolution)).step_kind())


def test_images_grow_and_validation_has_them_whole():
    seen = Seen()
    fit(TinyViT(), Resolution(0.5, hold=0.25, tail=0.25), epochs=2, validate=True, callbacks=[seen])
    expected = [max(1, round(4 * scale_at(step / 8, 0.5, 0.25, 0.25))) for step in range(8)]
    assert seen.trained == [(2 * side, 2, side * side + 1) for side in expected]
    assert set(seen.validated) == {(8, 2, 17)}
    assert seen.kinds == [f"{side} by {side} patches" if side < 4 else "all patches" for side in expected]


def test_patches_shrink_and_the_images_stay():
    seen, model = Seen(), TinyViT()
    fit(model, Resolution(0.25, hold=0.25, tail=0.25, mode="patches"), epochs=2, validate=True, callbacks=[seen])
    assert seen.trained == [(8, 8, 2)] * 4 + [(8, 4, 5)] * 2 + [(8, 2, 17)] * 2
    assert set(seen.validated) == {(8, 2, 17)}
    assert tuple(model.patch_embed.stride) == (2, 2)


def test_the_parameters_are_the_same_objects_in_the_same_order_after_each_step_and_get_gradients():
    model, orders = TinyViT(), []
    before = [(name, id(weight)) for name, weight in model.named_parameters()]

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, model, optimizer):
            orders.append([(name, id(weight)) for name, weight in model.named_parameters()])
            assert model.pos_embed.grad.abs().sum() > 0
            assert model.patch_embed.weight.grad.abs().sum() > 0

    fit(model, Resolution(0.5, mode="patches"), epochs=1, callbacks=[Look()])
    fit(model, Resolution(0.5), epochs=1, callbacks=[Look()])
    assert all(order == before for order in orders)
    assert "pos_embed" not in vars(model)
    assert "weight" not in vars(model.patch_embed)


def test_what_a_step_sets_on_the_module_stays_and_a_failed_step_leaves_it_whole():
    class Notes(TinyViT):
        def training_step(self, batch, batch_idx):
            self.noted = batch_idx
            if batch_idx == 2:
                raise KeyError("on purpose")
            return super().training_step(batch, batch_idx)

    model = Notes()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(KeyError, match="on purpose"):
        fit(model, Resolution(0.5), epochs=1)
    assert model.noted == 2
    assert [name for name, _ in model.named_parameters()] == names


def test_a_start_of_one_changes_no_bit():
    plain, kept = fit(TinyViT()).state["weights"], fit(TinyViT(), Resolution(1.0)).state["weights"]
    assert all(torch.equal(plain[name], kept[name]) for name in plain)


class Wrapped(LightningModule):
    dataset = Images

    def __init__(self, model, step):
        super().__init__()
        self.model, self.step = model, step

    def training_step(self, batch, batch_idx):
        return self.step(self.model, *batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def classify(model, images, classes):
    return F.cross_entropy(model(pixel_values=images).logits, classes)


@pytest.mark.parametrize("mode", ["images", "patches"])
def test_hugging_face_vit(mode):
    pytest.importorskip("transformers")
    model = hugging_face("vit")
    model.config.num_labels = CLASSES
    blocks = "vit.layers" if hasattr(model.vit, "layers") else "vit.encoder.layer"
    seen = Seen("model.vit.embeddings.patch_embeddings.projection", f"model.{blocks}.3")
    fit(Wrapped(model, classify), Resolution(0.5, tail=0.25, mode=mode), epochs=1, callbacks=[seen])
    assert seen.trained[0] == ((4, 2, 5) if mode == "images" else (8, 4, 5))
    assert seen.trained[-1] == (8, 2, 17)


def clip():
    hf = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config={**size, "vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 31},
            vision_config={**size, "image_size": 8, "patch_size": 2},
            projection_dim=8,
        )
    )


def contrast(model, images, classes):
    words = torch.arange(6) + torch.arange(len(images))[:, None]
    return model(input_ids=words, pixel_values=images, return_loss=True).loss


def test_positions_that_are_looked_up_and_the_image_tower_of_two():
    seen = Seen("model.vision_model.embeddings.patch_embedding", "model.vision_model.encoder.layers.1")
    small = Resolution(0.5, tail=0.25, blocks="model.vision_model.encoder.layers")
    fit(Wrapped(clip(), contrast), small, epochs=1, callbacks=[seen])
    assert seen.trained[0] == (4, 2, 5)
    assert seen.trained[-1] == (8, 2, 17)


def test_models_and_batches_that_it_cannot_serve_are_refused_with_the_reason():
    class NoPositions(TinyViT):
        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            return self.head(self.norm(self.blocks(x)).mean(1))

        def make(self, dropout, layers):
            super().make(dropout, layers)
            del self.pos_embed, self.cls_token

    with pytest.raises(MisconfigurationException, match="0 parameters of NoPositions have a row for each of 16 patch"):
        fit(NoPositions(), Resolution())
    fit(NoPositions(), Resolution(positions=""), epochs=1)

    class Stem(TinyViT):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.stem = nn.Conv2d(3, 3, 3, padding=1)

    with pytest.raises(ValueError, match=r"has further convolutions before its blocks \(stem\)"):
        fit(Stem(), Resolution())
    with pytest.raises(ValueError, match="0 convolutions that cut images"):
        fit(TinyBlocks(), Resolution())
    with pytest.raises(ValueError, match=r"has 2 tensors of images with 3 channels; its shapes: \(1, 3, "):
        find_images([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)], 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"start": 0}, "start=0: give a share"),
        ({"hold": 0.6, "tail": 0.5}, "hold=0.6, tail=0.5: give shares of the run that leave room"),
        ({"interpolation": "nearest"}, "interpolation='nearest' is none of: bicubic, linear"),
        ({"mode": "crops"}, "mode='crops' is none of: images, patches"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments, said):
    with pytest.raises(ValueError, match=said):
        Resolution(**arguments)


def test_compiled_by_block_it_takes_few_graphs():
    model = TinyViT()
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(model, Resolution(0.5), epochs=3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
