"""FP8's arithmetic against torch's casts, published numbers and torchao; the plugin on models and machines."""

import pytest
import torch
from eke.__main__ import main
from eke.seams.layers import restore, swap
from eke.seams.names import NamesError
from eke.testing import TinyBlocks, TinyGPT2, TinyTransformer, fit
from eke.testing.data import Tokens, shuffled
from eke_fp8 import FP8, FP8Error, chunked_product, round_to, shift_and_squeeze, to_float8
from eke_fp8.arithmetic import E4M3, E5M2, RECIPES, Arithmetic, emulate, scale_for
from eke_fp8.hardware import pick, torchao_linear
from eke_fp8.plugin import choose
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TransformerEnginePrecision
from torch import nn

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
FORMATS = [(E4M3, 3, -6, 448.0), (E5M2, 2, -14, 57344.0)]


def emulated(layer, recipe, **options):
    return emulate(layer, Arithmetic(recipe, **options))


def every_number():
    """All bfloat16 numbers, and all midpoints and neighbours of midpoints of both formats."""
    brain = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    grid = torch.cat([codes.view(dtype).float() for dtype in (E4M3, E5M2)]).unique()
    grid = grid[grid.isfinite()]
    middle = (grid[1:] + grid[:-1]) / 2
    return torch.cat([brain, middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)])


@pytest.mark.parametrize(("dtype", "mantissa", "lowest", "largest"), FORMATS)
def test_rounding_equals_torchs_casts_bit_for_bit(dtype, mantissa, lowest, largest):
    x = every_number()
    inside = x[x.abs() <= largest]
    assert torch.equal(
        round_to(inside, mantissa, lowest).to(dtype).view(torch.uint8), inside.to(dtype).view(torch.uint8)
    )
    assert torch.equal(round_to(inside, mantissa, lowest), inside.to(dtype).float())
    saturated = to_float8(x[~x.isnan()], dtype).float()
    assert torch.equal(saturated, round_to(x[~x.isnan()], mantissa, lowest).clamp(-largest, largest))
    assert to_float8(torch.tensor([torch.nan]), dtype).isnan().all()
    assert to_float8(torch.tensor([1e9, -torch.inf]), dtype).tolist() == [largest, -largest]


@pytest.mark.parametrize(("dtype", "mantissa", "lowest", "largest"), FORMATS)
def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased(dtype, mantissa, lowest, largest):
    x = torch.tensor([1.03, -0.7, 3e-3, 2.0**lowest / 3, largest * 0.99])
    uniform = (torch.arange(4096) + 0.5)[:, None].expand(-1, 5) / 4096
    drawn = to_float8(x.expand(4096, -1), dtype, uniform).float()
    assert all(len(column.unique()) <= 2 for column in drawn.T)
    torch.testing.assert_close(drawn.double().mean(0).float(), x, rtol=2e-3, atol=0)


def test_wangs_16_bits_round_the_14_low_bits_of_float32_to_even():
    bits = torch.randint(0x3080_0000, 0x4E00_0000, (10_000,), dtype=torch.int64)
    low = bits & 0x3FFF
    up = (low > 0x2000) | ((low == 0x2000) & (((bits >> 14) & 1) == 1))
    wanted = ((bits >> 14) + up) << 14
    found = round_to(bits.to(torch.int32).view(torch.float32), 9, -30)
    assert torch.equal(found.view(torch.int32).long(), wanted)


def test_chunks_keep_a_long_sum_from_being_swamped():
    torch.manual_seed(0)
    a, b = (to_float8(torch.rand(4096), E5M2).float() for _ in range(2))
    exact = float((a.double() * b.double()).sum())
    straight = float(chunked_product(a[None], b[:, None], chunk=1))
    chunked = float(chunked_product(a[None], b[:, None]))
    assert straight < 0.85 * exact
    assert chunked == pytest.approx(exact, rel=0.005)


