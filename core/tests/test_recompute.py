"""Recomputed regions: the same bits, what is kept, and what stays as it was."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from eke import EkeError, measure
from eke.seams import interceptor
from eke.seams.blocks import find_blocks
from eke.seams.recompute import RecomputeError, Region, recompute, recomputing, spans
from eke.seams.saved import OFFLOAD, Codec, Saved
from eke.testing import run_ranks
from eke.testing.models import SHAPES, TinyBlocks, TinyGPT2, TinyTransformer, hugging_face
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

WIDTH = 8


def batch_of(model, count=3):
    data = type(model).dataset(count)
    return tuple(torch.stack([torch.as_tensor(data[i][part]) for i in range(count)]) for part in range(2))


def gradients(model, autocast=False, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)  # dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(batch_of(model))
    loss.backward()
    after = torch.rand(1)
    return {"loss": loss.detach(), "random": after, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def assert_same_bits(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def blocks_of(model):
    return find_blocks(model).modules


class Block(nn.Module):
    """Residual; it counts its calls, and returns hidden states in a form to be chosen."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)
        self.form, self.calls = form, 0

    def forward(self, hidden_states, mask=None, *, scale=1.0):
        self.calls += 1
        inner = self.linear(self.norm(hidden_states)) * scale
        out = hidden_states + self.dropout(inner if mask is None else inner * mask)
        return {"tensor": out, "tuple": (out, None), "cache": (out, [1])}[self.form]


class Net(nn.Module):
    def __init__(self, depth=6, form="tensor", by_name=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block(form) for _ in range(depth))
        self.by_name = by_name
        self.look = None

    def forward(self, x, sides=None):
        for number, block in enumerate(self.blocks):
            mask, scale = sides[number] if sides else (None, 1.0)
            x = block(hidden_states=x, mask=mask, scale=scale) if self.by_name else block(x, mask, scale=scale)
            x = x[0] if isinstance(x, tuple) else x
            if self.look is not None:
                x = self.look(number, x)
        return x


def both(net, x, regions, *args, **options):
    """Output, gradients and random state: plain, then recomputed; and what was changed."""
    results = []
    for regions_ in (None, regions):
        done = None if regions_ is None else recompute(net.blocks, regions_, **options)
        for _ in range(2):  # the first pass learns the blocks' form
            net.zero_grad()
            x.grad = None
            torch.manual_seed(5)
            out = net(x, *args)
            (out.square().sum() if out.requires_grad else out).backward()
        grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        results.append([out.detach(), x.grad, torch.rand(1), *grads])
    done.undo()
    assert_same_bits(results[1], results[0])
    return done


@pytest.fixture
def x():
    return torch.randn(2, 5, WIDTH, requires_grad=True)


KINDS = [{"length": 1}, {"length": 1, "every": 2}, {"length": 2}, {"length": 3, "every": 2}, {"length": 4}]


