"""What scores promise: the papers' numbers, a file that is whole and of this data, the samples that they choose."""

import eke
import numpy as np
import pytest
import torch
from eke.seams.scores import ScoresError, fingerprint
from eke.testing import Cut, TinyBlocks, TinyViT, fit
from eke.testing.data import BATCH, Images
from eke.testing.models import STEPS
from eke_data_scores import Pruned, Score, Scores, choose, el2n
from eke_data_scores.command import main
from lightning.pytorch import Callback
from torch.utils.data import TensorDataset

COUNT = STEPS * BATCH


def test_el2n_is_the_length_of_the_error_vector():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.0001, 0.9998, 0.0001]]))
    assert el2n(logits, torch.tensor([0, 0])).tolist() == pytest.approx([0.374166, 2**0.5], abs=1e-3)


def test_the_choice_is_by_score_with_the_hardest_left_out_and_classes_kept():
    values = torch.arange(10.0)
    assert choose(values, 0.3).tolist() == [7, 8, 9]
    assert choose(values, 0.3, "easy").tolist() == [0, 1, 2]
    assert choose(values, 0.3, skip=0.2).tolist() == [5, 6, 7]
    assert choose(values, 0.3, "random", seed=1).tolist() != choose(values, 0.3, "random", seed=2).tolist()
    classes = (values >= 5).long()
    assert choose(values, 0.4, classes=classes, balance=0.5).tolist() == [4, 7, 8, 9]  # one of each class's two
    assert choose(torch.tensor([1.0, torch.inf, 0.0]), 1 / 3).tolist() == [1]
    assert choose(values, 1.0).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep": 0}, "keep=0, skip=0.0, balance=0.0: give shares"),
        ({"keep": 0.9, "skip": 0.2}, "keep=0.9, skip=0.2"),
        ({"keep": 0.5, "mode": "best"}, "mode='best' is none of"),
        ({"keep": 0.5, "balance": 0.5}, "balance=0.5 needs the classes"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        choose(torch.arange(10.0), **arguments)


def test_a_file_is_whole_and_comes_back(tmp_path):
    file = tmp_path / "folder" / "el2n.npz"
    scores = Scores("el2n", torch.rand(5, dtype=torch.float64), 3, "5-0000")
    scores.save(file)
    back = Scores.load(file)
    assert torch.equal(back.values, scores.values)
    assert (back.kind, back.runs, back.data) == ("el2n", 3, "5-0000")
    assert [path.name for path in file.parent.iterdir()] == ["el2n.npz"]  # nothing half written beside it
    mean = scores.merged(Scores("el2n", torch.ones(5, dtype=torch.float64), 1, "5-0000"))
    torch.testing.assert_close(mean.values, (3 * scores.values + 1) / 4)


def test_a_missing_cut_or_changed_file_is_refused(tmp_path):
    file = tmp_path / "el2n.npz"
    with pytest.raises(ScoresError, match=r"There is no file of scores at .*el2n\.npz\. A run with Score"):
        Scores.load(file)
    Scores("el2n", torch.rand(500, dtype=torch.float64), 1, "500-0").save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ScoresError, match="is no file of scores, or is cut short"):
        Scores.load(file)
    file.write_bytes(whole)
    with np.load(file) as stored:
        parts = dict(stored)
    parts["values"] = parts["values"] + 1
    np.savez(file, **parts)
    with pytest.raises(ScoresError, match="is damaged, or of another version"):
        Scores.load(file)


@pytest.mark.parametrize(("values", "words"), [
    (np.zeros(COUNT - 1), rf"shape \({COUNT - 1},\), and says that its data has {COUNT} samples"),
    (np.zeros((COUNT, 2)), "one number for each is needed"),
    (np.zeros(COUNT, dtype="int64"), "holds int64 values"),
    (np.full(COUNT, np.nan), f"holds {COUNT} scores that are NaN"),
])  # fmt: skip
def test_a_whole_file_with_other_values_than_one_a_sample_is_refused(tmp_path, values, words):
    file = tmp_path / "scores.npz"
    Scores("el2n", torch.from_numpy(values), 1, fingerprint(Images(COUNT))).save(file)  # its checksum is right
    with pytest.raises(ScoresError, match=words):
        Scores.load(file)


def test_data_is_told_apart_by_its_samples():
    one, other = Images(COUNT), Images(COUNT + 1)
    assert fingerprint(one) == fingerprint(Images(COUNT)) != fingerprint(other)
    x = torch.randn(20, 3)
    changed = x.clone()
    changed[0, 0] += 1
    assert fingerprint(TensorDataset(x)) != fingerprint(TensorDataset(changed))

    class Augmented(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] + torch.rand(3)

    assert fingerprint(Augmented(x)) == "20-?"


