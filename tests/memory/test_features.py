import logging
import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch
from memory.pooling import PoolingEncoder

from ocrmem.errors import CheckpointError, ConfigError
from ocrmem.memory.features import FeatureStore, encode_pages, page_key

HALF = torch.float16


def key(text="user: hi\n", *, encoder="e", render="r", dtype=HALF):
    return page_key(text, encoder_identity=encoder, render_identity=render, dtype=dtype)


def pages(number, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 768, 640), dtype=torch.uint8, generator=generator)


def keys(number):
    return [key(f"page {i}") for i in range(number)]


def get(store, key, dtype=HALF):
    return store.get(key, tokens_per_page=80, feature_width=384, dtype=dtype)


def test_key_depends_on_all_that_decides_the_features():
    different = {
        key(),
        key("user: ho\n"),
        key(encoder="f"),
        key(render="s"),
        key(dtype=torch.bfloat16),
        key("\ud800"),
        key("\udfff"),
        key("\ufffd"),
        key(""),
    }
    assert len(different) == 9
    assert key() == key()
    assert len(key()) == 64


def test_cached_features_equal_fresh_ones_bit_for_bit(tmp_path):
    encoder, store = PoolingEncoder(), FeatureStore(tmp_path / "new" / "features")
    fresh = encode_pages(encoder, pages(5), keys(5), store=store, dtype=HALF, batch_size=2)
    assert encoder.calls == [2, 2, 1]
    cached = encode_pages(encoder, pages(5), keys(5), store=store, dtype=HALF)
    assert encoder.calls == [2, 2, 1]
    assert torch.equal(fresh, cached)
    assert torch.equal(fresh, encoder(pages(5)).to(HALF))
    without = encode_pages(encoder, pages(5), keys(5), store=None, dtype=HALF)
    assert torch.equal(fresh, without)
    assert (fresh.dtype, tuple(fresh.shape)) == (HALF, (5, 80, 384))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 5
    assert store.path(keys(1)[0]).parent.name == keys(1)[0][:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(tmp_path, dtype):
    store = FeatureStore(tmp_path)
    fresh = encode_pages(PoolingEncoder(), pages(2), keys(2), store=store, dtype=dtype)
    assert torch.equal(get(store, keys(2)[1], dtype), fresh[1])


def test_mixed_and_repeated_pages_keep_their_order(tmp_path):
    encoder, store = PoolingEncoder(), FeatureStore(tmp_path)
    encode_pages(encoder, pages(4)[1:2], keys(4)[1:2], store=store, dtype=HALF)
    order = [3, 1, 3, 0, 1]
    mixed = encode_pages(encoder, pages(4)[order], [keys(4)[i] for i in order], store=store, dtype=HALF)
    assert torch.equal(mixed, encoder(pages(4)[order]).to(HALF))
    assert encoder.calls[:2] == [1, 2]


def test_no_pages():
    assert encode_pages(PoolingEncoder(), pages(0), [], store=None, dtype=HALF).shape == (0, 80, 384)


def test_features_can_be_learnt_from(tmp_path):
    store = FeatureStore(tmp_path)
    for _ in range(2):  # fresh, then cached
        features = encode_pages(PoolingEncoder(), pages(1), keys(1), store=store, dtype=torch.float32)
        linear = torch.nn.Linear(384, 3)
        linear(features).sum().backward()
        assert linear.weight.grad is not None


def test_blank_lines_take_no_room(tmp_path):
    store, blank = FeatureStore(tmp_path), pages(2)
    blank[0, 48:] = 255
    blank[1] = 255
    fresh = encode_pages(PoolingEncoder(), blank, keys(2), store=store, dtype=HALF)
    assert store.path(keys(2)[0]).stat().st_size < 5 * 384 * 2 + 300
    assert torch.equal(get(store, keys(2)[0]), fresh[0])
    assert torch.equal(get(store, keys(2)[1]), torch.zeros(80, 384, dtype=HALF))


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_empty(path):
    path.write_bytes(b"")


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def damage_garbage(path):
    path.write_bytes(b"\xff" * 1000)


def damage_shape(path):
    store = FeatureStore(path.parent.parent)
    store.put(path.stem, torch.ones(3, 7, dtype=HALF))


def damage_folder(path):
    path.unlink()
    path.symlink_to(path.parent)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncate, "incomplete|InvalidHeader|MetadataIncomplete"),
        (damage_empty, "HeaderTooSmall|too small"),
        (damage_flip, "its checksum is wrong"),
        (damage_garbage, "[Hh]eader"),
        (damage_shape, r"shape \(3, 7\)"),
        (damage_folder, "."),
    ],
)
def test_a_damaged_file_is_removed_and_computed_again(tmp_path, caplog, damage, reason):
    encoder, store = PoolingEncoder(), FeatureStore(tmp_path)
    fresh = encode_pages(encoder, pages(1), keys(1), store=store, dtype=HALF)
    damage(store.path(keys(1)[0]))
    again = encode_pages(encoder, pages(1), keys(1), store=store, dtype=HALF)
    assert torch.equal(fresh, again)
    assert encoder.calls == [1, 1]
    (record,) = caplog.records
    assert "damaged" in record.message
    assert pytest.importorskip("re").search(reason, record.message)
    assert torch.equal(get(store, keys(1)[0]), fresh[0])


