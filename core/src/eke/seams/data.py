"""Which samples a run sees, in which order, and where it goes on after a resume.

The tricks it hides: ``DataLoader`` forbids setting its sampler, but ``loader.batch_sampler.sampler`` may be set;
Lightning restarts a plain loader's epoch on a mid-epoch resume, and with workers it replays the first epoch's order;
it hands loader state back only in mid-epoch; it reads one batch ahead where data has no length; and it may replace
loaders in each epoch. So the random state is kept with which the iterators over all loaders together were made: they
are made again from there, and what had been seen is dropped.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from eke import compat
from eke.seams.state import plain_rng, rng_state, set_rng_state
from eke.spec import ArgumentError, EkeError


class Position:
    """Where the training data of a run stands: the random state behind its order, and the batches used.

    Loaders count by their place among those of the run, not by when they came: one may replace another.

    Attributes:
        begun: Random state and generators with which the running epoch's iterators were made.
        ahead: The same before the last batch was asked for: the next one is drawn then where data has no length.
        again: Of each loader that is shorter than the others and has begun anew in this epoch: at which batch, and with
            which random state and generators.
        keeps_state: Whether a loader keeps a state of its own.
        loads: How often the run has asked for its loaders.
    """

    def __init__(self, trainer: Trainer | None = None) -> None:
        self.trainer = trainer
        self.begun: dict[str, Any] | None = None
        self.ahead: dict[str, Any] | None = None
        self.again: dict[int, dict[str, Any]] = {}
        self.pending: dict[str, Any] | None = None  # from a checkpoint, until iterators are made
        self.loads, self.loading = 0, False
        self._asked = 0
        self._owned: list[Any] = []
        self._together: CombinedLoader | None = None
        self.keeps_state = False
        self._sources: list[_Source] = []

    # ------------------------------------------------------------------ loaders come

    @contextmanager
    def loads_now(self) -> Iterator[None]:
        """Inside, the run asks for its train loaders, if it does so. What else it asks for are those of validation: the
        Trainer's own state tells that of most, but not of all."""
        self.loads, self.loading = self.loads + 1, True
        try:
            yield
        finally:
            self.loading = False

    def attach(self, owned: list[Any]) -> None:
        """One of them has come. ``owned``: those whose samples are chosen now: a state that such a loader keeps of its
        own counts other samples, and is not given back."""
        if self._asked != self.loads:
            self._asked, self._owned = self.loads, []
        self._owned += owned

    def attach_all(self, states: list[dict[str, Any]]) -> None:
        """All of them are there, and Lightning is about to draw. ``states``: of loaders that keep their own."""
        combined = compat.combined_loader(self.trainer)
        self.detach()
        if combined is None:
            return
        plain, several = type(combined), len(combined.flattened) > 1
        if (plain, several) not in _classes:
            bases = (_Several if several else _Together, plain)
            _classes[plain, several] = type(f"Resumable{plain.__name__}", bases, {"plain": plain})
        combined.__class__, combined.eke_position = _classes[plain, several], self
        self._together = combined
        self._sources = sources(one for one in combined.flattened if not self._by_itself(one))
        self.keeps_state = any(map(compat.keeps_state, combined.flattened))
        if states:
            self.load_states(states)

    def detach(self) -> None:
        """Give the loaders' combination its own class back. Where it stood is kept, for a checkpoint after the run."""
        if self._together is not None:
            self._together.__class__ = self._together.plain
            del self._together.eke_position
            self._together = None

    # ------------------------------------------------------------------ where they stand

    def before_batch(self, rng: Any, generators: list[Any]) -> None:
        """A batch is about to be asked for."""
        self.ahead = {"rng": rng, "generators": generators}

    def generators(self) -> list[Any]:
        """States of all generators that the data draws from, of the user's own."""
        return [source.state() for source in self._sources]

    def set_generators(self, states: Iterable[Any]) -> None:
        for source, own in zip(self._sources, states, strict=False):
            source.set(own)

    def load_states(self, states: list[dict[str, Any]]) -> None:
        """Give the loaders that keep their own state theirs."""
        compat.load_loader_states(self.trainer, states, self._owned)

    def loader_states(self) -> list[dict[str, Any]]:
        """Of those that keep their own."""
        return compat.loader_states(self.trainer) if self.keeps_state else []

    def rewind(self) -> None:
        """Let the next iterators be as the running ones were when they were made: for a copy of the process, which
        looks."""
        self.pending = None
        if self.begun is not None:
            set_rng_state({**self.begun["rng"], "cuda": []})
            self.set_generators(self.begun["generators"])

    def state_dict(self) -> dict[str, Any]:
        if self.pending is not None:  # nothing was drawn yet
            return {key: self.pending[key] for key in ("begun", "generators", "ahead", "again")}
        generators = self.generators() if self._sources else []
        return {"begun": self.begun, "generators": generators, "ahead": self.ahead, "again": self.again.copy()}

    @staticmethod
    def plain(state: dict[str, Any]) -> dict[str, Any]:
        """What :meth:`state_dict` gave, in plain values."""

        def one(moment: dict[str, Any] | None) -> dict[str, Any] | None:
            return None if moment is None else {**moment, "rng": plain_rng(moment["rng"])}

        again = {number: one(moment) for number, moment in state["again"].items()}
        return {**state, "begun": one(state["begun"]), "ahead": one(state["ahead"]), "again": again}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Args:
        state: With ``"rng"``, and ``"epoch"``, ``"used"`` and ``"over"``: of the epoch whose iterators are to be
            made, the batches of it that were used, and whether these were all.
        """
        self.pending = state

    def _by_itself(self, loader: Any) -> bool:
        return compat.keeps_state(loader) and not any(one is loader for one in self._owned)

    def _begin(self) -> None:
        self.begun = {"rng": rng_state(), "generators": self.generators()}
        self.ahead, self.again = None, {}

    def _resume(self, combined: CombinedLoader, make: Any) -> None:
        pending, self.pending = self.pending, None
        for loader in combined.flattened:
            batches = getattr(loader, "batch_sampler", None)
            for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(pending["epoch"])  # Lightning does so only after the iterator exists
            if pending["epoch"] > 0 and getattr(loader, "persistent_workers", False):
                iter(loader)  # such workers are started once: their first seed was drawn in an earlier epoch
        begun = pending["begun"] or {"rng": pending["rng"], "generators": pending["generators"]}
        set_rng_state(begun["rng"])
        self.set_generators(begun["generators"])
        self._begin()
        make()
        if pending["begun"] is None:
            return
        if not pending["over"] and pending["used"]:
            self.again = dict(pending["again"])
            self._skip(combined, pending["used"])
        self.ahead = pending["ahead"]
        # As the batch that is read ahead found it; the run puts back its own where it goes on.
        after = pending if self.ahead is None or pending["used"] == 0 else self.ahead
        set_rng_state(after["rng"])
        self.set_generators(after["generators"])

    def _skip(self, combined: CombinedLoader, batches: int) -> None:
        """Drop what was seen: loaders draw in turns from one random state, and one that began anew did so later on."""
        iterators = compat.iterators_of(combined)
        own = {number for number, loader in enumerate(combined.flattened) if self._by_itself(loader)}
        counted = set(range(len(iterators))) - own
        for done in range(batches):
            for number in sorted(counted):
                if done == 0 or number not in self.again:
                    next(iterators[number], None)
        for batch in sorted({one["batch"] for one in self.again.values()}):
            anew = sorted(number for number in counted if self.again.get(number, {}).get("batch") == batch)
            for number in anew:
                if number == anew[0]:
                    set_rng_state(self.again[number]["rng"])
                    self.set_generators(self.again[number]["generators"])
                iterators[number] = iter(combined.flattened[number])
                next(iterators[number], None)
            for number in anew:
                for _ in range(batches - batch - 1):
                    next(iterators[number], None)
        compat.taken_up(combined, batches, self.again)


class _Together(CombinedLoader):
    """Mixed into the class of the loaders' combination, on that one instance."""

    def __iter__(self) -> Any:
        position = self.eke_position
        if position.pending is not None:
            position._resume(self, super().__iter__)
        else:
            position._begin()
            super().__iter__()
        return self

    def __copy__(self) -> CombinedLoader:
        twin = self.plain.__new__(self.plain)
        vars(twin).update({key: value for key, value in vars(self).items() if key != "eke_position"})
        return twin


