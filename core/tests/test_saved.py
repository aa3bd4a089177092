"""Saved tensors: what codecs see, what they leave as it was, and how it is counted."""

import gc
import weakref

import pytest
import torch
from eke import EkeError, measure
from eke.seams.saved import COMPRESS, OFFLOAD, Codec, Saved, SavedError
from eke.testing import run_ranks
from eke.testing.models import SHAPES, Block, TinyBlocks, TinyGPT2
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)


class Copy(Codec):
    """Keeps a copy: other memory, the same bits."""

    exact = True
    integers = True

    def __init__(self, wants=lambda tensor, place: True):
        self.wants, self.places, self.shapes = wants, [], []

    def encode(self, tensor, place):
        if not self.wants(tensor, place):
            return None
        self.places.append(place)
        self.shapes.append(tuple(tensor.shape))
        return (tensor.clone(),), None

    def decode(self, parts, how):
        return parts[0].clone()


class Identity(Codec):
    exact = True

    def encode(self, tensor, place):
        return (tensor,), None

    def decode(self, parts, how):
        return parts[0]


class Int8(Codec):
    """One scale for each row, rounded at random so that the mean is right."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def encode(self, tensor, place):
        if not place.needs_grad or tensor.dtype == torch.float64:
            return None
        rows = tensor.float()
        low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
        step = ((high - low) / 255).clamp_min(1e-30)
        noise = torch.rand(rows.shape, generator=self.generator)
        codes = ((rows - low) / step + noise).floor().clamp(0, 255).to(torch.uint8)
        return (codes, low, step), tensor.dtype

    def decode(self, parts, how):
        codes, low, step = parts
        return (codes * step + low).to(how)


def batch_of(model):
    data = type(model).dataset(3)  # 24 tokens: no weight has such a side
    return tuple(torch.stack([torch.as_tensor(data[i][part]) for i in range(3)]) for part in range(2))


def gradients(model, saved=None, autocast=False, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)  # dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if saved is None:
            loss = model.loss(batch_of(model))
        else:
            with saved.forward():
                loss = model.loss(batch_of(model))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_same_bits(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


# The same numbers


@pytest.mark.parametrize("codec", [Identity, Copy])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_codec_that_changes_no_bit_changes_no_gradient(shape, autocast, codec):
    if shape is TinyGPT2:
        pytest.importorskip("transformers")
    model = shape(dropout=0.1)
    saved = Saved(model)
    saved.register("it", codec(), COMPRESS)
    assert_same_bits(gradients(model, saved, autocast), gradients(model, None, autocast))
    assert saved.counts.after["it"] > 0


def test_an_int8_codec_keeps_the_loss_and_a_quarter_of_the_bytes():
    model = TinyBlocks()
    saved = Saved(model)
    saved.register("int8", Int8(), COMPRESS)
    got, wanted = gradients(model, saved), gradients(model)
    assert torch.equal(got["loss"], wanted["loss"])
    assert any(not torch.equal(got[name], wanted[name]) for name in wanted)
    cosine = F.cosine_similarity(*(torch.cat([one[n].flatten() for n in wanted]) for one in (got, wanted)), dim=0)
    assert cosine > 0.999


def test_gradients_of_a_linear_net_are_unbiased_with_the_variance_of_the_formula():
    # dW = g' x: with codes rounded at random, an element's variance is sum over samples of g^2 s^2 f (1 - f).
    torch.manual_seed(1)
    net = nn.Linear(32, 4, bias=False)
    x, g = torch.randn(8, 32, requires_grad=True), torch.randn(8, 4)
    saved, draws = Saved(net), []
    saved.register("int8", Int8(), COMPRESS)
    for _ in range(500):
        net.zero_grad()
        with saved.forward():
            y = net(x)
        y.backward(g)
        draws.append(net.weight.grad.double().clone())
    low, high = x.detach().double().aminmax(dim=-1, keepdim=True)
    step = (high - low) / 255
    share = ((x.detach().double() - low) / step).frac()
    variance = (g.double() ** 2).T @ (step**2 * share * (1 - share))
    draws = torch.stack(draws)
    exact = g.double().T @ x.detach().double()
    assert ((draws.mean(0) - exact).abs() <= 5 * (variance / 500).sqrt() + 1e-6).all()
    assert float(draws.var(0).sum()) == pytest.approx(float(variance.sum()), rel=0.06)


# Several codecs


class Note(Copy):
    """Says in which order codecs are asked."""

    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log

    def encode(self, tensor, place):
        self.log.append(self.name)
        return super().encode(tensor, place)


@pytest.mark.parametrize("turned", [False, True])
def test_codecs_act_by_priority_whatever_the_order_of_registration(turned):
    class Spy(Copy):
        dtypes = set()

        def encode(self, tensor, place):
            self.dtypes.add(tensor.dtype)
            return super().encode(tensor, place)

    model, spy = TinyBlocks(), Spy()
    spy.dtypes = set()
    saved = Saved(model)
    both = [("int8", Int8(), COMPRESS), ("offload", spy, OFFLOAD)]
    for one in reversed(both) if turned else both:
        saved.register(*one)
    got = gradients(model, saved)
    assert torch.uint8 in spy.dtypes  # it got codes, and what the first one left alone
    assert set(saved.counts.after) == {"offload"}
    alone = Saved(model)
    alone.register("int8", Int8(), COMPRESS)
    assert_same_bits(got, gradients(model, alone))


def test_a_name_is_given_once_and_a_removed_codec_still_decodes():
    model = TinyBlocks()
    saved = Saved(model)
    saved.register("int8", Int8(), COMPRESS)
    with pytest.raises(EkeError, match="'int8' packs saved tensors already"):
        saved.register("int8", Copy(), OFFLOAD)
    wanted = gradients(model)
    model.zero_grad()
    saved.remove("int8")
    saved.register("copy", Copy(), COMPRESS)
    torch.manual_seed(3)
    with saved.forward():
        loss = model.loss(batch_of(model))
    saved.close()
    loss.backward()
    assert_same_bits({n: p.grad for n, p in model.named_parameters()}, {n: wanted[n] for n in wanted if n != "loss"})


def test_what_a_codec_declines_is_kept_and_offered_to_the_next():
    model = TinyBlocks()
    saved, last = Saved(model), Copy()
    saved.register("first", Copy(lambda tensor, place: "mlp" in place.path), COMPRESS)
    saved.register("last", last, OFFLOAD)
    assert_same_bits(gradients(model, saved), gradients(model))
    assert set(saved.counts.after) == {"last"}
    saved.remove("last")
    gradients(model, saved)
    assert set(saved.counts.after) == {"first", ""}


def test_integers_are_left_alone_unless_asked_for():
    class Floats(Copy):
        integers = False

    for codec, wanted in ((Copy(), True), (Floats(), False)):
        seen = []
        codec.wants = lambda tensor, place, seen=seen: seen.append(tensor.dtype) or True
        saved = Saved(TinyBlocks())
        saved.register("it", codec, COMPRESS)
        gradients(saved.module, saved)
        assert (torch.int64 in seen) is wanted


# Who is speaking


def test_the_innermost_module_is_named_with_the_number_of_its_tensor():
    model = TinyBlocks()
    saved, codec = Saved(model), Copy()
    saved.register("it", codec, COMPRESS)
    gradients(model, saved)
    first = [(place.path, place.number) for place in codec.places]
    assert ("blocks.2.mlp.fc1", 0) in first
    assert ("blocks.3.attn", 0) in first
    assert ("norm", 0) in first
    assert ("", 0) in first  # the loss
    assert len(set(first)) == len(first)
    codec.places.clear()
    gradients(model, saved)
    assert [(place.path, place.number) for place in codec.places] == first


def test_a_module_that_an_exception_left_does_not_go_on_speaking():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("x")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fails, self.linear = Fails(), nn.Linear(4, 4)

        def forward(self, x):
            try:
                self.fails(x)
            except KeyError:
                return self.linear(x * 2).exp()

    net, codec = Net(), Copy()
    saved = Saved(net)
    saved.register("it", codec, COMPRESS)
    with saved.forward():
        net(torch.ones(2, 4, requires_grad=True))
    assert [place.path for place in codec.places] == ["linear", ""]


def test_statistics_say_that_no_gradient_flows_through_them():
    model = TinyBlocks()
    saved, codec = Saved(model), Copy()
    saved.register("it", codec, COMPRESS)
    gradients(model, saved)
    of_norm = [place.needs_grad for place in codec.places if place.path == "norm"]
    assert of_norm == [True, False, False]  # input, mean, deviation


# Weights, views and shared storages


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_weight_is_ever_offered(autocast, frozen):
    model = TinyBlocks()
    if frozen:
        model.blocks[1].requires_grad_(False)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2} | {
        tuple(p.shape[::-1]) for p in model.parameters() if p.ndim == 2
    }
    offered = []

    def look(tensor, place):
        offered.append((tensor.untyped_storage().data_ptr() in weights, tuple(tensor.shape) in shapes, place))
        return True

    saved = Saved(model)
    saved.register("it", Copy(look), COMPRESS)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved.forward():
        model.loss(batch_of(model)).backward()
    assert offered
    assert not any(is_weight for is_weight, _, _ in offered)
    if not (autocast and frozen):  # nothing tells the cast of a frozen weight from other tensors without gradients
        assert not [place for _, like_one, place in offered if like_one]
    else:
        assert not [place for _, like_one, place in offered if like_one and place.needs_grad]


def test_one_storage_is_packed_once_and_counted_once():
    x = torch.randn(4, 6, requires_grad=True)
    saved, codec = Saved(nn.Identity()), Copy()
    saved.register("it", codec, COMPRESS)

    def run():
        y = x * 2
        return y.square().sum() + y.view(24).sin().sum() + y.t().cos().sum() + y.square().sum()

    (plain,) = torch.autograd.grad(run(), x)
    with saved.forward():
        out = run()
    (got,) = torch.autograd.grad(out, x)
    assert torch.equal(got, plain)
    assert codec.shapes == [(4, 6)]
    assert saved.counts.before == saved.counts.after["it"] == 4 * 6 * 4


def test_views_of_one_storage_are_right_whatever_order_in_memory_the_codec_gives_back():
    class Contiguous(Copy):
        def decode(self, parts, how):
            return parts[0].clone(memory_format=torch.contiguous_format)

    x = torch.randn(4, 6, requires_grad=True)
    saved, codec = Saved(nn.Identity()), Contiguous()
    saved.register("it", codec, COMPRESS)

    def run():
        y = x * 2
        return y.t().sin().sum() + y.cos().sum() + y.view(2, 12).square().sum()

    (plain,) = torch.autograd.grad(run(), x)
    with saved.forward():
        out = run()
    (got,) = torch.autograd.grad(out, x)
    assert torch.equal(got, plain)
    assert codec.shapes == [(6, 4)]


def test_views_that_lie_apart_are_packed_apart_and_a_transposed_one_keeps_its_order_in_memory():
    x = torch.randn(2, 5, 12, requires_grad=True)
    saved, codec = Saved(nn.Identity()), Copy()
    saved.register("it", codec, COMPRESS)

    def run():
        q, k, v = (x * 1).chunk(3, -1)
        return (q.square() + k.sin() * v.transpose(0, 1).contiguous().transpose(0, 1).cos()).sum()

    (plain,) = torch.autograd.grad(run(), x)
    with saved.forward():
        out = run()
    (got,) = torch.autograd.grad(out, x)
    assert torch.equal(got, plain)
    assert codec.shapes.count((2, 5, 4)) == len(codec.shapes)


def test_an_expanded_tensor_is_packed_at_the_size_that_it_takes():
    x = torch.randn(1, 6, requires_grad=True)
    saved, codec = Saved(nn.Identity()), Copy()
    saved.register("it", codec, COMPRESS)

    def run():
        return ((x * 2).expand(50, 6).square() * torch.arange(300.0).view(50, 6)).sum()

    (plain,) = torch.autograd.grad(run(), x)
    codec.shapes.clear()
    with saved.forward():
        out = run()
    (got,) = torch.autograd.grad(out, x)
    assert torch.equal(got, plain)
    assert (1, 6) in codec.shapes


def test_memory_that_was_given_back_and_taken_again_is_other_memory():
    saved, codec = Saved(nn.Identity()), Copy()
    saved.register("it", codec, COMPRESS)
    x = torch.randn(64, 64, requires_grad=True)
    with saved.forward():
        out = x
        for _ in range(8):  # each product dies once it is packed, and the next one lies where it lay
            out = (out * 1.5).sin()
    out.sum().backward()
    got = x.grad.clone()
    x.grad = None
    out = x
    for _ in range(8):
        out = (out * 1.5).sin()
    out.sum().backward()
    assert torch.equal(got, x.grad)


def test_a_tensor_that_was_changed_in_place_between_two_saves_is_packed_twice():
    x = torch.randn(3, requires_grad=True)
    saved, codec = Saved(nn.Identity()), Copy()
    saved.register("it", codec, COMPRESS)
    with saved.forward():
        y = x * 1
        a = y.detach().requires_grad_()
        first = a.sin().sum()
        with torch.no_grad():
            a.add_(1)
        second = a.sin().sum()
    (one,) = torch.autograd.grad(first, a)
    (two,) = torch.autograd.grad(second, a)
    assert torch.equal(one, (x * 1).cos())
    assert torch.equal(two, (x * 1 + 1).cos())


@pytest.mark.parametrize("codec", [Identity(), Copy(lambda *_: False)])
def test_what_is_changed_in_place_before_backward_is_refused_as_torch_does(codec):
    x = torch.randn(3, requires_grad=True)
    saved = Saved(nn.Identity())
    saved.register("it", codec, COMPRESS)
    with saved.forward():
        y = x * 2
        out = y.sin().sum()
        y.add_(1)
    with pytest.raises(SavedError, match=r"shape \(3,\) that backward needs was changed in place"):
        out.backward()


# Counting


def test_bytes_before_are_those_that_autograd_keeps_without_codecs():
    model = TinyBlocks(dropout=0.1)
    with measure.saved_bytes(model) as plain:
        model.loss(batch_of(model))
    saved = Saved(model)
    saved.register("it", Copy(lambda *_: False), COMPRESS)
    gradients(model, saved)
    assert saved.counts.before == plain["bytes"] == saved.counts.after[""]


def test_bytes_after_are_those_of_the_parts():
    saved = Saved(nn.Identity())
    saved.register("int8", Int8(), COMPRESS)
    x = torch.randn(16, 64, requires_grad=True)
    with saved.forward() as counts:
        (x * 1).sin()
    assert counts.before == 16 * 64 * 4
    assert counts.after == {"int8": 16 * 64 + 2 * 16 * 4}


# Beside others


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_of_a_recomputed_region_only_its_inputs_are_seen_and_only_exact_codecs_get_them(use_reentrant):
    class Net(TinyBlocks):
        def forward(self, x):
            x = self.embed(x) + self.position[: x.shape[1]]
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return self.head(self.norm(x))

    model = Net(dropout=0.1)
    saved, codec, lossy = Saved(model), Copy(), Int8()
    seen = []
    lossy.encode = lambda tensor, place, own=lossy.encode: seen.append(place) or own(tensor, place)
    saved.register("copy", codec, OFFLOAD)
    saved.register("int8", lossy, COMPRESS)
    got = gradients(model, saved)
    regions = [place for place in codec.places if place.begins_region]
    assert len(regions) == len(model.blocks)
    assert not any("blocks" in place.path for place in codec.places)
    assert seen
    assert not any(place.begins_region for place in seen)
    saved.remove("int8")
    assert_same_bits(gradients(model, saved), gradients(model))
    assert torch.equal(got["loss"], gradients(model)["loss"])


def test_backward_inside_the_block_packs_nothing():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(5, 4)
    saved, codec = Saved(net), Copy()
    saved.register("it", codec, COMPRESS)

    def penalized():
        loss = net(x).square().sum()
        before = len(codec.places)
        grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
        assert len(codec.places) == before
        return torch.autograd.grad(sum(g.square().sum() for g in grads), list(net.parameters()))

    plain = penalized()
    with saved.forward():
        got = penalized()
    assert codec.places
    assert_same_bits(got, plain)


def test_backward_may_ask_twice():
    x = torch.randn(5, requires_grad=True)
    saved = Saved(nn.Identity())
    saved.register("it", Copy(), COMPRESS)
    with saved.forward():
        out = (x * 2).sin().sum()
    out.backward(retain_graph=True)
    first = x.grad.clone()
    out.backward()
    assert torch.equal(x.grad, 2 * first)


@pytest.mark.parametrize("codec", [Copy, Int8])
def test_compiled_blocks_pack_what_they_save(codec):
    model, plain = TinyBlocks(layers=2), TinyBlocks(layers=2)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    saved, it = Saved(model), codec()
    places = []
    it.encode = lambda tensor, place, own=it.encode: places.append(place) or own(tensor, place)
    saved.register("it", it, COMPRESS)
    got, wanted = gradients(model, saved), gradients(plain)
    assert torch.equal(got["loss"], wanted["loss"])
    if codec is Copy:
        assert_same_bits(got, wanted)
    assert {"blocks.0", "blocks.1"} <= {place.path for place in places}


def test_a_compiled_model_packs_what_it_saves():
    model = TinyBlocks(layers=1)
    compiled = torch.compile(model, backend="aot_eager")
    saved, it = Saved(compiled), Copy()
    saved.register("it", it, COMPRESS)
    wanted = gradients(TinyBlocks(layers=1))
    with saved.forward():
        x, y = batch_of(model)
        loss = F.cross_entropy(compiled(x).flatten(0, -2), y.flatten())
    loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, wanted[name])
    assert it.places


def test_on_two_processes_under_ddp_gradients_have_the_same_bits():
    def work(rank):
        def grads(codec):
            model = TinyBlocks(dropout=0.1)
            ddp = nn.parallel.DistributedDataParallel(model)
            saved = Saved(ddp.module)
            if codec:
                saved.register("it", Copy(), COMPRESS)
            torch.manual_seed(rank)
            x, y = batch_of(model)
            with saved.forward():
                loss = F.cross_entropy(ddp(x + rank).flatten(0, -2), y.flatten())
            loss.backward()
            return [p.grad for p in model.parameters()]

        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        return all(torch.equal(a, b) for a, b in zip(grads(True), grads(False), strict=True))

    assert run_ranks(work, 2) == [True, True]


def test_on_two_processes_under_fsdp_no_weight_is_packed_and_gradients_have_the_same_bits():
    def work(rank):
        from torch.distributed.fsdp import fully_shard

        def grads(codec):
            model = TinyBlocks(dropout=0.1)
            model.blocks[2].requires_grad_(False)
            shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
            saved, it = Saved(model), Copy()
            if codec:
                saved.register("it", it, COMPRESS)
            torch.manual_seed(rank)
            x, y = batch_of(model)
            with saved.forward():
                loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            loss.backward()
            of_weights = [s for s in it.shapes if s in shapes and len(s) == 2]
            grads = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
            return grads, of_weights, it.shapes

        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        (got, of_weights, shapes), (wanted, *_) = grads(True), grads(False)
        return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), of_weights, bool(shapes)

    assert run_ranks(work, 2) == [(True, [], True)] * 2


# Nothing stays


def test_nothing_is_left_on_the_stack_after_an_exception():
    model, codec = TinyBlocks(), Copy()
    saved = Saved(model)
    saved.register("it", codec, COMPRESS)
    with pytest.raises(KeyError), saved.forward():
        raise KeyError
    before = len(codec.places)
    gradients(model)
    assert len(codec.places) == before
    assert_same_bits(gradients(model, saved), gradients(model))


@pytest.mark.parametrize("codec", [Identity(), Int8(), Copy(lambda *_: False)])
def test_what_was_saved_dies_with_the_graph_and_without_the_collector(codec):
    saved = Saved(nn.Identity())
    saved.register("it", codec, COMPRESS)
    x = torch.randn(8, 8, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with saved.forward():
            y = (x * 2).exp()  # saves its own output
            out = y.sum()
        memory = weakref.ref(y.untyped_storage())
        del y, out
        assert memory() is None
    finally:
        gc.enable()


def test_the_original_dies_once_it_is_packed():
    saved = Saved(nn.Identity())
    saved.register("it", Int8(), COMPRESS)
    x = torch.randn(8, 8, requires_grad=True)
    with saved.forward():
        y = x * 2
        out = y.sin()
        memory = weakref.ref(y.untyped_storage())
        del y
        assert memory() is None
    out.sum().backward()


def test_without_codecs_and_inside_another_block_nothing_is_pushed():
    saved = Saved(TinyBlocks())
    with saved.forward(), torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        pass  # entering it fails where hooks are on
    codec = Copy()
    saved.register("it", codec, COMPRESS)
    x = torch.randn(3, requires_grad=True)
    with saved.forward(), saved.forward():
        (x * 1).sin()
    assert codec.shapes == [(3,)]


def test_a_codec_that_gives_back_something_else_is_named():
    class Wrong(Copy):
        def decode(self, parts, how):
            return parts[0].double()

    saved = Saved(nn.Identity())
    saved.register("mine", Wrong(), COMPRESS)
    x = torch.randn(2, 3, requires_grad=True)
    with saved.forward():
        out = (x * 1).sin().sum()
    with pytest.raises(SavedError, match=r"'mine' took a tensor of shape \(2, 3\) and float32.*float64"):
        out.backward()


def test_what_a_block_saves_can_be_told_by_its_path():
    model = TinyBlocks()
    saved, codec = Saved(model), Copy(lambda tensor, place: place.path.startswith("blocks.1."))
    saved.register("it", codec, COMPRESS)
    gradients(model, saved)
    assert isinstance(model.blocks[1], Block)
    assert {place.path.split(".")[1] for place in codec.places} == {"1"}
