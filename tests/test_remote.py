"""Converting from the hub: a file at a time, fetched when it is needed, gone when it was used."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from conftest import QUICK_CALIBRATION, TINY, Told, cut_tokenizer, random_model, save_checkpoint
from fake_hub import INDEX, FakeHub, shard

from convert import convert as to_mlx
from olmo3_mlx import CheckpointError, ConvertError, HubError, OptionError

WANTED = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]


@pytest.fixture
def sharded(hub: FakeHub, tmp_path: Path) -> FakeHub:
    """The hub's model in two files, the blocks in the second."""
    shard(hub.files["main"], tmp_path)
    return hub


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "dest"


@pytest.fixture
def whole(sharded: FakeHub, tmp_path: Path) -> Path:
    """The same model converted from a folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in sharded.files["main"].items():
        if "/" not in name:
            (folder / name).write_bytes(data)
    to_mlx(folder, tmp_path / "whole", bits=None, dtype="float16")
    return tmp_path / "whole"


def make(dest: Path, **options: Any) -> None:
    to_mlx("olmo/tiny", dest, bits=None, dtype="float16", **options)


def assert_same_files(found: Path, expected: Path) -> None:
    assert {p.name for p in found.iterdir()} == {p.name for p in expected.iterdir()}
    for path in expected.iterdir():
        if path.name == "README.md":  # which says where the model came from
            continue
        assert (found / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("keep", [True, False])
def test_from_the_hub_comes_what_comes_from_a_folder(
    sharded: FakeHub, dest: Path, whole: Path, keep: bool
) -> None:
    make(dest, keep=keep)
    assert_same_files(dest, whole)


def test_the_licence_comes_from_the_hub_too(sharded: FakeHub, dest: Path) -> None:
    sharded.files["main"]["LICENSE"] = b"Apache License"
    make(dest)
    assert (dest / "LICENSE").read_bytes() == b"Apache License"


def test_files_are_kept_in_the_cache_unless_told(sharded: FakeHub, dest: Path, tmp_path: Path) -> None:
    make(dest)
    assert {p.name for p in (tmp_path / "cache").rglob("*.safetensors")} == set(WANTED)
    sharded.got.clear()
    make(dest.with_name("again"))
    assert sharded.got == []


def test_without_keeping_no_file_stays(sharded: FakeHub, dest: Path, tmp_path: Path) -> None:
    make(dest, keep=False)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert [p.name for p in dest.rglob("*.safetensors")] == ["model.safetensors"]
    assert not list(dest.glob("shards"))


def test_what_is_not_kept_is_not_fetched_again_for_a_card(
    sharded: FakeHub, dest: Path, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "wide", TINY, random_model(TINY).tensors())
    sharded.files["main"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    shard(sharded.files["main"], tmp_path)
    report = to_mlx("olmo/tiny", dest, group_size=32, keep=False, card=None)
    assert report.quality is None
    assert "keep=False" in str(report.no_card)
    assert all(sharded.got.count(name) <= 2 for name in WANTED)  # the header, and all of it
    assert not (dest / "QUALITY.md").exists()


@pytest.mark.parametrize("options", [{"card": True}, {"card": None, "text": "a.txt"}])
def test_a_card_that_was_asked_for_is_refused_where_nothing_is_kept(
    sharded: FakeHub, dest: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match="a card needs the original again"):
        to_mlx("olmo/tiny", dest, keep=False, **options)
    assert not sharded.got


def test_a_folder_has_nothing_to_let_go(whole: Path, dest: Path) -> None:
    with pytest.raises(OptionError, match="is a folder here: keep=False"):
        to_mlx(whole, dest, keep=False, bits=None)


def test_a_file_is_let_go_of_before_the_next_is_fetched(hub: FakeHub, dest: Path, tmp_path: Path) -> None:
    files = hub.files["main"]
    tensors = mx.load(str(write(tmp_path / "model.safetensors", files.pop("model.safetensors"))))
    assert isinstance(tensors, dict)
    early = {name: t for name, t in tensors.items() if "embed" in name or ".layers.0" in name}
    weight_map: dict[str, str] = {}
    for n, part in enumerate((early, {k: v for k, v in tensors.items() if k not in early}), 1):
        mx.save_safetensors(str(tmp_path / WANTED[n - 1]), part)
        files[WANTED[n - 1]] = (tmp_path / WANTED[n - 1]).read_bytes()
        weight_map |= dict.fromkeys(part, WANTED[n - 1])
    files[INDEX] = json.dumps({"weight_map": weight_map}).encode()
    seen: list[set[str]] = []

    def look(done: int, total: int) -> None:
        seen.append({p.name for p in (dest.parent / ".dest.unfinished" / "shards").glob("*.safetensors")})

    make(dest, keep=False, progress=look)
    assert {WANTED[0]} in seen
    assert set(WANTED) not in seen


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_hub_that_fails_on_the_way_costs_nothing(sharded: FakeHub, dest: Path, whole: Path) -> None:
    kept = sharded.files["main"].pop(WANTED[1])
    with pytest.raises(HubError):
        make(dest, keep=False)
    sharded.files["main"][WANTED[1]] = kept
    make(dest, keep=False, resume=True)
    assert_same_files(dest, whole)


def stop_late(stage: str) -> dict[str, Any]:
    """Callbacks that stop a conversion when most of a stage is done."""
    told = Told()

    def progress(done: int, total: int) -> None:
        if told.titles[-1].startswith(stage) and done > 0.9 * total:
            raise KeyboardInterrupt

    return {"stage": told.stage, "progress": progress}


def test_a_stopped_conversion_goes_on_though_its_files_are_in_the_cache_by_now(
    sharded: FakeHub, dest: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(dest, **stop_late("converting"))
    assert {p.name for p in (tmp_path / "cache").rglob("*.safetensors")} == set(WANTED)
    make(dest, resume=True)
    assert_same_files(dest, whole)


def test_a_stopped_calibration_goes_on_though_its_files_are_in_the_cache_by_now(
    hub: FakeHub, dest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in QUICK_CALIBRATION.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setattr("convert.calibration.text._TOKENS", 256)
    monkeypatch.setattr("convert.calibration.text._LEAST_TOKENS", 64)
    monkeypatch.setattr("convert.calibration.text._LENGTH", 64)
    monkeypatch.setattr("convert.calibration.sensitivity._SEQUENCES", 2)
    monkeypatch.setattr("convert.preparing._LENGTH", 64)
    config = {**TINY, "vocab_size": 512, "num_hidden_layers": 1, "eos_token_id": [510, 508]}
    folder = save_checkpoint(tmp_path / "folder", config, random_model(config).tensors())
    cut_tokenizer(folder, 512)
    hub.files["main"] = {file.name: file.read_bytes() for file in folder.iterdir()}
    to_mlx(folder, tmp_path / "whole", calibrate=True)
    with pytest.raises(KeyboardInterrupt):
        to_mlx("olmo/tiny", dest, calibrate=True, **stop_late("calibrating"))
    to_mlx("olmo/tiny", dest, calibrate=True, resume=True)
    assert_same_files(dest, tmp_path / "whole")


def test_another_commit_does_not_go_on_with_what_one_began(sharded: FakeHub, dest: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(dest, **stop_late("converting"))
    with pytest.raises(ConvertError, match=r"is another one \(SOURCE is another or has changed\): "):
        make(dest, resume=True, revision="stage1")


def test_a_download_that_breaks_goes_on(sharded: FakeHub, dest: Path, whole: Path) -> None:
    sharded.cut[WANTED[1]] = 1
    make(dest, keep=False)
    assert_same_files(dest, whole)


def test_an_index_that_promises_more_than_the_files_hold_is_refused_before_the_work(
    sharded: FakeHub, dest: Path
) -> None:
    index = json.loads(sharded.files["main"][INDEX])
    files = index["weight_map"]
    files["lm_head.weight"] = next(name for name in WANTED if name != files["lm_head.weight"])
    sharded.files["main"][INDEX] = json.dumps(index).encode()
    message = r"its index promises tensors that its shards lack: lm_head\.weight"
    with pytest.raises(CheckpointError, match=message):
        make(dest)
    assert not list(dest.parent.iterdir())


def test_a_revision_that_is_not_there_is_named(sharded: FakeHub, dest: Path) -> None:
    with pytest.raises(HubError, match="has no revision 'stage9'"):
        make(dest, revision="stage9")


def test_the_disk_must_have_room_for_a_file_too(
    sharded: FakeHub, dest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [len(sharded.files["main"][name]) for name in WANTED]

    class Usage:
        free = sum(sizes) // 2 + 100  # of float16, half of the original

    ours = SimpleNamespace(disk_usage=lambda _: Usage, rmtree=shutil.rmtree)
    monkeypatch.setattr("convert.writer.folder.shutil", ours)
    with pytest.raises(ConvertError, match="make room"):
        make(dest, keep=False)
    make(dest)
