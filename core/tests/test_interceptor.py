"""The block interceptor: what it does to the numbers, and what it leaves as it was."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from eke.seams import interceptor
from eke.seams.blocks import find_all_blocks, find_blocks
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class Block(nn.Module):
    """Residual; ``form`` says what else it returns."""

    def __init__(self, form="tensor"):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.form = form
        self.calls = 0

    def forward(self, hidden_states, mask=None):
        self.calls += 1
        out = hidden_states + self.dropout(self.linear(self.norm(hidden_states)))
        return {"tensor": out, "tuple": (out, None), "cache": (out, [1]), "dict": {"out": out}}[self.form]


class Net(nn.Module):
    def __init__(self, depth=4, form="tensor"):
        super().__init__()
        self.blocks = nn.ModuleList(Block(form) for _ in range(depth))

    def forward(self, x, by_name=False):
        for block in self.blocks:
            x = block(hidden_states=x) if by_name else block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


@pytest.fixture
def x():
    return torch.randn(2, 5, WIDTH)


def close(blocks, owner="test"):
    interceptor.attach(blocks, owner)
    for block in blocks:
        interceptor.put(block, owner, interceptor.Skip())


def skip_upper(net, depth=2, owner="test"):
    interceptor.attach(net.blocks, owner)
    for block in net.blocks[depth:]:
        interceptor.put(block, owner, interceptor.Skip())


@pytest.mark.parametrize("training", [True, False])
def test_an_interceptor_without_actions_changes_no_bit(x, training):
    net = Net().train(training)
    torch.manual_seed(0)
    plain = net(x)
    interceptor.attach(net.blocks, "test")
    torch.manual_seed(0)
    assert torch.equal(net(x), plain)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("form", ["tensor", "tuple"])
@pytest.mark.parametrize("training", [True, False])
def test_skipped_blocks_are_as_if_they_were_not_there(x, form, training, by_name):
    net = Net(4, form).train(training)
    skip_upper(net)
    shallow = copy.deepcopy(net)
    interceptor.detach(list(shallow.blocks), "test")
    del shallow.blocks[2:]
    torch.manual_seed(0)
    skipped = net(x, by_name)
    torch.manual_seed(0)
    assert torch.equal(skipped, shallow(x))
    assert [block.calls for block in net.blocks] == [1, 1, 0, 0]
    skipped.sum().backward()
    assert all(parameter.grad is None for block in net.blocks[2:] for parameter in block.parameters())


def test_a_skipped_tuple_keeps_its_length():
    net = Net(3, "tuple")
    skip_upper(net, 1)
    net(torch.randn(1, 2, WIDTH))
    assert net.blocks[2](torch.ones(1, 2, WIDTH))[1:] == (None,)


def test_a_tuple_that_carries_a_cache_cannot_be_skipped(x):
    net = Net(3, "cache")
    skip_upper(net)
    with pytest.raises(RuntimeError, match=r"return \(Tensor, list\): a skipped block has no cache.*use_cache=False"):
        net(x)


def test_a_block_that_returns_something_else_cannot_be_skipped(x):
    blocks = nn.ModuleList([Block("dict"), Block("dict")])
    interceptor.attach(blocks, "test")
    interceptor.put(blocks[1], "test", interceptor.Skip())
    blocks[0](x)
    with pytest.raises(RuntimeError, match="neither a tensor nor a tuple"):
        blocks[1](x)


def test_the_first_block_of_a_fresh_model_runs_once_for_its_form_alone(x):
    net = Net(2, "tuple").train()
    close(net.blocks)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    x.requires_grad_()
    assert torch.equal(net(x), x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [block.calls for block in net.blocks] == [1, 0]
    net(x).sum().backward()
    assert [block.calls for block in net.blocks] == [1, 0]
    assert all(parameter.grad is None for parameter in net.blocks.parameters())
    with pytest.raises(RuntimeError, match="Keep the first block open"):
        interceptor.Form().wrap(x)


class Handing(nn.Module):
    """As T5's: the first makes a bias, the others hand it on; a second one too, by name; and attention maps if told."""

    def __init__(self, first=False, maps=False):
        super().__init__()
        self.first, self.maps, self.linear = first, maps, nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden, bias=None, other=None):
        if self.first and bias is None:
            bias, other = hidden.new_ones(1), hidden.new_ones(2)
        return self.linear(hidden) * bias, bias, other, *([hidden] if self.maps else [])


def run_handing(blocks, x):
    bias = other = None
    for block in blocks:
        x, bias, other, *_ = block(x, bias, other=other)
    return x


