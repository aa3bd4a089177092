import importlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from eke import registry, survey
from eke.__main__ import main

CORE = Path(__file__).parents[1]

CLASS = '''
from lightning.pytorch import Callback
from {package}.entry import RECORD


class Thing(Callback):
    """A thing.

    Args:
        every: Batches between two
            counts, 1 or more.
        where: Path.

    Raises:
        ValueError: every is below 1.
    """

    technique = RECORD

    def __init__(self, every: int = 1, where: str = "") -> None:
        if every < 1:
            raise ValueError(f"every={{every}} counts nothing: give 1 or more.")
        self.every = every
'''

ENTRY = """
import eke

RECORD = eke.Technique({name!r}, "callback", "{package}.callback:Thing", **{fields!r})


@eke.hookimpl
def eke_technique():
    return RECORD
"""

CERTIFICATE = {
    "date": "2026-11-24",
    "versions": {"torch": "2.13.0+cpu", "lightning": "2.6.6"},
    "strategies": ["single device", "ddp"],
    "precisions": ["32-true", "bf16-mixed"],
}


@pytest.fixture(autouse=True)
def in_a_pipe(monkeypatch):
    """A line stays a line: a process of pytest-xdist has COLUMNS set."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path for distributions."""
    monkeypatch.delenv("COLUMNS", raising=False)  # processes that share the tests have it
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name, plugin in registry._manager.list_name_plugin():
        if str(folder) in (getattr(plugin, "__file__", None) or ""):
            registry._manager.unregister(name=name)
    for module in [
        name for name, module in sys.modules.items() if str(folder) in (getattr(module, "__file__", 0) or "")
    ]:
        del sys.modules[module]


def install(site, name, distribution=None, certificate=None, **fields):
    distribution = distribution or f"eke-{name}"
    package = distribution.replace("-", "_")
    info = site / f"{package}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 1.2\nSummary: Does {name}\nKeywords: eke,callback\n"
    )
    (info / "entry_points.txt").write_text(f"[eke]\n{name} = {package}.entry\n")
    home = site / package
    home.mkdir()
    (home / "__init__.py").write_text(f"from {package}.callback import Thing\n")
    (home / "callback.py").write_text(CLASS.format(package=package))
    (home / "entry.py").write_text(ENTRY.format(name=name, package=package, fields=fields))
    if certificate is not None:
        (home / "certificate.json").write_text(certificate if isinstance(certificate, str) else json.dumps(certificate))
    importlib.invalidate_caches()
    return home


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def line_of(out, name):
    (line,) = [line for line in out.splitlines() if line.split()[0] == name]
    return " ".join(line.split())


# eke list


def test_a_technique_is_listed_with_version_kind_summary_and_certificate(site, capsys):
    install(site, "shrink", certificate=CERTIFICATE)
    install(site, "grow", does="Makes it larger")  # the record's sentence, where it has one
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert line_of(out, "shrink") == "shrink 1.2 callback Does shrink 2026-11"
    assert line_of(out, "grow") == "grow 1.2 callback Makes it larger none"


def test_what_is_broken_or_twofold_is_shown_as_such_and_hurts_no_other(site, capsys):
    install(site, "good")
    install(site, "same", "eke-same")
    install(site, "same", "other-same")
    (install(site, "halved") / "entry.py").unlink()
    (install(site, "gone") / "__init__.py").rename(site / "nowhere")
    (site / "eke_gone" / "entry.py").unlink()
    install(site, "unread", certificate="{")
    (site / "eke_unread-1.2.dist-info" / "METADATA").unlink()
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert line_of(out, "good") == "good 1.2 callback Does good none"
    assert line_of(out, "same") == "same DUPLICATE: eke-same and other-same both provide it; uninstall one of them"
    assert line_of(out, "halved").startswith("halved 1.2 callback BROKEN: its module eke_halved.entry is not there;")
    assert line_of(out, "gone").startswith("gone 1.2 callback BROKEN: its module eke_gone.entry is not there;")
    assert line_of(out, "unread") == "unread callback unreadable"


def test_nothing_installed_is_said_with_a_way_on(capsys, monkeypatch):
    monkeypatch.setattr(registry, "installed", dict)
    assert run(capsys, "list")[1] == "No technique is installed.\n"


