import importlib
import subprocess
import sys

import eke
import pytest
from eke import registry


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one plugin module on the path, as pip would, without pip."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution, name, source, metadata=None):
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        if metadata is None:
            metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text(f"[eke]\n{name} = {module}\n")
        importlib.invalidate_caches()
        return info

    yield install
    for name, plugin in registry._manager.list_name_plugin():
        if str(tmp_path) in (getattr(plugin, "__file__", None) or ""):
            registry._manager.unregister(name=name)
            sys.modules.pop(plugin.__name__, None)


def source(name, factory="dict", kind="callback", **fields):
    written = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    return (
        "import eke\n\n@eke.hookimpl\ndef eke_technique():\n"
        f"    return eke.Technique({name!r}, {kind!r}, {factory}, {written})\n"
    )


def test_a_broken_plugin_stops_nobody_but_its_own_user(install):
    install("eke-good", "good", source("good"))
    install("eke-broken", "broken", "import a_library_that_is_not_there")
    assert {"good", "broken"} <= eke.available().keys()
    assert eke.create("good", a=1) == {"a": 1}
    for _ in range(2):
        with pytest.raises(
            eke.EkeError, match="eke-broken 1.0 is installed but does not load: No module named 'a_library_that"
        ):
            eke.get("broken")
    assert eke.get("good").name == "good"


def test_a_plugin_that_exits_on_import_is_named_too(install):
    install("eke-quits", "quits", "raise RuntimeError('no such device')")
    with pytest.raises(eke.EkeError, match="eke-quits 1.0 is installed but does not load: no such device"):
        eke.get("quits")


def test_two_distributions_with_one_name_are_both_named_and_hurt_no_other(install):
    install("eke-same", "same", source("same"))
    install("other-same", "same", source("same"))
    install("eke-good", "good", source("good"))
    with pytest.raises(eke.EkeError, match="'same': eke-same and other-same. Uninstall one of them."):
        eke.get("same")
    assert "same" not in eke.available()
    assert [entry.dist.name for entry in registry.installed()["same"]] == ["eke-same", "other-same"]
    assert eke.get("good").name == "good"


def test_the_same_distribution_found_twice_is_no_rival(install, tmp_path, monkeypatch):
    info = install("eke-good", "good", source("good"))
    stale = tmp_path / "stale" / "Eke_Good-0.9.dist-info"
    stale.mkdir(parents=True)
    (stale / "METADATA").write_text("Metadata-Version: 2.1\nName: Eke_Good\nVersion: 0.9\n")
    (stale / "entry_points.txt").write_text((info / "entry_points.txt").read_text())
    monkeypatch.syspath_prepend(stale.parent)
    monkeypatch.syspath_prepend(tmp_path)
    assert [entry.dist.version for entry in registry.installed()["good"]] == ["1.0"]


def test_a_misspelt_hook_is_refused_every_time_and_hurts_no_other(install):
    install("eke-typo", "typo", source("typo").replace("def eke_technique", "def eke_tehcnique"))
    install("eke-good", "good", source("good"))
    for _ in range(2):
        with pytest.raises(eke.EkeError, match="eke-typo 1.0 is installed but does not load: unknown hook 'eke_teh"):
            eke.get("typo")
    assert eke.get("good").kind == "callback"


def test_a_plugin_without_the_hook_is_refused(install):
    install("eke-empty", "empty", "")
    with pytest.raises(eke.EkeError, match="must return one record named 'empty'; it returned nothing"):
        eke.get("empty")


def test_a_record_under_another_name_is_refused_and_hurts_no_other(install):
    install("eke-other", "other", source("another"))
    install("eke-another", "another", source("another"))
    for _ in range(2):
        with pytest.raises(eke.EkeError, match="must return one record named 'other'; it returned 'another'"):
            eke.get("other")
    assert eke.get("another").name == "another"


def test_a_hook_that_returns_no_record_is_refused(install):
    install("eke-words", "words", "import eke\n\n@eke.hookimpl\ndef eke_technique():\n    return 'words'\n")
    with pytest.raises(eke.EkeError, match="must return one record named 'words'; it returned 'words', a str"):
        eke.get("words")


def test_a_record_outside_the_vocabulary_is_refused_with_the_words_it_may_use(install):
    install("eke-wild", "wild", source("wild", effects=("burns weights",)))
    with pytest.raises(eke.EkeError, match="eke-wild 1.0 .*verb of effect 'burns weights' is 'burns'. Use one of: rep"):
        eke.get("wild")


@pytest.mark.parametrize("metadata", ["", "Metadata-Version: 2.1\nVersion: 1.0\n"])
def test_damaged_metadata_hurts_no_other(install, metadata):
    install("eke-good", "good", source("good"))
    install("eke-damaged", "damaged", source("damaged"), metadata)
    assert eke.get("good").name == "good"
    assert "damaged" in registry.installed()


def test_metadata_that_is_missing_hurts_no_other(install):
    install("eke-good", "good", source("good"))
    (install("eke-damaged", "damaged", source("damaged")) / "METADATA").unlink()
    assert eke.get("good").name == "good"
    assert "damaged" in registry.installed()


