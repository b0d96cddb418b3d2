"""Parts of an evaluation, one results file."""

import copy

import pytest
from test_report import interval, reading, results, using

from ocrmem.errors import DataError
from ocrmem.evaluation.merge import ANSWERED, merge_results


def parts():
    first = results()
    first |= {"using": [], "mean_gain": [], "cost": [], "command": "ocrmem eval a --parts reading"}
    first["left_out"] = [{"arm": "convolution", "reason": "none was given"}, {"arm": "llmlingua-2", "reason": "no"}]
    second = results()
    second |= {"reading": [], "command": "ocrmem eval a --parts using,cost", "created": "2026-03-05"}
    second["using"] = [using("cloze", "memory", interval(0.5)), using("cloze", "convolution", interval(0.25))]
    return first, second


def test_parts_become_one_file():
    first, second = parts()
    whole = merge_results(first, second, source="file")
    assert whole["reading"] == first["reading"]
    assert (whole["using"], whole["mean_gain"], whole["cost"]) == (
        second["using"],
        second["mean_gain"],
        second["cost"],
    )
    assert whole["command"] == "ocrmem eval a --parts reading && ocrmem eval a --parts using,cost"
    assert whole["created"] == "2026-03-05"
    assert {row["arm"] for row in whole["left_out"]} == {"llmlingua-2", "LLMLingua-2"}, "convolution is there"
    assert whole["adapter"]["memory_ratio"] == pytest.approx(1.75)


def test_a_part_that_is_run_again_replaces_its_rows():
    first, second = parts()
    whole = merge_results(first, second, source="file")
    again = copy.deepcopy(first)
    again["reading"] = [reading("memory", 1024, 0.5, 2.25)]
    found = merge_results(whole, again, source="file")
    assert [(row["num_chars"], row["token_accuracy"]["mean"]) for row in found["reading"]] == [(256, 0.9), (1024, 0.5)]
    assert found["command"] == "ocrmem eval a --parts using,cost && ocrmem eval a --parts reading"
    assert found["adapter"]["memory_ratio"] == pytest.approx(2.0)
    rejoined = merge_results(first, whole, source="file")  # as with what a stopped run had joined to the file
    assert rejoined["command"] == whole["command"]


def test_answers_stay_where_the_same_probes_are_scored_again_without():
    first, second = parts()
    fields = ANSWERED["using"]
    answered = {field: {"mean": 0.25, "low": 0.2, "high": 0.3} for field in fields}
    second["using"][0] |= answered
    whole = merge_results(first, second, source="file")
    again = {**copy.deepcopy(second), "using": [using("cloze", "memory", interval(0.75))]}
    again["using"][0] |= dict.fromkeys(fields)
    (row, _) = merge_results(whole, again, source="file")["using"]
    assert row["gain"]["mean"] == 0.75
    assert {field: row[field] for field in fields} == answered
    again["using"][0]["n"] += 1
    (row, _) = merge_results(whole, again, source="file")["using"]
    assert row["token_f1"] is None


def test_texts_that_were_read_aloud_stay_so_where_they_are_scored_again_without():
    first, _ = parts()
    again = copy.deepcopy(first)
    again["reading"] = [reading("memory", 1024, 0.5, 2.25)]
    again["reading"][0] |= dict.fromkeys(ANSWERED["reading"])
    (_, before), (_, row) = first["reading"], merge_results(first, again, source="file")["reading"]
    assert (row["token_accuracy"]["mean"], row["cer"]) == (0.5, before["cer"])
    again["reading"][0]["n"] += 1
    assert merge_results(first, again, source="file")["reading"][1]["cer"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "CPU"}, r"file holds an evaluation with device H100 . 80 GB, and these results have CPU"),
        ({"seeds": [0]}, "with seeds"),
        ({"adapter": {"name": "near-two", "steps": 1, "memory_ratio": 1.0}}, "'steps': 120000.*'steps': 1"),
    ],
)
def test_results_of_something_else_are_refused(change, message):
    first, second = parts()
    with pytest.raises(DataError, match=message):
        merge_results(first, second | change, source="file")
