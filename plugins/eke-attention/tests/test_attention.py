"""Attention against attention as it is written down; patterns against worked examples; models of all kinds."""

import math

import pytest
import torch
from eke.__main__ import main
from eke.seams.names import NamesError
from eke.testing import TinyBlocks, TinyGPT2, TinyTransformer, TinyViT, hugging_face
from eke.testing.data import Images, Tokens, shuffled
from eke_attention import (
    A3,
    DOTA,
    ELSA,
    Attention,
    AttentionError,
    Call,
    Documents,
    Prefix,
    Sanger,
    SlidingWindow,
    ViTCoD,
    covering,
    kernels,
    naive,
    pack,
    pairs,
    polarize,
    recall,
)
from eke_attention.kernels import KERNELS, block_pattern, flex, gathered, grid, sdpa
from eke_attention.patterns import greedy_scores, quantize
from eke_attention.sites import install
from lightning.pytorch import Trainer
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
CPU = torch.device("cpu")


def call(batch=2, heads=4, queries=100, keys=None, size=16, key_heads=None, dtype=torch.float32, **options):
    keys = keys or queries
    shapes = (heads, queries), (key_heads or heads, keys), (key_heads or heads, keys)
    parts = (torch.randn(batch, *shape, size).to(dtype).requires_grad_() for shape in shapes)
    return Call(*parts, **options)


def gradients(kernel, one):
    for part in one[:3]:
        part.grad = None
    output = kernel(one)
    output.float().square().sum().backward()
    return [output, *(part.grad for part in one[:3])]


def padded(batch, keys):
    lengths = torch.arange(batch) + keys - batch
    return (torch.arange(keys) < lengths[:, None])[:, None, None]