# The same bits


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_have_the_bits_of_a_plain_run_with_dropout(shape, autocast, kind):
    if shape is TinyGPT2:
        pytest.importorskip("transformers")
    model = shape(dropout=0.1)
    wanted = gradients(model, autocast)
    recompute(blocks_of(model), spans(4, **kind), model=model)
    for _ in range(2):  # the first pass learns the blocks' form
        assert_same_bits(gradients(model, autocast), wanted)


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
@pytest.mark.parametrize("length", [1, 2])
def test_they_do_in_hugging_face_models(kind, length):
    pytest.importorskip("transformers")
    model = hugging_face(kind, dropout=0.1)
    given = {"pixel_values": torch.randn(2, 3, 8, 8)} if kind == "vit" else {"input_ids": torch.arange(12).view(2, 6)}

    def grads():
        model.zero_grad()
        torch.manual_seed(3)
        model(**given)[0].square().sum().backward()
        return [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    wanted = grads()
    done = recompute(blocks_of(model), spans(4, length), model=model)
    assert_same_bits(grads(), wanted)
    assert_same_bits(grads(), wanted)
    assert done.cuts == set()


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_block_of_a_region_gets_its_own_side_inputs(x, kind, form, by_name):
    net = Net(form=form, by_name=by_name)
    sides = [(torch.rand(1, 5, 1), 1.0 + number) for number in range(6)]
    done = both(net, x, spans(6, **kind), sides)
    assert done.cuts == set()


def test_side_inputs_get_their_gradients(x):
    net, masks = Net(), [torch.rand(1, 5, 1, requires_grad=True) for _ in range(6)]
    found = []
    for regions in (None, spans(6, 3)):
        if regions:
            recompute(net.blocks, regions)
            net(x)  # learns the blocks' form
        torch.manual_seed(5)
        found.append(torch.autograd.grad(net(x, [(mask, 1.0) for mask in masks]).square().sum(), masks))
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("length", [1, 3])
def test_inputs_without_gradients_let_train_what_trains(x, length):
    net, frozen = Net(), torch.randn(2, 5, WIDTH)
    for block in net.blocks:
        block.norm.requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    found = []
    for regions in (None, spans(6, length)):
        if regions:
            recompute(net.blocks, regions)
            net(x)
        net.zero_grad()
        torch.manual_seed(5)
        net(frozen).square().sum().backward()
        found.append([p.grad for p in net.parameters() if p.requires_grad])
    assert len(found[1]) == 10
    assert_same_bits(found[1], found[0])


# What is kept and what it costs


def kept(net, x):
    with measure.saved_bytes(net) as held:
        net(x).square()
    return held["bytes"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_region_keeps_its_input_and_nothing_else(kind):
    net, x = Net(), torch.randn(2, 5, WIDTH, requires_grad=True)
    block = (kept(net, x) - x.nbytes) / 6  # each keeps its own, and the end its input
    regions = spans(6, **kind)
    recompute(net.blocks, regions)
    net(x)
    outside = 6 - sum(map(len, regions))
    assert kept(net, x) == x.nbytes + len(regions) * x.nbytes + outside * block


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_block_of_a_region_runs_twice_and_the_others_once(kind):
    net, x = Net(), torch.randn(2, 5, WIDTH, requires_grad=True)
    regions = spans(6, **kind)
    recompute(net.blocks, regions)
    net(x).sum().backward()
    for block in net.blocks:
        block.calls = 0
    net(x).sum().backward()
    inside = {number for region in regions for number in range(region.start, region.stop)}
    assert [block.calls for block in net.blocks] == [1 + (number in inside) for number in range(6)]


def test_inner_regions_are_recomputed_within_the_outer_one(x):
    net = Net()
    plan = [Region(0, 4, (Region(0, 2), Region(2, 3))), Region(5, 6)]
    both(net, x, plan)
    recompute(net.blocks, plan)
    net(x)
    for block in net.blocks:
        block.calls = 0
    net(x).sum().backward()
    # The outer region is run again with the inner ones as regions: their blocks a third time.
    assert [block.calls for block in net.blocks] == [3, 3, 3, 2, 1, 2]


def test_without_gradients_blocks_run_once_and_at_once(x):
    net = Net()
    recompute(net.blocks, spans(6, 3))
    with torch.no_grad():
        net(x)
    assert [block.calls for block in net.blocks] == [1] * 6


def test_nothing_is_alive_once_backward_is_through(x):
    net, seen = Net(), []
    recompute(net.blocks, spans(6, 3))
    net(x)
    net.look = lambda number, x: seen.append(weakref.ref(x)) or x
    gc.collect()
    gc.disable()
    try:
        net(x).sum().backward()
        assert [one() for one in seen] == [None] * 6
    finally:
        gc.enable()


# Operators kept


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("by", ["list", "function"])
def test_operators_that_a_policy_keeps_run_once(length, by):
    def policy(context, operator, *args, **kwargs):
        keep = operator == torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    model = TinyBlocks()
    wanted = gradients(model)
    keep = [torch.ops.aten.addmm.default] if by == "list" else policy
    plain, all_of_it, selected = (count_operators(TinyBlocks(), length, it) for it in ("plain", None, keep))
    assert plain["aten.addmm.default"] == selected["aten.addmm.default"] < all_of_it["aten.addmm.default"]
    assert plain["aten.native_layer_norm.default"] < selected["aten.native_layer_norm.default"]
    recompute(model.blocks, spans(4, length), policy=keep)
    gradients(model)
    assert_same_bits(gradients(model), wanted)


def test_a_policy_that_counts_begins_anew_in_each_region():
    begun = []

    class Third:
        def begin(self):
            begun.append(counts := {False: 0, True: 0})

            def policy(context, operator, *args, **kwargs):
                if operator != torch.ops.aten.addmm.default:
                    return CheckpointPolicy.PREFER_RECOMPUTE
                counts[context.is_recompute] += 1
                third = counts[context.is_recompute] % 3 == 0
                return CheckpointPolicy.MUST_SAVE if third else CheckpointPolicy.PREFER_RECOMPUTE

            return policy

    model = TinyBlocks(dropout=0.1)
    wanted = gradients(model)
    recompute(model.blocks, policy=Third())
    assert_same_bits(gradients(model), wanted)
    assert len(begun) == 4
    assert all(counts[False] == 4 for counts in begun)  # qkv, proj, fc1, fc2


def count_operators(model, length, policy):
    if policy != "plain":
        recompute(model.blocks, spans(4, length), policy=policy)
    gradients(model)
    with measure.OperatorCounter() as counter:
        gradients(model)
    return counter.counts


# Hidden states that somebody looks at


def test_a_model_that_works_on_hidden_states_between_blocks_cuts_the_region(x):
    net = Net()
    net.look = lambda number, x: x * 1.5 if number == 1 else x
    done = both(net, x, spans(6, 3))
    assert done.cuts == {1}


def test_looking_without_gradients_computes_them_with_gradients(x):
    net, seen = Net(), []

    @torch.no_grad()
    def look(number, x):
        seen.append(float(x.norm()))
        return x

    net.look = look
    done = both(net, x, spans(6, 3))
    assert done.cuts == {0, 1, 3, 4}
    assert seen[-6:] == seen[:6]


def test_hidden_states_that_were_passed_by_are_refused_in_words(x):
    net, collected = Net(), []
    net.look = lambda number, x: collected.append(x) or x
    recompute(net.blocks, spans(6, 3))
    net(x)
    collected.clear()
    net(x)
    assert torch.equal(collected[2] + 0, collected[2])
    with pytest.raises(RecomputeError, match="looked, after a later block had run.*regions of one block"):
        collected[1] + 0


def test_a_custom_function_between_blocks_is_refused_and_not_wrong(x):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    net = Net()
    recompute(net.blocks, spans(6, 3))
    net(x)
    net.look = lambda number, x: Twice.apply(x) if number == 1 else x
    with pytest.raises(RecomputeError, match="A custom autograd function took hidden states"):
        net(x).sum().backward()


def test_blocks_that_return_more_than_hidden_states_are_regions_of_one(x):
    done = both(Net(form="cache"), x, spans(6, 3))
    assert {0, 1, 3, 4} <= done.cuts


def test_each_block_keeps_the_autocast_under_which_it_was_called(x):
    class Mixed(Net):
        def forward(self, x):
            for number, block in enumerate(self.blocks):
                with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0):
                    x = block(x)
            return x

    both(Mixed(), x, spans(6, 3))


def test_a_list_that_is_run_twice_is_two_regions(x):
    class Shared(Net):
        def forward(self, x):
            return super().forward(super().forward(x))

    both(Shared(), x, [Region(0, 3), Region(3, 5)])


# With the block interceptor


class Chosen:
    """Draws the tokens that take part from a generator of its own: another draw would be another choice."""

    def __init__(self):
        self.calls = 0

    def __call__(self, hidden):
        self.calls += 1
        return torch.randperm(hidden.shape[1], generator=torch.Generator().manual_seed(self.calls))[:3].sort().values


@pytest.mark.parametrize("length", [1, 3])
def test_tokens_are_chosen_once_outside_of_the_region(x, length):
    found = []
    for regions in ([], spans(6, length)):
        net, chosen = Net(), Chosen()
        interceptor.attach(net.blocks, "test")
        recompute(net.blocks, regions)
        net(x)
        interceptor.put(net.blocks[1], "test", interceptor.Select(chosen))
        torch.manual_seed(5)
        out = net(x)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
        assert chosen.calls == 1
    assert_same_bits(found[1], found[0])


@pytest.mark.parametrize("skipped", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_skipped_block_leaves_a_region_and_does_not_cut_it(x, length, skipped):
    net = Net()
    interceptor.attach(net.blocks, "test")
    net(x)
    interceptor.put(net.blocks[skipped], "test", interceptor.Skip())
    done = both(net, x, spans(6, length))
    assert done.cuts <= {skipped - 1}  # the last of a region was to compute it


def test_an_action_that_changes_what_a_block_adds_sees_true_hidden_states(x):
    class Half:
        priority = 0

        def __call__(self, call_next, hidden, args, kwargs, form):
            added = 0.5 * call_next(hidden, args, kwargs)
            return added + hidden

    net = Net()
    interceptor.attach(net.blocks, "test")
    interceptor.put(net.blocks[1], "test", Half())
    both(net, x, spans(6, 3))


# Models that recompute by themselves


def own(model, how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newest version has another name for it
        model.gradient_checkpointing_enable(how)


def calls_of(model):
    counts = []
    for block in blocks_of(model):
        block.norm_ = next(m for m in block.modules() if isinstance(m, nn.LayerNorm))
        block.norm_.register_forward_hook(lambda *_: counts.append(1))
    return counts


@pytest.mark.parametrize("length", [1, 2])
def test_hugging_faces_own_recomputing_is_taken_over_and_given_back(length):
    pytest.importorskip("transformers")
    model = TinyGPT2(dropout=0.1)
    wanted = gradients(model)
    own(model.model, {"use_reentrant": False})
    done = recompute(blocks_of(model), spans(4, length), model=model)
    assert {type(module).__name__ for module, _ in done.taken_over} >= {"GPT2Block"}
    gradients(model)
    counts = calls_of(model)
    assert_same_bits(gradients(model), wanted)
    assert len(counts) == 8
    done.undo()
    assert all(block.gradient_checkpointing for block in blocks_of(model))
    counts.clear()
    assert_same_bits(gradients(model), wanted)
    assert len(counts) == 8


def test_hugging_faces_own_recomputing_is_left_alone_where_that_is_asked_for():
    pytest.importorskip("transformers")
    model = TinyGPT2()
    own(model.model, {"use_reentrant": False})
    done = recompute(blocks_of(model), model=model, own="leave")
    assert set(done.left) == {"gradient_checkpointing"}
    assert not done.taken_over
    assert not any("forward" in vars(block) for block in blocks_of(model))


@pytest.mark.parametrize("length", [1, 3])
def test_a_model_that_calls_checkpoint_in_its_forward_is_not_recomputed_twice(x, length):
    class Own(Net):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    net = Own()
    both(net, x, spans(6, length))
    recompute(net.blocks, spans(6, length))
    net(x)
    for block in net.blocks:
        block.calls = 0
    net(x).sum().backward()
    assert [block.calls for block in net.blocks] == [2] * 6


@pytest.mark.parametrize("length", [1, 2])
def test_a_cache_of_keys_and_values_is_left_out_with_a_warning(length):
    pytest.importorskip("transformers")
    model = TinyGPT2(dropout=0.1)
    wanted = gradients(model)
    model.model.config.use_cache = True
    recompute(blocks_of(model), spans(4, length), model=model)
    with pytest.warns(UserWarning, match="GPT2Block gets a cache of keys and values.*use_cache = False"):
        assert_same_bits(gradients(model), wanted)


def test_batch_statistics_move_once_and_code_can_ask_whether_it_runs_again():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.again = nn.BatchNorm1d(WIDTH), []

        def forward(self, x):
            self.again.append(recomputing())
            return x + self.norm(x)

    found = []
    for length in (None, 1, 2):
        torch.manual_seed(0)
        net = nn.Sequential(Normed(), Normed())
        x = torch.randn(16, WIDTH, requires_grad=True)
        if length:
            recompute(list(net), spans(2, length))
        for _ in range(3):
            net(x).square().sum().backward()
        found.append([*net.state_dict().values(), *(p.grad for p in net.parameters())])
        if length:
            assert net[0].again == [False, True] * 3
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])


# Beside others


def test_what_packs_saved_tensors_sees_the_inputs_of_a_region():
    class Copy(Codec):
        exact, integers = True, True

        def __init__(self):
            self.places = []

        def encode(self, tensor, place):
            self.places.append(place)
            return (tensor.clone(),), None

        def decode(self, parts, how):
            return parts[0]

    for length in (1, 2):
        model = TinyTransformer(dropout=0.1)  # whose blocks get a mask by name
        wanted = gradients(model)
        recompute(blocks_of(model), spans(4, length))
        gradients(model)
        saved, codec = Saved(model), Copy()
        saved.register("it", codec, OFFLOAD)
        model.zero_grad()
        torch.manual_seed(3)
        with saved.forward():
            loss = model.loss(batch_of(model))
        loss.backward()
        regions = [place for place in codec.places if place.begins_region]
        assert len(regions) == 4 // length + 1  # hidden states, and once the mask
        for name, p in model.named_parameters():
            assert torch.equal(p.grad, wanted[name])


@pytest.mark.parametrize("first", ["compile", "recompute"])
@pytest.mark.parametrize("length", [1, 2])
def test_blocks_that_are_compiled_one_by_one_compute_the_same(length, first):
    wanted = gradients(TinyBlocks(layers=2))
    model = TinyBlocks(layers=2)
    if first == "recompute":
        recompute(model.blocks, spans(2, length))
    for block in model.blocks:
        block.compile(backend="aot_eager")
    if first == "compile":
        recompute(model.blocks, spans(2, length))
    for _ in range(2):
        assert_same_bits(gradients(model), wanted)


@pytest.mark.parametrize("length", [1, 2])
def test_a_model_that_is_compiled_as_a_whole_computes_the_same(length):
    wanted = gradients(TinyBlocks(layers=2))
    model = TinyBlocks(layers=2)
    recompute(model.blocks, spans(2, length))
    compiled = torch.compile(model, backend="aot_eager")
    x, y = batch_of(model)
    F.cross_entropy(compiled(x).flatten(0, -2), y.flatten()).backward()
    assert_same_bits(
        {n: p.grad for n, p in model.named_parameters()}, {n: wanted[n] for n, _ in model.named_parameters()}
    )


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("length", [1, 2])
def test_on_two_processes_gradients_have_the_same_bits(how, length):
    def work(rank):
        from torch.distributed.fsdp import fully_shard

        def grads(regions):
            model = TinyBlocks(dropout=0.1)
            done = recompute(model.blocks, regions)
            if how == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(model)
            else:
                wrapped = model
                for block in model.blocks:
                    fully_shard(block)
                fully_shard(model)
            for _ in range(2):
                model.zero_grad()
                torch.manual_seed(rank)
                x, y = batch_of(model)
                F.cross_entropy(wrapped(x + rank).flatten(0, -2), y.flatten()).backward()
            done.undo()
            return [p.grad.full_tensor() if how == "fsdp" else p.grad for p in model.parameters()]

        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        return all(torch.equal(a, b) for a, b in zip(grads(spans(4, length)), grads([]), strict=True))

    assert run_ranks(work, 2) == [True, True]


# What stays as it was


@pytest.mark.parametrize("length", [1, 2])
def test_keys_classes_and_undoing(length):
    model = TinyBlocks()
    before, keys = [(type(b), set(vars(b))) for b in model.blocks], list(model.state_dict())
    done = recompute(model.blocks, spans(4, length))
    assert list(model.state_dict()) == keys
    assert all(isinstance(block, before[0][0]) for block in model.blocks)
    done.undo()
    done.undo()
    assert [(type(b), set(vars(b))) for b in model.blocks] == before


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), pickled])
@pytest.mark.parametrize("length", [1, 2])
def test_a_copy_computes_with_its_own_weights(length, duplicate):
    net = Net(depth=4)
    recompute(net.blocks, spans(4, length), policy=[torch.ops.aten.mm.default])
    x = torch.randn(2, 5, WIDTH, requires_grad=True)
    net(x)
    twin = duplicate(net).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    plain = Net(depth=4).eval()
    plain.load_state_dict(twin.state_dict())
    out = twin(x)
    assert torch.equal(out, plain(x))
    assert not torch.equal(out, x)
    out.sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("length", [1, 2])