@pytest.mark.parametrize("skipped", [[1], [2], [1, 2], [1, 2, 3]])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_skipped_block_hands_on_what_it_got(x, skipped, reentrant):
    blocks = nn.ModuleList(Handing(first=i == 0) for i in range(4))
    plain = run_handing([block for i, block in enumerate(blocks) if i not in skipped], x)
    if reentrant:
        for block in blocks:
            block.forward = partial(recomputed, block.forward)
    interceptor.attach(blocks, "test")
    for i in skipped:
        interceptor.put(blocks[i], "test", interceptor.Skip())
    assert torch.equal(run_handing(blocks, x.requires_grad_()), plain)


def recomputed(forward, hidden, bias, other):
    # by place: reentrant checkpointing knows tensors by place alone
    return checkpoint(forward, hidden, bias, other, use_reentrant=True)


def test_a_block_that_makes_what_the_others_hand_on_cannot_be_skipped_and_maps_cannot_be_made_up(x):
    blocks = nn.ModuleList(Handing(first=i == 0) for i in range(3))
    interceptor.attach(blocks, "test")
    run_handing(blocks, x)
    interceptor.put(blocks[0], "test", interceptor.Skip())
    with pytest.raises(RuntimeError, match="makes what the later ones hand on.*neither skipped nor.*Keep it open"):
        run_handing(blocks, x)
    interceptor.put(blocks[0], "test")
    blocks[1].maps = blocks[2].maps = True
    interceptor.put(blocks[2], "test", interceptor.Skip())
    with pytest.raises(RuntimeError, match=r"return \(Tensor, Tensor\).*no attention maps.*output_attentions=False"):
        run_handing(blocks, x)


def test_a_list_whose_modules_nobody_calls_is_refused():
    parts = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))
    with pytest.raises(interceptor.InterceptorError, match="A block is a ModuleList, whose parts the model calls"):
        interceptor.attach(parts, "test")


def test_several_lists_are_held_as_one_and_each_has_a_form_of_its_own(x):
    nets = nn.ModuleDict({"one": Net(3), "two": Net(4, "tuple")}).eval()
    plain = copy.deepcopy(nets)
    for net in plain.values():
        del net.blocks[1:-1]
    held = interceptor.InterceptedBlocks("test", find_all_blocks(nets), slice(1, -1))
    assert [len(one) for one in held.lists()] == [1, 2]
    assert held.now() == [nets["one"].blocks[1], nets["two"].blocks[1], nets["two"].blocks[2]]
    for block in held.now():
        held.put(block, interceptor.Skip())
    assert all(torch.equal(nets[name](x), plain[name](x)) for name in nets)
    nets["one"].blocks.insert(1, copy.deepcopy(plain["one"].blocks[0]))
    assert [len(one) for one in held.lists()] == [2, 2]
    held.detach()
    assert all(type(block) is Block for net in nets.values() for block in net.blocks)


def test_the_model_looks_as_before(x):
    net = Net()
    keys, printed, modules = list(net.state_dict()), repr(net), len(list(net.modules()))
    skip_upper(net)
    assert list(net.state_dict()) == keys
    assert repr(net) == printed
    assert len(list(net.modules())) == modules
    assert all(isinstance(block, Block) for block in net.blocks)


def test_taken_off_the_class_is_the_very_same(x):
    net = Net()
    before = [dict(vars(block)) for block in net.blocks]
    skip_upper(net)
    interceptor.detach(list(net.blocks), "test")
    interceptor.detach(list(net.blocks), "test")
    assert all(type(block) is Block for block in net.blocks)
    assert [vars(block).keys() for block in net.blocks] == [one.keys() for one in before]
    net(x)
    assert [block.calls for block in net.blocks] == [1] * 4


def test_attaching_and_closing_twice_is_once(x):
    net = Net()
    skip_upper(net)
    skip_upper(net)
    assert len(interceptor.actions(net.blocks[3])) == 1
    assert type(net.blocks[3]).__mro__.count(interceptor.InterceptedBlock) == 1
    interceptor.put(net.blocks[3], "test")
    interceptor.put(net.blocks[3], "test")
    assert interceptor.actions(net.blocks[3]) == ()


def test_a_deep_copy_has_an_interceptor_and_weights_of_its_own(x):
    net = Net().eval()
    skip_upper(net)
    twin = copy.deepcopy(net)
    for block in twin.blocks:
        interceptor.put(block, "test")
        nn.init.ones_(block.linear.weight)
    twin(x)
    net(x)
    assert [block.calls for block in twin.blocks] == [1] * 4
    assert [block.calls for block in net.blocks] == [1, 1, 0, 0]
    assert not torch.equal(net.blocks[0].linear.weight, twin.blocks[0].linear.weight)


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_skipped_block_survives_pickling(x, protocol):
    net = Net().eval()
    skip_upper(net)
    twin = pickle.loads(pickle.dumps(net, protocol))
    assert torch.equal(twin(x), net(x))
    assert [block.calls for block in twin.blocks] == [1, 1, 0, 0]
    interceptor.detach(list(twin.blocks), "test")
    assert type(twin.blocks[0]) is Block
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), net(x))


