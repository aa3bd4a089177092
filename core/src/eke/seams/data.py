"""Which samples a run sees, in which order, and where it goes on after a resume.

The tricks it hides: ``DataLoader`` forbids setting its sampler, but ``loader.batch_sampler.sampler`` may be set;
Lightning restarts a plain loader's epoch on a mid-epoch resume, and with workers it replays the first epoch's order;
and it hands loader state back only in mid-epoch. A resumable loader remembers the random state with which its
iterator was made, makes it again from there and drops what had been seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from eke import compat
from eke.seams.state import rng_state, set_rng_state
from eke.spec import ResumeError


class Position:
    """Where the training data of a run stands: the random state behind each loader's order, and the batches used."""

    def __init__(self) -> None:
        self.places: list[_Place] = []
        self.pending: dict[str, Any] | None = None  # from a checkpoint, until the loaders have taken it up

    def attach(self, loader: Any) -> None:
        """Make a train loader resumable. One that keeps its own state, or is no ``DataLoader``, is left alone."""
        if not isinstance(loader, DataLoader) or (hasattr(loader, "state_dict") and not isinstance(loader, _Resumable)):
            return
        plain = loader.plain if isinstance(loader, _Resumable) else type(loader)
        if plain not in _classes:
            _classes[plain] = type(f"Resumable{plain.__name__}", (_Resumable, plain), {"plain": plain})
        known = [place for place in self.places if place.loader is loader]  # a loader may be asked for again
        place = known[0] if known else _Place(loader, self)
        if not known:
            self.places.append(place)
        loader.__class__ = _classes[plain]
        loader.eke_place = place

    def detach(self) -> None:
        """Give each loader its own class back. Where it stood is kept, for a checkpoint written after the run."""
        for place in self.places:
            if isinstance(place.loader, _Resumable):
                place.loader.__class__ = place.loader.plain
                del place.loader.eke_place

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        used = compat.batches_done(trainer)
        return {
            "epoch": compat.epoch_of_next_batch(trainer),
            "loaders": [
                {"begun": place.begun if used else None, "generators": _generator_states(place.loader)}
                for place in self.places
            ],
            "used": used,
            "rng": rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self.pending = state

    def start(self, trainer: Trainer) -> None:
        """Called when training starts: puts back what the loaders could not take up each by itself."""
        if self.pending is None:
            return
        if len(self.places) > 1 and self.pending["used"]:
            # Several loaders draw in turns from one random state, so they are replayed in turns.
            together = compat.combined_loader(trainer)
            for _ in range(self.pending["used"]):
                next(together)
            for place, saved in zip(self.places, self.pending["loaders"], strict=False):
                _set_random(place.loader, self.pending["rng"], saved["generators"])
        elif not self.places:
            set_rng_state(self.pending["rng"])
        self.pending = None


class _Place:
    """Where one loader stands."""

    def __init__(self, loader: DataLoader, position: Position) -> None:
        self.loader = loader
        self.position = position
        self.begun: dict[str, Any] | None = None  # random state with which the running iterator was made

    def rewind(self) -> None:
        """Let the next iterator be as the running one was when it was made: for a copy of the process, which looks."""
        self.position.pending = None
        if self.begun is not None:
            first = self.position.places[0] is self
            _set_random(self.loader, {**self.begun["rng"], "cuda": []} if first else None, self.begun["generators"])

    def saved(self) -> dict[str, Any] | None:
        """This loader's part of a checkpoint that waits to be taken up."""
        pending = self.position.pending
        if pending is None:
            return None
        number = self.position.places.index(self)
        loaders = pending["loaders"]
        return loaders[number] if number < len(loaders) else {"begun": None, "generators": []}


class _Resumable(DataLoader):  # a DataLoader itself, or an instance could not change to it: layouts would differ
    """Mixed into the class of a user's loader, on that one instance."""

    def __iter__(self) -> Iterator[Any]:
        saved = self.eke_place.saved()
        if saved is None:
            return self._begin()
        pending = self.eke_place.position.pending
        for sampler in (self.sampler, getattr(self.batch_sampler, "sampler", None)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(pending["epoch"])  # Lightning does so only after the iterator exists
        if pending["epoch"] > 0 and self.num_workers > 0 and self.persistent_workers:
            super().__iter__()  # such workers are started once: their first seed was drawn in an earlier epoch
        begun = saved["begun"] or {"rng": pending["rng"], "generators": saved["generators"]}
        places = self.eke_place.position.places
        # The first loader's iterator starts from the saved state, the others' follow it in the same stream.
        _set_random(self, begun["rng"] if places[0] is self.eke_place else None, begun["generators"])
        iterator = self._begin()
        if saved["begun"] is not None and len(places) == 1:
            for _ in range(pending["used"]):
                next(iterator)
            _set_random(self, pending["rng"], saved["generators"])
        return iterator

    def _begin(self) -> Iterator[Any]:
        self.eke_place.begun = {"rng": rng_state(), "generators": _generator_states(self)}
        return super().__iter__()

    # Lightning asks for these two before it believes that a loader can be resumed in mid-epoch. The state itself
    # lies with Eke's own, because Lightning does not hand it back at an epoch's end.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


_classes: dict[type[DataLoader], type[DataLoader]] = {}


def _generators(loader: DataLoader) -> list[torch.Generator]:
    """Generators of the user's own that the loader draws from, each once."""
    owners = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _generator_states(loader: DataLoader) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(loader)]


def _set_random(loader: DataLoader, state: dict[str, Any] | None, generators: Sequence[torch.Tensor]) -> None:
    if state is not None:
        set_rng_state(state)
    for generator, own in zip(_generators(loader), generators, strict=False):
        generator.set_state(own)


class IndexTap:
    """Remembers which samples went into each batch, with any number of workers. Put it on in ``alter_loader``.

    :meth:`at` gives the indices of a batch by its number in the epoch.
    """

    def __init__(self, loader: DataLoader) -> None:
        if loader.batch_sampler is None:
            raise ValueError("The loader has no batch sampler, so its samples have no indices.")
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
                raise ResumeError(
                    f"which samples batch {batch_idx} of this epoch holds is not known: the run goes on in the middle "
                    "of the epoch from a checkpoint that was written without Eke, or with a loader that keeps a state "
                    "of its own and passes over what was seen. Resume from a checkpoint of an epoch's end."
                )
            self._last = self._batches.popleft()
            self._passed += 1
        return self._last

    def remove(self) -> None:
        self._sampler.__class__ = self._class
