"""Downloads that go right, and every way in which they can go wrong, with the real pip on a local folder."""

import json
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
from asset_wheels import MEMBER, start, tiny_asset, write_wheel

from ocrmem.assets.cache import SEAL, asset_dir, cache_dir, seal
from ocrmem.assets.fetch import asset_names, asset_revision, resolve, resolve_asset
from ocrmem.assets.registry import Preparation
from ocrmem.errors import AssetError

CONTENT = bytes(range(256)) * 41


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a folder that pip takes for the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("OCRMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def get(asset, *, offline=False) -> tuple[Path, list[str]]:
    said: list[str] = []
    return resolve_asset(asset, offline=offline, progress=said.append), said


def leftovers() -> list[str]:
    """Everything in the cache that is not a finished asset."""
    root = cache_dir() / "assets" / "tiny"
    return [path.name for path in root.iterdir() if path.name != ".lock"] if root.exists() else []


def test_download_on_first_use_then_from_the_cache(index):
    wheel = write_wheel(index, CONTENT)
    asset = tiny_asset(CONTENT)
    path, said = get(asset)
    assert path.read_bytes() == CONTENT
    assert path.name == "data.bin"
    assert said[0] == "tiny: downloading ocrmem-test-asset 1.0 (0 MB unpacked)"
    assert said[1] == "tiny: CC0-1.0; made by the test"
    wheel.unlink()
    assert get(asset) == (path, [])
    assert leftovers() == [asset.sha256[:12]]


def test_silent_without_progress(index, capfd, monkeypatch):
    write_wheel(index, CONTENT)
    monkeypatch.setattr("ocrmem.assets.fetch.ASSETS", (tiny_asset(CONTENT),))
    assert resolve("tiny").read_bytes() == CONTENT
    assert capfd.readouterr() == ("", "")


def test_changed_content_is_noticed_and_fetched_again(index):
    write_wheel(index, CONTENT)
    path, _ = get(tiny_asset(CONTENT))
    broken = bytearray(CONTENT)
    broken[1000] ^= 1
    path.write_bytes(broken)
    again, said = get(tiny_asset(CONTENT))
    assert again.read_bytes() == CONTENT
    assert len(said) == 2
    with path.open("r+b") as file:
        file.truncate(100)
    assert get(tiny_asset(CONTENT))[0].read_bytes() == CONTENT
    path.unlink()
    assert get(tiny_asset(CONTENT))[0].read_bytes() == CONTENT


def test_touched_file_is_hashed_once_and_kept(index):
    wheel = write_wheel(index, CONTENT)
    path, _ = get(tiny_asset(CONTENT))
    wheel.unlink()
    os.utime(path, (1, 1))
    assert get(tiny_asset(CONTENT)) == (path, [])
    entry = json.loads((path.parent / SEAL).read_text())["data.bin"]
    assert entry["mtime_ns"] == 1_000_000_000


@pytest.mark.parametrize("damage", ["{}", '{"data.bin": 3}', "\x00"])
def test_damaged_seal_is_not_trusted(index, damage):
    write_wheel(index, CONTENT)
    path, _ = get(tiny_asset(CONTENT))
    (path.parent / SEAL).write_text(damage)
    again, said = get(tiny_asset(CONTENT))
    assert again.read_bytes() == CONTENT
    assert len(said) == 2


def test_seal_over_other_content_is_not_trusted(index):
    write_wheel(index, CONTENT)
    path, _ = get(tiny_asset(CONTENT))
    path.write_bytes(CONTENT[::-1])
    seal(path.parent)
    assert get(tiny_asset(CONTENT))[0].read_bytes() == CONTENT


def test_another_pin_does_not_take_the_old_file(index):
    write_wheel(index, CONTENT)
    get(tiny_asset(CONTENT))
    write_wheel(index, CONTENT[::-1])
    assert get(tiny_asset(CONTENT[::-1]))[0].read_bytes() == CONTENT[::-1]


def test_other_content_in_the_wheel_is_refused(index):
    write_wheel(index, CONTENT[::-1])
    with pytest.raises(AssetError, match=r"'tiny': ocrmem_test_asset/data.bin has SHA-256 .* expected .* pinned; use"):
        get(tiny_asset(CONTENT))
    assert leftovers() == []


def test_other_size_in_the_wheel_is_refused(index):
    write_wheel(index, CONTENT + b"x")
    with pytest.raises(AssetError, match=r"data.bin in ocrmem_test_asset-1.0.* has 10497 bytes, expected 10496"):
        get(tiny_asset(CONTENT))
    assert leftovers() == []


def test_wheel_without_the_file_is_refused(index):
    write_wheel(index, CONTENT, member="ocrmem_test_asset/other.bin")
    with pytest.raises(AssetError, match=f"holds no {MEMBER}. Your package index serves another"):
        get(tiny_asset(CONTENT))
    assert leftovers() == []


def test_wheel_damaged_on_the_way_is_refused(index):
    wheel = write_wheel(index, CONTENT, stored=True)
    data = bytearray(wheel.read_bytes())
    data[data.index(CONTENT[:512]) + 100] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(AssetError, match=r"the downloaded .* is broken \(Bad CRC-32.*pip cache purge"):
        get(tiny_asset(CONTENT))
    assert leftovers() == []


def test_pip_failure_says_what_pip_said(index):
    with pytest.raises(
        AssetError,
        match=r"pip could not download ocrmem-test-asset==1.0 \(exit status 1\): ERROR: .*No matching "
        r"distribution found for ocrmem-test-asset==1.0. Check that `.* -m pip download --no-deps ocrmem-"
        r"test-asset==1.0` works",
    ):
        get(tiny_asset(CONTENT))
    assert leftovers() == []


def test_offline_without_the_file(index):
    write_wheel(index, CONTENT)
    with pytest.raises(AssetError, match=r"'tiny' is not in the cache .* Run `ocrmem fetch tiny` with a connection"):
        get(tiny_asset(CONTENT), offline=True)
    assert not cache_dir().exists()
    path, _ = get(tiny_asset(CONTENT))
    assert get(tiny_asset(CONTENT), offline=True) == (path, [])


def test_cache_that_cannot_be_written(index, tmp_path, monkeypatch):
    write_wheel(index, CONTENT)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OCRMEM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match=r"'tiny' could not be stored in .*: .*Not a directory.*point OCRMEM_CACHE"):
        get(tiny_asset(CONTENT))


