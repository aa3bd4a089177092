"""The finder of the patch embedding, on models with one tower, two towers, a stem and none."""

import pytest
import torch
from eke import EkeError
from eke.seams.blocks import BlocksError
from eke.seams.patches import PatchesError, find_patches, image_blocks, relative_positions
from eke.testing import TinyBlocks, TinyViT, hugging_face
from torch import nn


def test_one_convolution_is_found_with_its_patch_and_its_grid():
    found = find_patches(TinyViT())
    assert (found.path, found.patch, found.stem) == ("patch_embed", (2, 2), ())
    assert found.grid(torch.zeros(1, 3, 8, 6)) == (4, 3)


def test_hugging_face():
    pytest.importorskip("transformers")
    assert find_patches(hugging_face("vit")).path == "vit.embeddings.patch_embeddings.projection"


def test_convolutions_in_blocks_do_not_count_and_a_stem_is_named():
    model = TinyViT()
    for block in model.blocks:
        block.local = nn.Conv2d(16, 16, 2, stride=2)
    model.stem = nn.Conv2d(3, 3, 3, padding=1)
    assert find_patches(model).path == "patch_embed"
    assert find_patches(model).stem == ("stem",)


def test_of_two_towers_each_has_its_own():
    model = nn.ModuleDict({"left": TinyViT(), "right": TinyViT()})
    assert find_patches(model, "right.blocks").path == "right.patch_embed"


def clip_like():
    """A tower of texts beside one of images, whose parts lie at the root."""
    model = TinyViT()
    model.text = TinyBlocks()
    return model


def test_the_blocks_that_see_images_are_those_beside_the_convolution():
    assert [one.path for one in image_blocks(clip_like())] == ["blocks"]
    assert find_patches(clip_like()).path == "patch_embed"
    two = nn.ModuleDict({"left": TinyViT(), "right": TinyViT(), "words": TinyBlocks()})
    assert [one.path for one in image_blocks(two)] == ["left.blocks", "right.blocks"]
    assert [one.path for one in image_blocks(two, ["words.blocks", "right.blocks"])] == ["words.blocks", "right.blocks"]
    with pytest.raises(
        BlocksError, match=r"2 lists of blocks that see images: 'left.blocks', 'right.blocks'. Say which"
    ):
        find_patches(two)
    for model in (TinyBlocks(), nn.Transformer(8, 2, 2, 2, 8)):
        with pytest.raises(PatchesError, match="has 0 convolutions that cut images .* it has no convolution"):
            image_blocks(model)


def test_refusals_are_ekes_own_and_stay_value_errors():
    for call in (lambda: find_patches(TinyBlocks()), lambda: find_patches(TinyViT(), "nowhere")):
        with pytest.raises(EkeError) as refusal:
            call()
        assert isinstance(refusal.value, ValueError)


def test_a_model_without_or_with_two_is_refused_by_what_it_has():
    with pytest.raises(PatchesError, match="TinyBlocks has 0 convolutions that cut images .* it has no convolution"):
        find_patches(TinyBlocks())
    model = TinyViT()
    model.depth_embed = nn.Conv2d(1, 16, 2, stride=2)
    with pytest.raises(PatchesError, match=r"has 2 convolutions .* patch_embed \(2, 2\), depth_embed \(2, 2\)"):
        find_patches(model)


def test_tables_of_relative_positions_are_named():
    model = nn.Module()
    model.relative_position_bias_table = nn.Parameter(torch.zeros(3))
    assert relative_positions(model) == ("relative_position_bias_table",)
    assert relative_positions(TinyViT()) == ()
