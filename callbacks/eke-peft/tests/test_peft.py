import copy
import math
import warnings

import eke
import peft
import pytest
import torch
from eke import TechniqueCallback, strategies
from eke.seams import interceptor
from eke.seams.blocks import find_all_blocks, find_attention, find_blocks
from eke.seams.names import NamesError, plain_keys
from eke.testing import run as kit
from eke.testing import run_ranks, shapes
from eke.testing.data import shuffled
from eke.testing.models import SHAPES, TinyBlocks, TinyGPT2, TinyModel, TinyTransformer, TinyViT
from eke_peft import PEFT, PEFTError, export, load_adapter, merge, set_adapter
from eke_peft.adapters import Adapter
from eke_peft.base import trained_names
from eke_peft.intrinsic import Fastfood, walsh_hadamard
from eke_peft.quantized import keep_weights, quantize_layers
from eke_peft.ranks import Ranks
from eke_peft.targets import linear_layers, outputs
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

HEADS = {
    TinyBlocks: ["head.*"],
    TinyTransformer: ["head.*"],
    TinyViT: ["head.*"],
    TinyGPT2: ["*ln_f*"],
}


def fit(model, technique, epochs=2, **options):
    return kit.fit(model, technique, epochs=epochs, **options)


def put(method, model=None, **arguments):
    """A model with an adapter, and the technique that put it in."""
    model, technique = model or TinyBlocks(), PEFT(method, **arguments)
    technique._run = eke.Run(technique, None, model)
    technique.alter_model(technique.run)
    return model, technique


def inputs(model, samples=4):
    data = type(model).dataset(samples)
    return torch.stack([torch.as_tensor(data[i][0]) for i in range(samples)])


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(inputs(model))


# What is put in

METHODS = {
    "lora": {},
    "rslora": {},
    "dora": {},
    "pissa": {"settings": {"r": 4}},
    "bitfit": {},
    "adapters": {"settings": {"width": 4}},
    "intrinsic": {"settings": {"dimension": 20}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_begins_where_the_model_is_and_trains_only_what_it_says(method, shape):
    if shape is TinyGPT2:
        pytest.importorskip("transformers")
    arguments = {"train": HEADS[shape], **METHODS[method]}
    plain, model = shape(), shape()
    put(method, model, **arguments)
    # nn.TransformerEncoder computes in one piece where it can, which sums in another order.
    tolerance = 1e-5 if method == "pissa" else 1e-6 if shape is TinyTransformer else 0
    torch.testing.assert_close(logits(model), logits(plain), atol=tolerance, rtol=0)
    model.train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    training = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert training
    done = fit(model, PEFT(method, **arguments))
    after = dict(done.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    moved = [name for name, value in training.items() if not torch.equal(after[name], value)]
    assert len(moved) >= 0.6 * len(training)  # A of LoRA has no gradient while B is zero, for a step
    losses = [step["loss"] for step in done.state["steps"].values()]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_lora_counts_and_starts_as_the_paper_says():
    model, _ = put("lora", settings={"r": 4})
    layers = linear_layers(TinyBlocks())
    expected = sum(4 * (layer.in_features + layer.out_features) for layer in map(TinyBlocks().get_submodule, layers))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    first = next(p for name, p in model.named_parameters() if ".lora_A." in name)
    second = next(p for name, p in model.named_parameters() if ".lora_B." in name)
    assert first.abs().max() <= 1 / first.shape[1] ** 0.5
    assert not second.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_layers_of_the_blocks_are_found_and_no_others(shape):
    if shape is TinyGPT2:
        pytest.importorskip("transformers")
    model = shape()
    blocks = find_blocks(model)
    names = linear_layers(model)
    assert all(name.startswith(f"{blocks.path}.") for name in names)
    assert len(names) % len(blocks) == 0
    ends = outputs(model)
    assert len(ends) == 2 * len(blocks)
    assert len(outputs(model, attention=False)) == len(blocks)


def test_attention_of_torch_is_left_alone_and_refused_by_name():
    assert not any("self_attn" in name for name in linear_layers(TinyTransformer()))
    with pytest.raises(PEFTError, match="the base drifts by rounding"):
        put("lora", model := TinyTransformer(), targets=["encoder.layers.0.self_attn"])
    assert set(model.state_dict()) == set(TinyTransformer().state_dict())


@pytest.mark.parametrize("method", ["lora", "adapters"])
def test_torch_does_not_pass_an_adapter_by_in_evaluation(method):
    model, _ = put(method, TinyTransformer(), settings={"r": 4} if method == "lora" else {"width": 4})
    before = logits(model)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".up.weight" in name:
            nn.init.ones_(parameter)
    assert (logits(model) - before).abs().max() > 0.01


def test_adapters_are_two_a_block_of_the_size_that_the_paper_says():
    model, _ = put("adapters", settings={"width": 4})
    found = [part for part in model.modules() if isinstance(part, Adapter)]
    assert len(found) == 2 * 4
    assert sum(p.numel() for p in found[0].parameters()) == 2 * 16 * 4 + 4 + 16
    model, _ = put("adapters", settings={"width": 4, "after_attention": False})
    assert sum(isinstance(part, Adapter) for part in model.modules()) == 4


def test_bitfit_trains_biases_alone_and_refuses_a_model_without():
    model, _ = put("bitfit")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all(name.endswith("bias") for name in names)
    assert {name for name, _ in model.named_parameters() if name.endswith("bias")} == set(names)
    some, _ = put("bitfit", targets=["*attn*"])
    assert all("attn" in name for name, p in some.named_parameters() if p.requires_grad)

    class Plain(LightningModule):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

    with pytest.raises(PEFTError, match="no biases that BitFit could train"):
        put("bitfit", Plain())


@pytest.mark.parametrize("deep", [False, True])
def test_visual_prompts_are_seen_by_the_blocks_and_nobody_else(deep):
    model, technique = put("vpt", TinyViT(), settings={"tokens": 3, "deep": deep}, train=["head.*"])
    lengths = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        for block in find_blocks(model)
    ]
    after = []
    handles.append(model.norm.register_forward_pre_hook(lambda _, args: after.append(args[0].shape[1])))
    logits(model)
    [handle.remove() for handle in handles]
    tokens = after[0]
    assert lengths == [tokens + 3] * 4
    prompts = model.eke_prompts.tokens
    assert prompts.shape == (4 if deep else 1, 3, 16)
    bound = (6 / (model.patches.weight[0].numel() if hasattr(model, "patches") else 12 + 16)) ** 0.5
    assert prompts.abs().max() <= max(bound, 1)
    technique.run.close()


def test_a_prompt_of_one_block_does_not_reach_those_of_the_next():
    model, technique = put("vpt", TinyViT(), settings={"tokens": 3, "deep": True}, train=["head.*"])
    seen = []
    handle = find_blocks(model)[1].register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 1:4].clone()))
    logits(model)
    with torch.no_grad():
        model.eke_prompts.tokens[0] += 1
    logits(model)
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    technique.run.close()


