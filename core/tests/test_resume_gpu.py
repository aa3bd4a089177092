"""Resuming on a GPU: the claims of test_resume.py, with dropout drawn from the random state of CUDA."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

spec = importlib.util.spec_from_file_location("eke_test_resume", Path(__file__).with_name("test_resume.py"))
resume = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resume)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    cuda = torch.cuda.is_available()

    def trainer(trainer_class, accelerator, **options):
        return trainer_class(accelerator="gpu" if cuda else accelerator, devices=1, **options)

    monkeypatch.setattr(resume, "Trainer", partial(trainer, resume.Trainer))


@pytest.mark.parametrize("when", [{"batches": 3}, {"batches": 7}, {"epoch": 1}], ids=str)
@pytest.mark.parametrize("loader", resume.LOADERS)
def test_a_resumed_run_sees_the_batches_and_ends_at_the_weights_of_an_unbroken_one(tmp_path, loader, when):
    resume.assert_resumes(resume.LOADERS[loader], tmp_path / "cut.ckpt", **when)


@pytest.mark.parametrize("options", [{"max_steps": 13}, {"accumulate_grad_batches": 2}], ids=str)
def test_it_does_at_the_edge_of_an_epoch_too(tmp_path, options):
    resume.assert_resumes(resume.LOADERS["shuffled"], tmp_path / "cut.ckpt", batches=5, **options)


def test_an_accumulation_window_that_was_cut_in_two_keeps_its_first_half(tmp_path):
    resume.assert_resumes(resume.LOADERS["shuffled"], tmp_path / "cut.ckpt", batches=3, accumulate_grad_batches=2)


def test_dropout_on_the_card_was_drawn_anew_and_not_by_chance_alike(tmp_path):
    first, _ = resume.run(resume.LOADERS["shuffled"](), seed=0)
    other, _ = resume.run(resume.LOADERS["shuffled"](), seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
