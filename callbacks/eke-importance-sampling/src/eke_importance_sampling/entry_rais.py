"""Tells the eke registry of the second technique in this distribution."""

from eke import Technique, hookimpl

RECORD = Technique(
    name="rais",
    kind="callback",
    factory="eke_importance_sampling:RAIS",
    paper="https://proceedings.neurips.cc/paper/2018/hash/967990de5b3eac7b87d49a13c6834978-Abstract.html",
    does="Importance sampling over the data set, by gradient norms that earlier epochs gave (in the spirit of RAIS)",
    topics=("importance sampling",),
    survey=("rais",),
    effects=("replaces samples", "keeps batch subset", "changes loss"),
    needs=("sized training data",),
    exactness="unbiased",
    exceptions={
        "test_accumulated_gradients_equal_the_big_batch": "Samples are drawn by what earlier batches gave, and a large "
        "batch gives less often.",
        "test_two_processes_equal_one": "Under several processes it deals the samples out itself, in an order that one "
        "process does not have.",
        "test_it_costs_nothing_when_it_has_nothing_to_do": "There is no step in which "
        "it has nothing to do: the norm of every sample is noted.",
    },
)


@hookimpl
def eke_technique() -> Technique:
    return RECORD