def test_shift_and_squeeze_gives_the_worked_example():
    x = torch.tensor([1e-6, -3e-6, 2e-5, 4e-4, -1e-5, 0.0])
    wanted = torch.tensor([9.7659e-7, -2.9217e-6, 2.0524e-5, 4.0000e-4, -1.01639e-5, 0.0])
    torch.testing.assert_close(shift_and_squeeze(x), wanted, rtol=1e-4, atol=0)
    assert shift_and_squeeze(torch.zeros(3)).tolist() == [0, 0, 0]
    torch.testing.assert_close(shift_and_squeeze(torch.full((3,), -0.3)), torch.full((3,), -0.3))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_agrees_with_torchaos_emulation(recipe, dtype):
    torch.manual_seed(0)
    ours, layer = nn.Linear(64, 48, dtype=dtype), nn.Linear(64, 48, dtype=dtype)
    layer.load_state_dict(ours.state_dict())
    theirs = torchao_linear(recipe, emulate=True)(layer)
    emulated(ours, recipe)
    x = torch.randn(3, 32, 64, dtype=dtype) * torch.logspace(-3, 3, 64)
    x = x.to(dtype)
    gradient = torch.randn(3, 32, 48, dtype=dtype) * 1e-4
    found = []
    for one in (ours, theirs):
        into = x.clone().requires_grad_()
        output = one(into)
        output.backward(gradient)
        found.append((output, into.grad, one.weight.grad, one.bias.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "block", "mx", "s2fp8", "chunked"])
def test_products_are_near_those_of_float32(recipe):
    torch.manual_seed(0)
    plain = nn.Linear(160, 96)
    other = emulated(nn.Linear(160, 96), recipe)
    other.load_state_dict(plain.state_dict())
    x = torch.randn(64, 160)
    results = []
    for one in (plain, other):
        into = x.clone().requires_grad_()
        output = one(into)
        (output**2).mean().backward()
        results.append((output, into.grad, one.weight.grad))
    for exact, rounded in zip(*results, strict=True):
        error = float((exact - rounded).norm() / exact.norm())
        assert 1e-3 < error < 0.2


def test_groups_have_scales_of_their_own():
    x = torch.ones(2, 64)
    x[:, 32:] = 1e-6  # below the smallest number of E4M3 next to 1
    mx, tensorwise = (Arithmetic(recipe).operand(x, "input", 1, False) for recipe in ("mx", "tensorwise"))
    torch.testing.assert_close(mx, x, rtol=0.07, atol=0)
    assert (tensorwise[:, 32:] == 0).all()
    along_rows = Arithmetic("mx").operand(x.T.contiguous(), "gradient", 0, False)
    torch.testing.assert_close(along_rows, x.T, rtol=0.07, atol=0)
    wide = torch.ones(2, 256)
    wide[:, 128:] = 1e-6
    torch.testing.assert_close(Arithmetic("block").operand(wide, "input", 1, False), wide, rtol=0.07, atol=0)


def test_delayed_scaling_follows_the_largest_of_its_history():
    arithmetic = Arithmetic("delayed", history=2, margin=1)
    x = torch.tensor([[1000.0, 1.0]])
    assert arithmetic.operand(x, "input", 1, True).tolist() == [[448.0, 1.0]]  # the first step has scale 1
    arithmetic.update(arithmetic.seen)
    assert arithmetic.scales.tolist() == [pytest.approx(448 / 1000 / 2), 1.0, 1.0]
    for size in (10.0, 20.0):
        arithmetic.update(torch.tensor([size, 0.0, 0.0]))
    assert arithmetic.scales[0] == pytest.approx(448 / 20 / 2)
    assert arithmetic.operand(x, "input", 1, False) is not None
    assert (arithmetic.seen == 0).all()  # nothing is noted in evaluation


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_the_scale_stays_while_its_history_holds_a_size_that_is_not_finite(bad):
    """As Transformer Engine's: neither the window's other sizes nor the new ones move it before the bad one leaves."""
    arithmetic = Arithmetic("delayed", history=3)
    scales = []
    for size in (2.0, 8.0, bad, 4.0, 1.0, 1.0, 1.0):
        arithmetic.update(torch.tensor([0.0, size, 3.0]))
        scales.append(float(arithmetic.scales[1]))
    assert scales == [pytest.approx(448 / size) for size in (2, 8, 8, 8, 8, 4, 1)]
    assert arithmetic.scales[0] == 1  # only zeros were seen
    assert arithmetic.scales[2] == pytest.approx(57344 / 3)  # the other roles go on


