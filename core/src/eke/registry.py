"""Finds techniques in distribution metadata and imports one only when it is asked for."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from importlib.metadata import Distribution, EntryPoint, distributions
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal

import pluggy

from eke import argtypes, compose, spec
from eke.spec import ConflictError, EkeError, Technique

GROUP = "eke"

_manager = pluggy.PluginManager(GROUP)
_manager.add_hookspecs(spec)


def installed() -> dict[str, list[EntryPoint]]:
    """Map each installed technique's name to the entry points that claim it. Imports no plugin."""
    found: dict[str, list[EntryPoint]] = {}
    for distribution in distributions():  # not entry_points(): one unreadable distribution would stop them all
        for entry in _entries(distribution):
            claims = found.setdefault(entry.name, [])
            # An editable install beside a stale copy lists one distribution twice: that is no rival.
            if all(_normalized(entry) != _normalized(other) for other in claims):
                claims.append(entry)
    return dict(sorted(found.items()))


def available() -> dict[str, EntryPoint]:
    """Map each technique that exactly one distribution provides to its entry point. Imports no plugin."""
    return {name: claims[0] for name, claims in installed().items() if len(claims) == 1}


def canonical(name: str) -> str:
    """A technique's name as the registry holds it: distributions write ``layer-drop`` for ``layer_drop``."""
    return name.replace("-", "_")


def field(entry: EntryPoint, name: str) -> str:
    """Read one field of the metadata of the distribution that an entry point belongs to; empty where it has none."""
    try:
        return entry.dist.metadata.get(name) or ""
    except (OSError, TypeError, ValueError):  # no metadata file, or one that cannot be decoded
        return ""


def get(name: str) -> Technique:
    """Import one technique's plugin and return its record.

    Args:
        name: The technique's, ``layer_drop``, or ``layer-drop`` as the folder writes it.

    Raises:
        EkeError: it is not installed, does not load, or two distributions claim its name.
    """
    name = canonical(name)
    if not _manager.has_plugin(name):
        _load(name)
    (technique,) = _manager.subset_hook_caller("eke_technique", _all_but(name))()
    return technique


def peek(entry: EntryPoint) -> Technique | None:
    """A technique's record, read from the file of its entry module: the package around it, which imports torch, is
    not run. None where it cannot be read so.
    """
    if _manager.has_plugin(entry.name):
        return get(entry.name)
    file = module_file(entry)
    if file is None or (entry.attr and not entry.attr.isupper()):  # a class, whose file imports torch
        return None
    return read_record(file, entry.attr)


def read_record(file: Path, name: str = "") -> Technique | None:
    """The record of that name in a file, or the one that its hook returns; None where it has none, or does not run."""
    spec = spec_from_file_location(f"eke_record_{file.parent.name}_{file.stem}", file)
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        record = getattr(module, name) if name else module.eke_technique()
    except Exception:  # whatever is wrong with it: `eke.get` says what
        return None
    return record if isinstance(record, Technique) else None


def module_file(entry: EntryPoint) -> Path | None:
    """The file of an entry point's module, found without importing anything; None where there is none."""
    package, *inner = entry.module.split(".")
    try:
        found = find_spec(package)
    except (ImportError, ValueError):
        return None
    if found is None:
        return None
    if not inner:
        return Path(found.origin) if found.origin else None
    places = [Path(place, *inner) for place in found.submodule_search_locations or []]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return next((file for file in files if file.exists()), None)


def create(name: str, **arguments: Any) -> Any:
    """Build a technique's Lightning object.

    Raises:
        EkeError: as :func:`get`, or an argument that the technique does not take.
        ValueError: the technique refused the value of an argument.
    """
    technique = get(name)
    check_arguments(technique, arguments)
    return technique.build(**arguments)


def trainer_kwargs(
    *, on_changed_arguments: Literal["refuse", "warn"] = "refuse", **techniques: dict[str, Any]
) -> dict[str, Any]:
    """Build several techniques and put each under the Trainer argument it belongs to.

    Example::

        Trainer(max_epochs=3, **eke.trainer_kwargs(stacking={"stages": [0.3]}, adam8bit={}))

    Args:
        on_changed_arguments: What becomes of a run that resumes with other techniques or arguments than its checkpoint
            was written with: ``"refuse"`` it, or ``"warn"`` and go on as another run.
        techniques: Technique name to its arguments; ``{}`` takes the defaults.

    Raises:
        EkeError: as :func:`create`, or another word.
        ConflictError: techniques that cannot run together, or cannot bear the strategy among them.
    """
    if on_changed_arguments not in ("refuse", "warn"):
        raise EkeError(f"on_changed_arguments={on_changed_arguments!r}: give 'refuse' or 'warn'.")
    techniques = {canonical(name): arguments for name, arguments in techniques.items()}
    for name, arguments in techniques.items():
        if not isinstance(arguments, Mapping):
            raise EkeError(f"{name}={arguments!r}: arguments by name are needed, such as {name}={{}} for the defaults.")
    ordered = compose.order([get(name) for name in techniques])
    for technique in ordered:
        check_arguments(technique, techniques[technique.name])
    kwargs: dict[str, Any] = {}
    everything = []
    for technique in ordered:
        built = technique.build(**techniques[technique.name])
        everything.append(built)
        if on_changed_arguments != "refuse":  # that is the default, or what the class was set to
            built.on_changed_arguments = on_changed_arguments
        argument = trainer_argument(built)
        if argument == "strategy":
            kwargs[argument] = built  # of two strategies one has been refused
        else:
            kwargs.setdefault(argument, []).append(built)
    if found := compose.refusals(everything):
        raise ConflictError(" ".join(found))
    if "strategy" in kwargs:
        from eke import strategies

        strategies.check(everything, kwargs["strategy"])
    return kwargs