def test_listing_imports_neither_torch_nor_lightning_nor_a_technique(site):
    install(site, "shrink", certificate=CERTIFICATE)
    code = (
        "import sys; from eke.__main__ import main; main(['list']); "
        "sys.exit(str(sorted({'torch', 'lightning', 'eke_shrink', 'yaml', 'cookiecutter'} & sys.modules.keys())))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == "[]\n"
    assert "shrink" in done.stdout


def second(site, distribution, name, certificate=None):
    """A second technique in a distribution that is there, with a module and a certificate of its own."""
    package = distribution.replace("-", "_")
    with (site / f"{package}-1.2.dist-info" / "entry_points.txt").open("a") as points:
        points.write(f"{name} = {package}.{name}\n")
    (site / package / f"{name}.py").write_text(ENTRY.format(name=name, package=package, fields={"does": f"Is {name}"}))
    if certificate is not None:
        (site / package / f"certificate-{name}.json").write_text(json.dumps(certificate))


def test_two_techniques_of_one_distribution_each_have_their_own_sentence_and_certificate(site, capsys):
    install(site, "first", certificate={**CERTIFICATE, "technique": "first"}, does="Is the first")
    second(site, "eke-first", "other", {**CERTIFICATE, "technique": "other", "date": "2026-10-01"})
    second(site, "eke-first", "third")
    out = run(capsys, "list")[1]
    assert line_of(out, "first") == "first 1.2 callback Is the first 2026-11"
    assert line_of(out, "other") == "other 1.2 callback Is other 2026-10"
    assert line_of(out, "third") == "third 1.2 callback Is third none"


def test_a_certificate_of_another_technique_counts_for_nothing(site, capsys):
    install(site, "shrink", certificate={**CERTIFICATE, "technique": "grow"})
    assert line_of(run(capsys, "list")[1], "shrink") == "shrink 1.2 callback Does shrink none"


def test_a_record_that_cannot_be_read_alone_leaves_the_summary(site, capsys):
    (install(site, "far") / "entry.py").write_text("from . import there\n")
    assert line_of(run(capsys, "list")[1], "far") == "far 1.2 callback Does far none"


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_longer_than_columns(site, capsys, monkeypatch, width):
    install(site, "wordy", does="word " * 60, certificate=CERTIFICATE)
    monkeypatch.setenv("COLUMNS", str(width))
    for words in (["list"], ["list", "--survey"], ["info", "--effects"], ["info", "wordy"]):
        out = run(capsys, *words)[1]
        assert max(map(len, out.splitlines())) <= width or words == ["info", "wordy"], words
    monkeypatch.delenv("COLUMNS")
    assert max(map(len, run(capsys, "list")[1].splitlines())) > 300  # a pipe: a line stays a line


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("memory", {"small", "both"}),
        ("optimizers", {"steps", "both"}),
        ("Optimizer", {"steps", "both"}),
        ("2.1", {"steps", "both"}),
        ("quantized", {"small", "both"}),
    ],
)
def test_a_section_shows_what_belongs_there_and_nothing_else(site, capsys, word, found):
    install(site, "small", topics=("quantized training",))
    install(site, "steps", topics=("optimizer",))
    install(site, "both", topics=("optimizer", "quantized training"))
    install(site, "neither")
    own = {"small", "steps", "both", "neither"}
    code, out, _ = run(capsys, "list", "--section", word)
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} & own == found


def test_a_section_that_the_survey_does_not_have_is_answered_with_those_it_has(capsys):
    code, _, err = run(capsys, "list", "--section", "cooking")
    assert code == 2
    assert "the survey has no section 'cooking'. A part of one of these is needed: 2.1 Optimization: optimizer," in err


