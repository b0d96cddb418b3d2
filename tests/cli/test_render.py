"""`ocrmem render` and `ocrmem tune-page`, run as a user runs them."""

import json
import re

import numpy as np
from PIL import Image
from test_cli import fails, ocrmem

from ocrmem.config.render import RenderSettings

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


def test_a_broken_line_is_named_and_leaves_no_half_of_a_pdf(tmp_path):
    file = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": [{"role": "user", "content": "Hello. " * 40_000}]})
    file.write_text(f"{good}\n{{\n")
    message = fails(
        "render", file, "--encoder", "deepseek-ocr", "--pdf", tmp_path / "all.pdf", "-o", tmp_path / "pages"
    )
    assert f"{file}:2: broken JSON at column 2" in message
    assert len(list((tmp_path / "pages").iterdir())) > 16, "the pages of the first line were written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "pages"]


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
    assert "font-color='reddish': expected a colour" in fails("render", "-", "--style", "font-color=reddish", stdin="a")
    assert "auto-crop-width=3: expected true or false" in fails(
        "render", "-", "--style", "auto-crop-width=3", stdin="a"
    )
    assert "dpi='nan': expected a number" in fails("render", "-", "--style", "dpi=nan", stdin="a")
    assert "expected at most 16,384 pixels" in fails("render", "-", "--style", "page-size=1e9,1e9", stdin="a")
    assert "line_height=0: expected a positive" in fails("render", "-", "--style", "line-height=0", stdin="a")
    assert "paragraphs have no borders here" in fails("render", "-", "--style", "border-width=1", stdin="a")
    assert "expected WIDTH,HEIGHT in points" in fails("render", "-", "--style", "page-size=A99", stdin="a")
    assert "neither a file nor KEY=VALUE" in fails("render", "-", "--style", "none.json", stdin="a")
    both = ("--style", "dpi=72", "--set", "font_size=3")
    assert "--style and --set both give page settings" in fails("render", "-", *both, stdin="a")


def drawn(tmp_path, text: str, *style: str) -> np.ndarray:
    """The first page of a text in a style of 300 × 200 points without margins, and the given settings."""
    options = [part for one in ("page-size=300,200", "margin-x=0", "margin-y=0", *style) for part in ("--style", one)]
    ocrmem("render", "-", "-o", tmp_path / "drawn", *options, stdin=text)
    return pixels(tmp_path / "drawn" / "page-0001.png")