def test_scales_are_finite_for_zeros():
    assert scale_for(torch.zeros(()), E4M3).isfinite()
    layer = emulated(nn.Linear(16, 16), "tensorwise")
    assert layer(torch.zeros(2, 16)).isfinite().all()


def test_layers_of_the_blocks_are_chosen_and_the_others_listed():
    choice = choose(TinyBlocks())
    assert choice.taken
    assert all(name.startswith("blocks.") for name in choice.taken)
    assert choice.left["head"] == "outside of the blocks"
    assert choose(TinyBlocks(), layers="*.mlp.*", keep=["blocks.0.*"]).taken == [
        name for name in choice.taken if ".mlp." in name and not name.startswith("blocks.0.")
    ]
    plain = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 20), nn.Linear(20, 16), nn.Linear(16, 16))
    choice = choose(plain)
    assert choice.taken == ["1"]
    assert "no multiples of 16" in choice.left["2"]
    assert choice.left["4"] == "the first or the last"
    assert "fewer than 64" in choose(plain, smallest=64).left["1"]
    blocks = nn.Sequential(*TinyBlocks().blocks)  # the model is its list of blocks
    assert set(choose(blocks).taken) == {name for name, part in blocks.named_modules() if isinstance(part, nn.Linear)}
    assert any("its weights alone" in why for why in choose(TinyTransformer()).left.values())


def test_patterns_that_meet_no_layer_are_refused_with_near_names():
    with pytest.raises(NamesError, match=r"layers='\*.mpl.\*' meets no name. Near it are blocks.0.mlp.fc1"):
        choose(TinyBlocks(), layers="*.mpl.*")
    with pytest.raises(NamesError, match="keep='heads' meets no name. Near it is head"):
        choose(TinyBlocks(), keep=["heads"])
    assert choose(TinyBlocks(), layers="fc1").taken == [f"blocks.{i}.mlp.fc1" for i in range(4)]


def test_a_run_says_what_it_converts_and_by_what(caplog):
    with caplog.at_level("INFO"):
        Trainer(max_steps=1, callbacks=[FP8()], limit_val_batches=0, **QUIET).fit(TinyBlocks(), shuffled(Tokens(16)))
    said = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("FP8: "))
    assert "recipe tensorwise, by emulation (te needs an NVIDIA GPU" in said
    assert "head: outside of the blocks" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "int8"}, "give one of tensorwise"),
        ({"backend": "cuda"}, "give 'auto' or one of te"),
        ({"recipe": "mx", "backend": "torchao"}, "te, emulation has"),
        ({"history": 4}, "belong to recipe='delayed'"),
        ({"recipe": "delayed", "history": 0}, "at least 1"),
        ({"stochastic": True}, "give backend='emulation'"),
    ],
)
def test_bad_arguments_are_refused_at_once(given, said):
    with pytest.raises(ValueError, match=said):
        FP8(**given)


@pytest.mark.parametrize("backend", ["te", "torchao"])
def test_the_real_thing_is_refused_where_it_cannot_be(backend):
    with pytest.raises(FP8Error, match="needs an NVIDIA GPU, and this runs on the CPU"):
        Trainer(max_steps=1, accelerator="cpu", callbacks=[FP8(backend=backend)], **QUIET).fit(
            TinyBlocks(), shuffled(Tokens(16))
        )


