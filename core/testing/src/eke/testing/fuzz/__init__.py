"""Random runs, killed and resumed: ``python -m eke.testing.fuzz --minutes 5 --seed N``.

A seed decides a model, one to four techniques with arguments, options of the Trainer, and how a checkpoint comes
about. The run is resumed from it in a fresh process and has to end as one that was never broken, bit for bit. What
fails is cut down to the fewest techniques and options that fail, and printed as a script.

To read: ``case`` (what is drawn), ``draw`` and ``arguments`` (how), ``subjects`` (model and data), ``trace`` (what is
taken down, and what breaks a run), ``execute`` (the runs), ``judge`` (what is compared), ``shrink``, ``report``.
"""

from eke.testing.fuzz.case import Case
from eke.testing.fuzz.draw import draw_case
from eke.testing.fuzz.execute import Outcome, try_case
from eke.testing.fuzz.report import script, try_and_say
from eke.testing.fuzz.shrink import shrink

__all__ = ["Case", "Outcome", "draw_case", "script", "shrink", "try_and_say", "try_case"]
