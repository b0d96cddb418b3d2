"""The main job on real weights and conversations, by the command line: train, kill, resume, chat."""

import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file

from ocrmem.assets.fetch import resolve
from ocrmem.data.conversations import read_conversations
from ocrmem.data.documents import document_hash
from ocrmem.memory.history import history_text
from ocrmem.model.adapter import read_manifest

pytestmark = pytest.mark.slow

CONFIG = {
    "memory": {"context_threshold": 128, "recent_tokens": 48, "max_length": 320},
    "data": {"max_conversations": 40, "max_reply_tokens": 16},
    "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 1, "warmup_steps": 0},
}


def ocrmem(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ocrmem", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("job")


@pytest.fixture(scope="module")
def config(folder):
    path = folder / "config.yaml"
    path.write_text(
        yaml.safe_dump({"output_dir": str(folder / "run"), "feature_cache": str(folder / "features"), **CONFIG})
    )
    return path


@pytest.fixture(scope="module")
def adapter(folder, config):
    """An adapter from a run that was killed after its first checkpoint and started again."""
    command = [sys.executable, "-m", "ocrmem", "train", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not list((folder / "run").glob("checkpoint-*")):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    done = ocrmem("train", config, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 4
    assert result["resumed_from"] >= 1
    return folder / "run" / "adapter"


def test_a_killed_run_gives_what_an_undisturbed_one_gives(folder, config, adapter):
    done = ocrmem("train", config, f"output_dir={folder / 'straight'}")
    assert done.returncode == 0, done.stderr
    killed = load_file(adapter / "adapter.safetensors")
    straight = load_file(folder / "straight" / "adapter" / "adapter.safetensors")
    assert all(value.equal(killed[key]) for key, value in straight.items())


def test_other_settings_in_the_same_folder_are_refused(config, adapter):
    done = ocrmem("train", config, "training.learning_rate=0.5")
    assert done.returncode == 1
    assert "holds checkpoints of a run with other settings (training.learning_rate: None -> 0.5)" in done.stderr


def test_the_model_card_has_measured_figures(adapter):
    card = (adapter / "README.md").read_text()
    assert "4 optimizer steps on `chitchat/train.jsonl`" in card
    assert "training loss" in card


def test_an_evaluation_would_refuse_what_it_was_trained_on(adapter):
    manifest = read_manifest(adapter)
    assert manifest["corpora"] == ["chitchat/train.jsonl"]
    first = read_conversations(resolve("chitchat") / "train.jsonl", max_conversations=1).conversations[0]
    assert document_hash(history_text(first.messages))[:16] in manifest["documents"]


def test_chat_answers_through_the_memory(folder, adapter):
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"This is sentence {n} of our talk."} for n in range(40)]
    history = folder / "history.jsonl"
    history.write_text(json.dumps({"messages": turns}))
    arguments = ("chat", adapter, history, "-q", "What was sentence 3?", "--max-new-tokens", 6, "--json")
    answer = json.loads(ocrmem(*arguments).stdout)
    assert answer["memory_tokens"] > 0
    assert answer["compression_ratio"] > 1.5
    assert answer["pages"] >= 1
    assert json.loads(ocrmem(*arguments).stdout) == answer, "greedy answers repeat"
    piped = ocrmem("chat", adapter, "-", "-q", "Hello?", "--max-new-tokens", 4, stdin=history.read_text())
    assert piped.returncode == 0, piped.stderr
    assert "ratio" in piped.stderr


def test_an_adapter_of_another_llm_is_refused(folder, adapter):
    changed = folder / "changed"
    changed.mkdir()
    for path in adapter.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    config = json.loads((changed / "config.json").read_text())
    config["llm"]["embedding_probe"] = [value + 0.05 for value in config["llm"]["embedding_probe"]]
    (changed / "config.json").write_text(json.dumps(config))
    done = ocrmem("chat", changed, "-q", "hi")
    assert done.returncode == 1
    assert "has other weights of the same shape" in done.stderr