def test_blocks_of_which_some_are_intercepted_are_found_as_before():
    net = Net()
    net.attention = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
    interceptor.attach(net.blocks[1:3], "test")
    assert find_blocks(net).modules == list(net.blocks)


def test_checkpointed_blocks_recompute_the_same_bits(x):
    def run(net, blocks):
        torch.manual_seed(0)
        out = x
        for block in blocks:
            out = checkpoint(block, out, use_reentrant=False)
        out.sum().backward()
        return [parameter.grad for parameter in net.parameters()]

    net = Net()
    plain = run(net, net.blocks[:2])
    net.zero_grad()
    skip_upper(net)
    intercepted = run(net, net.blocks)
    assert all(
        one is other if one is None else torch.equal(one, other) for one, other in zip(plain, intercepted, strict=True)
    )


def test_a_forward_that_somebody_replaced_on_the_instance_is_intercepted_too(x):
    net = Net()
    for block in net.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    skip_upper(net)
    net(x)
    assert [block.calls for block in net.blocks] == [1, 1, 0, 0]


def test_two_owners_share_one_interceptor_in_order_of_priority(x):
    seen = []

    class Note:
        def __init__(self, name, priority):
            self.name, self.priority = name, priority

        def __call__(self, call_next, hidden, args, kwargs, form):
            seen.append(self.name)
            return call_next(hidden, args, kwargs)

    net = Net(2)
    interceptor.attach(net.blocks, "one")
    interceptor.attach(net.blocks, "two")
    interceptor.put(net.blocks[1], "one", Note("inner", 2))
    interceptor.put(net.blocks[1], "two", Note("outer", 1), Note("first", 0))
    net(x)
    assert seen == ["first", "outer", "inner"]
    interceptor.put(net.blocks[1], "two", interceptor.Skip())
    net(x)
    assert seen == ["first", "outer", "inner"]  # an action that skips lets nobody through
    interceptor.detach(list(net.blocks), "two")
    assert [one.name for one in interceptor.actions(net.blocks[1])] == ["inner"]
    interceptor.detach(list(net.blocks), "one")
    assert type(net.blocks[1]) is Block


def test_a_block_computed_again_meets_the_actions_of_its_forward_whatever_was_taken_off_since(x):
    class Again:
        priority = 1

        def __call__(self, call_next, hidden, args, kwargs, form):
            self.compute = partial(call_next, hidden, args, kwargs)
            return call_next(hidden, args, kwargs)

    class Double:
        def __init__(self, priority):
            self.priority = priority

        def __call__(self, call_next, hidden, args, kwargs, form):
            return call_next(2 * hidden, args, kwargs)

    net, again = Net(1).eval(), Again()
    interceptor.attach(net.blocks, "test")
    interceptor.put(net.blocks[0], "test", Double(0), again, Double(2))
    first = net(x)
    interceptor.put(net.blocks[0], "test")
    assert torch.equal(again.compute(), first)


def test_who_has_not_attached_cannot_put_anything():
    with pytest.raises(KeyError, match="'test' has no interceptor on this Block. Call attach first"):
        interceptor.put(Block(), "test", interceptor.Skip())


class Fixed:
    def __init__(self, positions):
        self.positions = positions

    def __call__(self, hidden):
        return self.positions


@pytest.mark.parametrize("positions", [torch.tensor([1, 3]), torch.tensor([[0, 3], [1, 4]])])
@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_a_block_run_on_some_tokens_changes_those_and_no_other(x, positions, form):
    net = Net(1, form).eval()
    plain = net(x)
    interceptor.attach(net.blocks, "test")
    interceptor.put(net.blocks[0], "test", interceptor.Select(Fixed(positions)))
    got = net(x)
    rows = positions.expand(2, -1)
    for row in range(2):
        for token in range(5):
            if token in rows[row]:  # some processors multiply fewer rows in another order
                torch.testing.assert_close(got[row, token], plain[row, token])
            else:
                assert torch.equal(got[row, token], x[row, token])
    interceptor.put(net.blocks[0], "test", interceptor.Select(Fixed(None)))
    assert torch.equal(net(x), plain)


def test_tokens_first_in_the_batch_order_can_be_chosen_too(x):
    block = Block().eval()
    plain = block(x)
    interceptor.attach([block], "test")
    interceptor.put(block, "test", interceptor.Select(Fixed(torch.tensor([1])), dim=0))
    got = block(x)
    assert torch.equal(got[0], x[0])
    torch.testing.assert_close(got[1], plain[1])  # fewer rows may be multiplied in another order


