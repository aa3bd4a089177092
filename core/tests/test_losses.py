"""Losses of single samples, out of steps that return their mean: the same value and gradient, or a refusal."""

from functools import partial

import pytest
import torch
from eke.seams.losses import LossError, capture, reduce_loss, showing
from torch.nn import functional as F

WEIGHTS = torch.tensor([0.5, 2.0, 1.0])


def captured(step, weights=None, samples=3, batch=None):
    with capture(samples, lambda losses: weights, batch) as found:
        loss = step()
    return loss, found.check()


def test_a_plain_cross_entropy_gives_each_samples_loss_and_the_same_mean():
    logits, classes = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
    each = F.cross_entropy(logits, classes, reduction="none")
    loss, losses = captured(lambda: F.cross_entropy(logits, classes))
    assert torch.equal(losses, each.detach())
    torch.testing.assert_close(loss, each.mean())
    loss, _ = captured(lambda: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, classes), WEIGHTS)
    smooth = F.cross_entropy(logits, classes, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(loss, smooth.mean())
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0], torch.autograd.grad((smooth * WEIGHTS).mean(), logits)[0]
    )


@pytest.mark.parametrize("shape", ["flattened", "transposed", "helper"])
def test_a_sequences_loss_is_the_mean_of_its_tokens_that_count(shape):
    logits, ids = torch.randn(3, 4, 7), torch.randint(0, 7, (3, 4))
    ids[0, 2:] = -100
    valid = ids != -100
    each = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    step = {
        "flattened": lambda: F.cross_entropy(logits.view(-1, 7), ids.view(-1)),
        "transposed": lambda: F.cross_entropy(logits.transpose(1, 2), ids),
        "helper": lambda: reduce_loss(each, valid),
    }[shape]
    loss, losses = captured(step)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
    torch.testing.assert_close(losses, each.sum(1) / valid.sum(1))
    with capture(3, lambda losses: WEIGHTS) as found:
        shown = step()
    torch.testing.assert_close(shown, loss)
    torch.testing.assert_close(found.weighted, (each.sum(1) * WEIGHTS).sum() / valid.sum())


def test_hugging_faces_own_loss_is_captured():
    pytest.importorskip("transformers")
    from eke.testing import hugging_face

    ids = torch.randint(0, 32, (3, 8))
    model = hugging_face("gpt2")
    plain = model(input_ids=ids, labels=ids).loss
    loss, losses = captured(lambda: model(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(loss, plain)
    each = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in ids])
    torch.testing.assert_close(losses, each.detach())


def test_probabilities_of_classes_are_captured():
    logits, shares = torch.randn(3, 5), torch.rand(3, 5).softmax(1)
    loss, losses = captured(lambda: F.cross_entropy(logits, shares))
    torch.testing.assert_close(loss, F.cross_entropy(logits, shares))
    assert losses.shape == (3,)


def test_what_is_not_beyond_doubt_is_refused():
    logits, classes = torch.randn(6, 5), torch.arange(6) % 5
    for step, said in (
        (lambda: F.cross_entropy(logits, classes), r"targets of shape \(6,\) in a step on 3 samples"),  # two views
        (lambda: F.cross_entropy(logits[:3], classes[:3], reduction="sum"), "reduction='sum'"),
        (
            lambda: F.cross_entropy(logits[:3], classes[:3]) + reduce_loss(torch.ones(3)),
            "takes the mean of losses twice",
        ),
        (lambda: reduce_loss(torch.ones(4)), "gave 4 losses for a batch of 3 samples"),
        (lambda: F.mse_loss(logits, logits), "took no mean of losses"),
    ):
        with pytest.raises(LossError, match=said):
            captured(step)


@pytest.mark.parametrize("ahead", [slice(1, None), slice(0, 4), slice(None)])
def test_copied_and_flattened_targets_are_found_again_in_the_batch(ahead):
    batch = {"ids": torch.randint(0, 7, (3, 5)), "other": torch.randn(3, 2)}
    targets = batch["ids"][:, ahead].clone()
    targets[1, 1] = -100
    logits = torch.randn(*targets.shape, 7)
    loss, losses = captured(lambda: F.cross_entropy(logits.flatten(0, 1), targets.flatten()), batch=batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, each.sum(1) / (targets != -100).sum(1))