def test_a_block_that_fails_leaves_the_next_pass_right(x, length):
    net = Net()
    recompute(net.blocks, spans(6, length))
    net(x)

    def fail(number, x):
        raise KeyError

    net.look = fail
    with pytest.raises(KeyError):
        net(x)
    net.look = None
    torch.manual_seed(5)
    out = net(x)
    torch.manual_seed(5)
    assert torch.equal(out, Net()(x))


# Refusals


def test_regions_that_make_no_sense_are_refused():
    net = Net()
    for make, words in (
        (lambda: Region(2, 2), "from block 2 to before 2 holds none"),
        (lambda: Region(0, 4, (Region(2, 5),)), "from block 2 to before 5 overlaps .* beyond the 4 blocks"),
        (lambda: spans(4, 0), "length=0: 1 or more"),
        (lambda: spans(4, 1, 0), "every=0: 1 or more"),
        (lambda: recompute(net.blocks, [Region(0, 2), Region(1, 3)]), "from block 1 to before 3 overlaps"),
        (lambda: recompute(net.blocks, [Region(4, 7)]), "beyond the 6 blocks"),
    ):
        with pytest.raises(EkeError, match=words):
            make()


@pytest.mark.parametrize("length", [1, 2])
def test_blocks_are_not_recomputed_by_two_techniques(length):
    net = Net()
    recompute(net.blocks, spans(6, length), owner="zero")
    with pytest.raises(RecomputeError, match="Block 0, a Block, is recomputed already, by"):
        recompute(net.blocks, owner="remat")


def test_torchs_wrapper_is_named():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    blocks = [checkpoint_wrapper(Block()), checkpoint_wrapper(Block())]
    with pytest.raises(RecomputeError, match="by torch's checkpoint_wrapper"):
        recompute(blocks)


def test_it_says_nothing_where_there_is_nothing_to_say(x):
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(net, x, spans(6, 2))
