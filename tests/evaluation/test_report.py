"""Results files in, a page and plots out; broken files are named."""

import copy
import json
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from ocrmem.errors import DataError
from ocrmem.evaluation.report import check_schema, longest_trained, page, read_results, write_report


def interval(mean, width=0.02):
    return {"mean": mean, "low": mean - width, "high": mean + width}


def reading(arm, num_chars, accuracy, ratio):
    return {
        "source": "prose",
        "num_chars": num_chars,
        "arm": arm,
        "ratio": ratio,
        "n": 1234,
        "token_accuracy": interval(accuracy),
        "cer": interval(1 - accuracy),
        "identifier_recall": None,
    }


def using(task, arm, gain):
    return {
        "task": task,
        "source": "conversations",
        "arm": arm,
        "n": 200,
        "budget_tokens": 301.4,
        "ce": interval(2.5),
        "gain": gain,
        "ce_over_memory": None if arm == "memory" else interval(0.125, 0.03),
        "exact_match": None,
        "token_f1": interval(0.25),
        "transcribes": interval(0.5),
    }


def results(name="near-two", ratio=1.75):
    return {
        "schema": 1,
        "probes": 2,
        "command": f"ocrmem eval adapters/{name} --seed 0",
        "created": "2026-03-04",
        "versions": {"ocrmem": "0.1.0", "torch": "2.9.0"},
        "device": "H100 | 80 GB",
        "seeds": [0, 1, 2],
        "adapter": {"name": name, "steps": 120000, "memory_ratio": ratio, "llm": "ignored"},
        "reading": [reading("memory", 256, 0.9, ratio), reading("memory", 1024, 0.875, ratio)],
        "using": [
            using("next-turn", "memory", None),
            using("cued-recall", "BM25", interval(0.7)),
            using("cued-recall", "memory", interval(0.6)),
        ],
        "mean_gain": [{"arm": "memory", "tasks": "cued-recall, next-turn", "gain": interval(0.5)}],
        "cost": [
            {
                "arm": "full text",
                "tokens": 301.0,
                "render_ms": None,
                "encode_ms": None,
                "prefill_ms": 12.346,
                "decode_ms_per_token": 4,
                "cached": True,
            }
        ],
        "left_out": [{"arm": "LLMLingua-2", "reason": "its model\ncannot | be had"}],
    }


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def test_the_page_shows_every_figure(tmp_path):
    folder = write(tmp_path / "results", b=results(), a=results("near-four", 3.5))
    text = page(read_results(folder))
    assert text.index("## a\n") < text.index("## b\n")
    assert "| b | near-two | 1.75× | 120,000 | 2026-03-04 | 2 | H100 \\| 80 GB |" in text
    assert "| prose | 1,024 | memory | 1.75× | 1,234 | 0.875 [0.855, 0.895] | 0.125 [0.105, 0.145] | – |" in text
    row = "| {} | 200 | 301 | 2.500 [2.480, 2.520] | {} | – | 0.250 [0.230, 0.270] | 0.500 [0.480, 0.520] |"
    assert row.format("memory", "0.600 [0.580, 0.620] | –") in text
    assert row.format("memory", "– | –") in text
    assert row.format("BM25", "0.700 [0.680, 0.720] | 0.125 [0.095, 0.155]") in text
    assert "| memory | cued-recall, next-turn | 0.500 [0.480, 0.520] |" in text
    assert text.index("#### Cued recall, conversations") < text.index("#### Next turn, conversations")
    assert "| full text | warm | 301 | – | – | 12.35 | 4.00 |" in text
    assert "- LLMLingua-2: its model cannot | be had" in text
    assert "```bash\nocrmem eval adapters/near-two --seed 0\n```" in text
    assert "Seeds 0, 1, 2; ocrmem 0.1.0, torch 2.9.0." in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1, table


def test_plots_are_there_and_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write(tmp_path / "results", b=results(), a=results("near-four", 3.5))
    first = write_report(folder, tmp_path / "one")
    second = write_report(folder, tmp_path / "two")
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", first.read_text(encoding="utf-8"))
    assert images == ["fidelity/reading.svg", "fidelity/a-using.svg", "fidelity/b-using.svg"]
    assert first.read_bytes() == second.read_bytes()
    for image in images:
        drawn = (first.parent / image).read_text(encoding="utf-8")
        assert drawn == (second.parent / image).read_text(encoding="utf-8")
        assert "<dc:date>" not in drawn
    words = drawn_text(first.parent / "fidelity" / "b-using.svg")
    assert {"BM25", "memory", "not defined", "Cued recall, conversations"} <= words
    assert {"memory, prose", "256 characters", "1,024 characters", "compression ratio"} <= drawn_text(
        first.parent / "fidelity" / "reading.svg"
    )


def test_the_plot_on_reading_has_the_longest_trained_adapter_of_a_ratio(tmp_path):
    short, long, other = results(), results(ratio=1.76), results("near-four", 3.5)
    short["adapter"]["steps"] = 7
    short["reading"][0]["token_accuracy"] = interval(0.1)
    short["reading"].append(reading("mean-pooling", 256, 0.1, 1.75))
    found = longest_trained(read_results(write(tmp_path / "r", a=long, b=short, c=other)))
    assert sorted((row["num_chars"], row["ratio"]) for row in found) == [
        (256, 1.76),
        (256, 3.5),
        (1024, 1.76),
        (1024, 3.5),
    ]
    assert all(row["token_accuracy"]["mean"] > 0.5 for row in found)


