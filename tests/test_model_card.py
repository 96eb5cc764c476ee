"""The card that a result gets for the hub, and putting it there, at the border of the hub's client."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, random_model, save_checkpoint
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from convert import convert as to_mlx
from convert.writer.upload import check_login
from olmo3_mlx import HubError

CHAT = "{{ messages[0].content }}"


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**TINY, "intermediate_size": 128, "vocab_size": 8192}
    return save_checkpoint(tmp_path_factory.mktemp("even") / "source", config, random_model(config).tensors())


def card_of(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert isinstance(card, ModelCard)
    return card


def cached_with(even: Path, cache: Path, front: str) -> Path:
    """A download of allenai/Olmo-3-7B-Instruct, its card's front matter as given."""
    folder = cache / "models--allenai--Olmo-3-7B-Instruct" / "snapshots" / ("a" * 40)
    shutil.copytree(even, folder)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    return folder


def test_the_front_matter_says_what_the_hub_asks_for(even: Path, tmp_path: Path) -> None:
    cached = cached_with(even, tmp_path, "base_model: allenai/Olmo-3-7B-Instruct-DPO")
    to_mlx(cached, tmp_path / "dest", bits=4)
    data = card_of(tmp_path / "dest").data.to_dict()
    assert data["base_model"] == "allenai/Olmo-3-7B-Instruct"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "mlx"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["mlx", "olmo3", "4-bit"]