CASES = {
    "all pairs": {},
    "causal": {"causal": True},
    "padding": {"mask": padded(2, 100)},
    "padding, causal": {"mask": padded(2, 100), "causal": True},
    "added": {"mask": torch.linspace(-2, 2, 4)[None, :, None, None] * torch.rand(1, 1, 100, 100)},
    "scale": {"scale": 0.3},
    "few keys": {"keys": 40},
    "grouped queries": {"key_heads": 2, "causal": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_and_gathered_blocks_give_what_is_written_down(case, dtype):
    torch.manual_seed(0)
    one = call(dtype=dtype, **CASES[case])
    queries, keys = one.query.shape[2], one.key.shape[2]
    every = block_pattern(lambda b, h, q, k: (q >= 0) & (k >= 0), 1, 1, queries, keys, 16, CPU)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 0.05)
    wanted = gradients(naive, one)
    for kernel in (sdpa, lambda one: gathered(one, every)):
        for mine, other in zip(gradients(kernel, one), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


def test_vitcods_autoencoder_is_a_projection_that_learns():
    torch.manual_seed(0)
    pattern, layer = ViTCoD(autoencoder=True, collect=1000, lr=0.01), {}
    shared = torch.randn(3, 2, 10, 16)
    mix = torch.randn(4, 2)
    query = torch.einsum("brnd,hr->bhnd", shared, mix)  # four heads out of two directions
    one = Call(query, query, query)
    losses = []
    for _ in range(300):
        coded = pattern.transform(one, layer, True)
        losses.append(float((coded.query - query).norm()))
        coded.query.sum().mul(0).backward()  # the loss itself says nothing
        pattern.after_step({"layer": layer}, 0, lambda tensor: tensor)
    assert losses[-1] < 0.1 * losses[0]
    exact = layer["coder"].clone().requires_grad_()
    rows = torch.einsum("bhnd,hr,gr->bgnd", query, exact[0, 0], exact[0, 1])
    (1e-4 * (query - rows).norm()).backward()
    pattern.transform(one, layer, True).query.sum().mul(0).backward()
    torch.testing.assert_close(layer["leaf"].grad[0], exact.grad[0])
    with torch.no_grad():
        assert torch.equal(pattern.transform(one, dict(layer), False).value, one.value)


@pytest.mark.parametrize(
    "pattern", [SlidingWindow(9, block=8), SlidingWindow(5, sinks=3, block=16), Prefix(21, block=8)]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [64, 75])
def test_a_pattern_is_the_same_by_blocks_and_by_a_mask(pattern, causal, length):
    torch.manual_seed(0)
    one = call(queries=length, causal=causal)
    mod = pattern.mod(one, {}, True)
    blocks = block_pattern(mod, 1, 1, length, length, pattern.block, CPU)
    wanted = gradients(lambda one: naive(one._replace(mask=grid(mod, 1, 1, length, length, CPU))), one)
    for mine, other in zip(gradients(lambda one: gathered(one, blocks), one), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    fixed = one._replace(query=one.query.detach(), key=one.key.detach(), value=one.value.detach())
    torch.testing.assert_close(flex(fixed, blocks), wanted[0], rtol=1e-4, atol=1e-5)


def test_flex_gets_the_heads_and_the_blocks_that_its_kernels_take_on_a_gpu(monkeypatch):
    seen = []

    def spy(query, key, value, block_mask, **options):
        seen.append(([part.shape[-1] for part in (query, key, value)], block_mask.BLOCK_SIZE))
        return flex_attention(query, key, value, block_mask=block_mask, **options)

    monkeypatch.setattr(kernels, "_flex", lambda: spy)
    losses = []
    for kernel in ("flex", "masked"):
        trainer = Trainer(callbacks=[Attention(SlidingWindow(3, block=4), kernel)], **QUIET)
        losses.append(trainer.validate(TinyBlocks(), shuffled(Tokens(16)), verbose=False)[0]["val_loss"])
    assert seen
    assert all(sizes == [16, 16, 16] and block == (128, 128) for sizes, block in seen)  # of 8, and of 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_window_leaves_most_blocks_out():
    blocks = block_pattern(lambda b, h, q, k: ((q - k).abs() <= 64) & (k <= q), 1, 1, 2048, 2048, 64, CPU)
    assert blocks.kept == pytest.approx((32 + 31) / 32**2, rel=0.01)


def test_a_query_that_meets_nothing_gives_zeros_and_no_nan():
    one = call(queries=16, mask=torch.zeros(1, 1, 16, 16, dtype=torch.bool))
    blocks = block_pattern(lambda b, h, q, k: q >= k, 1, 1, 16, 16, 8, CPU)
    found = gradients(lambda one: gathered(one, blocks), one)
    assert all((part == 0).all() for part in found)


def test_dropout_is_taken_in_training_alone():
    one = call(dropout=0.5)
    every = block_pattern(lambda b, h, q, k: (q >= 0) & (k >= 0), 1, 1, 100, 100, 16, CPU)
    for kernel in (sdpa, naive, lambda one: gathered(one, every)):
        assert not torch.equal(kernel(one), kernel(one))
        assert torch.equal(kernel(one._replace(dropout=0.0)), kernel(one._replace(dropout=0.0)))


# ---------------------------------------------------------------------- documents


def test_packed_documents_are_as_if_alone():
    torch.manual_seed(0)
    model = hugging_face("llama")
    texts = [torch.randint(1, 32, (length,)) for length in (7, 4, 9, 3, 6)]
    batch = pack(texts, 16)
    assert batch["input_ids"].shape == (2, 16)
    pattern = Documents(block=4)
    plugin = Attention(pattern, "gather")
    plugin._used = "gather"
    sites, _ = install(model, plugin._attend)
    with torch.no_grad():
        given = pattern.see_batch({name: part for name, part in batch.items() if name != "labels"})
        packed = model(**given).logits
    for site in sites:
        site.remove()
    found = 0
    with torch.no_grad():
        for row, ids in enumerate(batch["document_ids"]):
            for document in ids[ids >= 0].unique():
                place = (ids == document).nonzero()[:, 0]
                alone = model(batch["input_ids"][row, place][None]).logits[0]
                torch.testing.assert_close(packed[row, place], alone, rtol=1e-4, atol=1e-5)
                assert batch["position_ids"][row, place].tolist() == list(range(len(place)))
                assert batch["labels"][row, place[0]] == -100
                assert torch.equal(batch["labels"][row, place[1:]], batch["input_ids"][row, place[1:]])
                found += 1
    assert found == len(texts)


def test_documents_are_told_apart_by_their_separator():
    pattern = Documents(separator=0)
    tokens = torch.tensor([[5, 0, 6, 7, 0, 8]])
    pattern.see_batch({"input_ids": tokens})
    found = pairs(pattern, call(1, 1, 6), {})[0, 0]
    ids = torch.tensor([0, 0, 1, 1, 1, 2])
    assert torch.equal(found, ids[:, None] == ids)


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (lambda: pack([torch.ones(9)], 8), "sequences of 9 to 9 tokens. Give 1 to 8"),
        (lambda: Documents().see_batch(torch.ones(2, 3)), "reads document_ids from the batch"),
        (lambda: SlidingWindow(0), "size=0: give a number above 0"),
        (lambda: Attention(kernel="gather"), "without a pattern: give 'auto' or one of naive"),
        (lambda: Attention(SlidingWindow(3), "flash"), "with a pattern: give 'auto' or one of gather"),
        (lambda: Sanger(2), "threshold=2"),
        (lambda: DOTA(0), "keep=0"),
        (lambda: A3(0), "share=0"),
        (lambda: ViTCoD(prefix=-1), "prefix=-1"),
    ],
)
def test_bad_arguments_are_refused_at_once(does, said):
    with pytest.raises(ValueError, match=said):
        does()


# ---------------------------------------------------------------------- predicted pairs


def test_sanger_keeps_what_its_few_bits_say():
    assert (quantize(torch.tensor([1, -1, 0.5, 0.07]), torch.tensor(1.0)) * 7).tolist() == pytest.approx([7, -7, 4, 0])
    one = call(1, 2, 12, causal=True)
    assert torch.equal(pairs(Sanger(0.0), one, {}), torch.ones(12, 12, dtype=torch.bool).tril().expand(1, 2, -1, -1))
    layer = {}
    kept = pairs(Sanger(0.08), one, layer)
    query, key = F.normalize(one.query, dim=-1), F.normalize(one.key, dim=-1)
    few = [
        (x * 7 / x.abs().max()).round() * x.abs().max() / 7 * part.norm(dim=-1, keepdim=True)
        for x, part in ((query, one.query), (key, one.key))
    ]
    scored = few[0] @ few[1].transpose(-1, -2) / 4
    predicted = scored.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    assert torch.equal(kept, predicted > 0.08)
    before, pattern = layer["query"].clone(), Sanger(0.08, decay=0.75)
    pattern.mod(one._replace(query=one.query * 9), layer, True)  # lengths do not count
    pattern.after_step({"layer": layer}, 1, lambda tensor: tensor)
    assert layer["query"] == pytest.approx(float(before))
    even = one._replace(query=torch.ones_like(one.query))
    assert torch.equal(pairs(pattern, even, dict(layer), True), pairs(pattern, even, layer, True))
    pattern.after_step({"layer": layer}, 1, lambda tensor: tensor)
    assert layer["query"] == pytest.approx(float(0.75 * before + 0.25 / 4))


def test_a3_gives_the_worked_example():
    key = torch.tensor([[-0.6, 0.1, 0.8], [0.1, -0.2, -0.9], [0.8, 0.6, 0.7], [0.5, 0.7, 0.5]])
    query = torch.tensor([[0.8, -0.3, 0.4]])
    torch.testing.assert_close(greedy_scores(query, key, 3), torch.tensor([[-0.16, -0.36, 0.64, 0.19]]))
    kept = pairs(A3(0.75, 5.0), Call(query[None, None], key[None, None], key[None, None], scale=1.0), {})
    assert kept[0, 0, 0].tolist() == [False, False, True, True]


def by_hand(query, key, steps):
    """A3's search one product at a time."""
    found, total, products = torch.zeros(len(key)), 0.0, key * query
    left = [
        sorted(range(len(key)), key=lambda row, column=column: products[row, column]) for column in range(len(query))
    ]
    right = [list(order) for order in left]
    for _ in range(steps):
        column = max((c for c in range(len(query)) if right[c]), key=lambda c: products[right[c][-1], c])
        row = right[column].pop()
        if products[row, column] > 0:
            found[row] += products[row, column]
            total += products[row, column]
        if total >= 0:
            column = min((c for c in range(len(query)) if left[c]), key=lambda c: products[left[c][0], c])
            row = left[column].pop(0)
            if products[row, column] < 0:
                found[row] += products[row, column]
                total += products[row, column]
    return found


def test_a3_searches_as_by_hand():
    torch.manual_seed(0)
    query, key = torch.randn(5, 4), torch.randn(9, 4)
    found = greedy_scores(query, key, 7)
    torch.testing.assert_close(found, torch.stack([by_hand(one, key, 7) for one in query]))


def test_elsas_rotation_and_bias_are_the_papers():
    matrix, bias = ELSA().rotation(64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64), rtol=0, atol=1e-5)
    assert 0.11 < bias < 0.135  # 0.127 in the paper