def test_the_survey_is_listed_with_what_serves_each_entry(site, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    install(site, "sign", survey=("lion",))
    install(site, "sign_too", survey=("lion", "sam"))
    code, out, _ = run(capsys, "list", "--survey")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert code == 0
    assert "[18] Lion lion sign, sign_too" in lines
    assert "[28] [17] SAM: sharpness-aware minimization (and for ViT) sam sign_too" in lines
    assert "[26] RigL rigl nothing yet" in lines
    assert "[50] Adam adam (in torch)" in lines
    assert all(f"{title}: {topic}" in lines for title, topics in survey.SECTIONS.items() for topic in topics)
    assert all(entry.key in out for entry in survey.ENTRIES)


# eke


def test_eke_says_its_version(capsys):
    from importlib.metadata import version

    assert run(capsys, "--version") == (0, f"eke {version('eke')}\n", "")


def test_eke_alone_asks_for_a_command(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("eke: a command is needed: list, info, check")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_command_that_loads_torch_says_so_at_a_terminal(site, capsys, monkeypatch, terminal):
    install(site, "shrink")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr("eke.cli.info.render", lambda name: name)  # torch cannot be loaded twice
    assert run(capsys, "info", "shrink")[2].count("loading torch") == terminal
    assert "loading torch" not in run(capsys, "list")[2]


# eke info


def test_the_words_of_effects_are_told_with_their_definitions(capsys):
    from eke.spec import IMPOSITIONS, RESOURCES, SEAMS, VERBS

    code, out, _ = run(capsys, "info", "--effects")
    flat = " ".join(out.split())
    assert code == 0
    assert all(f"{word} {definition}" in flat for word, definition in (RESOURCES | VERBS).items())
    assert all(word in flat for word in (*IMPOSITIONS, *SEAMS))


def test_a_name_may_be_written_as_the_folder_writes_it(site, capsys):
    install(site, "two_words", "eke-two-words")
    assert run(capsys, "info", "two-words")[1] == run(capsys, "info", "two_words")[1]
    assert run(capsys, "check", "two-words:every=2")[1] == run(capsys, "check", "two_words:every=2")[1]
    code, _, err = run(capsys, "check", "two-words", "two_words")
    assert (code, err) == (2, "eke: 'two_words' is given twice. Give it once.\n")


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(site, capsys):
    install(site, "shrinking")
    _, _, err = run(capsys, "info", "shrinkin")
    assert err == (
        "eke: no technique named 'shrinkin' is installed. Did you mean shrinking? `eke list` shows those that are.\n"
    )


def test_info_tells_the_record_the_arguments_the_exceptions_and_the_certificate(site, capsys):
    install(
        site,
        "shrink",
        certificate=CERTIFICATE,
        paper="https://arxiv.org/abs/0000.00000",
        effects=("changes batch content", "reads loss"),
        needs=("one optimizer",),
        conflicts={"grow": "one undoes the other."},
        exactness="approximate",
        exceptions={"test_two_processes_equal_one": "Each process counts for itself."},
    )
    code, out, _ = run(capsys, "info", "shrink")
    assert code == 0
    flat = [" ".join(line.split()) for line in out.splitlines()]
    assert flat == [
        "shrink 1.2 (eke-shrink): Does shrink",
        "",
        "class eke_shrink.callback.Thing",
        "kind callback",
        "paper https://arxiv.org/abs/0000.00000",
        "survey none",
        "effects changes batch content, reads loss",
        "needs one optimizer",
        "conflicts grow: one undoes the other.",
        "after none",
        "exactness approximate",
        "tolerates none",
        "",
        "Arguments",
        "every=1 Batches between two counts, 1 or more.",
        "where='' Path.",
        "",
        "Contract, with these exceptions",
        "test_two_processes_equal_one Each process counts for itself.",
        "",
        "On the zoo's models: not tried",
        "",
        "Certificate",
        "date 2026-11-24",
        "versions torch 2.13.0+cpu, lightning 2.6.6",
        "strategies single device, ddp",
        "precisions 32-true, bf16-mixed",
    ]


def test_info_tells_which_models_of_the_zoo_it_trains_and_of_others_why_not_each_reason_once(site, capsys):
    home = install(site, "shrink")
    refused = {"outcome": "refuses", "words": "It needs texts. Leave it out."}
    animals = {"bert": {"outcome": "trains", "words": "3 of 6 rows"}, "vit": refused, "cnn": refused}
    (home / "zoo.json").write_text(json.dumps({"technique": "shrink", "date": "2026-11-28", "animals": animals}))
    _, out, _ = run(capsys, "info", "shrink")
    flat = [" ".join(line.split()) for line in out.splitlines()]
    start = flat.index("On the zoo's models (2026-11; docs/zoo.md)")
    assert flat[start + 1 : start + 4] == [
        "trains bert (3 of 6 rows)",
        "vit, cnn refuses: It needs texts. Leave it out.",
        "",
    ]


def test_info_of_a_technique_that_is_not_there_is_one_line_and_code_2(capsys):
    code, out, err = run(capsys, "info", "no_such")
    assert (code, out) == (2, "")
    assert err.startswith("eke: no technique named 'no_such' is installed.")
    assert err.count("\n") == 1


# eke check


def test_a_value_of_another_type_is_refused_with_the_type_that_is_needed(site, capsys):
    install(site, "shrink")
    code, out, _ = run(capsys, "check", "shrink:every=often")
    assert code == 1
    assert "REFUSED: shrink: every='often' is a str; an int is needed." in out


def test_an_error_of_a_constructor_is_a_sentence_with_technique_and_argument(site, capsys):
    home = install(site, "odd")
    (home / "callback.py").write_text((home / "callback.py").read_text().replace("every: int = 1", "every=1"))
    code, out, _ = run(capsys, "check", "odd:every=often")
    assert code == 1
    assert "REFUSED: odd: '<' not supported between instances of 'str' and 'int' It was given every='often'." in out


def test_words_are_put_into_the_order_in_which_they_act(site, capsys):
    install(site, "reader", effects=("reads weights",), needs=("one optimizer",))
    install(site, "writer", effects=("changes weights",))
    code, out, _ = run(capsys, "check", "reader:every=2", "writer")
    assert code == 0
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "In the order in which they act:",
        "1. writer changes weights",
        "2. reader reads weights",
        "needs one optimizer",
        "They go together.",
    ]


def test_every_reason_to_refuse_is_named_and_the_code_is_1(site, capsys):
    install(site, "one", effects=("replaces weights",), conflicts={"two": "both count."})
    install(site, "two", effects=("replaces weights",))
    code, out, _ = run(capsys, "check", "one:every=0", "two:size=3")
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("REFUSED")] == [
        "REFUSED: one: every=0 counts nothing: give 1 or more.",
        "REFUSED: two: got an unexpected keyword argument 'size'. It takes: every=1, where=''.",
        "REFUSED: 'one' and 'two' both replace the weights. Leave one of them out.",
        "REFUSED: 'one' cannot run together with 'two': both count.",
    ]


