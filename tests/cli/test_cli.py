"""The command line, run as a user runs it."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from ocrmem import cli
from ocrmem.config.loader import load_yaml
from ocrmem.errors import AssetError, message_of

VERBS = ["params", "fetch", "render", "tune-page", "train", "chat", "store", "eval", "doctor"]


def ocrmem(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ocrmem", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def fails(*arguments: object, stdin: str | None = None) -> str:
    """The one-line error of a command that must fail without a traceback."""
    done = ocrmem(*arguments, stdin=stdin)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_what_it_does(verb):
    done = ocrmem(verb, "--help")
    assert done.returncode == 0
    assert "Usage: ocrmem" in done.stdout or "Usage: python -m ocrmem" in done.stdout
    assert len(done.stdout.splitlines()) > 6


def test_version_and_wrong_usage():
    assert ocrmem("--version").stdout.strip().count(".") == 2
    done = ocrmem("trian")
    assert done.returncode == 2
    assert "trian" in done.stderr


def test_fetch_lists_and_resolves():
    assets = json.loads(ocrmem("fetch", "--json").stdout)
    assert {"smollm2-135m-instruct", "pp-ocrv6-small-rec", "chitchat"} <= {asset["name"] for asset in assets}
    assert all(asset["license"] for asset in assets)
    found = json.loads(ocrmem("fetch", "pp-ocrv6-small-rec", "--json").stdout)
    assert found["pp-ocrv6-small-rec"].endswith(".onnx")


def test_render_writes_pages(tmp_path):
    done = ocrmem("render", "-", "-o", tmp_path / "pages", "--json", stdin="hello world\n" * 200)
    result = json.loads(done.stdout)
    assert result["characters"] == 2400
    assert [path.name for path in sorted((tmp_path / "pages").iterdir())] == [f"page-000{n}.png" for n in (1, 2, 3)]
    assert "none.txt' cannot be read: No such file" in fails("render", tmp_path / "none.txt", "-o", tmp_path)
    assert "unknown setting 'page.font_sise'" in fails("render", "-", "-o", tmp_path, "--set", "font_sise=3", stdin="a")


def config_file(tmp_path, **changes):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "run"), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memry": {}}, "unknown setting 'memry'. Did you mean 'memory'?"),
        (
            {"memory": {"context_treshold": 1}},
            "unknown setting 'memory.context_treshold'. Did you mean 'context_threshold'?",
        ),
        (
            {"training": {"learning_rte": 1}},
            "unknown setting 'training.learning_rte'. Did you mean 'learning_rate'?",
        ),
        ({"encoder": {"name": "pp-orc"}}, "unknown encoder 'pp-orc'. Did you mean 'pp-ocr'?"),
        ({"encoder": {"settings": {"steps": 1}}}, "unknown setting 'encoder.settings.steps'."),
        (
            {"memory": {"max_length": 300, "context_threshold": 512}},
            "max_length=300 is not above context_threshold=512",
        ),
        ({"data": {"train": "none.jsonl"}}, "none.jsonl"),
        ({"llm": {"name": "smollm2"}}, "smollm2"),
        ({"training": {"learning_rate": "1e-x"}}, "learning_rate='1e-x': expected a value like 5e-05, got text"),
        (
            {"projection": {"kind": "attention", "read_tokens": 2}},
            "read_tokens=2 without `objectives` would never learn",
        ),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, changes, message):
    assert message in fails("train", config_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-2.5E+3", -2500.0), (".5e2", 50.0), ("[1e-3, b]", [1e-3, "b"]),
        ("abc1e3", "abc1e3"), ("1e", "1e"), ("'1e-3'", "1e-3"), ("0x1e3", 0x1E3),
    ],
)  # fmt: skip
def test_a_number_with_an_exponent_is_a_number(tmp_path, text, value):
    path = tmp_path / "config.yaml"
    path.write_text(f"training: {{learning_rate: {text}}}\n", encoding="utf-8")
    assert load_yaml(path, [f"training.weight_decay={text}"]) == {
        "training": {"learning_rate": value, "weight_decay": value}
    }


def test_overrides_and_missing_files(tmp_path):
    assert "does not exist" in fails("train", tmp_path / "none.yaml")
    assert "override 'x'" in fails("train", config_file(tmp_path), "x")
    assert "memory.max_length='long'" in fails("train", config_file(tmp_path), "memory.max_length=long")


def test_chat_refuses_what_is_no_adapter(tmp_path):
    assert "has no config.json" in fails("chat", tmp_path, "-q", "hi")
    assert "give one with --question" in fails("chat", tmp_path, "-", stdin="{}")


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    for verb in (("eval", tmp_path), ("chat", tmp_path, "-q", "hi")):
        for device in ("cuda:x", "cuda:99"):
            assert f"device '{device}' cannot be used here" in fails(*verb, "--device", device)
    assert "expected more than 0, at most 1" in fails("eval", tmp_path, "--gpu-memory-utilization", "1.5")


def test_params_prints_the_seeds_figures_in_little_memory():
    arguments = ("params", "--llm", "qwen3-8b", "--encoder", "deepseek-ocr", "--vision-embedding-size", "512")
    code = (
        "import resource, subprocess, sys;"
        f"subprocess.run([sys.executable, '-m', 'ocrmem', *{arguments!r}], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [
        "trainable params: 18,882,560 || all params: 8,607,498,496 || trainable%: 0.2194%",
        "",
        "Detailed breakdown:",
        "  base_llm_model trainable params: 0 (should be 0)",
        "  ocr_embed trainable params: 0 (should be 0)",
        "  proj trainable params: 18,882,560",
    ]
    assert int(done.stderr.splitlines()[-1]) < 2000, "MiB"
    result = json.loads(ocrmem(*arguments, "--json").stdout)
    assert result["parts"] == {"base_llm_model": 8_190_735_360, "ocr_embed": 397_880_576, "proj": 18_882_560}
    assert "deepseek-ocr has features of 512" in fails(*arguments[:-1], "700")
    assert "unknown LLM preset 'qwen3-9b'. Did you mean 'qwen3-8b'?" in fails("params", "--llm", "qwen3-9b")


class Unreadable(torch.utils.data.Dataset):
    """Its items cannot be had, as where a font of a rare character cannot."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise AssetError("asset 'a-font': no registry here.\nFetch it before.")


def test_an_error_in_a_worker_process_is_shown_without_the_worker_s_traceback(monkeypatch, capsys):
    loader = torch.utils.data.DataLoader(Unreadable(), batch_size=None, num_workers=1)
    monkeypatch.setattr(cli, "app", lambda: list(loader))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: asset 'a-font': no registry here.\nFetch it before.\n"


def test_an_error_that_quotes_its_own_name_stays_whole():
    message = "ocrmem.errors.AssetError: is what a log says."
    assert message_of(AssetError(message)) == message