def test_elsa_learns_its_threshold_and_then_keeps_near_keys():
    torch.manual_seed(0)
    pattern, layer = ELSA(calibrate=2), {}
    query = torch.randn(1, 2, 64, 64)
    key = torch.randn(1, 2, 64, 64)
    key[..., :8, :] = query[..., :8, :]
    one = Call(query * 2, key, key)
    for _ in range(2):
        assert pattern.mod(one, layer, True) is None
        assert pattern.mod(one, layer, True) is None  # as activation checkpointing asks
        pattern.after_step({"layer": layer}, 1, lambda tensor: tensor)
    attention = naive(Call(one.query, one.key, torch.eye(64).expand(1, 2, -1, -1)))
    longest = key.norm(dim=-1).amax(-1)[..., None, None]
    relative = (one.query @ key.transpose(-1, -2)) / (one.query.norm(dim=-1, keepdim=True) * longest)
    smallest = relative.masked_fill(attention <= 1 / 64, torch.inf).amin(-1)
    assert float(layer["threshold"]) == pytest.approx(float(smallest.mean()), rel=1e-4)
    kept = pairs(pattern, one, layer)
    assert kept[..., torch.arange(8), torch.arange(8)].all()
    assert kept.float().mean() < 0.5
    assert recall(one, kept, 1 / 64)[0] > 0.8