def test_flattened_targets_that_may_be_read_otherwise_are_refused():
    ids, logits = torch.arange(15).reshape(3, 5) % 7, torch.randn(12, 7)
    alike = torch.ones(3, 5, dtype=torch.int64)
    for targets, batch in (
        (ids[:, 1:].T.flatten(), ids),  # a position after the other
        (torch.cat([ids[:, 1:2].flatten()] * 4), ids),
        (alike[:, 1:].flatten(), alike),  # either way
        ((ids[:, 1:].flatten() + 2) % 7, ids),
        (ids[:, 1:].flatten(), ids.float()),
    ):
        with pytest.raises(LossError, match="which loss belongs to which sample is not known"):
            captured(lambda targets=targets: F.cross_entropy(logits, targets), batch=batch)


def test_unreduced_losses_pass_and_outside_nothing_is_caught():
    logits, classes = torch.randn(3, 5), torch.tensor([0, 4, 2])
    _, losses = captured(lambda: reduce_loss(F.cross_entropy(logits, classes, reduction="none")))
    torch.testing.assert_close(losses, F.cross_entropy(logits, classes, reduction="none"))
    torch.testing.assert_close(reduce_loss(losses), losses.mean())


def test_a_weighted_mean_shows_the_plain_one_to_whatever_is_made_of_it_and_keeps_its_own_gradient():
    logits, classes = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2])
    each = F.cross_entropy(logits, classes, reduction="none")
    with capture(3, lambda losses: WEIGHTS) as found:
        loss = 0.5 * F.cross_entropy(logits, classes) + 1
    torch.testing.assert_close(loss, 0.5 * each.mean() + 1)
    by_hand = torch.autograd.grad(0.5 * (each * WEIGHTS).sum() / 3 + 1, logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], by_hand)
    assert (found.mean.requires_grad, found.weighted.requires_grad) == (False, False)
    with capture(3, lambda losses: WEIGHTS, shows=torch.tensor(7.0)):
        assert float(F.cross_entropy(logits, classes)) == 7


def test_a_step_on_chosen_samples_shows_the_mean_of_all_once_and_is_refused_nothing():
    logits, classes = torch.randn(6, 5, requires_grad=True), torch.arange(6) % 5
    each = F.cross_entropy(logits, classes, reduction="none")
    with showing(torch.tensor(7.0)) as shown:
        summed = F.cross_entropy(logits, classes, reduction="sum")
        first, second = F.cross_entropy(logits, classes), reduce_loss(each)
    torch.testing.assert_close(summed, each.sum())
    assert float(first) == 7
    torch.testing.assert_close(second, each.mean())
    torch.testing.assert_close(shown.mean, each.detach().mean())
    gradients = [torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (first, each.mean())]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_where_either_reading_gives_each_sample_the_same_there_is_no_doubt(samples):
    ids = torch.zeros(samples, 5, dtype=torch.int64)  # read by column, the same tokens
    copied = ids[:, 1:].flatten().clone()
    kept = copied.clone()
    kept[1:] = -100  # one token counts, that of the first sample either way
    for targets in (copied, kept, torch.full_like(copied, -100)):
        logits = torch.randn(len(targets), 7)
        step = partial(F.cross_entropy, logits, targets)
        if samples > 1 and targets is copied:
            with pytest.raises(LossError, match="which loss belongs to which sample is not known"):
                captured(step, samples=samples, batch=ids)
            continue
        _, losses = captured(step, samples=samples, batch=ids)
        each = F.cross_entropy(logits, targets, reduction="none").view(samples, -1)
        torch.testing.assert_close(losses, each.sum(1) / (targets.view(samples, -1) != -100).sum(1).clamp(min=1))


def test_one_sample_owns_whatever_losses_there_are():
    logits, targets = torch.randn(4, 7, 1), torch.randint(0, 7, (4, 1))  # tokens first
    loss, losses = captured(lambda: F.cross_entropy(logits, targets), samples=1)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets)[None])
    torch.testing.assert_close(loss, losses[0])