def test_inputs_with_an_entry_a_token_are_refused_unless_somebody_cuts_them(x):
    block = Block().eval()
    interceptor.attach([block], "test")
    interceptor.put(block, "test", interceptor.Select(Fixed(torch.tensor([1, 3]))))
    with pytest.raises(RuntimeError, match=r"also gets mask of shape \(2, 5\), one entry a token"):
        block(x, mask=torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="also gets argument 1"):
        block(x, (torch.ones(5, 3),))
    block(x, mask=torch.ones(2, 4))

    def side(args, kwargs, positions):
        return args, {"mask": kwargs["mask"][:, positions]}

    interceptor.put(block, "test", interceptor.Select(Fixed(torch.tensor([1, 3])), side))
    block(x, mask=torch.ones(2, 5))


def test_tokens_can_be_put_in_replaced_and_taken_out(x):
    prompt = torch.randn(2, WIDTH)
    longer = interceptor.insert_tokens(x, prompt, at=1)
    assert torch.equal(longer, torch.cat([x[:, :1], prompt.expand(2, -1, -1), x[:, 1:]], 1))
    assert torch.equal(
        interceptor.replace_tokens(longer, torch.zeros(2, WIDTH), at=1)[:, 1:3], torch.zeros(2, 2, WIDTH)
    )
    assert torch.equal(interceptor.replace_tokens(longer, torch.zeros(2, WIDTH), at=1)[:, 3:], x[:, 1:])
    net = Net(1, "tuple").eval()
    interceptor.attach(net.blocks, "test")
    before = partial(interceptor.insert_tokens, tokens=prompt)
    interceptor.put(net.blocks[0], "test", interceptor.Edit(before=before))
    assert net(x).shape == (2, 7, WIDTH)
    interceptor.put(
        net.blocks[0], "test", interceptor.Edit(before=before, after=partial(torch.narrow, dim=1, start=2, length=5))
    )
    with_prompt = net(x)
    interceptor.put(net.blocks[0], "test")
    assert torch.equal(with_prompt, net(x))  # a block without attention does not see the prompt


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_it_holds_on_the_fast_paths_of_the_torch_encoder(x, padding, training):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4).train(training)
    mask = torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]]) if padding else None
    shallow = copy.deepcopy(encoder)
    del shallow.layers[2:]
    interceptor.attach(encoder.layers, "test")
    for block in encoder.layers[2:]:
        interceptor.put(block, "test", interceptor.Skip())
    with torch.set_grad_enabled(training):
        assert torch.equal(encoder(x, src_key_padding_mask=mask), shallow(x, src_key_padding_mask=mask))


def test_tokens_of_a_nested_tensor_are_refused(x):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 2).eval()
    interceptor.attach(encoder.layers, "test")
    interceptor.put(encoder.layers[1], "test", interceptor.Select(Fixed(torch.tensor([0]))))
    mask = torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]])
    with pytest.raises(RuntimeError, match="enable_nested_tensor=False"), torch.no_grad():
        encoder(x, src_key_padding_mask=mask)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_holds_in_a_hugging_face_model(checkpointing):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=16, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shallow = copy.deepcopy(model)
    del shallow.transformer.h[2:]
    skip_upper(nn.ModuleDict({"blocks": model.transformer.h}))
    ids = torch.arange(6).view(2, 3)
    torch.manual_seed(0)
    intercepted = model(ids, labels=ids)
    torch.manual_seed(0)
    plain = shallow(ids, labels=ids)
    assert torch.equal(intercepted.logits, plain.logits)
    intercepted.loss.backward()
    plain.loss.backward()
    for name, parameter in shallow.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(x)


def graphs(how):
    """Graphs compiled with the upper half closed, and in all after it has opened."""
    torch._dynamo.reset()
    built = []

    def backend(graph, inputs):
        built.append(graph)
        return graph

    net, x = Net(0), torch.randn(2, 5, WIDTH, requires_grad=True)
    net.blocks.extend(Residual() for _ in range(4))
    skip_upper(net)
    for module in [net] if how == "whole" else net.blocks:
        module.compile(backend=backend, fullgraph=True)
    counts = []
    for depth in (2, 4):
        for block in net.blocks[:depth]:
            interceptor.put(block, "test")
        expected = x
        for block in net.blocks[:depth]:
            expected = expected + block.linear(expected)
        for _ in range(3):
            assert torch.equal(net(x), expected)
        counts.append(len(built))
    return counts


def test_compiled_by_block_one_graph_serves_all_actions_and_as_a_whole_each_setting_has_one():
    assert graphs("block") == [1, 1]
    assert graphs("whole") == [2, 3]  # the first call learns the form of the output, which costs one
