"""Where a run stands, so that a checkpoint is of a moment between two batches, and a resumed run does what that moment
had left to do.

The tricks it hides: Lightning saves its counters as they are in the hook that saves, which differ from hook to hook,
and guesses from them where to go on: validations, schedules and epochs' ends that came after the file are left out,
and finished epochs are taken up again. After an error it saves what a half-done batch has left behind. Here the moments
are noted as they pass, and a resumed run enters Lightning's loops where it left them.

An epoch passes through these stages:

    "begin"       the epoch before is through
    "between"     the next batch is to be asked for
    "batch"       a batch is through; its validation and the schedules that follow it are due
    "validated"   its validation is through; the schedules are due
    "trained"     the last batch is through, with all that follows it
    "epoch end"   the hooks of the epoch's end are through; schedules by a metric are due
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from eke import compat
from eke.seams import state
from eke.seams.data import Position, sources
from eke.seams.passes import Passes
from eke.seams.state import Copies
from eke.spec import ResumeError

# Stages of which the run's own state tells at any time while they last.
_LIVE = ("outside", "batch end", "validated", "epoch end", "over")


class Standing:
    """Of one run.

    Args:
        trainer, module: Of it.
        position: Of its data.
        passes: The window at hand, where a technique goes over it twice.
        others: Gives what else is noted at each moment: the techniques' states, the progress.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        position: Position,
        passes: Passes | None,
        others: Callable[[Copies], dict[str, Any]],
    ) -> None:
        self.trainer, self.module, self.position, self.passes, self.others = trainer, module, position, passes, others
        self.phase = "outside"
        self.resumes: dict[str, Any] | None = None  # where the run goes on, until it is there
        self._moment: dict[str, Any] | None = None  # the last one between two batches
        self._clean: dict[str, Any] | None = None  # the last one at which no gradient was held
        self._evaluated = False  # since the last batch
        self._evaluation: dict[str, Any] | None = None  # of a checkpoint, until the validation's loaders are there
        self._exhausted = False
        self._known: tuple[Any, list[Tensor], list[tuple[str, nn.Module, str]]] | None = None
        self._frozen: dict[str, Any] | None = None
        self._copies = Copies()

    # ------------------------------------------------------------------ moments pass

    def layers(self) -> list[tuple[object, str, Callable[..., Any]]]:
        """What to put around which method of whom."""
        loop = self.trainer.fit_loop
        return [
            (loop, "setup_data", self._load),
            (loop, compat.LOADERS_ARE_THERE, self._loaded),
            (loop, "on_advance_start", self._begin_epoch),
            (loop.epoch_loop, "reset", self._reset),
            (loop.epoch_loop, "advance", self._batch),
            (loop, "on_advance_end", self._end_epoch),
            (loop.epoch_loop.val_loop, "setup_data", self._load_validation),
        ]

    def _load(self, call_next: Callable[..., Any]) -> None:
        with self.position.loads_now():
            call_next()

    def _loaded(self, call_next: Callable[..., Any]) -> None:
        here = self.resumes
        begins = here is not None and here["stage"] in ("begin", "epoch end")
        if begins and here["loaders"] and compat.counters(self.trainer)["epoch"]:
            # These iterators are for nothing: the epoch's are made where it begins, as in a run that was not cut.
            self.position.attach_all([])
            self.position.load_states([])
        else:
            self.position.attach_all([] if here is None else here["loaders"])
        call_next()

    def _load_validation(self, call_next: Callable[..., Any]) -> None:
        call_next()
        here, loaders = self._evaluation, compat.validation_loaders(self.trainer)
        if here is None or not loaders:
            return
        self._evaluation = None
        if here["workers"]:
            random = state.rng_state()
            for loader in loaders:
                if getattr(loader, "persistent_workers", False) and not compat.has_workers_running(loader):
                    iter(loader)  # such workers are started once, and their seed was drawn before the run was cut
            state.set_rng_state(random)
        for source, own in zip(sources(loaders), here["generators"], strict=False):
            source.set(own)

    def _begin_epoch(self, call_next: Callable[..., Any]) -> None:
        if self.resumes is not None and self.resumes["stage"] in ("begin", "epoch end"):
            here, self.resumes = self.resumes, None
            if here["stage"] == "epoch end":
                compat.finish_epoch(self.trainer)
            if here["loaders"] and compat.counters(self.trainer)["epoch"]:
                self.position.load_states(here["loaders"])
            self._put_random(here)
        if self.resumes is None:
            self._note("begin")
            self.phase = "begin"
        call_next()

    def _reset(self, call_next: Callable[..., Any]) -> None:
        with warnings.catch_warnings():
            if self.resumes is not None:  # Eke lets any loader be resumed, which Lightning cannot know
                warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
            call_next()

    def _batch(self, call_next: Callable[..., Any], fetcher: Any) -> None:
        here, self.resumes = self.resumes, None
        if here is not None:
            stage = here["stage"]
            compat.stop_restarting(self.trainer, skip_validation=stage == "validated")
            compat.set_means(self.trainer, here["means"])
            self._put_random(here)
            if stage == "trained":
                raise StopIteration
            if stage != "between":
                self.phase = stage
                if stage == "batch":
                    self._note("batch")
                return
            compat.run_batch_loop(self.trainer, restarting=False)
        if self.phase == "batch" and not self._evaluated:
            self._moment = {**self._moment, "stage": "between", "counters": compat.counters(self.trainer)}
            if self._clean is not None and self._clean["counters"]["total"] == self._moment["counters"]["total"]:
                self._clean = self._moment
        else:
            self._note("between")
        self._evaluated = False
        self.phase = "in a batch"
        self.position.before_batch(self._moment["rng"], self._moment["data"]["generators"])
        try:
            call_next(fetcher)
        except StopIteration:
            self._exhausted = True
            raise
        self._note("batch")
        self.phase = "batch"

    def _end_epoch(self, call_next: Callable[..., Any]) -> None:
        self.resumes = None
        over = self._exhausted or compat.epoch_is_over(self.trainer)
        self._exhausted = False
        # A run that ends within an epoch calls its end nevertheless: what goes on later goes on before that.
        self._note("trained" if over else "between", Copies() if over else Copies(largest=None))
        self.phase = "ends" if over else "cut"
        call_next()
        if over:
            self.phase = "over"

    def batch_ended(self) -> None:
        """The hooks of a batch's end are being called, techniques' first."""
        self.phase = "batch end"

    def evaluated(self) -> None:
        """A validation in ``fit`` is through."""
        if self.phase in ("batch", "batch end", "validated"):
            self.phase, self._evaluated = "validated", True

    def evaluates(self) -> None:
        """One begins: until it is through, the run stands before it."""
        if self.phase == "validated":
            self.phase = "batch"
        self._evaluated = True

    def epoch_ended(self) -> None:
        """The hooks of an epoch's end are being called, techniques' first."""
        if self.phase == "ends":
            self.phase = "epoch end"

    # ------------------------------------------------------------------ a moment

    def _note(self, stage: str, copies: Copies | None = None) -> None:
        """Few calls, whatever the model: it runs for each batch."""
        gradients, copies, loaders = state.held_gradients(self.trainer), copies or self._copies, []
        if self.position.keeps_state:
            loaders = copy.deepcopy(self.position.loader_states())
        parameters, buffers = self._tensors()
        self._moment = {
            "stage": stage,
            "counters": compat.counters(self.trainer),
            "rng": state.rng_now(),
            "data": self.position.state_dict(),
            "loaders": loaders,
            "means": compat.means(self.trainer),
            "others": self.others(copies),
            "buffers": self._copied(buffers, copies) if buffers else {},
            "weights": parameters,
            "versions": [one._version for one in parameters],
            # weakly: what the user clears must not be held until the next moment
            "gradients": [(name, weakref.ref(one), one._version) for name, one in gradients.items()],
            "window": None if self.passes is None or not gradients else self.passes.state_dict(),
        }
        if not gradients:
            self._clean = self._moment

    def _tensors(self) -> tuple[list[Tensor], list[tuple[str, nn.Module, str]]]:
        """Parameters, and where buffers are; looked up again where the model has grown, with other optimizers then."""
        optimizers = self.trainer.strategy.optimizers
        if self._known is None or self._known[0] is not optimizers:
            parameters = [one for one in self.module.parameters() if not one.is_inference()]
            places = [(name, *name.rpartition(".")[::2]) for name, _ in self.module.named_buffers()]
            buffers = [(name, self.module.get_submodule(owner), own) for name, owner, own in places]
            self._known = optimizers, parameters, buffers
        return self._known[1:]

    @staticmethod
    def _copied(buffers: list[tuple[str, nn.Module, str]], copies: Copies) -> dict[str, Tensor]:
        kept = {}
        for name, owner, own in buffers:
            one = getattr(owner, own, None)
            if not isinstance(one, Tensor):
                continue
            # torch moves a batch norm's statistics without counting it as a change
            running = name.endswith(("running_mean", "running_var"))
            kept[name] = one.detach().clone() if running else copies.take(one, "buffers", name)
        return kept

    def _intact(self, moment: dict[str, Any]) -> bool:
        """Whether the weights, and the gradients that were held, are still those of the moment."""
        held = {name: one.grad for name, one in self.module.named_parameters()} if moment["gradients"] else {}
        for name, kept, version in moment["gradients"]:
            one = kept()
            if one is None or held.get(name) is not one or one._version != version:
                return False
        return [one._version for one in moment["weights"]] == moment["versions"]

    def past(self) -> dict[str, Any] | None:
        """The moment of which a checkpoint written now has to be; None where it can be of now."""
        if self._frozen is not None:
            return self._frozen
        if self.resumes is not None or self._moment is None or self.phase in _LIVE:
            return None
        if self.phase != "in a batch":
            return None if self._followed() else self._moment  # nothing trains there
        if compat.batch_is_through(self.trainer):
            return None
        found = next((one for one in (self._moment, self._clean) if one is not None and self._intact(one)), None)
        return found or {**self._moment, "gradients": [], "window": None, "moved": True}

    def freeze(self) -> None:
        """The run has ended or failed: what is undone now does not belong to the checkpoint that may be written yet."""
        if self.resumes is None and self._moment is not None and self._frozen is None:
            past = self.past()
            if past is None:
                self._note(self._stage())
                past = {**self._moment, "buffers": {}}  # a user may set some yet, as he may weights
            self._frozen = {**past, "evaluation": self._evaluation or self._evaluates()}

    def state_dict(self, past: dict[str, Any] | None) -> dict[str, Any]:
        """What a checkpoint holds of where this process stands. ``past``: from :meth:`past`."""
        if past is not None and "moved" in past:
            rank_zero_warn(
                "Eke: this checkpoint is written in the middle of a batch whose weights have moved already: a run that "
                "resumes from it goes through that batch again. Save in on_train_batch_end or later."
            )
        if self.resumes is not None:
            return self.resumes  # it has not come there yet
        if past is None:
            gradients = state.held_gradients(self.trainer)
            window = self.passes.state_dict() if self.passes is not None and gradients else None
            here = {
                "stage": self._stage(),
                "counters": compat.counters(self.trainer),
                "rng": state.rng_state(),
                "data": self.position.state_dict(),
                "loaders": self.position.loader_states(),
                "means": compat.means(self.trainer),
            }
        else:
            kept = {name: one() for name, one, _ in past["gradients"]}
            gradients, window = {name: one for name, one in kept.items() if one is not None}, past["window"]
            here = {key: past[key] for key in ("stage", "counters", "rng", "data", "loaders", "means")}
        return {
            **here,
            "rng": state.plain_rng(here["rng"]),
            "data": self.position.plain(here["data"]),
            "means": compat.plain_means(here["means"]),
            "gradients": {name: one.clone() for name, one in gradients.items()},
            "window": window,
            "metrics": compat.metrics(self.trainer),
            "evaluation": (past or {}).get("evaluation") or self._evaluation or self._evaluates(),
        }

    def _evaluates(self) -> dict[str, Any]:
        """What the validation's loaders will draw from."""
        loaders = compat.validation_loaders(self.trainer)
        generators = [source.state() for source in sources(loaders)]
        return {"workers": any(map(compat.has_workers_running, loaders)), "generators": generators}

    def _stage(self) -> str:
        if self.phase in ("batch", "validated"):
            return "between" if self._followed() else self.phase
        if self.phase == "epoch end":
            return "begin" if self._followed() else self.phase
        return "batch" if self.phase in ("in a batch", "batch end") else "begin"

    def _followed(self) -> bool:
        """Whether the schedules that follow a batch or an epoch are through, but not yet what comes next: there
        Lightning ends a run that is told to terminate."""
        if self._moment is None or self.phase not in ("batch", "validated", "epoch end"):
            return False
        before, now = self._moment["counters"], compat.counters(self.trainer)
        return (before["epoch"], before["logged"]) != (now["epoch"], now["logged"])

    # ------------------------------------------------------------------ a resumed run

    def load_state_dict(self, here: dict[str, Any], loops: dict[str, Any]) -> dict[str, Any]:
        """Take up where this process stood, before Lightning's loops take up theirs.

        Returns:
            The loops' part of the checkpoint as Lightning understands it.
        """
        self.resumes, self._evaluation = here, here["evaluation"]
        counters, stage = here["counters"], here["stage"]
        within = stage not in ("begin", "epoch end")
        epoch = counters["epoch"] + (stage == "epoch end")
        over = counters["last"] or stage == "trained"
        place = {"rng": here["rng"], "epoch": epoch, "used": counters["batch"] if within else 0, "over": over}
        begun = here["data"]["begun"] if within or epoch == 0 else None
        self.position.load_state_dict({**here["data"], **place, "begun": begun})
        return compat.set_counters(loops, {**counters, "epoch": epoch}, within=within)

    def start(self) -> None:
        """Called when training starts: lets Lightning's loops go on where the checkpoint was."""
        here = self.resumes
        if here is None:
            return
        within = here["stage"] not in ("begin", "epoch end")
        compat.remember_loading(self.trainer, here["counters"])
        compat.set_metrics(self.trainer, here["metrics"])
        first = compat.counters(self.trainer)["epoch"] == 0
        compat.believe_resumed(self.trainer, within=within, begins=first)
        if within:
            for callback in self.trainer.callbacks:
                if isinstance(callback, _BY_EPOCH):
                    with _rates_kept(self.trainer):
                        callback.on_train_epoch_start(self.trainer, self.module)

    def _put_random(self, here: dict[str, Any]) -> None:
        if here["stage"] != "begin" or here["data"]["begun"] is not None or here["counters"]["epoch"] > 0:
            state.set_rng_state(here["rng"])
            self.position.set_generators(here["data"]["generators"])


# Lightning's callbacks that set the Trainer up for an epoch where it begins. A run that goes on within one has no such
# beginning, and they can do it again.
_BY_EPOCH = (GradientAccumulationScheduler, StochasticWeightAveraging)


@contextmanager
def _rates_kept(trainer: Trainer) -> Iterator[None]:
    """A schedule that is made inside steps once; the optimizer's rates come from the checkpoint already."""
    before = [(group, group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    yield
    for group, rate in before:
        group["lr"] = rate


def refuse_finders(trainer: Trainer) -> None:
    """Called when a run resumes.

    Raises:
        ResumeError: Lightning's finders try out learning rates or batch sizes before training, and put back what they
            saved before that: in place of the checkpoint's optimizer and counters, which are not restored then.
    """
    own = Path(str(trainer.ckpt_path)).name.startswith((".lr_find_", ".scale_batch_size_"))  # the finder's, put back
    found = [type(one).__name__ for one in trainer.callbacks if isinstance(one, (LearningRateFinder, BatchSizeFinder))]
    if found and not own:
        raise ResumeError(
            f"{found[0]} tries out values before training, and Lightning then goes on without the checkpoint's "
            f"optimizer state and counters. Leave {found[0]} out of the run that resumes, and give the value it found."
        )