def test_a_circle_is_refused_once(site, capsys):
    install(site, "one", effects=("changes batch subset", "reads loss"))
    install(site, "two", effects=("changes loss", "reads batch subset"))
    code, out, _ = run(capsys, "check", "one", "two")
    assert code == 1
    assert "one, two each have to act before another one of them in around_step." in out
    assert out.count("REFUSED") == 1


def test_a_recipe_file_is_checked_like_words(site, tmp_path, capsys):
    install(site, "one")
    file = tmp_path / "recipe.yaml"
    file.write_text("one: {every: 2}\n")
    assert run(capsys, "check", str(file)) == (0, "In the order in which they act:\n  1. one  touches nothing\nNothing "
        "speaks against it.\n", "")  # fmt: skip
    file.write_text("one: {every: 0}\n")
    code, out, _ = run(capsys, "check", str(file))
    assert code == 1
    assert "REFUSED: one: every=0 counts nothing: give 1 or more." in out


@pytest.mark.parametrize("under", ["", "fit:\n"])
def test_a_lightning_cli_file_is_checked_by_the_records_of_its_classes(site, tmp_path, capsys, under):
    install(site, "reader", effects=("reads weights",))
    install(site, "writer", effects=("changes weights",))
    text = """
trainer:
  strategy: ddp
  plugins: {class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: bf16-mixed, device: cpu}}
  callbacks:
    - class_path: eke_reader.Thing
      init_args: {every: 0}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    - class_path: eke_writer.Thing
      init_args: {every: 2}
model: {class_path: not.looked.At}
"""
    file = tmp_path / "cli.yaml"
    file.write_text(under + text.replace("\n", "\n  ") if under else text)
    code, out, _ = run(capsys, "check", str(file))
    assert code == 1
    assert "REFUSED: reader: every=0 counts nothing: give 1 or more." in " ".join(out.split())
    assert out.count("REFUSED") == 1
    assert out.index("1. writer") < out.index("2. reader")
    unknown = [line.partition(": ")[2] for line in out.splitlines() if line.startswith("Not of Eke")]
    assert unknown == [
        "lightning.pytorch.callbacks.ModelCheckpoint (callbacks)",
        "lightning.pytorch.plugins.MixedPrecision (plugins)",
        "ddp (strategy)",
    ]