def test_dota_learns_scores_of_low_rank_and_keeps_their_best():
    torch.manual_seed(0)
    pattern, layer = DOTA(0.25, rank=0.5, lr=0.05, calibrate=150), {}
    maps = torch.randn(2, 2, 16, 4)  # queries and keys of 2 heads out of 4 directions of the input
    x = torch.randn(2, 16, 16)
    base = x[..., :4] @ torch.randn(4, 16)
    query, key = (base[:, None] @ part @ torch.randn(4, 8) for part in maps)
    one = Call(query / 10, key / 10, key)
    for step in range(151):
        layer["input"] = base
        kept = pattern.mod(one, layer, True)
        assert (kept is None) == (step < 150)
        pattern.after_step({"layer": layer}, step, lambda tensor: tensor)
    layer["input"] = base
    chosen = pairs(pattern, one, layer)
    assert (chosen.sum(-1) == 4).all()
    assert recall(one, chosen, 0.25)[0] > 0.5  # 0.25 by chance
    assert layer["random"].abs().unique().tolist() == pytest.approx([0, math.sqrt(3 / 4)])


def test_vitcod_keeps_the_fewest_keys_and_moves_global_ones_to_the_front():
    row = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04])
    assert covering(row[None], 0.75).sum() == 2
    assert covering(row.flip(0)[None], 0.8)[0].tolist() == [False, False, False, True, True]
    torch.manual_seed(0)
    pattern, layer = ViTCoD(0.5, collect=2, prefix=1), {}
    calls = [call(3, 2, 10) for _ in range(2)]
    for one in calls:
        assert pattern.mod(one, layer, True) is None
        pattern.after_step({"layer": layer}, 0, lambda tensor: tensor)
    eye = torch.eye(10).expand(3, 2, -1, -1)
    mean = sum(naive(Call(one.query, one.key, eye)).mean(0) for one in calls)
    kept = pairs(pattern, calls[0], layer)
    assert torch.equal(kept[0], covering(mean, 0.5, 1))
    assert kept[0, :, 0].all()
    assert kept[0, :, :, 0].all()
    one, mask = calls[0], kept[:, :1]
    order, count = polarize(mask[0, 0])
    assert mask[0, 0].float().mean(0)[order[:count]].min() >= 0.5
    moved = Call(*(part[:, :, order] for part in one[:3]), mask[..., order, :][..., order])
    torch.testing.assert_close(naive(moved), naive(one._replace(mask=mask))[:, :, order])