class _Several(_Together):
    """With more than one, the shorter begin anew."""

    def __next__(self) -> Any:
        position, before = self.eke_position, list(compat.iterators_of(self))
        item = super().__next__()
        for number, iterator in enumerate(compat.iterators_of(self)):
            if iterator is not before[number] and position.ahead is not None:
                position.again[number] = {"batch": item[1], **position.ahead}
        return item


_classes: dict[tuple[type[CombinedLoader], bool], type[CombinedLoader]] = {}


class _Source:
    """A generator of the user's own, of torch, NumPy or Python, and its state in plain values."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def state(self) -> Any:
        if isinstance(self.generator, torch.Generator):
            return self.generator.get_state()
        if isinstance(self.generator, random.Random):
            return self.generator.getstate()
        return _plain(_bits(self.generator).state)

    def set(self, state: Any) -> None:
        if isinstance(self.generator, torch.Generator):
            self.generator.set_state(state)
        elif isinstance(self.generator, random.Random):
            version, words, gauss = state
            self.generator.setstate((version, tuple(words), gauss))
        else:
            _bits(self.generator).state = state


def _bits(generator: Any) -> Any:
    """The part of a NumPy generator that has a state."""
    return generator.bit_generator if hasattr(generator, "bit_generator") else generator._bit_generator


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def sources(loaders: Iterable[Any]) -> list[_Source]:
    """Generators that loaders hold, their samplers, data sets and what turns samples into batches, each once."""
    import numpy

    kinds = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)
    found: dict[int, _Source] = {}
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if isinstance(value, kinds):
            found.setdefault(id(value), _Source(value))
        elif depth and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, (list, tuple)) and len(value) <= _PARTS:
                parts = list(value)
            elif isinstance(value, dict) and len(value) <= _PARTS:
                parts = list(value.values())
            elif isinstance(value, _OTHERS) or not hasattr(value, "__dict__"):
                return
            else:
                parts = list(vars(value).values())
            for part in parts:
                look(part, depth - 1)

    for loader in loaders:
        look(loader, _DEPTH)
    return list(found.values())


_OTHERS = (torch.Tensor, type, str, bytes, Trainer, LightningModule, Callback)  # what a data set may know, and not have
_DEPTH = 6  # loader, batch sampler, sampler, data set, its data set, a list of transforms
_PARTS = 64  # of a list or mapping: transforms or joined data sets, not samples


class TapError(EkeError, IndexError):
    """The samples of a batch are not known."""


class IndexTap:
    """Remembers which samples went into each batch, with any number of workers. Put it on in ``alter_loader``.

    :meth:`at` gives the indices of a batch by its number in the epoch.
    """

    def __init__(self, loader: DataLoader) -> None:
        if loader.batch_sampler is None:
            raise ArgumentError("The loader has no batch sampler, so its samples have no indices.")
        self._loader = loader
        self._batches: deque[list[int]] = deque()
        self._passed = 0  # batches of the running epoch that were asked for or passed over
        self._last: list[int] = []
        self._sampler = loader.batch_sampler
        self._class = type(loader.batch_sampler)
        tap = self

        class Tapped(self._class):
            def __iter__(self) -> Iterator[list[int]]:
                tap._batches.clear()  # a new iterator: what was read ahead of the old one is void
                tap._passed = 0
                for batch in super().__iter__():
                    tap._batches.append(list(batch))
                    yield batch

        loader.batch_sampler.__class__ = Tapped

    def at(self, batch_idx: int) -> list[int]:
        """The indices of a batch by its number in the epoch; earlier ones are forgotten, as after a resume."""
        while self._passed <= batch_idx:
            if not self._batches:
                raise TapError(
                    f"The {type(self._loader).__name__} gave batch {batch_idx} of the epoch without asking its batch "
                    f"sampler for it, which has given {self._passed} so far: which samples it holds is not known. A "
                    "loader that skips by itself where it resumes has to draw what it skips from its batch sampler."
                )
            self._last = self._batches.popleft()
            self._passed += 1
        return self._last

    def remove(self) -> None:
        self._sampler.__class__ = self._class
