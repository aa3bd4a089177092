"""The promises of a technique, each a function that raises an AssertionError naming what was broken.

The contract calls them with defaults; call one directly to check a technique that is no subject of the contract.
"""

from eke.testing.checks.changing import another, says_what_changed, steps_do_not_depend_on_what_may_change
from eke.testing.checks.common import REFUSALS, transformers_missing
from eke.testing.checks.in_zoo import Seen, differs, meets
from eke.testing.checks.leaving import (
    changes_nothing_when_off,
    costs_nothing_when_idle,
    does_what_its_record_says,
    fails_cleanly,
    leaves_the_model_as_it_was,
    leaves_the_random_state_alone,
)
from eke.testing.checks.resuming import (
    comparable,
    loads_without_it,
    ranks_resume,
    resumes,
    weights_only_checkpoint_loads,
)
from eke.testing.checks.subject import Subject
from eke.testing.checks.training import (
    accumulation_equals_the_big_batch,
    clips_gradients,
    compiles,
    loss_falls,
    ranks_agree,
    ranks_equal_one_process,
    sees_one_step_beside_a_second_pass,
    trains,
    trains_in_bf16,
    trains_or_refuses,
)
from eke.testing.checks.using import a_command_line_builds_it, fits_twice_validates_and_tests, pickles_and_copies

__all__ = [
    "REFUSALS",
    "Seen",
    "Subject",
    "a_command_line_builds_it",
    "accumulation_equals_the_big_batch",
    "another",
    "changes_nothing_when_off",
    "clips_gradients",
    "comparable",
    "compiles",
    "costs_nothing_when_idle",
    "differs",
    "does_what_its_record_says",
    "fails_cleanly",
    "fits_twice_validates_and_tests",
    "leaves_the_model_as_it_was",
    "leaves_the_random_state_alone",
    "loads_without_it",
    "loss_falls",
    "meets",
    "pickles_and_copies",
    "ranks_agree",
    "ranks_equal_one_process",
    "ranks_resume",
    "resumes",
    "says_what_changed",
    "steps_do_not_depend_on_what_may_change",
    "sees_one_step_beside_a_second_pass",
    "trains",
    "trains_in_bf16",
    "trains_or_refuses",
    "transformers_missing",
    "weights_only_checkpoint_loads",
]