@pytest.mark.parametrize(
    "pattern",
    [Sanger(0.05), ELSA(calibrate=1), A3(), DOTA(0.3, calibrate=1), ViTCoD(0.5, collect=1, autoencoder=True)],
    ids=repr,
)
@pytest.mark.parametrize("model", [TinyBlocks, TinyTransformer, TinyGPT2, TinyViT])
def test_predictions_train_and_keep_fewer_pairs(pattern, model):
    seen = []

    class Looking(Attention):
        def _attend(self, site, one):
            output = super()._attend(site, one)
            training = self._training and torch.is_grad_enabled()
            if not training and not (isinstance(pattern, DOTA) and "input" not in site.layer):
                seen.append(float(pairs(pattern, one, site.layer).float().mean()))
            return output

    data = shuffled((Images if model is TinyViT else Tokens)(16))
    trainer = Trainer(max_steps=4, callbacks=[Looking(pattern)], num_sanity_val_steps=0, **QUIET)
    trainer.fit(model(), data, data)
    assert trainer.callback_metrics["val_loss"].isfinite()
    assert isinstance(pattern, DOTA) or min(seen) < 0.99


# ---------------------------------------------------------------------- models


class Naive(nn.Module):
    """Attention as many write it, with timm's names."""

    def __init__(self, width=16, heads=2, causal=False, scale=None, by_head=False):
        super().__init__()
        self.num_heads, self.causal, self.by_head = heads, causal, by_head
        self.scale = (width // heads) ** -0.5 if scale is None else scale
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(x)
        if self.by_head:
            q, k, v = parts.view(batch, length, self.num_heads, 3, -1).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = parts.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = q @ k.transpose(-2, -1) * self.scale
        if self.causal:
            weights = weights.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        weights = self.attn_drop(weights.softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(batch, length, width)))


class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_head = 2
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.o_proj = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    "attention",
    [Naive(), Naive(causal=True), Naive(by_head=True), Naive(causal=True, by_head=True), Separate()],
    ids=["plain", "causal", "by head", "causal by head", "separate"],
)
def test_attention_that_is_written_out_is_rebuilt_with_the_same_numbers(attention):
    torch.manual_seed(0)
    x = torch.randn(2, 20, 16)
    wanted = attention(x)
    sites, left = install(attention, lambda site, one: sdpa(one))
    assert [site.how for site in sites] == ["rebuilt"]
    assert not left
    torch.testing.assert_close(attention(x), wanted, rtol=1e-4, atol=1e-5)
    assert sites[0].calls == 1
    sites[0].remove()
    assert "forward" not in vars(attention)
    assert torch.equal(attention(x), wanted)


def test_attention_of_other_numbers_is_left_and_named():
    sites, left = install(nn.Sequential(Naive(), Naive(scale=0.9)), lambda site, one: sdpa(one))
    assert [site.path for site in sites] == ["0"]
    assert left == {"1": "computed from its projections it gives other numbers than its own code"}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "vit"])