def test_full_disk_leaves_nothing_behind(index):
    content = bytes(6_000_011)  # zeros: the wheel stays far below the limit, only its file does not fit
    write_wheel(index, content)
    asset = tiny_asset(content)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, old[1]))
    try:
        with pytest.raises(
            AssetError, match=r"could not be stored in .*File too large.* takes 6 MB .* free some space"
        ):
            get(asset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert leftovers() == []
    assert get(asset)[0].read_bytes() == content


RESOLVE = """
from asset_wheels import tiny_asset
from ocrmem.assets.fetch import resolve_asset
asset = tiny_asset(bytes({size}))
print("path", resolve_asset(asset, offline=False, progress=lambda line: print(line, flush=True)))
"""


def test_killed_in_the_middle_of_writing(index):
    size = 150_000_000
    content = bytes(size)
    write_wheel(index, content)
    process = start(RESOLVE.format(size=size))
    seen = 0
    while process.poll() is None and seen == 0:
        for path in asset_dir("tiny").glob(".partial-*/source/data.bin"):
            seen = path.stat().st_size
    process.kill()
    process.wait()
    assert 0 < seen < size
    (left,) = leftovers()
    assert left.startswith(".partial-")
    path, _ = get(tiny_asset(content))
    assert path.stat().st_size == size
    assert leftovers() == [tiny_asset(content).sha256[:12]]


def test_killed_while_pip_runs(index):
    write_wheel(index, bytes(10))
    process = start(RESOLVE.format(size=10))
    assert process.stdout is not None
    assert "downloading" in process.stdout.readline()
    process.kill()
    process.wait()
    assert get(tiny_asset(bytes(10)))[0].read_bytes() == bytes(10)


def test_two_processes_download_once(index):
    write_wheel(index, bytes(10))
    first = start(RESOLVE.format(size=10))
    assert first.stdout is not None
    lines = [first.stdout.readline()]
    assert "downloading" in lines[0]
    second, _ = start(RESOLVE.format(size=10)).communicate(timeout=60)
    rest, _ = first.communicate(timeout=60)
    assert "downloading" not in second
    assert "waiting for another process that works in" in second
    assert second.splitlines()[-1] == rest.splitlines()[-1]
    assert second.splitlines()[-1].startswith("path ")


def upper(source: Path, folder: Path) -> None:
    (folder / "upper.txt").write_text(source.read_text().upper())


def slow(source: Path, folder: Path) -> None:
    (folder / "half.txt").write_text("half")
    print("preparing", flush=True)
    time.sleep(60)


def prepared(run, *, version=1, outputs=None):
    return tiny_asset(b"words", preparation=Preparation(version=version, run=run, size=5, outputs=outputs))


def test_preparation_runs_once(index):
    write_wheel(index, b"words")
    folder, said = get(prepared(upper))
    assert (folder / "upper.txt").read_text() == "WORDS"
    assert said[-1] == "tiny: preparing prepared-v1 (0 MB)"
    assert get(prepared(upper)) == (folder, [])
    assert get(prepared(upper, version=2))[1] == ["tiny: preparing prepared-v2 (0 MB)"]


def test_preparation_needs_no_download_where_the_file_lies_ready(index):
    write_wheel(index, b"words").rename(index.parent / "away")
    with pytest.raises(AssetError, match="not in the cache"):
        get(prepared(upper), offline=True)
    (index.parent / "away").rename(index / "ocrmem_test_asset-1.0-py3-none-any.whl")
    folder, _ = get(prepared(upper))
    shutil.rmtree(folder)
    assert get(prepared(upper), offline=True) == (folder, ["tiny: preparing prepared-v1 (0 MB)"])


def test_damaged_preparation_is_made_again(index):
    write_wheel(index, b"words")
    folder, _ = get(prepared(upper))
    (folder / "upper.txt").write_text("WORDZ")
    assert (get(prepared(upper))[0] / "upper.txt").read_text() == "WORDS"


def test_preparation_with_other_outputs_is_refused(index):
    write_wheel(index, b"words")
    with pytest.raises(AssetError, match=r"its preparation wrote .*upper.txt.*, expected .*install it again"):
        get(prepared(upper, outputs={"upper.txt": "0" * 64}))
    assert [path.name for path in (asset_dir("tiny") / leftovers()[0]).iterdir()] == ["source"]


def test_killed_preparation_is_never_used(index):
    write_wheel(index, b"words")
    script = (
        "from test_assets_fetch import prepared, slow\nfrom ocrmem.assets.fetch import resolve_asset\n"
        "resolve_asset(prepared(slow), offline=False, progress=lambda line: None)"
    )
    process = start(script)
    assert process.stdout is not None
    assert process.stdout.readline() == "preparing\n"
    process.kill()
    process.wait()
    assert any(name.startswith(".partial-") for name in leftovers())
    folder, _ = get(prepared(upper))
    assert sorted(path.name for path in folder.iterdir()) == [SEAL, "upper.txt"]
    assert len(leftovers()) == 1


def test_local_paths_are_themselves(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == Path("model")
    assert resolve(str(tmp_path / "model")) == tmp_path / "model"
    assert asset_revision("./model") == "local"


def test_asset_name_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "chitchat").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OCRMEM_CACHE", str(tmp_path / "cache"))
    assert len(asset_revision("chitchat")) == 64
    with pytest.raises(AssetError, match="'chitchat' is not in the cache"):
        resolve("chitchat", offline=True)
    assert resolve("./chitchat") == Path("chitchat")


@pytest.mark.parametrize("offline", [True, False])
def test_unknown_name_lists_the_assets_nearest_first(offline):
    with pytest.raises(
        AssetError,
        match=r"'smollm2-135m' is no asset .* nearest first: smollm2-135m-instruct, .*local folder",
    ):
        resolve("smollm2-135m", offline=offline)


@pytest.mark.parametrize("name", ["", "./nowhere", "/nowhere/at/all", "a/b/c", "a b"])
def test_what_cannot_be_a_hub_id_is_told_at_once(name):
    with pytest.raises(AssetError, match=r"no existing file or folder, and no Hugging Face id \(owner/name\)"):
        resolve(name)


def test_hub_id_from_the_hub_cache(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    script = (
        f"import os; os.environ['HF_HUB_CACHE'] = {str(tmp_path)!r}\n"
        "from ocrmem.assets.fetch import asset_revision, resolve\n"
        "print(resolve('owner/model', offline=True)); print(asset_revision('owner/model'))"
    )
    out, _ = start(script).communicate(timeout=60)
    assert out.splitlines()[-2:] == [str(snapshot), commit]


def test_names():
    assert asset_names() == [
        "smollm2-135m-instruct",
        "pp-ocrv6-small-rec",
        "chitchat",
        "wiki-leads",
        "long-prose",
        "noto-sans-sc",
        "noto-sans-kr",
        "noto-sans-devanagari",
        "noto-sans-thai",
        "noto-sans-tamil",
        "noto-sans-telugu",
        "noto-sans-khmer",
        "noto-sans-arabic",
    ]


def test_npm_that_is_not_there(index, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(AssetError, match=r"'tiny' comes from npm, and there is no `npm` here. Install Node.js, or run"):
        get(tiny_asset(CONTENT, registry="npm", member="tiny-1.0.tgz"))
    assert leftovers() == []


def test_npm_that_fails(index, monkeypatch):
    npm = index / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{index}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(AssetError, match=r"could not download ocrmem-test-asset@1.0 \(exit status 1\): npm error code"):
        get(tiny_asset(CONTENT, registry="npm", member="tiny-1.0.tgz"))
    assert leftovers() == []