def test_the_backbone_is_in_eval_while_prompts_train():
    modes = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, model, *_):
            modes.append((model.blocks[0].training, model.eke_prompts.training))

    kit.fit(TinyViT(dropout=0.5), PEFT("vpt", train=["head.*"]), epochs=2, callbacks=[Watch()], validate=False)
    assert set(modes) == {(False, True)}


def test_the_transform_of_the_intrinsic_dimension_is_a_hadamard_matrix():
    whole = walsh_hadamard(torch.eye(8))
    assert torch.equal(whole @ whole.T, 8 * torch.eye(8))
    assert set(whole.flatten().tolist()) == {1.0, -1.0}


def test_intrinsic_directions_are_of_one_length_and_nearly_apart():
    numbers = nn.Parameter(torch.zeros(64))
    part = Fastfood(numbers, torch.Size([64, 128]), seed=1)
    moved = torch.stack([
        torch.autograd.functional.jvp(lambda z: _with(part, z), torch.zeros(64), torch.eye(64)[i])[1].flatten()
        for i in range(8)
    ])  # fmt: skip
    lengths = moved.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(8), atol=1e-5, rtol=0)
    products = (moved / lengths[:, None]) @ (moved / lengths[:, None]).T - torch.eye(8)
    assert products.abs().max() < 0.15


@pytest.mark.parametrize("shape", [(30, 70), (16, 16), (7,), (640, 33)])
@pytest.mark.parametrize("dimension", [16, 50])
def test_a_step_goes_as_far_as_the_authors_whatever_the_sizes(shape, dimension):
    """Length 1 for each number on average, as fastfood_torched has it: neither the weight's size nor theirs matters."""
    part = Fastfood(nn.Parameter(torch.zeros(dimension)), torch.Size(shape), seed=3)
    squares = torch.stack([_with(part, one).square().sum() for one in torch.eye(dimension)])
    # A part that is cut off keeps its share of entries, whose squares differ: their mean over numbers is near 1.
    assert abs(squares.mean() - 1) < 4 * (2 / min(math.prod(shape), part.size) / dimension) ** 0.5 + 0.02

    BB, PI, GG = part.signs[0].float(), part.order[0], part.gauss[0]
    if part.parts == 1:  # one transform: the authors' own formula, number for number
        number = torch.randn(dimension)
        mixed = walsh_hadamard((nn.functional.pad(number, (0, part.size - dimension)) * BB)[None])[0]
        mixed = walsh_hadamard((mixed[PI] * GG)[None])[0]
        size = math.prod(shape)
        wanted = mixed[:size] / ((part.size * GG.square().sum()).sqrt() * math.sqrt(size / part.size))
        torch.testing.assert_close(_with(part, number).flatten(), wanted)


def test_every_parameter_moves_where_that_is_asked_for():
    model = Classifier()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tune(model, PEFT("intrinsic", settings={"dimension": 30, "parameters": "all"}))
    merge(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(before)  # embeddings, norms and biases too
    with pytest.raises(PEFTError, match="give 'blocks', the linear weights of blocks or of the targets, or 'all'"):
        put("intrinsic", settings={"parameters": "some"})


def test_a_parameter_that_two_modules_share_moves_once_and_stays_shared():
    class Tied(TinyBlocks):
        def make(self, dropout, layers):
            super().make(dropout, layers)
            self.head.weight = self.embed.weight

    model = fit(Tied(), PEFT("intrinsic", settings={"dimension": 20, "parameters": "all"})).model
    before = logits(model)
    assert torch.equal(model.head.weight, model.embed.weight)
    merge(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def _with(part, numbers):
    return torch.func.functional_call(part, {"numbers": numbers}, (torch.zeros(part.shape),))


def test_lora_plus_steps_the_second_matrix_farther():
    class Descent(TinyBlocks):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def second(ratio):
        model = fit(Descent(), PEFT(settings={"r": 4}, lr_ratio=ratio), epochs=1, steps=1).model
        return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if ".lora_B." in name])

    torch.testing.assert_close(second(16.0), 16 * second(1.0))
    torch.testing.assert_close(second(None), second(1.0))


# AdaLoRA


RANKS = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 2, "init_lora_weights": False}