class Errors(TinyViT):
    """Keeps what its own logits say of each sample in the last epoch, by what the sample is."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        for image, error, right in zip(x, el2n(logits.detach(), y), logits.argmax(1) == y, strict=True):
            self.notes.setdefault(image.sum().item(), []).append((float(error), bool(right)))
        return torch.nn.functional.cross_entropy(logits, y)


@pytest.fixture
def noted():
    model = Errors()
    model.notes = {}
    return model


def keys():
    images = Images(COUNT)
    return [images[index][0].sum().item() for index in range(COUNT)]


def test_el2n_and_loss_are_those_of_the_last_epoch(tmp_path, noted):
    fit(noted, Score(tmp_path / "el2n.npz"), epochs=2)
    values = Scores.load(tmp_path / "el2n.npz").values
    assert values.tolist() == pytest.approx([noted.notes[key][-1][0] for key in keys()], rel=1e-4)
    fit(TinyViT(), Score(tmp_path / "loss.npz", "loss"), epochs=1)
    assert Scores.load(tmp_path / "loss.npz").values.isfinite().all()


def test_forgetting_counts_from_right_to_wrong_and_never_right_is_infinite(tmp_path, noted):
    fit(noted, Score(tmp_path / "forgetting.npz", "forgetting"), epochs=6)
    expected = []
    for key in keys():
        right = [right for _, right in noted.notes[key]]
        forgot = sum(before and not after for before, after in zip(right, right[1:], strict=False))
        expected.append(float(forgot) if any(right) else float("inf"))
    assert Scores.load(tmp_path / "forgetting.npz").values.tolist() == expected


def test_runs_are_averaged_and_another_kind_or_other_data_is_refused(tmp_path):
    file = tmp_path / "el2n.npz"
    fit(TinyViT(seed=0), Score(file), epochs=1)
    one = Scores.load(file)
    fit(TinyViT(seed=1), Score(file), epochs=1)
    both = Scores.load(file)
    assert both.runs == 2
    assert not torch.equal(one.values, both.values)
    with pytest.raises(ScoresError, match="Scores el2n of data .* and loss of .* have no mean"):
        fit(TinyViT(), Score(file, "loss"), epochs=1)
    with pytest.raises(ScoresError, match="holds scores of other data"):
        fit(TinyViT(), Score(file), epochs=1, steps=STEPS + 1)
    assert torch.equal(Scores.load(file).values, both.values)  # and the file is as it was


class Batches(Callback):
    def __init__(self):
        self.images, self.validated = {}, []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        seen = self.images.setdefault(trainer.current_epoch, set())
        seen |= {image.sum().item() for image in batch[0]}

    def on_validation_start(self, trainer, model):
        self.validated.append(trainer.current_epoch)


@pytest.mark.parametrize("mode", ["hard", "easy", "random"])
def test_a_pruned_run_sees_the_chosen_samples_in_every_epoch(tmp_path, mode):
    file, seen = tmp_path / "scores.npz", Batches()
    values = torch.rand(COUNT, dtype=torch.float64)
    Scores("el2n", values, 1, fingerprint(Images(COUNT))).save(file)
    fit(TinyViT(), Pruned(file, 0.5, mode=mode), epochs=3, validate=True, callbacks=[seen])
    names = keys()
    expected = {names[index] for index in choose(values, 0.5, mode).tolist()}
    assert [seen.images[epoch] for epoch in range(3)] == [expected] * 3
    assert seen.validated == [0, 1, 2]


def test_two_processes_write_one_file_and_agree(tmp_path):
    from eke.testing import checks

    file = tmp_path / "el2n.npz"
    checks.ranks_agree(checks.Subject(build=lambda: Score(file), model=TinyViT, epochs=1))
    assert len(Scores.load(file).values) == 2 * COUNT
    assert Scores.load(file).runs == 1


def test_a_pruned_run_resumes_to_the_same_bits(tmp_path):
    from eke.testing import checks
    from eke.testing.data import shuffled

    file = tmp_path / "scores.npz"
    Scores("el2n", torch.rand(COUNT, dtype=torch.float64), 1, fingerprint(Images(COUNT))).save(file)
    subject = checks.Subject(build=lambda: Pruned(file, 0.5), model=TinyViT)
    checks.resumes(subject, Cut(steps=3), Cut(epochs=2), killed=False, loader=shuffled, random=True)


def test_scores_of_other_data_and_losses_without_classes_are_refused(tmp_path):
    file = tmp_path / "scores.npz"
    Scores("el2n", torch.rand(COUNT + 1, dtype=torch.float64), 1, f"{COUNT + 1}-?").save(file)
    with pytest.raises(ScoresError, match="holds scores of other data"):
        fit(TinyViT(), Pruned(file), epochs=1)
    with pytest.raises(ValueError, match="has no plain cross_entropy of"):
        fit(TinyBlocks(), Score(tmp_path / "text.npz"), epochs=1)
    fit(TinyBlocks(), Score(tmp_path / "text.npz", "loss"), epochs=1)  # by sequence
    assert len(Scores.load(tmp_path / "text.npz").values) == COUNT


def test_both_are_in_the_registry():
    assert eke.get("data_scores") == Score.technique
    assert eke.get("data_pruning") == Pruned.technique
    with pytest.raises(ValueError, match="kind='margin' is none of"):
        Score("x.npz", "margin")
    with pytest.raises(ValueError, match="keep=2"):
        Pruned("x.npz", 2)


def test_one_command_draws_the_hardest_and_the_easiest(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, png = tmp_path / "el2n.npz", tmp_path / "sheet.png"
    values = torch.rand(COUNT, dtype=torch.float64)
    Scores("el2n", values, 2, fingerprint(Images(COUNT))).save(file)
    assert main([str(file)]) == 0
    assert f"el2n of {COUNT} samples, the mean over 2 runs; least, quartiles, most: " in capsys.readouterr().out
    assert main([str(file), "--data", "nowhere:data", "--sheet", str(png)]) == 2
    assert "--data 'nowhere:data' does not load" in capsys.readouterr().err


def test_a_sheet_shows_scores_and_classes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "own.py").write_text(
        f"from eke.testing.data import Images\n\n\ndef training_set():\n    return Images({COUNT})\n"
    )
    monkeypatch.chdir(tmp_path)
    Scores("el2n", torch.rand(COUNT, dtype=torch.float64), 1, fingerprint(Images(COUNT))).save("el2n.npz")
    assert main(["el2n.npz", "--data", "own:training_set", "--sheet", "out/sheet.png", "--count", "5"]) == 0
    assert (tmp_path / "out" / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["el2n.npz", "--sheet", "x.png"]) == 2
    assert main(["missing.npz"]) == 2
    assert "There is no file of scores at missing.npz" in capsys.readouterr().err
