import subprocess
import sys

import eke
import pytest
from eke import recipe


def test_a_bare_name_takes_the_defaults():
    assert recipe.parse_words(["stacking", "adam8bit"]) == {"stacking": {}, "adam8bit": {}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("256", 256),
        ("1e-3", 0.001),
        ("-2E4", -20000.0),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("[1, 2]", [1, 2]),
        ("{a: 1, b: [2, 3]}", {"a": 1, "b": [2, 3]}),
        ("'a,b'", "a,b"),
        ("a=b", "a=b"),
        ("model.layers", "model.layers"),
    ],
)
def test_a_value_is_read_as_yaml_and_exponents_are_numbers(text, value):
    read = recipe.parse_words([f"x:first={text},last=7"])["x"]
    assert read == {"first": value, "last": 7}
    assert type(read["first"]) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "x:a=1"], "'x' is given twice. Give it once."),
        (["x:a=1,a=2"], "'x:a=1,a=2': 'a' is given twice. Give it once."),
        (["x:a"], "'x:a': 'a' is no argument: write key=value."),
        (["x:a=1,"], "'x:a=1,': '' is no argument: write key=value."),
        (["x:"], "'x:' names no technique: write name or name:key=value,key=value."),
        (["a=1"], "'a=1' names no technique: write name or name:key=value,key=value."),
        ([""], "'' names no technique: write name or name:key=value,key=value."),
        (["x:a=[1"], "'x:a=[1': the value of 'a' is not YAML: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_words_of_another_form_get_one_line(words, message):
    with pytest.raises(eke.EkeError) as caught:
        recipe.parse_words(words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_file_maps_techniques_to_arguments_and_nothing_means_defaults(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("stacking:\nadam8bit: {block: 256, lr: 1e-3}\n")
    assert recipe.load(file) == {"stacking": {}, "adam8bit": {"block": 256, "lr": 0.001}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- stacking\n", "holds ['stacking']; a mapping of technique to its arguments is needed."),
        (b"", "holds nothing; a mapping of technique to its arguments is needed."),
        (b"a: 3\n", ": 'a' has 3; arguments by name are needed, such as {block: 256}."),
        (b"a: {1: 2}\n", ": 'a' has {1: 2}; arguments by name are needed, such as {block: 256}."),
        (b"a: 2026-13-45\n", "is not YAML: month must be in 1..12"),
        (b"? [1]\n: 2\n", "is not YAML: found unhashable key"),
        (b"a: 1\na: 2\n", "is not YAML: 'a' is given twice (line 2, column 1)."),
        (b"a: [\n", "is not YAML: expected the node content, but found '<stream end>' (line 2, column 1)."),
        (b"a: !!python/object:os.x {}\n", "is not YAML: could not determine a constructor for the tag"),
        (b"\xff\xfe\x00", "cannot be read: it is not UTF-8 text."),
    ],
)
def test_a_file_that_is_no_recipe_gets_one_line(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(eke.EkeError) as caught:
        recipe.load(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(eke.EkeError, match="no.yaml cannot be read: No such file or directory."):
        recipe.load(tmp_path / "no.yaml")


def test_reading_a_recipe_imports_neither_torch_nor_lightning():
    code = (
        "import sys; from eke import recipe; recipe.parse_words(['a:b=1']); "
        "sys.exit(bool({'torch', 'lightning'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
