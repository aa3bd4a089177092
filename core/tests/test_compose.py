from itertools import permutations

import pytest
from eke import ConflictError, Technique, compose


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
    assert names(compose.order([record("a", "changes loss"), record("b", "changes batch")])) == ["b", "a"]
    assert names(compose.order([record("b", "changes batch"), record("a", "changes batch")])) == ["a", "b"]


def test_what_is_only_read_does_not_count_as_the_first_resource_written():
    reader = record("a", "reads samples", "changes learning rate")
    assert names(compose.order([reader, record("b", "changes loss")])) == ["b", "a"]


def test_after_outweighs_effects():
    reader = record("a", "reads weights")
    changer = record("b", "changes weights", after=("a",))
    assert names(compose.order([changer, reader])) == ["a", "b"]


def test_after_a_technique_that_is_not_there_says_nothing():
    assert names(compose.order([record("b", after=("x",)), record("a")])) == ["a", "b"]


def test_a_circle_is_refused_and_does_not_name_who_comes_before_it():
    first = record("a", "changes weights", "reads loss")
    second = record("b", "changes loss", "reads weights")
    with pytest.raises(ConflictError, match="^a, b each have to act before another one of them. Leave one out, or"):
        compose.order([first, second, record("outside", "changes batch")])


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