def test_adalora_ends_where_peft_in_a_bare_loop_does():
    lit, bare = Classifier(), Classifier()
    technique = PEFT("adalora", settings={**RANKS, "total_step": 8}, targets=["all-linear"])
    technique.alter_model(eke.Run(technique, None, lit))
    targets = linear_layers(bert())
    config = peft.AdaLoraConfig(**RANKS, total_step=8, lora_alpha=32, target_modules=targets)
    model = peft.get_peft_model(bare.model, config)
    ours = {name: p for name, p in lit.model.named_parameters()}
    for name, parameter in model.base_model.model.named_parameters():
        parameter.data.copy_(ours[name])
    for parameter in model.base_model.model.classifier.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for epoch in range(2):
        for number, (tokens, labels) in enumerate(texts()):
            model.base_model(input_ids=tokens, labels=labels).loss.backward()  # PeftModel passes the regularizer by
            optimizer.step()
            model.base_model.update_and_allocate(4 * epoch + number + 1)
            optimizer.zero_grad()
    tune(lit, technique)
    for name, parameter in model.base_model.model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-6)
    kept = sum(int((p != 0).sum()) for name, p in lit.named_parameters() if ".lora_E." in name)
    assert kept == 2 * len(targets)


def test_adalora_takes_its_steps_from_the_run_and_resumes(tmp_path):
    settings = {"init_r": 6, "target_r": 2}
    whole, stopped = Classifier(), Classifier()
    tune(whole, PEFT("adalora", settings=settings), max_steps=12, epochs=-1)
    trainer = kit.make_trainer(PEFT("adalora", settings={**settings, "total_step": 12, "tinit": 1, "tfinal": 3}),
                               epochs=-1, max_steps=6)  # fmt: skip
    kit.seed_everything(0)
    with kit.quiet():
        trainer.fit(stopped, texts())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = Classifier()
    tune(again, PEFT("adalora", settings={**settings, "total_step": 12, "tinit": 1, "tfinal": 3}),
         ckpt=tmp_path / "x.ckpt", max_steps=12, epochs=-1)  # fmt: skip
    for (name, one), (_, other) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    folder = export(whole, tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(bert(), folder)
    batch = next(iter(texts()))
    whole.eval(), read.eval()
    torch.testing.assert_close(read(input_ids=batch[0]).logits, whole.model(input_ids=batch[0]).logits)


def test_adalora_says_what_it_lacks():
    with pytest.raises(PEFTError, match="give the Trainer max_steps, or total_step="):
        tune(Classifier(), PEFT("adalora"), epochs=-1, max_time="00:00:01:00")
    with pytest.raises(PEFTError, match="tinit=5 and tfinal=3 has no step left of 8"):
        tune(Classifier(), PEFT("adalora", settings={"tinit": 5, "tfinal": 3}))

    class Two(Classifier):
        def configure_optimizers(self):
            self.automatic_optimization = False
            return [torch.optim.SGD([one], 0.1) for one in self.parameters() if one.requires_grad][:2]

    with pytest.raises(PEFTError, match="steps of one optimizer, and configure_optimizers gives several"):
        tune(Two(), PEFT("adalora", settings={"total_step": 8}))
    for method in ("adalora", peft.AdaLoraConfig(total_step=10)):
        (words,) = strategies.refusals([PEFT(method)], ModelParallelStrategy())
        assert "'sharded gradients'" in words
        assert "AdaLoRA looks at whole gradients. Use one device, strategy='ddp' or ZeRO(stage=1)" in words
    assert strategies.refusals([PEFT("lora")], ModelParallelStrategy()) == []


# Hugging Face


def bert(labels=3):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


class Classifier(LightningModule):
    def __init__(self, base=None):
        super().__init__()
        self.model = base or bert()

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def texts():
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (16, 8), generator=draw)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, tokens[:, 0] % 3), 4)


def tune(model, technique, ckpt=None, epochs=2, **options):
    trainer = kit.make_trainer(technique, epochs=epochs, **options)
    kit.seed_everything(0)
    with kit.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, texts(), ckpt_path=ckpt)
    return trainer


def test_the_new_head_of_a_hugging_face_model_trains_by_itself():
    model, _ = put("lora", Classifier())
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"model.classifier.weight", "model.classifier.bias"} <= names
    assert all(".lora_" in name for name in names if "classifier" not in name)


def test_a_class_that_does_not_say_what_it_does_is_asked_for():
    model = Classifier()
    type(model.model).__name__, name = "Mystery", type(model.model).__name__
    try:
        with pytest.raises(PEFTError, match="what Mystery does is not to be told from its name"):
            put("prompt", model)
    finally:
        type(model.model).__name__ = name


