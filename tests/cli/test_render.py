"""`ocrmem render` and `ocrmem tune-page`, run as a user runs them."""

import json

import numpy as np
from PIL import Image
from test_cli import fails, ocrmem

MARKDOWN = "# Title\n\nSome *text* with `code`.\n\n- one\n- two\n\n```\ndef f():\n    pass\n```\n"


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_pdf_sheet_and_statistics(tmp_path):
    file = tmp_path / "notes.md"
    file.write_text(MARKDOWN * 60)
    done = ocrmem(
        "render", file, "-o", tmp_path / "pages", "--pdf", tmp_path / "notes.pdf",
        "--contact-sheet", tmp_path / "sheet.png", "--llm", "smollm2-135m-instruct", "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["num_pages"] == len(result["pages"]) == len(list((tmp_path / "pages").iterdir())) > 2
    assert (tmp_path / "notes.pdf").read_bytes()[:5] == b"%PDF-"
    assert pixels(tmp_path / "sheet.png").ndim == 2
    assert result["separator_tokens"] > 0
    memory = result["memory_tokens"] + result["separator_tokens"]
    assert result["ratio"] == round(result["text_tokens"] / memory, 3)
    assert result["missing_characters"] == {}


def test_conversations_and_markdown_on_stdin(tmp_path):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
    file = tmp_path / "chats.jsonl"
    file.write_text((json.dumps({"messages": messages}) + "\n") * 2)
    result = json.loads(ocrmem("render", file, "-o", tmp_path / "a", "--json").stdout)
    assert [path.split("/")[-1] for path in result["pages"]] == ["chats-0001-0001.png", "chats-0002-0001.png"]
    assert result["characters"] == 2 * len("user: Hello\nassistant: Good day\n")
    done = ocrmem("render", "-", "--markdown", "--json", stdin="**bold** move")
    assert json.loads(done.stdout)["characters"] == len("bold move\n")


def test_a_target_that_cannot_be_written_is_one_line(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("Some text.\n")
    message = fails("render", file, "--contact-sheet", tmp_path)
    assert str(tmp_path) in message
    assert "Is a directory. Check the path, its rights and the room on its disk." in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


def test_styles_in_points(tmp_path):
    style = tmp_path / "style.json"
    style.write_text(json.dumps({"page-size": "300,200", "dpi": 144, "font-size": 9, "margin-x": 5, "margin_y": 5}))
    arguments = ("render", "-", "--style", style, "-o", tmp_path / "whole")
    ocrmem(*arguments, stdin="Hello world\n" * 3)
    assert pixels(tmp_path / "whole" / "page-0001.png").shape == (400, 600)
    ocrmem(
        *arguments[:-1], tmp_path / "cut", "--style", "auto-crop-width=true", "--style", "auto-crop-last-page=true",
        stdin="Hello world\n" * 3,
    )  # fmt: skip
    cut = pixels(tmp_path / "cut" / "page-0001.png")
    assert cut.shape[0] < 120
    assert cut.shape[1] < 200
    assert (cut < 128).sum() == (pixels(tmp_path / "whole" / "page-0001.png") < 128).sum()
    assert "unknown page style setting 'dpj'. Did you mean 'dpi'?" in fails(
        "render", "-", "--style", "dpj=3", stdin="a"
    )
    assert "font-color='red': expected a colour" in fails("render", "-", "--style", "font-color=red", stdin="a")
    assert "paragraphs have no borders here" in fails("render", "-", "--style", "border-width=1", stdin="a")
    assert "expected WIDTH,HEIGHT in points" in fails("render", "-", "--style", "page-size=A99", stdin="a")
    assert "neither a file nor KEY=VALUE" in fails("render", "-", "--style", "none.json", stdin="a")
    both = ("--style", "dpi=72", "--set", "font_size=3")
    assert "--style and --set both give page settings" in fails("render", "-", *both, stdin="a")


def test_tune_page_prints_a_table_and_draws_a_plot(tmp_path):
    text = tmp_path / "prose.txt"
    text.write_text("The train to Oslo leaves at 06:25 from gate 7, and the ticket costs 349.50 kr. " * 4)
    done = ocrmem(
        "tune-page", "--try", "cell_width=6,12", "--text", text, "--pages", 1, "--plot", tmp_path / "plot.png"
    )
    header, narrow, wide = done.stdout.splitlines()
    assert header.split() == ["cell_width", "text", "recovered", "exactly", "chars/token"]
    assert narrow.split()[:2] == ["6", "prose"]
    assert float(wide.split()[2].rstrip("%")) > 98 > float(narrow.split()[2].rstrip("%"))
    assert pixels(tmp_path / "plot.png").shape[2] in (3, 4)
    assert "expected KEY=A,B,C" in fails("tune-page", "--try", "cell_width")