def test_a_full_disk_is_a_warning(tmp_path, caplog):
    encoder, store = PoolingEncoder(), FeatureStore(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        fresh = encode_pages(encoder, pages(3), keys(3), store=store, dtype=HALF)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(fresh, encoder(pages(3)).to(HALF))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "features are no longer cached" in record.message
    assert "File too large" in record.message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match=r"feature cache '.*x' is a file; give the path of a folder"):
        FeatureStore(tmp_path / "x")


def test_overflow_names_the_setting():
    with pytest.raises(
        ConfigError, match=r"a feature of encoder 'pooling' is 1e\+05, too large for feature_dtype='float16'"
    ):
        encode_pages(PoolingEncoder(scale=1e5), pages(1) * 0, keys(1), store=None, dtype=HALF)
    encode_pages(PoolingEncoder(scale=1e5), pages(1) * 0, keys(1), store=None, dtype=torch.bfloat16)


def test_broken_weights_are_named():
    with pytest.raises(CheckpointError, match="encoder 'pooling' gave features that are not finite numbers"):
        encode_pages(PoolingEncoder(scale=float("nan")), pages(1), keys(1), store=None, dtype=torch.float32)


def write_and_read(folder, seed, number):
    """Work of one of several processes: all pages, in an order of its own, twice."""
    torch.set_num_threads(1)
    store, all_pages = FeatureStore(folder), pages(number)
    for turn in range(2):
        order = torch.randperm(number, generator=torch.Generator().manual_seed(seed + turn)).tolist()
        features = encode_pages(
            PoolingEncoder(),
            all_pages[order],
            [keys(number)[i] for i in order],
            store=store,
            dtype=HALF,
            batch_size=1,
        )
        assert torch.equal(features, PoolingEncoder()(all_pages[order]).to(HALF))


def write_forever(folder):
    """Write big features until killed."""
    store = FeatureStore(folder)
    for i in range(1_000_000):
        store.put(key(f"big {i}"), torch.ones(80, 40_000, dtype=HALF))


def test_two_processes_and_a_killed_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=write_forever, args=(tmp_path,))
    others = [context.Process(target=write_and_read, args=(tmp_path, seed, 8)) for seed in (0, 100)]
    for process in (killed, *others):
        process.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    for process in (killed, *others):
        process.join()
    assert [process.exitcode for process in others] == [0, 0]
    store = FeatureStore(tmp_path)
    fresh = PoolingEncoder()(pages(8)).to(HALF)
    assert all(torch.equal(get(store, key), fresh[i]) for i, key in enumerate(keys(8)))
    kept = {path.stem for path in tmp_path.rglob("*.safetensors")}
    for name in kept - set(keys(8)):
        assert store.get(name, tokens_per_page=80, feature_width=40_000, dtype=HALF) is not None