def test_a_head_that_peft_copies_trains_once():
    model, _ = put("prompt", Classifier(), settings={"task_type": "SEQ_CLS", "num_virtual_tokens": 4})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any("original_module" in name for name in names)
    assert sum("classifier" in name for name in names) == 2
    words = model.model.get_input_embeddings().weight
    prompts = next(p for name, p in model.named_parameters() if "prompt_encoder" in name)
    assert all((words == prompt).all(1).any() for prompt in prompts)  # the paper's better start


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loftq_begins_at_the_best_approximation_of_what_rounding_took(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_module_weight

    plain, model = Classifier(), Classifier()
    make = lambda: PEFT("loftq", settings={"r": 4}, quantize=kind)  # noqa: E731
    technique = make()
    technique.alter_model(eke.Run(technique, None, model))
    names = linear_layers(plain.model)
    for name in names:
        layer, weight = model.model.get_submodule(name), plain.model.get_submodule(name).weight
        rest = weight - dequantize_module_weight(layer.get_base_layer())
        sizes = torch.linalg.svdvals(rest)
        left = rest - layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(left.norm(), sizes[4:].norm())  # Eckart and Young: nothing of rank 4 is nearer
    whole, again = Classifier(), Classifier()
    tune(whole, make())
    tune(Classifier(), make(), epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    tune(again, make(), ckpt=tmp_path / "x.ckpt")
    for (name, one), (_, other) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(PEFTError, match="'loftq' makes up for rounding, and nothing is rounded"):
        PEFT("loftq")


def test_what_is_put_beside_a_half_precision_base_is_float32():
    model, _ = put("lora", Classifier(bert().to(torch.bfloat16)))
    dtypes = {"lora" if ".lora_" in name else "base": p.dtype for name, p in model.named_parameters()}
    assert dtypes == {"lora": torch.float32, "base": torch.bfloat16}
    tune(model, PEFT())
    model = Classifier()
    tune(model, PEFT(), precision="bf16-true")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "method", ["lora", "ia3", "bitfit", "adapters", "intrinsic", "intrinsic of all", "prompt", "prefix", "p-tuning"]
)
def test_methods_train_a_hugging_face_model_and_save_little(method, tmp_path):
    model = Classifier()
    settings = {
        "intrinsic of all": {"dimension": 30, "parameters": "all"},
        "prefix": {"num_virtual_tokens": 4},
        "p-tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
        "lora": {"r": 4},
        "adapters": {"width": 4},
        "intrinsic": {"dimension": 30},
    }.get(method, {})
    method = method.partition(" ")[0]
    trainer = tune(model, PEFT(method, settings=settings))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == trained_names(model)
    assert sum(value.numel() for value in saved.values()) < 0.5 * sum(p.numel() for p in model.parameters())
    again = Classifier()
    eke_model = tune(again, PEFT(method, settings=settings), ckpt=tmp_path / "x.ckpt", epochs=2)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert eke_model.global_step == 8


CONFIGS = [peft.LoHaConfig(r=4, target_modules=["query"]), peft.VeraConfig(r=4)]


@pytest.mark.parametrize("config", CONFIGS, ids=["LoHa", "VeRA"])
def test_any_configuration_of_peft_can_be_passed(config, tmp_path):
    model = Classifier()
    trainer = tune(model, PEFT(config), epochs=1)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("hada" in name or "vera_lambda" in name for name in names)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = Classifier()
    tune(again, PEFT(config), ckpt=tmp_path / "x.ckpt", epochs=1)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


class Speaker(LightningModule):
    """A causal model."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = transformers.GPT2LMHeadModel(config)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_a_causal_model_gets_a_prefix_or_a_prompt(method, tmp_path):
    model, arguments = Speaker(), {"settings": {"num_virtual_tokens": 4}}
    tune(model, PEFT(method, **arguments), epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    assert len(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == 1
    again = Speaker()
    tune(again, PEFT(method, **arguments), ckpt=tmp_path / "x.ckpt", epochs=1)
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name


# Checkpoints


def test_a_checkpoint_holds_what_trains_and_names_its_base(tmp_path):
    done = fit(TinyBlocks(), PEFT(settings={"r": 4}, train=["head.*"]))
    done.trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == trained_names(done.model)
    assert len(saved["eke"]["techniques"]["peft"]["manifest"]["hash"]) == 32
    loaded = eke.load_from_checkpoint(TinyBlocks, tmp_path / "x.ckpt")  # told by the file alone what it was
    torch.testing.assert_close(logits(loaded), logits(done.model), rtol=0, atol=0)


def test_another_base_is_refused_and_so_are_other_settings(tmp_path):
    fit(TinyBlocks(), PEFT(settings={"r": 4}), epochs=1).trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(PEFTError, match="belongs to another base.*Load the same pretrained weights first"):
        fit(TinyBlocks(seed=1), PEFT(settings={"r": 4}), ckpt=tmp_path / "x.ckpt")
    with pytest.raises(
        eke.ResumeError, match=r"PEFT\(settings=\{'r': 4\}\), and this run has PEFT\(settings=\{'r': 8\}\)"
    ):
        fit(TinyBlocks(), PEFT(settings={"r": 8}), ckpt=tmp_path / "x.ckpt")
    more = PEFT(settings={"r": 4}, train=["blocks.0.norm1.*"])
    with pytest.raises(eke.ResumeError, match=r"PEFT\(train=None\), and this run has PEFT\(train=\['blocks.0.norm1"):
        fit(TinyBlocks(), more, ckpt=_with_hash(tmp_path))
    more.on_changed_arguments = "warn"
    with pytest.raises(PEFTError, match="which trains in this run"):
        fit(TinyBlocks(), more, ckpt=_with_hash(tmp_path))


def _with_hash(folder):
    """The same checkpoint, with the hash of a run that trains a norm too."""
    model, technique = put("lora", settings={"r": 4}, train=["blocks.0.norm1.*"])
    saved = torch.load(folder / "x.ckpt", weights_only=True)
    saved["eke"]["techniques"]["peft"]["manifest"]["hash"] = technique._base
    torch.save(saved, folder / "y.ckpt")
    return folder / "y.ckpt"


def test_full_checkpoints_hold_all(tmp_path):
    done = fit(TinyBlocks(), PEFT(settings={"r": 4}, checkpoint="full"), epochs=1)
    done.trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert set(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]) == set(done.model.state_dict())


# Files of peft's, merging, several adapters


@pytest.mark.parametrize("arguments", [{"train": []}, {}, {"train": ["model.classifier.*", "*pooler*"]}])
def test_peft_reads_what_is_exported_and_the_other_way_round(arguments, tmp_path):
    model = Classifier()
    tune(model, PEFT(settings={"r": 4}, **arguments))
    export(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "adapter")).eval()
    tokens = texts().dataset.tensors[0]
    model.eval()
    with torch.no_grad():
        ours = model.model(input_ids=tokens).logits
        torch.testing.assert_close(theirs(input_ids=tokens).logits, ours, rtol=0, atol=0)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = Classifier()
    load_adapter(again, tmp_path / "theirs")
    again.eval()
    with torch.no_grad():
        torch.testing.assert_close(again.model(input_ids=tokens).logits, ours, rtol=0, atol=0)
    with pytest.raises(PEFTError, match="no adapter 'other'"):
        export(model, tmp_path / "x", name="other")


def test_what_peft_has_no_place_for_is_said_at_export(tmp_path):
    model = Classifier()
    model.head = nn.Linear(2, 2)
    put("lora", model)
    with pytest.warns(UserWarning, match="'head.weight' trained, and lies outside"):
        export(model, tmp_path / "adapter")
    model, _ = put("lora", Classifier(), train=["*query.bias"])
    with pytest.raises(PEFTError, match="query.base_layer.bias' trained beside an adapter of its layer"):
        export(model, tmp_path / "other")


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "intrinsic", "intrinsic of all"])
def test_merging_gives_the_plain_model_with_the_same_outputs(method):
    settings = {"intrinsic": {"dimension": 20}, "intrinsic of all": {"dimension": 20, "parameters": "all"}}
    settings, method = settings.get(method, {"r": 4}), method.partition(" ")[0]
    model = fit(TinyBlocks(), PEFT(method, settings=settings, train=["head.*"])).model
    before = logits(model)
    merge(model)
    assert set(model.state_dict()) == set(TinyBlocks().state_dict())
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    assert not torch.equal(before, logits(TinyBlocks()))


def test_a_run_can_merge_at_its_end_and_then_saves_the_plain_model(tmp_path):
    done = fit(TinyBlocks(), PEFT(settings={"r": 4}, merge=True), epochs=1)
    assert set(done.model.state_dict()) == set(TinyBlocks().state_dict())
    done.trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    TinyBlocks().load_state_dict(torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"])
    with kit.quiet():
        done.trainer.validate(done.model, shuffled(TinyBlocks.dataset(16), 4, 0))
    assert set(done.model.state_dict()) == set(TinyBlocks().state_dict())  # evaluating begins no new adapter


def test_a_merged_model_is_no_base_for_the_run_s_checkpoints(tmp_path):
    fit(TinyBlocks(), PEFT(settings={"r": 4}), epochs=1).trainer.save_checkpoint(tmp_path / "x.ckpt")
    done = fit(TinyBlocks(), PEFT(settings={"r": 4}, merge=True), epochs=1)
    with pytest.raises(PEFTError, match="has been merged into this model"), kit.quiet():
        done.trainer.validate(done.model, shuffled(TinyBlocks.dataset(16), 4, 0), ckpt_path=tmp_path / "x.ckpt")


def test_what_cannot_be_merged_says_so():
    for method, model in (("adapters", TinyBlocks()), ("vpt", TinyViT())):
        put(method, model, train=["head.*"])
        with pytest.raises(PEFTError, match="cannot be merged"):
            merge(model)


def test_a_second_adapter_trains_beside_the_first_and_they_can_be_switched():
    model = fit(TinyBlocks(), PEFT(settings={"r": 4}, adapter="one")).model
    alone = logits(model)
    first = {name: p.detach().clone() for name, p in model.named_parameters() if ".one." in name}
    fit(model, PEFT(settings={"r": 2}, adapter="two"))
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters() if ".one." in name)
    both = logits(model)
    set_adapter(model, "one")
    torch.testing.assert_close(logits(model), alone)
    set_adapter(model)
    torch.testing.assert_close(logits(model), logits(TinyBlocks()))
    set_adapter(model, "one", "two")
    torch.testing.assert_close(logits(model), both)
    with pytest.raises(PEFTError, match="no adapter 'three'; there are one, two"):
        set_adapter(model, "three")


def test_another_method_on_a_tuned_model_is_refused_unless_it_has_another_name():
    model = fit(TinyBlocks(), PEFT(settings={"r": 4})).model
    fit(model, PEFT(settings={"r": 4}))  # goes on
    with pytest.raises(PEFTError, match="is tuned by lora already, with other settings. Merge that"):
        fit(model, PEFT("bitfit"))
    fit(model, PEFT("bitfit", adapter="second"))
    merge(model)
    fit(model, PEFT(settings={"r": 4}))  # begins anew on what was merged
    assert any(".lora_" in name for name, _ in model.named_parameters())


# Quantized


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_trains_saves_the_adapter_and_resumes(kind, tmp_path):
    pytest.importorskip("bitsandbytes")

    class Wide(TinyModel):
        def make(self, dropout, layers):
            self.embed = nn.Embedding(64, 64)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2)
            )
            self.head = nn.Linear(64, 32)

        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = x + block(x)
            return self.head(x)

    make = lambda: PEFT(settings={"r": 4}, train=["head.*"], quantize=kind)  # noqa: E731
    unbroken = fit(Wide(), make(), epochs=2)
    names = {type(part).__name__ for part in unbroken.model.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind] in names
    fit(Wide(), make(), epochs=1).trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name or name.startswith("head.") for name in saved)
    resumed = fit(Wide(), make(), epochs=2, ckpt=tmp_path / "x.ckpt")
    ends = unbroken.model.named_parameters(), resumed.model.named_parameters()
    for (name, one), (_, other) in zip(*ends, strict=True):
        assert torch.equal(one, other), name
    tuned = put("lora", Wide(), quantize=kind)[0]
    trained = [tuned.train()(inputs(tuned)).detach(), logits(tuned), tuned.train()(inputs(tuned)).detach()]
    assert torch.equal(trained[0], trained[2]), "evaluation has changed the base"
    near, plain = logits(tuned), logits(Wide())
    assert 0 < (near - plain).norm() / plain.norm() < (0.1 if kind == "nf4" else 0.02)
    with pytest.raises(PEFTError, match="is quantized, and merging would round it again"):
        merge(unbroken.model)


def test_a_base_that_transformers_has_quantized_trains_and_resumes(tmp_path):
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    config = bert().config
    config.hidden_size, config.intermediate_size = 64, 128
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)

    def model(skip=("classifier",)):
        quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=list(skip))
        return Classifier(
            transformers.AutoModelForSequenceClassification.from_pretrained(
                tmp_path, quantization_config=quantization, device_map="cpu", dtype=torch.float32
            )
        )

    whole, again = model(), model()
    tune(whole, PEFT(settings={"r": 4}))
    tune(model(), PEFT(settings={"r": 4}), epochs=1).save_checkpoint(tmp_path / "x.ckpt")
    tune(again, PEFT(settings={"r": 4}), ckpt=tmp_path / "x.ckpt")
    for (name, one), (_, other) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(PEFTError, match="'model.classifier.weight' should train, and is quantized .*llm_int8_skip_mod"):
        tune(model(skip=()), PEFT())
    with pytest.raises(PEFTError, match="do not load from a checkpoint. Give checkpoint='adapter'"):
        tune(model(), PEFT(checkpoint="full"))


# With strategies and other techniques


@pytest.mark.parametrize(("stage", "half"), [(1, False), (2, True), (3, False), (3, True)])
def test_it_trains_and_saves_under_zero_as_under_ddp(stage, half, tmp_path):
    zero = pytest.importorskip("eke_zero")

    def run(strategy, ckpt=None, save=None, epochs=2):
        def work(rank):
            technique = PEFT(settings={"r": 4}, train=["head.*"])
            trainer = kit.make_trainer(technique, *strategy(), epochs=epochs, world=2)
            kit.seed_everything(0)
            model = TinyBlocks()
            if half:
                model.to(torch.bfloat16)
            with kit.quiet():
                trainer.fit(model, shuffled(TinyBlocks.dataset(32), 4, 0, rank, 2), ckpt_path=ckpt)
                if save:
                    trainer.save_checkpoint(save)
            whole = lambda t: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()  # noqa: E731
            return {name: whole(p) for name, p in model.named_parameters()}

        return run_ranks(work, 2)[0]

    ddp = run(list)
    sharded = run(lambda: [zero.ZeRO(stage=stage)])
    assert max(float((ddp[name] - sharded[name]).abs().max()) for name in ddp) == 0
    run(lambda: [zero.ZeRO(stage=stage)], save=tmp_path / "x.ckpt", epochs=1)
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name or name.startswith("head.") for name in saved)
    resumed = run(lambda: [zero.ZeRO(stage=stage)], ckpt=tmp_path / "x.ckpt")
    assert max(float((ddp[name] - resumed[name]).abs().max()) for name in ddp) == 0


def test_the_optimizer_holds_only_what_trains():
    done = fit(TinyBlocks(), PEFT(settings={"r": 4}), epochs=1)
    held = [p for group in done.trainer.optimizers[0].param_groups for p in group["params"]]
    assert held
    assert all(p.requires_grad for p in held)


def test_eight_bit_states_go_with_it():
    adam8bit = pytest.importorskip("eke_adam8bit")
    done = kit.fit(TinyBlocks(), PEFT(settings={"r": 4}), adam8bit.Adam8bit(), epochs=1)
    assert done.trainer.global_step == 4


def test_recomputing_finds_gradients_though_the_inputs_need_none():
    model = Classifier()
    model.model.gradient_checkpointing_enable({"use_reentrant": True})
    tune(model, PEFT(settings={"r": 4}))
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if ".lora_B." in name)


def test_a_compiled_block_trains_the_same():
    def losses(compiled):
        model, technique = TinyBlocks(), PEFT(settings={"r": 4})
        if compiled:
            for block in find_blocks(model):
                block.compile(backend="aot_eager")
        return [step["loss"] for step in fit(model, technique, epochs=1).state["steps"].values()]

    assert losses(True) == pytest.approx(losses(False), abs=1e-6)


def test_all_of_it_together_resumes_to_the_same_bits(tmp_path):
    adam8bit = pytest.importorskip("eke_adam8bit")

    def run(ckpt=None, save=None, epochs=2):
        def work(rank):
            techniques = [PEFT(settings={"r": 4}), adam8bit.Adam8bit(min_elements=1)]
            options = {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "gradient_clip_val": 1.0}
            trainer = kit.make_trainer(*techniques, epochs=epochs, world=2, **options)
            kit.seed_everything(0)
            model = Classifier()
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
            for block in find_blocks(model.model):
                block.compile(backend="aot_eager")
            with kit.quiet():
                trainer.fit(model, shuffled(texts().dataset, 2, 0, rank, 2), ckpt_path=ckpt)
                if save:
                    trainer.save_checkpoint(save)
            return {name: p.detach().clone() for name, p in model.named_parameters()}

        return run_ranks(work, 2)[0]

    whole = run()
    assert any(p.abs().sum() > 0 for name, p in whole.items() if ".lora_B." in name)
    run(save=tmp_path / "x.ckpt", epochs=1)
    resumed = run(ckpt=tmp_path / "x.ckpt")
    assert all(torch.equal(p, resumed[name]) for name, p in whole.items())


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "magic"}, "method='magic': one of lora"),
        ({"settings": {"rank": 3}}, "settings of 'lora'.*rank"),
        ({"method": "vpt", "settings": {"rank": 3}}, "settings of 'vpt' are tokens, deep, prefix, dropout, not 'rank'"),
        ({"quantize": "int2"}, "quantize='int2'"),
        ({"quantize": "nf4", "checkpoint": "full"}, "made anew from the base"),
        ({"quantize": "nf4", "merge": True}, "would round merged weights again"),
        ({"method": "adapters", "merge": True}, "which is no sum of weights"),
        ({"method": "bitfit", "lr_ratio": 4.0}, "LoRA\\+ needs a positive ratio and a LoRA"),
        ({"settings": {"init_lora_weights": "pissa_niter_4"}}, "leaves another rest of the base each time"),
        ({"checkpoint": "some"}, "checkpoint='some'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, words):
    with pytest.raises(PEFTError, match=words):
        PEFT(**arguments)


def test_models_that_it_has_no_place_in_are_refused_in_words():
    with pytest.raises(PEFTError, match="Or name the layers: targets="):
        put("lora", LightningModule())
    with pytest.raises(PEFTError, match="is none"):
        put("prompt", TinyBlocks())
    with pytest.raises(PEFTError, match="has no part 'nowhere'"):
        put("lora", host="nowhere")
    with pytest.raises(PEFTError, match="whose weights are several"):
        put("intrinsic", TinyTransformer(), targets=["encoder.layers.0.self_attn"])
    model, _ = put("lora")
    del model.eke_peft
    with pytest.raises(PEFTError, match="has an adapter 'default' already"):
        put("lora", model)


def test_it_says_what_trains():
    model, technique = put("lora", settings={"r": 4}, train=["head.*"])
    words = technique.summary(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{trained:,} of" in words
    lines = [line.strip() for line in words.splitlines()[1:]]
    assert "blocks.*.mlp.fc1: 4 x 192" in lines  # 4 x (16 + 32)
    assert "head.bias: 1 x 32" in lines
    assert len(lines) == 4 + 2


def test_a_copy_of_the_model_keeps_its_adapter():
    model, _ = put("lora", settings={"r": 4})
    twin = copy.deepcopy(model)
    torch.testing.assert_close(logits(twin), logits(model))


# Patterns, and two names of one parameter


def test_patterns_that_meet_nothing_show_near_names():
    with pytest.raises(NamesError, match=r"targets='q_prjo' meets no name. Near it are"):
        put("lora", Tied(), targets=["q_prjo"])
    with pytest.raises(NamesError, match=r"train='heads.\*' meets no name. Near it are head.weight, head.bias"):
        put("lora", train=["heads.*"])
    with pytest.raises(NamesError, match=r"targets='\*atn\*' meets no name"):
        put("bitfit", targets=["*atn*"])
    model, _ = put("lora", targets=["fc1", "*.1.attn.qkv"])
    adapted = [name for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
    assert sorted(adapted) == sorted(["blocks.1.attn.qkv", *(f"blocks.{i}.mlp.fc1" for i in range(4))])


class Tied(LightningModule):
    """A language model whose head is its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = shapes.llama().model

    def forward(self, tokens):
        return self.model(input_ids=tokens).logits


def trained_somehow(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model.eval()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_into_one_of_two_tied_weights_leaves_the_other(target):
    model, _ = put("lora", Tied(), targets=[target], settings={"r": 4})
    tokens = torch.arange(8)[None]
    wanted = trained_somehow(model)(tokens)
    merged = merge(model)
    torch.testing.assert_close(merged(tokens), wanted)
    ends = merged.model.get_input_embeddings(), merged.model.get_output_embeddings()
    assert ends[0].weight is not ends[1].weight
    assert merged.model.config.tie_word_embeddings is False


def test_a_model_that_a_copy_has_untied_says_so():
    settings = {"r": 4, "modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    model, _ = put("lora", Tied(), settings=settings)
    assert model.model.config.tie_word_embeddings is False
    tokens = torch.arange(8)[None]
    wanted = trained_somehow(model)(tokens)
    torch.testing.assert_close(merge(model)(tokens), wanted)
    untouched, _ = put("lora", Tied(), targets=["q_proj"], settings={"r": 4})
    assert untouched.model.config.tie_word_embeddings is True


@pytest.mark.parametrize("pattern", ["model.lm_head.*", "lm_head", "model.model.embed_tokens.weight"])
def test_a_tied_parameter_trains_by_any_of_its_names(pattern):
    model, _ = put("lora", Tied(), train=[pattern], targets=["q_proj"])
    assert model.model.lm_head.weight.requires_grad
    assert not model.model.model.norm.weight.requires_grad


def test_an_exported_adapter_with_a_trained_tied_embedding_loads_to_the_same_outputs(tmp_path):
    model, _ = put("lora", Tied(), train=["lm_head"], targets=["q_proj"], settings={"r": 4})
    tokens = torch.arange(8)[None]
    wanted = trained_somehow(model)(tokens)
    export(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(Tied().model, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, wanted)


# Compiled submodules


class Compiled(TinyBlocks):
    def __init__(self, **given):
        super().__init__(**given)
        self.blocks[1] = torch.compile(self.blocks[1], backend="eager")


@pytest.mark.parametrize(("writes", "reads"), [(Compiled, Compiled), (Compiled, TinyBlocks), (TinyBlocks, Compiled)])
def test_a_compiled_part_is_no_other_base_and_its_checkpoint_loads(tmp_path, writes, reads):
    make = lambda: PEFT(settings={"r": 4}, train=["head.*"])  # noqa: E731
    first = fit(writes(), make(), epochs=1)
    first.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fit(reads(), make(), epochs=2, ckpt=tmp_path / "half.ckpt")
    unbroken = fit(TinyBlocks(), make(), epochs=2)
    found, wanted = plain_keys(resumed.model.state_dict()), unbroken.model.state_dict()
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# Other shapes


@pytest.mark.parametrize("shape", ["t5", "bart", "clip", "whisper", "swin"])
def test_the_blocks_of_all_towers_are_adapted_by_default(shape):
    built = shapes.SHAPES[shape]()
    names = linear_layers(built.model)
    assert all(any(name.startswith(f"{path}.") for name in names) for path in built.lists)
    blocks = [block for blocks in find_all_blocks(built.model) for block in blocks]
    assert len(outputs(built.model)) == sum(1 + len(find_attention(block)) for block in blocks)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_conv1d_layers_of_gpt2_are_quantized_to_near_their_weights(kind):
    pytest.importorskip("bitsandbytes")
    model = TinyGPT2().eval()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        plain = model.model(tokens).logits
        names = linear_layers(model)
        weights = quantize_layers(model, names, kind)
        keep_weights(model)
        assert set(weights) == set(names)
        assert {type(model.get_submodule(name)).__name__ for name in names} <= {"Linear4bit", "Linear8bitLt"}
        error = model.model(tokens).logits - plain
    assert 0 < error.norm() < 0.2 * plain.norm()


@pytest.mark.parametrize(
    ("shape", "layers"),
    [("gpt2", {"c_attn"}), ("llama", {"q_proj", "v_proj"}), ("bert", {"query", "value"}), ("t5", {"q", "v"}),
     ("bart", {"q_proj", "v_proj"})],
)  # fmt: skip
def test_the_layers_are_those_that_peft_itself_takes_in_an_architecture_that_it_knows(shape, layers):
    built, theirs = shapes.SHAPES[shape](), shapes.SHAPES[shape]().model

    class Holds(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = built.model

    model, _ = put("lora", Holds(), settings={"r": 2})
    peft.get_peft_model(theirs, peft.LoraConfig(r=2))
    ours = [name for name, part in model.inner.named_modules() if isinstance(part, BaseTunerLayer)]
    assert ours == [name for name, part in theirs.named_modules() if isinstance(part, BaseTunerLayer)]
    assert {name.rpartition(".")[2] for name in ours} == layers
    assert all(any(name.startswith(f"{path}.") for name in ours) for path in built.lists)


def test_lists_of_blocks_and_all_linear_layers_can_be_asked_for_where_peft_has_a_choice_of_its_own():
    class Holds(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = shapes.SHAPES["t5"]().model

    def adapted(**arguments):
        model, _ = put("lora", Holds(), settings={"r": 2}, **arguments)
        return [name for name, part in model.inner.named_modules() if isinstance(part, BaseTunerLayer)]

    names = adapted(blocks=["encoder.block"])
    assert names
    assert all(name.startswith("encoder.block.") and name.endswith((".q", ".v")) for name in names)
    assert adapted(targets=["all-linear"]) == linear_layers(shapes.SHAPES["t5"]().model)
    only = adapted(targets=["all-linear"], blocks="decoder.block")
    assert only == linear_layers(shapes.SHAPES["t5"]().model, "decoder.block")


def test_visual_prompts_go_to_the_tower_of_images_and_several_ask_which():
    class Holds(LightningModule):
        def __init__(self, shape):
            super().__init__()
            self.inner = shapes.SHAPES[shape]().model

    model, technique = put("vpt", Holds("clip"), settings={"tokens": 2}, train=["*logit_scale"])
    images, texts = (find_blocks(model, path) for path in ("inner.vision_model", "inner.text_model"))
    assert [bool(interceptor.actions(block)) for block in images] == [True, False, True]
    assert not any(interceptor.actions(block) for block in texts)
    technique.run.close()
    with pytest.raises(PEFTError, match="'vpt' puts tokens before those of one list.*blocks='encoder.block'"):
        put("vpt", Holds("t5"))
    with pytest.raises(PEFTError, match="The blocks of SwinModel hold relative positions.*here 'lora' or 'adapters'"):
        put("vpt", Holds("swin"))


class Uneven(TechniqueCallback):
    """Skips the second block in every second step, as layer dropping does, or always, as stacking does."""

    technique = eke.Technique(name="uneven", kind="callback", effects=("changes hidden states",))

    def __init__(self, every=2):
        self.every = every

    def alter_model(self, run):
        self.blocks = run.blocks()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        skips = batch_idx % self.every == 0
        self.blocks.put(self.blocks.now()[1], *([interceptor.Skip()] if skips else []))


@pytest.mark.parametrize("every", [1, 2])
def test_adalora_leaves_the_scores_of_a_skipped_block_as_they_were(every):
    model, technique = Classifier(), PEFT("adalora", settings={**RANKS, "total_step": 8})
    scores = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            own = technique._ranks.allocator.exp_avg_ipt
            scores.append({name: one.clone() for name, one in own.items() if ".1." in name})

    tune(model, technique, callbacks=[Uneven(every), Look()])
    assert scores[0]
    assert not any(one.any() for one in scores[0].values())  # skipped in the first step: nothing was seen
    moved = [any((new[name] != old[name]).any() for name in new) for old, new in zip(scores, scores[1:], strict=False)]
    assert any(moved) == (every == 2)
    if every == 2:
        assert moved[:2] == [True, False]


def test_an_adapter_larger_than_its_layer_is_regularized_by_the_size_of_its_product():
    """Of rank 24 beside layers of 16 features; by hand: the norm of P P' - 1 for each matrix."""
    model, technique = Classifier(), PEFT("adalora", settings={**RANKS, "init_r": 24, "total_step": 8})
    tune(model, technique)
    ranks = Ranks(model.model, peft.AdaLoraConfig(**{**RANKS, "init_r": 24}, total_step=8), "default")
    matrices = [(name, p) for name, p in ranks._parameters() if "lora_E" not in name]
    for _, p in matrices:
        p.grad = torch.zeros_like(p)
    ranks.regularize()
    total = sum(
        ((p @ p.T if "lora_A" in name else p.T @ p) - torch.eye(24)).square().sum().sqrt() for name, p in matrices
    )
    wanted = torch.autograd.grad(ranks.config.orth_reg_weight * total / len(matrices), [p for _, p in matrices])
    for (_, p), gradient in zip(matrices, wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_mamba_is_adapted_where_its_layers_are_called():
    hf = pytest.importorskip("transformers")

    class Holds(LightningModule):
        def __init__(self):
            super().__init__()
            config = hf.MambaConfig(vocab_size=17, hidden_size=8, state_size=2, num_hidden_layers=2, time_step_rank=2)
            self.inner = hf.MambaForCausalLM(config)

    model, _ = put("lora", Holds(), settings={"r": 2})
    adapted = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, BaseTunerLayer)}
    assert adapted == {"in_proj", "x_proj", "dt_proj"}


def test_prompts_where_blocks_get_something_for_each_token_are_refused_in_words():
    model, technique = put("vpt", TinyViT(), settings={"tokens": 2}, train=["head.*"])
    block, hidden = find_blocks(model)[0], torch.randn(2, 17, 16)
    with pytest.raises(PEFTError, match=r"also get mask of shape \(2, 17\), one entry a token, and prompts have none"):
        block(hidden, mask=torch.ones(2, 17))
    technique.run.close()