def test_hugging_face_models_give_the_same_numbers(kind):
    torch.manual_seed(0)
    try:
        model = hugging_face(kind).eval()
    except (KeyError, ValueError):
        pytest.skip(f"the kit has no {kind}")
    given = (
        {"pixel_values": torch.randn(2, 3, model.config.image_size, model.config.image_size)}
        if kind == "vit"
        else {"input_ids": torch.randint(1, 32, (2, 8)), "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])}
    )
    with torch.no_grad():
        wanted = model(**given)[0]
        before = model.config._attn_implementation
        sites, _ = install(model, lambda site, one: naive(one))
        found = model(**given)[0]
        assert all(site.calls == 1 for site in sites)
        for site in sites:
            site.remove()
        assert model.config._attn_implementation == before
        assert torch.equal(model(**given)[0], wanted)
    if kind == "vit":
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    else:
        seen = given["attention_mask"].bool()
        torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "by head"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_own_attention_gives_the_same_numbers(padding, mask, batch_first):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, batch_first=batch_first)
    x = torch.randn(3, 6, 16) if batch_first else torch.randn(6, 3, 16)
    masks = {
        "bool": torch.ones(6, 6, dtype=torch.bool).triu(1),
        "float": torch.randn(6, 6),
        "by head": torch.randn(6, 6, 6),
    }
    pads = {"bool": torch.arange(6).expand(3, 6) >= torch.tensor([[6], [5], [4]]), "float": torch.randn(3, 6)}
    options = {"attn_mask": masks.get(mask), "key_padding_mask": pads.get(padding), "need_weights": False}
    wanted, _ = module(x, x, x, **options)
    sites, _ = install(module, lambda site, one: naive(one))
    found, _ = module(x, x, x, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(AttentionError, match="need_weights=False"):
        module(x, x, x)
    sites[0].remove()


def test_evaluation_of_torchs_encoder_goes_through_it_too():
    sites = []

    class Looking(Attention):
        def _attend(self, site, one):
            sites.append(site.path)
            return super()._attend(site, one)

    Trainer(callbacks=[Looking()], **QUIET).validate(TinyTransformer(), shuffled(Tokens(16)), verbose=False)
    assert sites


@pytest.mark.parametrize("kernel", ["naive", "sdpa", "flash"])
def test_kernels_train_to_the_same_weights(kernel):
    found = []
    for callbacks in ([], [Attention(kernel=kernel)]):
        torch.manual_seed(0)
        module = TinyBlocks()
        Trainer(max_steps=3, callbacks=callbacks, limit_val_batches=0, **QUIET).fit(module, shuffled(Tokens(16)))
        found.append(module.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_says_which_kernel_was_taken_and_why(caplog):
    with caplog.at_level("INFO"):
        Trainer(callbacks=[Attention(SlidingWindow(4))], **QUIET).validate(
            TinyBlocks(), shuffled(Tokens(16)), verbose=False
        )
    said = next(one.getMessage() for one in caplog.records if one.getMessage().startswith("Attention: "))
    assert (
        "kernel gather (FlexAttention has no backward on a CPU), pattern SlidingWindow(size=4, sinks=0, block=64)"
        in said
    )


def test_eke_check_says_which_kernel_would_be_taken(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # a line stays a line
    assert main(["check", "attention"]) == 0
    assert "On this machine: attention by kernel sdpa (torch takes its best kernel" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main(["check", "attention:kernel=cudnn"]) == 1
        assert "it needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["cudnn", "flash-attn"])
def test_a_kernel_that_needs_a_gpu_is_refused_without_one(kernel):
    trainer = Trainer(accelerator="cpu", callbacks=[Attention(kernel=kernel)], **QUIET)
    with pytest.raises(AttentionError, match="it needs a GPU, and this runs on the CPU"):
        trainer.validate(TinyBlocks(), shuffled(Tokens(16)), verbose=False)


def test_layers_are_chosen_by_name():
    seen = []

    class Looking(Attention):
        def _attend(self, site, one):
            seen.append(site.path)
            return super()._attend(site, one)

    plugin = Looking(SlidingWindow(2), layers=["blocks.1.*"])
    Trainer(callbacks=[plugin], **QUIET).validate(TinyBlocks(), shuffled(Tokens(16)), verbose=False)
    assert set(seen) == {"blocks.1.attn"}
    with pytest.raises(NamesError, match="layers='nowhere' meets no name. There are blocks.0.attn, blocks.1.attn"):
        Trainer(callbacks=[Attention(layers=["nowhere"])], **QUIET).validate(
            TinyBlocks(), shuffled(Tokens(16)), verbose=False
        )


def test_documents_are_refused_in_prediction():
    with pytest.raises(AttentionError, match="does not see the batches of a prediction"):
        Trainer(callbacks=[Attention(Documents(3))], **QUIET).predict(TinyBlocks(), shuffled(Tokens(16)))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa", "flash", "cudnn", "flash-attn"])
def test_kernels_on_a_gpu_give_what_is_written_down(kernel):
    if kernel == "flash-attn":
        pytest.importorskip("flash_attn")
    one = call(queries=256, size=64, causal=True)
    one = one._replace(**{name: getattr(one, name).detach().cuda().bfloat16() for name in ("query", "key", "value")})
    torch.testing.assert_close(KERNELS[kernel](one), naive(one), rtol=0.05, atol=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [8, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flex_trains_on_a_gpu(size, dtype):
    torch.manual_seed(0)
    one = call(queries=512, size=size, causal=True, dtype=dtype)
    one = one._replace(
        **{name: getattr(one, name).detach().cuda().requires_grad_() for name in ("query", "key", "value")}
    )
    mod = SlidingWindow(100).mod(one, {}, True)
    blocks = block_pattern(mod, 1, 1, 512, 512, 128, one.query.device)
    wanted = gradients(lambda one: gathered(one, blocks), one)
    tolerance = 1e-2 if dtype == torch.float32 else 0.1
    for mine, other in zip(gradients(lambda one: flex(one, blocks), one), wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
