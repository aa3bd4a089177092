"""Results are only ever added, survive a killed writer and are found again by what they are the result of."""

import json
import multiprocessing

import pytest
from eke import EkeError
from eke_bench.store import SCHEMA, Run, Store, record

RUN = Run("gpt", "smoke", {"blocks": 2, "width": 32}, steps=24, lr=8e-3)


def made(run=RUN, status="ok", **result):
    return record(run, {"final": {"val_loss": 1.0}, **result}, status)


def test_a_stored_result_is_found_by_its_run(tmp_path):
    store = Store(tmp_path, "gpt", "smoke")
    store.append(made())
    assert store.find(RUN)["final"] == {"val_loss": 1.0}
    assert store.find(RUN.but(seed=1)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 25},
        {"lr": 4e-3},
        {"seed": 1},
        {"shape": {"blocks": 1, "width": 32}},
        {"again": 1},
        {"subject": "hand"},
    ],
)
def test_whatever_may_change_a_result_changes_its_name(changes):
    assert RUN.but(**changes).id() != RUN.id()


def test_another_version_of_a_technique_is_another_run(monkeypatch):
    run = RUN.but(recipe={"stacking": {}})
    before = run.id()
    monkeypatch.setattr("eke_bench.store._version", lambda distribution: "99")
    assert run.id() != before


def test_another_meaning_of_the_size_is_another_run(monkeypatch):
    before = RUN.id()
    monkeypatch.setattr("eke_bench.store._definition", lambda *_: {"batch": 99})
    assert RUN.id() != before


def test_a_failed_result_is_kept_but_does_not_count_as_found(tmp_path):
    store = Store(tmp_path, "gpt", "smoke")
    store.append(made(status="failed", error="out of memory"))
    assert store.find(RUN) is None
    assert len(store.records()) == 1


def test_a_line_that_a_killed_writer_cut_short_is_dropped_and_the_rest_is_kept(tmp_path):
    store = Store(tmp_path, "gpt", "smoke")
    store.append(made())
    with store.path.open("a") as file:
        file.write('{"schema": "eke-ben')
    assert len(store.records()) == 1
    store.append(made(RUN.but(seed=1)))
    assert [one["run"]["seed"] for one in store.records()] == [0, 1]
    assert store.path.read_text().count("\n") == 2


def test_a_spoilt_line_in_the_middle_is_named(tmp_path):
    store = Store(tmp_path, "gpt", "smoke")
    store.append(made())
    lines = store.path.read_text()
    store.path.write_text("no json\n" + lines)
    with pytest.raises(EkeError, match=r"gpt-smoke\.jsonl, line 1 is no result of eke-bench/2"):
        store.records()


def test_results_of_another_schema_are_named(tmp_path):
    store = Store(tmp_path, "gpt", "smoke")
    store.path.write_text(json.dumps({"schema": "eke-bench/9"}) + "\n" + json.dumps({"schema": SCHEMA}) + "\n")
    with pytest.raises(EkeError, match="line 1 is no result"):
        store.records()


def _append(folder, seed):
    for again in range(20):
        Store(folder, "gpt", "smoke").append(made(RUN.but(seed=seed, again=again)))


def test_two_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path, seed)) for seed in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(Store(tmp_path, "gpt", "smoke").records()) == 40
