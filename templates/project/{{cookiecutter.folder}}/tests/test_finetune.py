"""Instruction tuning, on a small causal model that is made here."""

import json
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("eke_peft")
sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune  # noqa: E402
from instructions import GIVEN, Example, attention_mask, encode, pack, prompt, read  # noqa: E402

COLOURS = {"grass": "green", "the sky": "blue", "snow": "white", "coal": "black", "blood": "red"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two blocks and a tokenizer of characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    place = tmp_path_factory.mktemp("model")
    letters = sorted({*"".join(map(chr, range(32, 127))), "\n"})
    words = {letter: number for number, letter in enumerate(["<unk>", "<end>", *letters])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unk>")
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"instruction": f"Colour of {thing}?", "output": colour} for thing, colour in COLOURS.items()] * 4
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def tokenizer_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_only_answers_are_learned(folder):
    tokenizer = tokenizer_of(folder)
    row = {"instruction": "Colour of grass?", "output": "green"}
    example = encode(row, tokenizer, 100)
    given = len(tokenizer(prompt(row, tokenizer))["input_ids"])
    assert example.labels[:given] == [GIVEN] * given
    assert example.labels[given:] == example.tokens[given:]
    assert tokenizer.decode(example.tokens[given:-1]) == "green"
    assert example.tokens[-1] == tokenizer.eos_token_id
    assert encode(row, tokenizer, 10) is None


def test_packing_loses_no_token_and_wastes_less_than_a_row_each():
    examples = [Example(list(range(2, 2 + size)), list(range(2, 2 + size))) for size in (5, 3, 7, 2, 4, 6, 1)]
    tokens, labels, positions, numbers = pack(examples, 8, pad=0).tensors
    assert tokens.shape == labels.shape == positions.shape == numbers.shape
    assert int((numbers > 0).sum()) == 28
    assert len(tokens) == 4  # 28 tokens in rows of 8
    sizes = [int((row == number).sum()) for row in numbers for number in row.unique() if number]
    assert sorted(sizes) == [1, 2, 3, 4, 5, 6, 7]
    assert (labels[numbers == 0] == GIVEN).all()


def test_examples_of_a_row_do_not_see_each_other(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    one, other = [5, 6, 7, 8, 9], [10, 11, 12]
    tokens, _, positions, numbers = pack([Example(one, one), Example(other, other)], 10, pad=1).tensors
    seen = {"position_ids": positions, "attention_mask": attention_mask(numbers, model.dtype)}
    with torch.no_grad():
        packed = model(input_ids=tokens, **seen).logits[0]
        alone = [model(input_ids=torch.tensor([each])).logits[0] for each in (one, other)]
    torch.testing.assert_close(packed[:8], torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_it_tunes_exports_answers_and_goes_on(folder, data, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    words = ["--model", folder, "--data", data, "--out", tmp_path / "out", "--length", 64, "--batch", 2, "--lr", 1e-2]
    words += ["--accumulate", 1, "--accelerator", "cpu", "--validation", 0.2, "--ask", "Colour of coal?"]
    words = [str(word) for word in words]
    assert finetune.main([*words, "--epochs", "2"]) == 0
    saved = torch.load(tmp_path / "out/last.ckpt", weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"])
    first = saved["global_step"]
    assert finetune.main([*words, "--epochs", "4", "--resume"]) == 0
    assert torch.load(tmp_path / "out/last.ckpt", weights_only=True)["global_step"] == 2 * first
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peft.PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    assert "examples in" in capsys.readouterr().out


def test_a_base_in_four_bits_tunes_and_goes_on(folder, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    words = ["--model", folder, "--data", data, "--out", tmp_path / "out", "--length", 64, "--batch", 2, "--lr", 1e-2]
    words += ["--accelerator", "cpu", "--validation", 0.2, "--recipe", "peft:settings={r: 4},quantize=nf4"]
    words = [str(word) for word in words]
    assert finetune.main([*words, "--epochs", "1"]) == 0
    assert finetune.main([*words, "--epochs", "2", "--resume"]) == 0
    saved = torch.load(tmp_path / "out/last.ckpt", weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    peft.PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "line 1: no JSON"),
        ('{"instruction": "x"}', "line 1: no 'output'"),
        ("", "holds no examples"),
    ],
)
def test_a_file_of_no_use_is_refused_with_its_line(tmp_path, content, words):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=words):
        read(file)


def test_what_is_missing_is_one_line_and_code_2(data, tmp_path, capsys):
    assert finetune.main(["--model", str(tmp_path / "nowhere"), "--data", str(data)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