def edges(image: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is darker than paper."""
    rows, columns = np.flatnonzero((image < 128).any(axis=1)), np.flatnonzero((image < 128).any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def test_each_length_of_a_style(tmp_path):
    """Inks of `H`: edges move by what the setting says, in points at 72 dots an inch and twice at 144."""
    plain = edges(drawn(tmp_path, "H H\nH"))
    assert drawn(tmp_path, "H").shape == (200, 300)
    assert drawn(tmp_path, "H", "page-size=A5").shape == (595, 420)
    assert drawn(tmp_path, "H", "dpi=144").shape == (400, 600)
    moved = edges(drawn(tmp_path, "H H\nH", "margin-x=20", "margin-y=30"))
    assert np.subtract(moved, plain).tolist() == [20, 30, 20, 30]
    assert edges(drawn(tmp_path, "H H\nH", "left-indent=7"))[0] == plain[0] + 7
    right = edges(drawn(tmp_path, "H", "alignment=RIGHT"))[2]
    assert edges(drawn(tmp_path, "H", "alignment=RIGHT", "right-indent=7"))[2] == right - 7
    assert edges(drawn(tmp_path, "H", "first-line-indent=13"))[0] == plain[0] + 13
    taller = edges(drawn(tmp_path, "H\nH", "line-height=30"))
    assert taller[3] - taller[1] == plain[3] - plain[1] + 30 - 11
    for name in ("space-before", "space-after"):
        assert edges(drawn(tmp_path, "H\nH", f"{name}=6"))[3] == plain[3] + 6
    small, large = (edges(drawn(tmp_path, "H", f"font-size={size}")) for size in (9, 27))
    assert large[3] - large[1] >= 2.5 * (small[3] - small[1])
    long = "HHHHH " * 40
    stretched, narrow = edges(drawn(tmp_path, "H" * 9)), edges(drawn(tmp_path, "H" * 9, "horizontal-scale=0.5"))
    assert abs(2 * narrow[2] - stretched[2]) <= 9
    assert edges(drawn(tmp_path, long))[2] < edges(drawn(tmp_path, long, "alignment=JUSTIFY"))[2] == 299
    centre = edges(drawn(tmp_path, "H", "alignment=CENTER"))
    assert abs(centre[0] + centre[2] - 300) <= 2
    mono = drawn(tmp_path, "iiii MMMM", "font-path=dejavu-sans-mono")
    assert edges(mono)[2] != edges(drawn(tmp_path, "iiii MMMM"))[2]
    marked = drawn(tmp_path, "H\nH", "newline-markup=|")
    assert edges(marked)[3] < plain[3], "the break is drawn as a mark"


def test_alignment_and_fonts_of_other_scripts(tmp_path):
    hebrew = "שלום\nabc"
    assert edges(drawn(tmp_path, hebrew)[:11])[0] > 200, "right-to-left paragraphs stand at the right"
    assert edges(drawn(tmp_path, hebrew)[11:])[0] < 9
    assert edges(drawn(tmp_path, hebrew, "alignment=LEFT")[:11])[0] < 9
    korean = ("render", "-", "--style", "font-size=9", "--json")
    assert json.loads(ocrmem(*korean, stdin="한국어 हिन्दी ไทย").stdout)["missing_characters"] == {}
    few = json.loads(ocrmem(*korean, "--style", "fallback-fonts=noto-sans-sc", stdin="한국어").stdout)
    assert few["missing_characters"] == {"U+AD6D": 1, "U+C5B4": 1, "U+D55C": 1}
    assert "font 'comic' is neither bundled" in fails("render", "-", "--style", "fallback-fonts=comic", stdin="한")


def test_colours_are_written_in_colour_and_read_in_grey(tmp_path):
    grey = drawn(tmp_path, "HHH", "font-color=#333333", "page-bg-color=#eeeeee")
    assert (grey.ndim, grey.min(), grey.max()) == (2, 0x33, 0xEE)
    image = drawn(
        tmp_path, "HHH\n", "font-color=navy", "page-bg-color=FFEECC", "para-bg-color=lightyellow", "margin-x=9"
    )
    assert image.shape == (200, 300, 3)
    assert image[:11, :9].reshape(-1, 3).tolist() == [[0xFF, 0xEE, 0xCC]] * 99
    assert image[20:].reshape(-1, 3).max(axis=0).tolist() == image[20:].reshape(-1, 3).min(axis=0).tolist()
    assert [0, 0, 128] in image[:11].reshape(-1, 3).tolist()
    assert image[:11, 200].tolist() == [[0xFF, 0xFF, 0xE0]] * 11
    ocrmem(
        "render", "-", "--set", "foreground=#ff0000", "-o", tmp_path / "red", "--pdf", tmp_path / "red.pdf",
        "--contact-sheet", tmp_path / "sheet.png", stdin="Red text\n",
    )  # fmt: skip
    red = pixels(tmp_path / "red" / "page-0001.png")
    assert red.shape == (768, 640, 3)
    assert (red[..., 0] == 255).all()
    assert red[..., 1].min() == red[..., 2].min() == 0
    assert pixels(tmp_path / "sheet.png").ndim == 3
    page = RenderSettings(page_width=99, page_height=50, line_height=20, font_size=15, foreground="#f00")  # type: ignore[arg-type]
    assert page.foreground == 76, "what an encoder sees"
    assert Image.new("RGB", (1, 1), "#f00").convert("L").getpixel((0, 0)) == 76


def test_the_pages_of_a_pdf_have_the_size_of_the_style(tmp_path):
    style = ("--style", "page-size=300,200", "--style", "dpi=144")
    ocrmem("render", "-", "--pdf", tmp_path / "page.pdf", *style, stdin="Text\n")
    assert re.search(rb"/MediaBox \[ 0 0 300\.0 200\.0 \]", (tmp_path / "page.pdf").read_bytes())


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
