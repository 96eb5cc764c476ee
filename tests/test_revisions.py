"""A model's revisions: what their names tell, their order, and a hub that does not list them."""

import json

import huggingface_hub
import pytest
from fake_hub import FakeHub

from olmo3_mlx import CheckpointError, HubError
from olmo3_mlx.checkpoints.revisions import Revision, in_training_order, list_revisions
from olmo3_mlx.cli import main

ORDERED = [
    "stage1-step0-tokens0B",
    "stage1-step5000-tokens21B",
    "stage1-step10000",
    "stage1-step1413814",
    "stage2-step1000",
    "stage2-step47684",
    "stage2-step47684-mix-1-from-2T-ckpt",
    "stage2-ingredient1-step1000-tokens5B",
    "stage2-ingredient1-step12000",
    "stage2-ingredient2-step1000",
    "stage3-step11921",
    "v1.0",
    "main",
]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stage1-step1413814", (1, None, 1413814, None)),
        ("stage1-step5000-tokens21B", (1, None, 5000, 21 * 10**9)),
        ("stage1-step9-tokens1.5T", (1, None, 9, 15 * 10**11)),
        ("stage2-ingredient1-step1000-tokens5B", (2, 1, 1000, 5 * 10**9)),
        ("stage2-step47684-mix-3-from-2T-ckpt", (2, None, 47684, None)),
        ("stage3", (3, None, None, None)),
        ("step_0100", (None, None, 100, None)),
        ("step1000-tokens4B", (None, None, 1000, 4 * 10**9)),
        ("main", (None, None, None, None)),
        ("backstage1", (None, None, None, None)),
        ("stage1step5", (None, None, None, None)),
        ("steps", (None, None, None, None)),
        ("-tokens5B", (None, None, None, None)),
        ("", (None, None, None, None)),
    ],
)
def test_a_name_tells_stage_ingredient_step_and_tokens(name: str, told: tuple[int | None, ...]) -> None:
    found = Revision.named(name, "branch", "c")
    assert (found.stage, found.ingredient, found.step, found.tokens) == told
    assert (found.name, found.kind, found.commit) == (name, "branch", "c")


def test_revisions_come_in_training_order() -> None:
    shuffled = sorted(ORDERED, key=lambda name: name[::-1])
    assert shuffled != ORDERED
    found = in_training_order(Revision.named(name, "branch", "c") for name in shuffled)
    assert [revision.name for revision in found] == ORDERED


def test_steps_are_ordered_as_numbers_whatever_their_zeros() -> None:
    found = in_training_order(
        Revision.named(n, "branch", "c") for n in ("step_1375", "step_300", "step_0025")
    )
    assert [revision.step for revision in found] == [25, 300, 1375]


def test_branches_and_tags_are_listed_with_their_commits(hub: FakeHub) -> None:
    hub.branches, hub.tags = ["main", "stage1-step10"], ["v1.0"]
    found = list_revisions("olmo/tiny")
    assert [(r.name, r.kind, int(r.commit, 16)) for r in found] == [
        ("stage1-step10", "branch", 1),
        ("v1.0", "tag", 0),
        ("main", "branch", 0),
    ]
    assert hub.asked[-1] == "/api/models/olmo/tiny/refs"


def test_the_verb_prints_what_the_names_tell(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.branches = ["main", "stage2-step47684", "stage1-step5000-tokens21B", "stage1-step1413814"]
    assert main(["revisions", "olmo/tiny"]) == 0
    assert capsys.readouterr().out == (
        "revision                   stage       step  tokens\n"
        "stage1-step5000-tokens21B      1      5,000     21B\n"
        "stage1-step1413814             1  1,413,814\n"
        "stage2-step47684               2     47,684\n"
        "main\n"
    )


def test_columns_that_no_name_fills_are_left_out(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.branches = ["main", "step_0100"]
    assert main(["revisions", "olmo/tiny"]) == 0
    assert capsys.readouterr().out == "revision   step\nstep_0100   100\nmain\n"


def test_the_verb_gives_json(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.branches = ["main", "stage2-ingredient1-step7-tokens2T"]
    assert main(["revisions", "olmo/tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "olmo/tiny"
    assert found["revisions"][0] == {
        "name": "stage2-ingredient1-step7-tokens2T", "kind": "branch", "commit": f"{1:040x}", "stage": 2,
        "ingredient": 1, "step": 7, "tokens": 2 * 10**12,
    }  # fmt: skip
    assert [r["name"] for r in found["revisions"]][1:] == ["main"]


@pytest.mark.parametrize("name", ["", "demo", "7b", "/tmp", "../x/y", "a/b/c"])
def test_what_is_no_hub_id_is_refused_without_asking(hub: FakeHub, name: str) -> None:
    with pytest.raises(CheckpointError, match="no hub id"):
        list_revisions(name)
    assert not hub.asked


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, "RepoNotFound", None), "no such model"),
        ((404, "RepoNotFound", None), "no such model"),
        ((403, "GatedRepo", None), "gated"),
        ((500, "", None), "try again"),
        ((429, "", None), "try again"),
        ((None, "", "<html>"), "try again"),
        ((None, "", "{}"), "try again"),
        ((None, "", '{"branches": 7}'), "try again"),
    ],
)
def test_a_hub_that_does_not_list_them_is_a_hub_error_of_one_line(
    hub: FakeHub, answer: tuple[int | None, str, str | None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.status, hub.code, hub.refs = answer
    with pytest.raises(HubError, match=said) as caught:
        list_revisions("olmo/tiny")
    assert "olmo/tiny" in str(caught.value)
    assert main(["revisions", "olmo/tiny"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("olmo3 revisions: error: olmo/tiny")
    assert shown.err.count("\n") == 1


def test_a_hub_out_of_reach_is_a_hub_error(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="check the network"):
        list_revisions("olmo/tiny")


def test_offline_mode_is_respected(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        list_revisions("olmo/tiny")
    assert not hub.asked