def test_a_file_without_techniques_says_so(tmp_path, capsys):
    file = tmp_path / "cli.yaml"
    file.write_text("trainer: {max_epochs: 3, strategy: auto}\n")
    assert run(capsys, "check", str(file)) == (0, "No technique of Eke is asked for.\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer: {callbacks: [{class_path: eke_no.Such}]}",
            "class_path 'eke_no.Such' does not load: No module named",
        ),
        ("trainer: {callbacks: [{path: x}]}", "trainer.callbacks holds {'path': 'x'}; a class_path is needed."),
        ("- 1", "holds [1]; a mapping of technique to its arguments is needed."),
        ("no_such: {}", "no technique named 'no_such' is installed."),
    ],
)
def test_a_file_of_no_use_is_one_line_and_code_2(tmp_path, capsys, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    code, out, err = run(capsys, "check", str(file))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


# eke new


def test_a_baked_technique_is_written_without_questions(tmp_path, capsys):
    pytest.importorskip("cookiecutter")
    code, out, _ = run(
        capsys, "new", "technique", "--no-input", "--output", str(tmp_path), "--set", "technique=warm-up", "kind=plugin"
    )
    assert code == 0
    assert out == f"Wrote {tmp_path / 'eke-warm-up'}. Its README.md says what to do next.\n"
    assert (tmp_path / "eke-warm-up/src/eke_warm_up/plugin.py").exists()
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["flavour=sweet"], "--set flavour=sweet: the template has no 'flavour'. It asks for: technique, "),
        (["technique"], "--set technique: write key=value."),
        (["technique=TokenDrop"], "the template refused an answer, for the reason above. Nothing was written."),
        (
            ["kind=hook"],
            "--set kind=hook: kind is one of callback, plugin, strategy.",
        ),
    ],
)
def test_an_answer_that_the_template_refuses_is_one_line_and_writes_nothing(tmp_path, capsys, answers, message):
    pytest.importorskip("cookiecutter")
    code, _, err = run(capsys, "new", "technique", "--no-input", "--output", str(tmp_path), "--set", *answers)
    assert code == 2
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_not_given_is_asked_and_a_default_follows_what_was(tmp_path, capsys, monkeypatch):
    pytest.importorskip("cookiecutter")
    words = ["new", "technique", "--output", str(tmp_path), "--set", "technique=warm-up", "kind=plugin", "paper=none"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Warms up\n\n"))  # the summary; the class's name as offered
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert "[1/2]" in out
    assert "[2/2] Name of the class (WarmUp)" in out
    assert "Name: lower-case" not in out
    assert 'does="Warms up"' in (tmp_path / "eke-warm-up/src/eke_warm_up/plugin.py").read_text()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "there is nobody to ask: add --no-input" in run(capsys, *words)[2]


def test_a_folder_that_is_there_is_not_written_over(tmp_path, capsys):
    pytest.importorskip("cookiecutter")
    words = ["new", "technique", "--no-input", "--output", str(tmp_path), "--set", "technique=warm-up"]
    assert run(capsys, *words)[0] == 0
    code, _, err = run(capsys, *words)
    assert code == 2
    assert 'eke-warm-up" directory already exists. Remove it, or give another --output.' in err


def test_without_cookiecutter_the_way_to_get_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cookiecutter", None)
    monkeypatch.setitem(sys.modules, "cookiecutter.exceptions", None)
    code, _, err = run(capsys, "new", "technique", "--no-input", "--output", str(tmp_path))
    assert (code, err) == (2, "eke: eke new needs cookiecutter. Install it: pip install 'eke[new]'\n")


@pytest.mark.parametrize("how", [["--wheel"], []], ids=["from the checkout", "from an sdist"])
def test_the_wheel_holds_the_templates_file_by_file(tmp_path, how):
    pytest.importorskip("build")
    templates = CORE.parent / "templates"
    if not templates.exists():
        pytest.skip("runs in a checkout")
    command = [sys.executable, "-m", "build", "--no-isolation", *how, "--outdir", tmp_path, CORE]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name.removeprefix("eke/_templates/") for name in zipfile.ZipFile(wheel).namelist() if "_templates/" in name}
    files = (file for file in templates.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert held == {file.relative_to(templates).as_posix() for file in files}
