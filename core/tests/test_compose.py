from itertools import permutations

import pytest
from eke import ConflictError, Technique, compose
from eke.spec import SEAMS


def record(name, *effects, kind="callback", **fields):
    return Technique(name, kind, effects=effects, **fields)


def names(techniques):
    return [technique.name for technique in techniques]


def test_who_replaces_acts_before_who_changes_and_both_before_who_reads():
    three = [record("a", "reads weights"), record("b", "changes weights"), record("c", "replaces weights")]
    for given in permutations(three):
        assert names(compose.order(given)) == ["c", "b", "a"]


def test_the_order_of_the_list_never_matters():
    four = [
        record("d", "changes samples"),
        record("c", "changes module tree", "changes optimizer state"),
        record("b", "replaces optimizer"),
        record("a"),
    ]
    for given in permutations(four):
        assert names(compose.order(given)) == ["d", "c", "b", "a"]


def test_the_first_resource_written_decides_where_effects_leave_it_open_and_then_the_name():
    assert names(compose.order([record("a", "changes loss"), record("b", "changes batch content")])) == ["b", "a"]
    assert names(compose.order([record("b", "changes batch content"), record("a", "changes batch content")])) == [
        "a",
        "b",
    ]


def test_what_is_only_read_does_not_count_as_the_first_resource_written():
    reader = record("a", "reads samples", "changes learning rate")
    assert names(compose.order([reader, record("b", "changes loss")])) == ["b", "a"]


def test_after_outweighs_effects():
    reader = record("a", "reads weights")
    changer = record("b", "changes weights", after=("a",))
    assert names(compose.order([changer, reader])) == ["a", "b"]


def test_after_a_technique_that_is_not_there_says_nothing():
    assert names(compose.order([record("b", after=("x",)), record("a")])) == ["a", "b"]


def test_a_circle_at_one_seam_is_refused_and_does_not_name_who_comes_before_it():
    first = record("a", "changes batch subset", "reads loss")
    second = record("b", "changes loss", "reads batch subset")
    words = (
        "^a, b each have to act before another one of them in around_step. Leave one out, or declare after= in a rec"
    )
    for at in (None, "around_step", "alter_model"):
        with pytest.raises(ConflictError, match=words):
            compose.order([first, second, record("outside", "changes batch content")], at)


def test_two_that_each_want_to_come_after_the_other_are_refused():
    with pytest.raises(ConflictError, match="^a, b each have to act before another"):
        compose.order([record("a", after=("b",)), record("b", after=("a",))])


INITIALIZATION = record("init", "replaces weights", "changes module tree")
GROWTH = record("growth", "replaces module tree", "changes weights", "changes optimizer state")
EXPERTS = record("experts", "replaces module tree", "changes loss")
MASKED = record("masked", "changes module tree", "replaces tokens", "changes hidden states", "replaces loss")


@pytest.mark.parametrize(
    ("pair", "seam", "first"),
    [
        ((INITIALIZATION, GROWTH), "alter_model", "growth"),
        ((INITIALIZATION, GROWTH), "initialize", "init"),
        ((EXPERTS, MASKED), "alter_model", "experts"),
        ((EXPERTS, MASKED), "around_step", "masked"),
    ],
)
def test_who_comes_first_is_a_matter_of_each_seam(pair, seam, first):
    for given in permutations(pair):
        assert compose.order(given, seam)[0].name == first


def test_at_hooks_what_an_earlier_resource_settles_a_later_one_does_not_undo():
    for at in (None, "on_train_batch_start"):
        assert names(compose.order([INITIALIZATION, GROWTH], at)) == ["growth", "init"]  # by the module tree
        assert names(compose.order([MASKED, EXPERTS], at)) == ["experts", "masked"]
    # Settled over a third one, too: c before a by the batch content, a before b by the weights, so not b before c.
    three = [
        record("a", "changes batch content", "replaces weights"),
        record("b", "changes weights", "replaces loss"),
        record("c", "replaces batch content", "changes loss"),
    ]
    for given in permutations(three):
        assert names(compose.order(given)) == ["c", "a", "b"]
        assert names(compose.order(given, "around_step")) == ["a", "b", "c"]


def test_seams_agree_where_nothing_speaks_against_it():
    many = [record("d", "reads loss"), record("c", "changes tokens"), record("b", "changes samples"), record("a")]
    for given in permutations(many):
        for seam in (None, *SEAMS):
            assert names(compose.order(given, seam)) == ["b", "c", "a", "d"]


def test_data_tensor_and_pipeline_parallelism_go_together_and_two_of_a_kind_do_not():
    data, tensor = record("data", "replaces batch sharding"), record("tensor", "replaces parameter sharding")
    pipeline = record("pipeline", "replaces layer sharding")
    assert compose.conflicts([data, tensor, pipeline]) == []
    assert len(compose.conflicts([data, tensor, record("zero3", "replaces parameter sharding")])) == 1


@pytest.mark.parametrize("verb", ["replaces", "changes"])
def test_what_one_keeps_nobody_else_may_touch(verb):
    keeper, other = record("b", "keeps batch subset"), record("a", f"{verb} batch subset")
    assert compose.conflicts([keeper, other]) == [
        "'b' relies on the batch subset as it is (which samples of a batch are trained on), and 'a' "
        f"{verb} it. Leave one of them out."
    ]
    with pytest.raises(ConflictError, match="'b' relies on the batch subset"):
        compose.order([keeper, other])


def test_two_may_keep_and_others_may_read_what_one_keeps():
    three = [record("a", "keeps tokens"), record("b", "keeps tokens"), record("c", "reads tokens", "changes loss")]
    assert compose.conflicts(three) == []


def test_two_that_replace_one_resource_are_refused():
    pair = [record("b", "replaces attention"), record("a", "replaces attention", "replaces weights")]
    assert compose.conflicts(pair) == ["'a' and 'b' both replace the attention. Leave one of them out."]
    with pytest.raises(ConflictError, match="both replace the attention"):
        compose.order(pair)


def test_two_that_change_one_resource_are_not_refused():
    assert compose.conflicts([record("a", "changes weights"), record("b", "changes weights")]) == []


def test_two_strategies_are_refused():
    pair = [record("a", kind="strategy"), record("b", kind="strategy")]
    assert compose.conflicts(pair) == ["'a' and 'b' both give a strategy, and a Trainer takes one. Leave one out."]
    assert compose.conflicts([record("a", kind="strategy"), record("b")]) == []


@pytest.mark.parametrize(("name", "other"), [("a", "b"), ("b", "a")])
def test_a_conflict_declared_on_either_side_is_refused_with_its_reason(name, other):
    declares = record(name, conflicts={other: "both own the schedule."})
    assert compose.conflicts([declares, record(other)]) == [
        f"{name!r} cannot run together with {other!r}: both own the schedule."
    ]
    assert compose.conflicts([declares, record("c")]) == []


def test_the_same_technique_twice_is_refused():
    with pytest.raises(ConflictError, match="^'a' is given twice. Give it once.$"):
        compose.order([record("a"), record("a")])


def test_every_conflict_is_named_not_only_the_first():
    three = [record(name, "replaces optimizer") for name in "abc"]
    with pytest.raises(ConflictError) as caught:
        compose.order(three)
    assert all(f"'{one}' and '{two}' both replace" in str(caught.value) for one, two in ("ab", "ac", "bc"))


def test_nothing_to_order_is_no_error():
    assert compose.order([]) == []