@pytest.mark.parametrize(
    ("capability", "recipe", "installed", "taken"),
    [
        ((9, 0), "tensorwise", {"transformer_engine", "torchao"}, "te"),
        ((9, 0), "tensorwise", {"torchao"}, "torchao"),
        ((9, 0), "mx", {"transformer_engine", "torchao"}, "emulation"),
        ((8, 0), "tensorwise", {"transformer_engine", "torchao"}, "emulation"),
        ((8, 9), "delayed", {"torchao"}, "emulation"),
        ((10, 0), "mx", {"transformer_engine"}, "te"),
    ],
)
def test_the_back_end_is_the_first_that_the_machine_has(monkeypatch, capability, recipe, installed, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("eke_fp8.hardware.find_spec", lambda name: name in installed or None)
    assert pick("auto", recipe, torch.device("cuda"))[0] == taken


def test_a_model_without_a_layer_for_it_is_refused_and_whole():
    module = TinyBlocks()
    with pytest.raises(FP8Error, match="features, fewer than 4096"):
        Trainer(max_steps=1, callbacks=[FP8(min_features=4096)], **QUIET).fit(module, shuffled(Tokens(16)))
    assert type(module.blocks[0].mlp.fc1) is nn.Linear


def test_the_advice_names_a_layer_that_can_be_converted_and_where_there_is_none_says_so():
    class Wide(TinyBlocks):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.blocks = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))

    with pytest.raises(FP8Error, match=r"Name those that are to be converted, such as FP8\(layers=\['head'\]\)"):
        fit(Wide(), FP8())
    with pytest.raises(FP8Error, match="None of them can be converted: leave FP8 out"):
        fit(Wide(), FP8(min_features=4096))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed"])
def test_a_conv1d_computes_what_a_linear_layer_of_its_weight_does(recipe):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, linear = Conv1D(48, 64), nn.Linear(64, 48)
    nn.init.normal_(conv.bias)
    linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    x = torch.randn(3, 5, 64)
    found = []
    for layer in (emulated(conv, recipe), emulated(linear, recipe)):
        into = x.clone().requires_grad_()
        output = layer(into)
        output.square().sum().backward()
        weight = layer.weight.grad.T if layer is conv else layer.weight.grad
        found.append((output, into.grad, weight, layer.bias.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other)


def test_the_conv1d_layers_of_gpt2_multiply_in_fp8_and_are_as_before_afterwards():
    from transformers.pytorch_utils import Conv1D

    names = choose(TinyGPT2()).taken
    assert len(names) == 4 * len(TinyGPT2().model.transformer.h)
    assert choose(TinyGPT2(), conv1d=False).taken == []
    weights = []
    for callbacks in ([], [FP8()]):
        torch.manual_seed(0)
        module = TinyGPT2()
        keys = list(module.state_dict())
        Trainer(max_steps=2, callbacks=callbacks, limit_val_batches=0, **QUIET).fit(module, shuffled(Tokens(16)))
        assert list(module.state_dict()) == keys
        assert all(type(module.get_submodule(name)) is Conv1D for name in names)
        assert not any(part._forward_pre_hooks for part in module.modules())
        weights.append(module.get_submodule(names[0]).weight.detach())
    assert not torch.equal(*weights)
    torch.testing.assert_close(*weights, atol=0.02, rtol=0.5)


def test_torchaos_layers_take_the_place_of_plain_ones_and_back():
    module = TinyBlocks()
    before, keys = module.blocks[0].mlp.fc1, list(module.state_dict())
    swap(module, ["blocks.0.mlp.fc1"], torchao_linear("tensorwise", emulate=True), "fp8")
    built = module.blocks[0].mlp.fc1
    assert type(built).__name__ == "Float8Linear"
    assert built.weight is before.weight
    assert list(module.state_dict()) == keys
    restore(module, "fp8")
    assert module.blocks[0].mlp.fc1 is before


def test_torchao_multiplies_a_conv1d_by_its_own_parameters():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, linear = Conv1D(48, 64), nn.Linear(64, 48)
    linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    build = torchao_linear("tensorwise", emulate=True)
    layer, other = build(conv), build(linear)
    assert layer.weight is conv.weight
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(4, 16, 64)
    for one in (layer, other):
        one(x).square().sum().backward()
    torch.testing.assert_close(layer(x), other(x))
    torch.testing.assert_close(conv.weight.grad.T, other.weight.grad)


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"mx"}))  # the kit has no 32 features
def test_every_recipe_trains_with_activation_checkpointing_to_the_same_weights(recipe):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(TinyBlocks):
        def forward(self, *args):
            for block in self.blocks:
                if "forward" not in vars(block):
                    plain = block.forward
                    block.forward = lambda *given, plain=plain: checkpoint(plain, *given, use_reentrant=False)
            return super().forward(*args)

    found = []
    for cls in (TinyBlocks, Checkpointed):
        torch.manual_seed(0)
        module = cls()
        Trainer(max_steps=3, callbacks=[FP8(recipe)], limit_val_batches=0, **QUIET).fit(module, shuffled(Tokens(16)))
        found.append(module.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=0, atol=0)