def trainer_argument(built: object) -> str:
    """Name the Trainer argument that takes this object: ``callbacks``, ``strategy`` or ``plugins``."""
    from lightning.pytorch import Callback
    from lightning.pytorch.strategies import Strategy

    if isinstance(built, Callback):
        return "callbacks"
    return "strategy" if isinstance(built, Strategy) else "plugins"


def check_arguments(technique: Technique, arguments: dict[str, Any]) -> None:
    """Refuse an argument that the technique's factory does not have, or whose value is of another type than it says.

    Raises:
        EkeError: which names the technique, the argument and what it takes.
    """
    try:
        signature = inspect.signature(technique.resolve())
    except ValueError:
        return  # a factory written in C may have none
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(_without_annotation(parameter) for parameter in signature.parameters.values())
        raise EkeError(f"{technique.name}: {error}. It takes: {takes or 'no arguments'}.") from None
    for name, wanted in argtypes.of(technique.resolve()).items():
        if name in arguments and not argtypes.fits(arguments[name], wanted):
            raise EkeError(
                f"{technique.name}: {name}={arguments[name]!r} is {argtypes.kind(arguments[name])}; "
                f"{argtypes.written(wanted)} is needed."
            )


def _load(name: str) -> None:
    claims = installed().get(name, [])
    if not claims:
        alike = difflib.get_close_matches(name, available(), n=2)
        meant = f"Did you mean {' or '.join(alike)}? " if alike else ""
        raise EkeError(f"no technique named {name!r} is installed. {meant}`eke list` shows those that are.")
    if len(claims) > 1:
        rivals = " and ".join(sorted(_distribution(entry) for entry in claims))
        raise EkeError(f"two distributions provide the technique {name!r}: {rivals}. Uninstall one of them.")
    (entry,) = claims
    where = f"{_distribution(entry)} {field(entry, 'Version')}".strip()
    try:
        _manager.register(_plugin(entry.load()), name=name)
        _manager.check_pending()  # a hook under a misspelt name would otherwise go unseen
        records = _manager.subset_hook_caller("eke_technique", _all_but(name))()
        if len(records) != 1 or not isinstance(records[0], Technique) or records[0].name != name:
            got = ", ".join(_described(record) for record in records) or "nothing"
            raise EkeError(f"its hook eke_technique must return one record named {name!r}; it returned {got}")
    except Exception as error:
        if _manager.has_plugin(name):
            _manager.unregister(name=name)
        raise EkeError(f"{where} is installed but does not load: {error}") from error


def _plugin(loaded: Any) -> Any:
    """What an entry point names, as pluggy takes it: a module with the hook, a record, or a class that has one."""
    record = loaded if isinstance(loaded, Technique) else vars(loaded).get("technique")
    return _Gives(record) if isinstance(record, Technique) else loaded


class _Gives:
    """A plugin of one record."""

    def __init__(self, record: Technique) -> None:
        self.record = record

    @spec.hookimpl
    def eke_technique(self) -> Technique:
        return self.record


def _all_but(name: str) -> list[object]:
    return [plugin for plugin_name, plugin in _manager.list_name_plugin() if plugin_name != name]


def _entries(distribution: Distribution) -> list[EntryPoint]:
    try:
        return list(distribution.entry_points.select(group=GROUP))
    except (OSError, TypeError, ValueError):  # entry_points.txt that cannot be read
        return []


def _distribution(entry: EntryPoint) -> str:
    return field(entry, "Name") or f"a distribution without a name (entry point {entry.value})"


def _normalized(entry: EntryPoint) -> str:
    return _distribution(entry).lower().replace("_", "-").replace(".", "-")


def _without_annotation(parameter: inspect.Parameter) -> str:
    return str(parameter.replace(annotation=inspect.Parameter.empty))


def _described(record: object) -> str:
    return repr(record.name) if isinstance(record, Technique) else f"{record!r}, a {type(record).__name__}"