def test_a_rival_whose_metadata_cannot_be_decoded_is_told_by_its_entry_point(install):
    install("eke-same", "same", source("same"))
    (install("other-same", "same", source("same")) / "METADATA").write_bytes(b"Name: \xff")
    with pytest.raises(eke.EkeError, match="a distribution without a name .entry point other_same. and eke-same"):
        eke.get("same")


@pytest.mark.parametrize("content", ["[eke]\nno equals sign\n", "no section = here\n", "[eke\na = b\n", "\xff"])
def test_entry_points_that_cannot_be_read_hurt_no_other(install, content):
    install("eke-good", "good", source("good"))
    (install("eke-damaged", "damaged", "") / "entry_points.txt").write_text(content, encoding="latin-1")
    assert eke.get("good").name == "good"


def test_an_unknown_name_gets_those_that_are_like_it_and_no_invitation_to_install_it(install):
    install("eke-good-one", "good_one", source("good_one"))
    with pytest.raises(eke.EkeError, match="no technique named 'good_onne' is .* mean good_one. `eke list`"):
        eke.get("good-onne")
    with pytest.raises(eke.EkeError) as caught:
        eke.get("zzzzzz")
    assert str(caught.value) == "no technique named 'zzzzzz' is installed. `eke list` shows those that are."


def test_a_name_may_have_hyphens(install):
    install("eke-good-one", "good_one", source("good_one"))
    assert eke.get("good-one") == eke.get("good_one")
    assert eke.create("good-one", a=1) == {"a": 1}


def test_an_argument_of_another_type_is_refused_before_it_is_built(install):
    install("eke-typed", "typed", source("typed", "make") + "\n\ndef make(count: int): raise AssertionError\n")
    with pytest.raises(eke.EkeError, match="typed: count='three' is a str; an int is needed."):
        eke.create("typed", count="three")


def test_a_record_is_read_without_running_the_package_around_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "eke_heavy"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('run')\n")
    (package / "entry.py").write_text(source("heavy", does="Is heavy"))
    info = tmp_path / "eke_heavy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eke-heavy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[eke]\nheavy = eke_heavy.entry\n")
    importlib.invalidate_caches()
    assert registry.peek(eke.available()["heavy"]).does == "Is heavy"
    (package / "entry.py").write_text("import a_library_that_is_not_there\n")
    assert registry.peek(eke.available()["heavy"]) is None


def test_an_argument_that_the_technique_does_not_take_is_named_with_those_it_takes(install):
    install("eke-picky", "picky", source("picky", "make") + "\n\ndef make(first, second=2): return first, second\n")
    assert eke.create("picky", first=1) == (1, 2)
    with pytest.raises(
        eke.EkeError, match="picky: got an unexpected keyword argument 'third'. It takes: first, second=2"
    ):
        eke.create("picky", first=1, third=3)
    with pytest.raises(eke.EkeError, match="picky: missing a required argument: 'first'. It takes: first, second=2."):
        eke.create("picky")


CALLBACK = """
from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy


class Own(Callback):
    pass


def strategy():
    return SingleDeviceStrategy("cpu")
"""


def test_each_object_goes_under_the_trainer_argument_of_its_class_in_solved_order(install):
    install("eke-late", "late", source("late", "Own", effects=("reads weights",)) + CALLBACK)
    install("eke-early", "early", source("early", "Own", effects=("changes weights",)) + CALLBACK)
    install("eke-digits", "digits", source("digits", "Precision") + CALLBACK)
    install("eke-place", "place", source("place", "strategy", kind="strategy") + CALLBACK)
    kwargs = eke.trainer_kwargs(late={}, digits={}, early={}, place={})
    assert {key: type(value).__name__ for key, value in kwargs.items()} == {
        "callbacks": "list",
        "plugins": "list",
        "strategy": "SingleDeviceStrategy",
    }
    assert [type(one).__module__ for one in kwargs["callbacks"]] == ["eke_early", "eke_late"]
    assert [type(one).__name__ for one in kwargs["plugins"]] == ["Precision"]


@pytest.mark.parametrize("given", [None, 3, [0.3]])
def test_what_holds_no_arguments_by_name_is_refused_in_words(given):
    with pytest.raises(eke.EkeError, match=r"stacking=.*: arguments by name are needed, such as stacking=\{\}"):
        eke.trainer_kwargs(stacking=given)


def test_two_strategies_are_refused_before_one_is_lost(install):
    install("eke-one", "one", source("one", "strategy", kind="strategy") + CALLBACK)
    install("eke-two", "two", source("two", "strategy", kind="strategy") + CALLBACK)
    with pytest.raises(eke.ConflictError, match="'one' and 'two' both give a strategy, and a Trainer takes one."):
        eke.trainer_kwargs(one={}, two={})


def test_techniques_that_exclude_each_other_are_refused_before_any_is_built(install):
    build = "\n\ndef make():\n    raise AssertionError('built')\n"
    install("eke-one", "one", source("one", "make", conflicts={"two": "both own the schedule."}) + build)
    install("eke-two", "two", source("two", "make") + build)
    with pytest.raises(eke.ConflictError, match="'one' cannot run together with 'two': both own the schedule."):
        eke.trainer_kwargs(two={}, one={})


def test_listing_imports_neither_torch_nor_lightning():
    code = "import sys, eke; eke.available(); sys.exit(bool({'torch', 'lightning'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)