def test_what_a_local_original_was_trained_from_is_named_and_not_taken_for_it(
    even: Path, tmp_path: Path
) -> None:
    shutil.copytree(even, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\nbase_model:\n- me/mine\n---\n# Mine\n")
    to_mlx(tmp_path / "source", tmp_path / "dest")
    to_mlx(tmp_path / "dest", tmp_path / "back", bits=None, dtype="bfloat16")
    for folder in (tmp_path / "dest", tmp_path / "back"):
        data = card_of(folder).data.to_dict()
        assert data["license"] == "mit"
        assert (data["base_model"], data["base_model_relation"]) == ("me/mine", "finetune")
    said = "The Olmo 3 model `source`, trained from [me/mine](https://huggingface.co/me/mine), quantized for"
    assert said in card_of(tmp_path / "dest").text


@pytest.mark.parametrize(
    ("named", "base"),
    [("me/mine", "me/mine"), ("/home/me/mine", None), ("source", None), ("dir/file", None), (5, None)],
)
def test_what_a_local_originals_config_names_is_the_base_if_it_is_a_hub_id(
    even: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: object, base: str | None
) -> None:
    source = Path(shutil.copytree(even, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": named}))
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").touch()
    monkeypatch.chdir(tmp_path)
    to_mlx(source, tmp_path / "dest")
    card = card_of(tmp_path / "dest")
    assert card.data.to_dict().get("base_model") == base
    assert "base_model_relation" not in card.data.to_dict()
    names = " (its config names [me/mine](https://huggingface.co/me/mine))" if base else ""
    assert f"The Olmo 3 model `source`{names} quantized for MLX: " in card.text


def test_the_card_links_only_pages_that_are_there(even: Path, tmp_path: Path) -> None:
    to_mlx(even, tmp_path / "dest", card=True)
    text = card_of(tmp_path / "dest").text
    assert re.findall(r"https?://[^)\s]+", text) == ["https://pypi.org/project/mlx-lm/"]
    quality = re.search(r"said of (\w+), where it is farthest off\.\n\n(\|.*\n)+", text)
    assert quality
    assert re.search(rf"^\| {quality[1]} \| .* ± .* \| .* of 31 \| .* ± .* \|$", quality[0], re.M)
    assert re.search(r"^\| all 4 kinds of text \| .* of 124 ", quality[0], re.M)
    assert "of an 8B in llama.cpp's table (a small model's KL is not a large one's)" in text


def test_a_conversion_of_a_conversion_keeps_its_base(even: Path, tmp_path: Path) -> None:
    cached = cached_with(even, tmp_path, "library_name: mlx\nlicense: mit\nbase_model: me/mine")
    to_mlx(cached, tmp_path / "dest", bits=None, dtype="float16")
    data = card_of(tmp_path / "dest").data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "me/mine")
    assert "base_model_relation" not in data  # only cast


def test_a_conversion_that_names_no_base_is_one_itself(even: Path, tmp_path: Path) -> None:
    cached = cached_with(even, tmp_path, "library_name: mlx")
    to_mlx(cached, tmp_path / "dest")
    assert card_of(tmp_path / "dest").data.to_dict()["base_model"] == "allenai/Olmo-3-7B-Instruct"


def test_a_folder_below_a_download_is_not_that_download(even: Path, tmp_path: Path) -> None:
    mine = tmp_path / "models--allenai--Olmo-3-7B-Instruct" / "mine"
    shutil.copytree(even, mine)
    to_mlx(mine, tmp_path / "dest")
    assert "base_model" not in card_of(tmp_path / "dest").data.to_dict()


@pytest.mark.parametrize("text", ["", "no front matter", "---\n: : :\n---\n", "---\n- a\n---\n"])
def test_what_cannot_be_told_is_not_claimed(even: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(even, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(text)
    to_mlx(tmp_path / "source", tmp_path / "dest")
    data = card_of(tmp_path / "dest").data.to_dict()
    assert "license" not in data
    assert "base_model" not in data


def test_the_card_lists_which_layers_have_how_many_bits_and_how_to_run_them(
    even: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('bits = 4\n[layers]\n"*.down_proj" = 6\nlm_head = { bits = 8, group_size = 32 }\n')
    (even / "chat_template.jinja").write_text(CHAT)
    report = to_mlx(even, tmp_path / "mixed", recipe=recipe)
    text = (tmp_path / "mixed" / "README.md").read_text()
    assert "| `mlp.down_proj` of all 4 layers | 6 | 64 | affine |" in text
    assert "| `lm_head` | 8 | 32 | affine |" in text
    assert "`mlp.gate_proj`, `mlp.up_proj` of all 4 layers" in text
    assert f" MB, {report.bits_per_weight:.3f} bits per weight" in text
    assert "0.00 GB" not in text
    assert "olmo3 chat --model mixed\n" in text
    assert "mlx_lm.chat --model mixed\n" in text


def test_the_card_lists_what_is_not_quantized_and_why(even: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    rules = '"*.v_proj" = { bits = 4, group_size = 64 }\nlm_head = "none"\n'
    recipe.write_text(f"bits = 4\ngroup_size = 128\n[layers]\n{rules}")
    to_mlx(even, tmp_path / "dest", recipe=recipe, dtype="bfloat16")
    lines = (tmp_path / "dest" / "README.md").read_text().splitlines()
    (plain,) = (line for line in lines if "not quantized |" in line)
    assert "`lm_head`" in plain
    assert "`embed_tokens`" in plain
    assert plain.endswith(" | 16 | – | not quantized |")
    (norms,) = (line for line in lines if line.startswith("Norms are bfloat16."))
    assert "does not divide their inputs: `mlp.gate_proj`, `mlp.up_proj`, " in norms
    assert "lm_head" not in norms


def test_a_dequantized_model_does_not_pass_for_the_original(
    even: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.preparing._TOKENS", 64)
    source = cached_with(even, tmp_path, "license: mit")
    to_mlx(source, tmp_path / "small", bits=3)
    for card in (True, False):
        dest = tmp_path / f"card-{card}"
        to_mlx(tmp_path / "small", dest, bits=None, dtype="bfloat16", card=card)
        text = (dest / "README.md").read_text()
        assert (
            "\n[allenai/Olmo-3-7B-Instruct](https://huggingface.co/allenai/Olmo-3-7B-Instruct), dequantized "
            "for MLX to bfloat16 from the quantized checkpoint `small` (3-bit affine, group size 64): "
        ) in text
        assert "What quantizing lost is not back." in text
        assert ("Measured against the quantized checkpoint that it was made from: **" in text) == card
        assert "against the original" not in text
    assert "The original here is a quantized checkpoint itself (3-bit affine, group size 64): " in (
        tmp_path / "card-True" / "QUALITY.md"
    ).read_text().replace("\n", " ")


def test_a_folder_is_what_a_result_was_made_from_where_no_hub_id_is_known(even: Path, tmp_path: Path) -> None:
    to_mlx(even, tmp_path / "dest")
    assert "\nThe Olmo 3 model `source` quantized for MLX: " in (tmp_path / "dest" / "README.md").read_text()
    to_mlx(tmp_path / "dest", tmp_path / "back", bits=None, dtype="float16")
    text = (tmp_path / "back" / "README.md").read_text()
    assert "\nAn Olmo 3 model, dequantized for MLX to float16 from the quantized checkpoint `dest` (" in text


def test_the_commands_on_the_card_hold_names_with_spaces_and_quotes(even: Path, tmp_path: Path) -> None:
    to_mlx(even, tmp_path / "sp ace'q")
    text = (tmp_path / "sp ace'q" / "README.md").read_text()
    commands = [shlex.split(line) for line in text.splitlines() if " --model " in line]
    assert [message[message.index("--model") + 1] for message in commands] == ["sp ace'q"] * 2


def test_the_card_says_which_layers_and_stays_short_for_many(tmp_path: Path) -> None:
    config = {**TINY, "intermediate_size": 64, "vocab_size": 8192, "num_hidden_layers": 12}
    tensors = random_model(config).tensors()
    source = save_checkpoint(tmp_path / "source", config, tensors)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'bits = 4\n[layers]\n"model.layers.[0235].*.up_proj" = 6\n"model.layers.7.*.up_proj" = "none"\n'
        '"model.layers.[02468].*.q_proj" = 6\n"model.layers.3.*.v_proj" = 6\n'
    )
    to_mlx(source, tmp_path / "dest", recipe=recipe)
    lines = (tmp_path / "dest" / "README.md").read_text().splitlines()
    rows = {line.split(" | ")[1]: line.split(" | ")[0] for line in lines if line.startswith("| `")}
    assert rows["6"] == (
        "| `self_attn.q_proj` of 5 layers; `mlp.up_proj` of layers 0, 2–3, 5; `self_attn.v_proj` of layer 3"
    )
    assert rows["32"] == "| `mlp.up_proj` of layer 7"
    assert "Norms are float32. Each layer's bits are in config.json." in lines
    assert "`self_attn.q_proj` of 7 layers" in rows["4"]
    assert "`mlp.gate_proj`, `mlp.down_proj` of all 12 layers; " in rows["4"]


def test_a_template_in_the_tokenizers_config_is_one_too(even: Path, tmp_path: Path) -> None:
    source = shutil.copytree(even, tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    to_mlx(source, tmp_path / "base")
    assert "olmo3 generate " in (tmp_path / "base" / "README.md").read_text()
    file = source / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": CHAT}))
    to_mlx(source, tmp_path / "chat")
    assert "olmo3 chat --model chat\n" in (tmp_path / "chat" / "README.md").read_text()
    file.write_text(json.dumps({"chat_template": "{% if %}"}))
    to_mlx(source, tmp_path / "broken")
    assert "olmo3 generate " in (tmp_path / "broken" / "README.md").read_text()


class FakeApi:
    """Records what would reach the hub."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: dict[str, Exception] = {}

    def __call__(self) -> "FakeApi":
        return self

    def _record(self, name: str, **options: Any) -> str:
        self.calls.append((name, options))
        if name in self.error:
            raise self.error[name]
        return "https://hub/you/olmo3-4bit"

    def whoami(self) -> Any:
        return self._record("whoami")

    def create_repo(self, repo: str, **options: Any) -> str:
        return self._record("create_repo", repo=repo, **options)

    def upload_folder(self, **options: Any) -> str:
        options["files"] = sorted(p.name for p in Path(options["folder_path"]).iterdir())
        return self._record("upload_folder", **options)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    return fake


def test_the_result_goes_to_the_repository_when_it_is_complete(
    api: FakeApi, even: Path, tmp_path: Path
) -> None:
    to_mlx(even, tmp_path / "dest", upload_to="you/olmo3-4bit")
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1] == {"repo": "you/olmo3-4bit", "repo_type": "model", "exist_ok": True}
    options = api.calls[2][1]
    assert (options["repo_id"], options["folder_path"]) == ("you/olmo3-4bit", tmp_path / "dest")
    assert {"README.md", "config.json", "model.safetensors"} <= set(options["files"])
    assert not [name for name in options["files"] if name.startswith((".", "journal", "lock"))]
    assert "olmo3 chat --model you/olmo3-4bit" in (tmp_path / "dest" / "README.md").read_text()


def test_nothing_reaches_the_hub_unless_asked(api: FakeApi, even: Path, tmp_path: Path) -> None:
    to_mlx(even, tmp_path / "dest")
    assert api.calls == []


@pytest.mark.parametrize("repo", ["no-owner", "a/b/c", "you/", "-/x", "you/two words", ""])
def test_a_name_that_is_no_repositorys_is_refused_before_the_work(
    api: FakeApi, even: Path, tmp_path: Path, repo: str
) -> None:
    with pytest.raises(HubError, match=r"expected (a name|one) like you/olmo3-7b-4bit"):
        to_mlx(even, tmp_path / "dest", upload_to=repo)
    assert api.calls == []
    assert not list(tmp_path.iterdir())


def test_without_a_login_the_work_does_not_begin(api: FakeApi, even: Path, tmp_path: Path) -> None:
    api.error["whoami"] = LocalTokenNotFoundError("no token")
    with pytest.raises(HubError, match=r"log in first: `hf auth login`"):
        to_mlx(even, tmp_path / "dest", upload_to="you/olmo3-4bit")
    assert not list(tmp_path.iterdir())


def test_an_upload_that_fails_keeps_the_result_and_says_how_to_go_on(
    api: FakeApi, even: Path, tmp_path: Path
) -> None:
    api.error["upload_folder"] = OSError("connection lost")
    message = (
        r"the upload failed \(connection lost\): .*dest is complete, `hf upload you/olmo3-4bit .*dest \.`"
    )
    with pytest.raises(HubError, match=message):
        to_mlx(even, tmp_path / "dest", upload_to="you/olmo3-4bit")
    assert (tmp_path / "dest" / "model.safetensors").is_file()


def test_a_hub_out_of_reach_is_said_before_the_work(api: FakeApi) -> None:
    api.error["whoami"] = OSError("no route")
    with pytest.raises(HubError, match=r"asking who is logged in failed \(no route\): check the network"):
        check_login("you/olmo3-4bit")
