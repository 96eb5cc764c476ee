"""Names to folders: the hub's part against a hub of our own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fake_hub import COMMITS, INDEX, JUNK, FakeHub, shard

from olmo3_mlx import CheckpointError, ConfigError, HubError, generate, load
from olmo3_mlx.checkpoints.files import weight_files
from olmo3_mlx.checkpoints.names import DEMO, resolve


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


TEXT_NAMES = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}

# What is fetched


def test_only_the_files_that_are_needed_are_fetched(hub: FakeHub) -> None:
    folder = resolve("olmo/tiny")
    assert names_in(folder) == TEXT_NAMES | {"model.safetensors"}
    assert sorted(hub.got) == sorted(names_in(folder))  # each of them once
    assert (folder / "model.safetensors").read_bytes() == hub.files["main"]["model.safetensors"]


def test_without_weights_no_safetensors_are_fetched(hub: FakeHub) -> None:
    assert names_in(resolve("olmo/tiny", weights=False)) == TEXT_NAMES
    assert not [name for name in hub.got if name.endswith(".safetensors")]


def test_of_a_sharded_model_the_files_of_the_index_are_fetched(hub: FakeHub, tmp_path: Path) -> None:
    shard(hub.files["main"], tmp_path)
    folder = resolve("olmo/tiny")
    shards = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]
    assert names_in(folder) == TEXT_NAMES | {INDEX, *shards}
    assert weight_files(folder) == [folder / name for name in shards]


def test_a_model_from_the_hub_loads_and_answers(hub: FakeHub, tmp_path: Path) -> None:
    shard(hub.files["main"], tmp_path)
    model, tokenizer = load("olmo/tiny")
    assert generate(model, tokenizer, "Hello", max_tokens=3).generation_tokens <= 3


def test_what_was_fetched_is_not_fetched_again(hub: FakeHub) -> None:
    folder = resolve("olmo/tiny")
    hub.got.clear()
    assert resolve("olmo/tiny") == folder
    assert hub.got == []


def test_a_revision_is_fetched_by_name_and_by_commit(hub: FakeHub) -> None:
    staged = resolve("olmo/tiny", "stage1")
    assert (staged / "config.json").read_bytes() == hub.files["stage1"]["config.json"]
    assert resolve("olmo/tiny", COMMITS["stage1"]) == staged
    assert (resolve("olmo/tiny") / "config.json").read_bytes() == hub.files["main"]["config.json"]


# What the hub refuses


def test_an_unknown_repository_is_named(hub: FakeHub) -> None:
    with pytest.raises(HubError, match="olmo/nothing") as error:
        resolve("olmo/nothing")
    assert "no such model" in one_line(error)


def test_a_missing_revision_is_named(hub: FakeHub) -> None:
    for revision in ("stage9", "c" * 40):
        with pytest.raises(HubError, match=revision) as error:
            resolve("olmo/tiny", revision)
        assert "no revision" in one_line(error)


@pytest.mark.parametrize("gated", ["api", "files"])
def test_a_gated_repository_is_told_from_an_unknown_one(hub: FakeHub, gated: str) -> None:
    hub.gated = gated
    with pytest.raises(HubError, match="gated") as error:
        resolve("olmo/tiny")
    assert "olmo/tiny" in one_line(error)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503])
def test_a_hub_that_answers_with_an_error_status_is_a_hub_error(hub: FakeHub, status: int) -> None:
    hub.status = status
    with pytest.raises(HubError, match="olmo/tiny") as error:
        resolve("olmo/tiny")
    one_line(error)


# No network


def test_a_hub_that_is_down_is_a_hub_error(hub: FakeHub, stop_hub: list[Callable[[], None]]) -> None:
    stop_hub[0]()
    with pytest.raises(HubError, match="network") as error:
        resolve("olmo/tiny", "stage1")
    assert "olmo/tiny at revision stage1" in one_line(error)


def test_a_fetched_model_needs_no_network(hub: FakeHub, stop_hub: list[Callable[[], None]]) -> None:
    folder = resolve("olmo/tiny")
    stop_hub[0]()
    assert resolve("olmo/tiny") == folder
    load("olmo/tiny")


def test_half_a_checkpoint_without_a_network_is_not_called_incomplete(
    hub: FakeHub, stop_hub: list[Callable[[], None]]
) -> None:
    resolve("olmo/tiny", weights=False)  # what `olmo3 inspect` fetches
    stop_hub[0]()
    with pytest.raises(HubError, match="not downloaded yet, and the hub cannot be reached"):
        resolve("olmo/tiny")


LICENCE = {"LICENSE": b"Apache 2.0", "special_tokens_map.json": b"{}"}


def fetched_by_another_program(hub: FakeHub, *files: str) -> None:
    """The cache as a program leaves it that knows what the model has, and wanted just these files of it."""
    huggingface_hub.snapshot_download("olmo/tiny", allow_patterns=[*files])


@pytest.mark.parametrize(
    "files", [["*.json", "*.jinja", "model*.safetensors"], [*TEXT_NAMES, "*.safetensors"]]
)
def test_without_a_network_a_licence_that_another_program_left_out_is_not_missed(
    hub: FakeHub, stop_hub: list[Callable[[], None]], files: list[str]
) -> None:
    hub.files["main"] |= LICENCE
    fetched_by_another_program(hub, *files)
    stop_hub[0]()
    assert load(resolve("olmo/tiny"))


def test_without_a_network_a_needed_file_that_another_program_left_out_is_missed(
    hub: FakeHub, stop_hub: list[Callable[[], None]]
) -> None:
    hub.files["main"] |= LICENCE
    fetched_by_another_program(hub, "*.json", "*.safetensors")  # no template
    stop_hub[0]()
    with pytest.raises(
        HubError, match="not all of it is downloaded yet, and the hub cannot be reached"
    ) as error:
        resolve("olmo/tiny")
    one_line(error)


def test_without_a_network_the_hub_is_not_blamed_for_a_shard_that_was_not_fetched(
    hub: FakeHub, stop_hub: list[Callable[[], None]], tmp_path: Path
) -> None:
    shard(hub.files["main"], tmp_path)
    fetched_by_another_program(hub, "*.json", "*.jinja", "model-00001-of-00002.safetensors")
    stop_hub[0]()
    with pytest.raises(HubError, match="downloaded yet, and the hub cannot be reached") as error:
        resolve("olmo/tiny")
    assert "no complete weights" not in one_line(error)


def test_of_a_model_with_an_older_index_the_single_file_is_fetched(hub: FakeHub) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    hub.files["main"][INDEX] = json.dumps(index).encode()
    assert load(resolve("olmo/tiny"))


def test_a_shard_without_an_index_is_fetched(hub: FakeHub) -> None:
    files = hub.files["main"]
    files["model-00001-of-00001.safetensors"] = files.pop("model.safetensors")
    assert load(resolve("olmo/tiny"))


def test_an_adapter_on_the_hub_is_called_one(hub: FakeHub) -> None:
    del hub.files["main"]["config.json"], hub.files["main"]["model.safetensors"]
    hub.files["main"]["adapter_config.json"] = b'{"base_model_name_or_path": "allenai/Olmo-3-7B"}'
    with pytest.raises(CheckpointError, match="is a LoRA adapter for allenai/Olmo-3-7B"):
        resolve("olmo/tiny")


def test_further_templates_are_fetched(hub: FakeHub) -> None:
    hub.files["main"]["additional_chat_templates/tool_use.jinja"] = b"tools"
    folder = resolve("olmo/tiny")
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"


def test_offline_mode_is_respected(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("olmo/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("olmo/tiny") == folder
    with pytest.raises(HubError) as error:
        resolve("olmo/tiny", "stage1")
    one_line(error)


def test_without_network_small_files_alone_are_no_whole_model(
    hub: FakeHub, stop_hub: list[Callable[[], None]]
) -> None:
    resolve("olmo/tiny", weights=False)
    stop_hub[0]()
    with pytest.raises(CheckpointError) as error:
        load("olmo/tiny")
    one_line(error)
    assert names_in(resolve("olmo/tiny", weights=False)) == TEXT_NAMES


# Downloads that break


@pytest.mark.parametrize("reset", [False, True])
def test_a_download_that_breaks_once_is_finished_at_the_latest_by_trying_again(
    hub: FakeHub, reset: bool
) -> None:
    hub.cut["model.safetensors"] = 1
    hub.reset = reset
    try:
        folder = resolve("olmo/tiny")
    except HubError:
        folder = resolve("olmo/tiny")
    assert (folder / "model.safetensors").read_bytes() == hub.files["main"]["model.safetensors"]


def test_a_download_that_breaks_goes_on_where_it_stopped(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.cut["model.safetensors"] = 2
    folder = resolve("olmo/tiny")
    assert (folder / "model.safetensors").read_bytes() == hub.files["main"]["model.safetensors"]
    assert len(hub.ranges) == 2
    assert all(entry.startswith("model.safetensors bytes=") for entry in hub.ranges)


@pytest.mark.parametrize("reset", [False, True])
def test_a_download_that_never_ends_is_a_hub_error_and_leaves_nothing_that_looks_whole(
    hub: FakeHub, reset: bool
) -> None:
    hub.files["main"]["model.safetensors"] = whole = hub.files["main"]["model.safetensors"][:4000]
    hub.cut["model.safetensors"] = 1000
    hub.reset = reset
    with pytest.raises(HubError, match="try again") as error:
        resolve("olmo/tiny")
    assert "olmo/tiny" in one_line(error)
    hub.cut.clear()
    assert (resolve("olmo/tiny") / "model.safetensors").read_bytes() == whole


# Names


def test_a_folder_is_its_own_checkpoint(tiny_checkpoint: Path) -> None:
    assert resolve(tiny_checkpoint) == tiny_checkpoint
    assert resolve(str(tiny_checkpoint), weights=False) == tiny_checkpoint


def test_a_folder_wins_over_a_hub_id_of_the_same_name(
    hub: FakeHub, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / "olmo" / "tiny")
    assert resolve("olmo/tiny") == Path("olmo/tiny")
    assert hub.got == []


def test_a_tilde_is_the_home_folder(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_checkpoint.parent))
    assert resolve(f"~/{tiny_checkpoint.name}") == tiny_checkpoint


def test_demo_is_the_embedded_model() -> None:
    assert resolve("demo") == DEMO


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "/no/such/folder",
        "a/b/c",
        "../nothing",
        "olmo tiny",
        "https://example.com/olmo",
        "olmo/",
        "/olmo",
        "olmo/ti ny",
        "olmo/tiny\n",
        "-x/y",
        "a\0b",
        pytest.param("n" * 5000, id="too long for a file"),
        "~nobody-of-that-name/tiny",
    ],
)
def test_a_name_that_is_no_folder_and_no_hub_id_is_a_checkpoint_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError) as error:
        resolve(name)
    assert not isinstance(error.value, HubError)
    assert "hub id" in str(error.value)


def test_a_hub_id_that_the_hub_would_never_give_is_a_checkpoint_error(hub: FakeHub) -> None:
    for name in ("olmo/..", "olmo/a--b", "olmo/" + "n" * 97, "olmo/é", "olmo/x.git"):
        with pytest.raises(CheckpointError) as error:
            resolve(name)
        one_line(error)


def test_a_file_instead_of_a_folder_is_named(tiny_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file") as error:
        resolve(tiny_checkpoint / "model.safetensors")
    one_line(error)


def test_a_revision_of_a_folder_or_the_demo_is_refused(tiny_checkpoint: Path) -> None:
    for name in (tiny_checkpoint, "demo"):
        with pytest.raises(CheckpointError, match="stage1") as error:
            resolve(name, "stage1")
        one_line(error)


# The weight files of a folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_weight_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as error:
        weight_files(tmp_path)
    assert str(tmp_path) in one_line(error)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").touch()
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"two\.safetensors") as error:
        weight_files(tmp_path)
    one_line(error)


def test_files_outside_the_index_are_left_alone(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors", "consolidated.safetensors"):
        (tmp_path / name).touch()
    write_index(tmp_path, {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    assert sorted(weight_files(tmp_path)) == [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]


def test_two_sets_of_weights_of_which_either_could_be_meant_are_refused(tmp_path: Path) -> None:
    """transformers would take the single file, mlx-lm both, one over the other."""
    for name in ("one.safetensors", "model.safetensors"):
        (tmp_path / name).touch()
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"has model\.safetensors and beside it .* remove those"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "", ".", "..", 3, None, ["x"], {}]
)
def test_an_index_that_names_anything_but_files_beside_it_is_refused(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "a").mkdir(parents=True)
    for path in (tmp_path, folder, folder / "a"):
        (path / "x.safetensors").touch()
    write_index(folder, {"b": "x.safetensors", "a": name})
    with pytest.raises(CheckpointError) as error:
        weight_files(folder)
    one_line(error)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="weight_map") as error:
        weight_files(tmp_path)
    one_line(error)


def test_an_index_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{")
    with pytest.raises((CheckpointError, ConfigError), match=r"index\.json") as error:
        weight_files(tmp_path)
    one_line(error)


@pytest.mark.parametrize("name", ["*", "*.bin", "original/", "[!.]*"])
def test_an_index_on_the_hub_cannot_make_more_than_its_weights_be_fetched(hub: FakeHub, name: str) -> None:
    hub.files["main"][INDEX] = json.dumps({"weight_map": {"a": name, "b": "model.safetensors"}}).encode()
    with pytest.raises(CheckpointError) as error:
        load("olmo/tiny")
    one_line(error)
    assert not set(hub.got) & JUNK.keys()