def test_lengths_that_were_not_read_aloud_are_said(tmp_path):
    pytest.importorskip("matplotlib")
    data = results()
    path = tmp_path / "docs" / "fidelity" / "reading.svg"
    write_report(write(tmp_path / "r", x=data), tmp_path / "docs")
    assert "not read aloud" not in drawn_text(path)
    for row in data["reading"]:
        row["cer"] = row["cer"] if row["num_chars"] == 256 else None
    write_report(write(tmp_path / "r", x=data), tmp_path / "docs")
    assert "not read aloud" in drawn_text(path)


def drawn_text(path):
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return {"".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")}


def test_bars_stand_where_the_gain_is(tmp_path):
    pytest.importorskip("matplotlib")
    from ocrmem.evaluation.report import plots

    data = results()
    data["using"][1]["gain"] = {"mean": 0.7, "low": 0.4, "high": 0.9}
    figure = plots(read_results(write(tmp_path / "r", only=data)))["only-using.svg"]
    recall, turn = figure.axes
    assert [bar.get_width() for bar in recall.patches] == [0.7, 0.6]
    assert not turn.patches
    spans = [line.get_segments()[0][:, 0].tolist() for line in recall.collections]
    assert spans[0] == pytest.approx([0.4, 0.9])


def test_the_steps_of_trained_rivals_are_said(tmp_path):
    data = results() | {"rivals": [{"arm": "convolution", "steps": 2188}]}
    (tmp_path / "one.json").write_text(json.dumps(data))
    text = page(read_results(tmp_path))
    assert "Steps of the trained rivals: convolution 2,188; of the memory: 120,000." in text


def test_empty_tables_give_no_sections(tmp_path):
    data = results() | {"reading": [], "using": [], "mean_gain": [], "cost": [], "left_out": []}
    path = write_report(write(tmp_path / "r", x=data), tmp_path / "docs")
    assert "###" not in path.read_text(encoding="utf-8")
    assert "![" not in path.read_text(encoding="utf-8")
    assert not (tmp_path / "docs" / "fidelity").exists()


def broken(change):
    data = copy.deepcopy(results())
    change(data)
    return data


BROKEN = {
    "no table": (lambda d: d.pop("cost"), r"x.json: no 'cost'; expected a list of objects. It has schema, probes"),
    "version": (lambda d: d.update(schema=2), r"x.json: schema is 2; this version reads 1. Write the file again"),
    "no version": (lambda d: d.pop("schema"), r"x.json: no 'schema'; expected a whole number"),
    "field": (lambda d: d["reading"][1].pop("cer"), r"x.json: reading\[1\]: no 'cer'; expected \{\"mean\""),
    "interval": (
        lambda d: d["using"][0].update(ce={"mean": 1, "low": 2, "high": 1}),
        r'using\[0\]: ce is \{"mean": 1, "low": 2, "high": 1\}; expected .*low not above high',
    ),
    "half": (lambda d: d["using"][0]["ce"].pop("low"), r"using\[0\]: ce is"),
    "null": (lambda d: d["using"][2].update(ce=None), r"using\[2\]: ce is null; expected"),
    "nan": (lambda d: d["reading"][0]["cer"].update(mean=math.nan), r"reading\[0\]: cer is \{\"mean\": NaN"),
    "string": (lambda d: d["cost"][0].update(tokens="301"), r'cost\[0\]: tokens is "301"; expected a finite number'),
    "truth": (lambda d: d["cost"][0].update(cached=1), r"cost\[0\]: cached is 1; expected true or false"),
    "bool": (lambda d: d["reading"][0].update(n=True), r"reading\[0\]: n is true; expected a whole number"),
    "row": (lambda d: d["left_out"].append("BM25"), r"left_out is .*; expected a list of objects"),
    "reason": (lambda d: d["left_out"][0].update(reason=" "), r"left_out\[0\]: reason is \" \"; expected a text that"),
    "adapter": (lambda d: d["adapter"].pop("memory_ratio"), r"x.json: adapter: no 'memory_ratio'; .* It has name"),
    "date": (lambda d: d.update(created="yesterday"), r'created is "yesterday"; expected an ISO 8601 date'),
    "seeds": (lambda d: d.update(seeds=[0.5]), r"seeds is \[0.5\]; expected a list of whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_results_are_named(name):
    change, match = BROKEN[name]
    with pytest.raises(DataError, match=match):
        check_schema(broken(change), source="x.json")
    check_schema(results(), source="x.json")


def test_a_list_is_no_result():
    with pytest.raises(
        DataError, match="x.json: expected one JSON object with results, got list. Write the file again"
    ):
        check_schema([], source="x.json")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"no results in .*expected \*.json files. Make one with `ocrmem eval ADAPTER`"):
        read_results(tmp_path)
    (tmp_path / "cut.json").write_text('{"schema": 1, "comm', encoding="utf-8")
    with pytest.raises(DataError, match=r"cut.json: cannot be read as JSON: Unterminated string.*`ocrmem eval`"):
        read_results(tmp_path)


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"the plots need matplotlib .*pip install 'ocrmem\[plot\]'"):
        write_report(write(tmp_path / "r", x=results()), tmp_path / "docs")
    assert not (tmp_path / "docs").exists()


def test_the_module_as_a_command(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "ocrmem.evaluation.report", write(tmp_path / "r", x=results()), tmp_path / "docs"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "docs" / "fidelity.md")
    assert (tmp_path / "docs" / "fidelity" / "x-using.svg").exists()