def test_chunked_weights_stay_in_16_bits():
    module = TinyBlocks()
    Trainer(max_steps=2, callbacks=[FP8("chunked")], limit_val_batches=0, **QUIET).fit(module, shuffled(Tokens(16)))
    weight = module.blocks[0].mlp.fc1.weight.detach()
    assert torch.equal(round_to(weight, 9, -30), weight)


def test_evaluation_of_torchs_own_layers_multiplies_in_fp8_too():
    losses = []
    for callbacks in ([], [FP8()]):
        torch.manual_seed(0)
        trainer = Trainer(callbacks=callbacks, **QUIET)
        losses.append(trainer.validate(TinyTransformer(), shuffled(Tokens(16)), verbose=False)[0]["val_loss"])
    assert losses[0] != losses[1]  # torch's layers read the weights of their parts, unless these have hooks
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_emulated_layers_train_under_fsdp2_as_without(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        found = []
        for shards in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(emulated(nn.Linear(32, 32), "tensorwise"), nn.GELU(), nn.Linear(32, 16))
            if shards:
                mesh = torch.distributed.init_device_mesh("cpu", (1,))
                fully_shard(model[0], mesh=mesh)
                fully_shard(model, mesh=mesh)
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            for _ in range(3):
                model(torch.randn(8, 32, generator=torch.Generator().manual_seed(1))).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append([getattr(part, "full_tensor", lambda part=part: part)() for part in model.parameters()])
        for plain, sharded in zip(*found, strict=True):
            torch.testing.assert_close(plain, sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_lightnings_own_plugin_beside_it_is_refused():
    class Precision(TransformerEnginePrecision):
        def __init__(self):
            pass

    trainer = Trainer(callbacks=[FP8()], max_steps=1, **QUIET)
    trainer.strategy._precision_plugin = Precision()
    with pytest.raises((FP8Error, MisconfigurationException), match="converts layers too"):
        trainer.fit(TinyBlocks(), shuffled(Tokens(16)))


def test_eke_check_says_what_would_multiply(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # a line stays a line
    assert main(["check", "fp8"]) == 0
    assert "On this machine: fp8 by " in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main(["check", "fp8:backend=te"]) == 1
        assert "REFUSED: fp8: FP8(backend='te') cannot run here" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["te", "torchao"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_real_fp8_is_near_its_emulation(backend, precision):
    pytest.importorskip({"te": "transformer_engine", "torchao": "torchao"}[backend])
    losses = []
    for used in (backend, "emulation"):
        torch.manual_seed(0)
        module, technique = TinyBlocks(), FP8(backend=used)
        trainer = Trainer(max_steps=4, callbacks=[technique], precision=precision, devices=1, **QUIET)
        trainer.fit(module, shuffled(Tokens(16)), shuffled(Tokens(16)))
        losses.append(float(trainer.callback_metrics["val_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
