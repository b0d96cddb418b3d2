"""`ocrmem encode`: the same shards whoever writes them, nothing lost by a kill, and what is in the way is named."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from memory.pooling import PoolingEncoder

from ocrmem.config.train import TrainConfig, load_train_config
from ocrmem.encoders import registry
from ocrmem.errors import ConfigError, MemoryNeverAppearsError
from ocrmem.training import encode as encode_module
from ocrmem.training.build import build_dataset, build_eval_dataset, build_processor, feature_store
from ocrmem.training.encode import BlockEncoder, encode
from ocrmem.training.encode_ray import encode_on_ray

TESTS = Path(__file__).resolve().parents[1]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "told",
    "the",
    "dog",
    "of",
    "seven",
    "ships",
    "that",
    "had",
    "come",
    "home",
    "in",
    "the",
    "grey",
    "of",
    "morning",
]


def conversation(number):
    """Sixteen turns, unlike those of any other."""
    messages = []
    for turn in range(8):
        words = [WORDS[(number * 7 + turn * 3 + i * i) % len(WORDS)] for i in range(12 + (number + turn) % 5)]
        messages.append({"role": "user", "content": f"{number}.{turn} " + " ".join(words)})
        messages.append({"role": "assistant", "content": " ".join(reversed(words))})
    return {"messages": messages}


@pytest.fixture(autouse=True)
def pooling(monkeypatch):
    monkeypatch.setitem(registry.BUILT_IN, "pooling", "memory.pooling:PoolingEncoder")
    registry.encoder_class.cache_clear()
    monkeypatch.setattr(encode_module, "PAGES_PER_SHARD", 12)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return load_train_config(config_file(tmp_path))


def config_file(folder: Path, cache: str = "features") -> Path:
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(conversation(number)) + "\n" for number in range(24)))
    values = {
        "output_dir": str(folder / "run"),
        "feature_cache": str(folder / cache),
        "encoder": {"name": "pooling"},
        "memory": {"context_threshold": 128, "recent_tokens": 48, "max_length": 400},
        "data": {"train": str(data), "eval": str(data), "max_eval_samples": 5},
    }
    path = folder / f"{cache}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def files(cache: Path) -> dict[str, str]:
    """Every file of a cache with the digest of its bytes."""
    found = {}
    for path in sorted(cache.rglob("*")):
        if path.is_file():
            found[path.relative_to(cache).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def environment(tmp_path):
    """For other processes: the test encoder is registered as an installed package would do it."""
    package = tmp_path / "site" / "pooling_encoder-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: pooling-encoder\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[ocrmem.encoders]\npooling = memory.pooling:PoolingEncoder\n")
    paths = [str(package.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def command(*arguments: object, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", "ocrmem", *map(str, arguments)]


def run(*arguments: object, environment: dict[str, str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, processes=processes),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def test_training_finds_every_page(config, monkeypatch):
    result = encode(config, pages_per_shard=12)
    assert result.encoded == result.pages > 100
    assert result.shards > 3
    processor, store = build_processor(config), feature_store(config)
    dataset, evaluation = (
        build_dataset(config.data.train, config.data, processor),
        build_eval_dataset(config, processor),
    )
    encoder = PoolingEncoder()
    wanted = set()
    for item in (*(dataset[i] for i in range(len(dataset))), *(evaluation[i] for i in range(len(evaluation)))):
        wanted |= set(item["page_keys"])
        fresh = encoder(item["pages"]).to(torch.float16)
        for key, features in zip(item["page_keys"], fresh, strict=True):
            kept = store.get(key, tokens_per_page=80, feature_width=384, dtype=torch.float16)
            assert kept is not None
            assert torch.equal(kept, features)
    assert len(wanted) <= result.pages
    assert not [path for path in Path(config.feature_cache).rglob("*.safetensors") if "shards" not in path.parts]


def test_a_second_call_encodes_nothing_and_other_data_does(config):
    first = encode(config, pages_per_shard=12)
    before = files(Path(config.feature_cache))
    again = encode(config, pages_per_shard=12)
    assert (again.encoded, again.pages, again.size) == (0, first.pages, first.size)
    assert files(Path(config.feature_cache)) == before
    Path(config.data.train).write_text(json.dumps(conversation(99)) + "\n")
    assert encode(config, pages_per_shard=12).encoded > 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "incomplete|MetadataIncomplete"),
        (lambda path: path.write_bytes(b""), "HeaderTooSmall|too small"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100_000] + b"\x01" * 100_000), "checksum of its page"),
    ],
)
def test_a_damaged_shard_is_named_and_written_again(config, caplog, damage, reason):
    encode(config, pages_per_shard=12)
    cache = Path(config.feature_cache)
    before = files(cache)
    victim = max(cache.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    damage(victim)
    assert encode(config, pages_per_shard=12).encoded > 0
    (record,) = caplog.records
    assert str(victim) in record.message
    assert pytest.importorskip("re").search(reason, record.message)
    assert files(cache) == before


def test_training_passes_over_a_damaged_shard(config, caplog):
    encode(config, pages_per_shard=12)
    victim = max(Path(config.feature_cache).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1000])
    processor, store = build_processor(config), feature_store(config)
    dataset = build_dataset(config.data.train, config.data, processor)
    keys = {key for i in range(len(dataset)) for key in dataset[i]["page_keys"]}
    found = [store.get(key, tokens_per_page=80, feature_width=384, dtype=torch.float16) for key in keys]
    assert 0 < sum(features is None for features in found) < len(found)
    (record,) = caplog.records
    assert "is damaged" in record.message
    assert "the next `ocrmem encode` writes it anew" in record.message


def test_half_a_shard_is_removed_when_it_is_old(config, caplog):
    encoder = BlockEncoder(config, pages_per_shard=12)
    encoder.prepare()
    old, new = (encoder.shards.folder / f".x{number}.safetensors.1-ab.tmp" for number in range(2))
    old.write_bytes(b"1")
    new.write_bytes(b"1")
    os.utime(old, (time.time() - 3600,) * 2)
    encoder.prepare()
    assert not old.exists()
    assert new.exists(), "another process may be writing it"
    assert f"half-written shard {old} is removed" in caplog.text


def test_shards_of_other_settings_are_named(config, caplog):
    first = encode(config, pages_per_shard=12)
    changed = dataclasses.replace(config, page={"page_width": 768})
    second = encode(changed, pages_per_shard=12)
    assert first.folder != second.folder
    assert "shards that were made otherwise and are not used: page.page_width 640, here 768" in caplog.text
    caplog.clear()
    encode(
        dataclasses.replace(config, memory=dataclasses.replace(config.memory, feature_dtype="float32")),
        pages_per_shard=12,
    )
    assert "dtype 'float16', here 'float32'" in caplog.text


def test_other_weights_are_named(config, caplog, monkeypatch):
    encode(config, pages_per_shard=12)
    monkeypatch.setattr(PoolingEncoder, "identity", lambda self: "other weights")
    encode(config, pages_per_shard=12)
    assert "are not used: other encoder weights under the same settings" in caplog.text


def test_nothing_to_encode(config):
    short = dataclasses.replace(config.memory, context_threshold=3000, max_length=4000)
    data = dataclasses.replace(config.data, eval=None)
    with pytest.raises(MemoryNeverAppearsError, match="there is nothing to encode: no prompt of the data has a memory"):
        encode(dataclasses.replace(config, memory=short, data=data))


def test_two_processes_and_a_killed_one_write_the_same_files(tmp_path, environment):
    one, two, killed = (config_file(tmp_path, cache) for cache in ("one", "two", "killed"))
    done = run("encode", one, "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    alone = json.loads(done.stdout)
    assert alone["encoded"] == alone["pages"] > 100
    done = run("encode", two, "--json", environment=environment, processes=2)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert (together["workers"], together["encoded"], together["size"]) == (2, alone["encoded"], alone["size"])
    assert files(tmp_path / "two") == files(tmp_path / "one")

    with subprocess.Popen(
        command("encode", killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "killed").rglob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    written = {name for name in files(tmp_path / "killed") if not name.endswith(".tmp")}
    done = run("encode", killed, "--json", environment=environment, processes=2)
    assert done.returncode == 0, done.stderr
    assert 0 < json.loads(done.stdout)["encoded"] < alone["pages"] or written == set(files(tmp_path / "one"))
    kept = {name: digest for name, digest in files(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert kept == files(tmp_path / "one")


def test_ray_writes_the_same_files(tmp_path, environment):
    pytest.importorskip("ray.data")
    one, two = config_file(tmp_path, "one"), config_file(tmp_path, "ray")
    assert run("encode", one, environment=environment).returncode == 0
    done = run("encode", two, "--ray", "local", "--ray-workers", 2, "--json", environment=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["workers"] == 2
    assert files(tmp_path / "ray") == files(tmp_path / "one")


def test_ray_that_is_not_installed(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray .*pip install ocrmem\[ray\]"):
        encode_on_ray(config, address="local")
