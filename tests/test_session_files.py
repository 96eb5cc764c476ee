"""Saved sessions: what loads is right, what is damaged or of something else is refused with a reason, and
no failure of the disk or of the process leaves anything that loads wrong.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model
from test_session import LONG

from olmo3_mlx import Olmo3, Session, SessionError
from olmo3_mlx.generation.loop import prefill
from olmo3_mlx.sessions.files import SessionFiles

TOLERANCE = 1e-4
CONFIG = {**LONG, "max_position_embeddings": 2048}
CHAPTERS = ((0, 100), (100, 130), (130, 140))  # the stretches between snapshots


@pytest.fixture(scope="module")
def model() -> Olmo3:
    return random_model(CONFIG)


def ids(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(TINY["vocab_size"]) for _ in range(count)]


def open_session(model: Olmo3, folder: Path, **options: Any) -> Session:
    """A session with files in `folder`; `options` are those of SessionFiles and Session together."""
    identity, form = options.pop("identity", "weights"), options.pop("form", "plain")
    files = SessionFiles(folder, identity, form, options.pop("limit", 10**9))
    return Session(model, files=files, **{"rewind": 0, **options})


def write_session(model: Olmo3, folder: Path, tokens: list[int] | None = None, **options: Any) -> Session:
    """Save a conversation of three spans."""
    tokens = ids(140) if tokens is None else tokens
    session = open_session(model, folder, **options)
    for start, stop in CHAPTERS:
        session.prefill(tokens[start:stop])
        session.snapshot()
    session.save()
    return session


@pytest.fixture(scope="module")
def saved(model: Olmo3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved conversation of `ids(140)`, for copying."""
    folder = tmp_path_factory.mktemp("saved") / "session"
    write_session(model, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A saved conversation to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "session"))


def goes_on(model: Olmo3, session: Session, **caches: Any) -> bool:
    """Whether the session is consistent, and gives the logits of a fresh run from here on."""
    tokens = list(session.tokens)
    assert {cache.offset for cache in session.caches} == {len(tokens)}
    new = ids(3, seed=len(tokens) + 1)
    expected = prefill(model, [*tokens, *new], model.make_caches(**caches))
    return float(mx.abs(session.prefill(new) - expected).max()) < TOLERANCE


def one_line(error: SessionError) -> str:
    assert str(error)
    assert "\n" not in str(error)
    return str(error)


def refused(model: Olmo3, folder: Path, **options: Any) -> str:
    """The reason for which the session is refused; afterwards it is empty, and can be used and saved."""
    session = open_session(model, folder, **options)
    with pytest.raises(SessionError) as error:
        session.resume()
    usable(model, session, folder, **options)
    return one_line(error.value)


def usable(model: Olmo3, session: Session, folder: Path, **options: Any) -> None:
    assert list(session.tokens) == []
    assert goes_on(model, session)
    session.prefill(ids(20, seed=9))
    session.save()
    again = open_session(model, folder, **options)
    again.resume()
    assert list(again.tokens) == list(session.tokens)
    assert goes_on(model, again)


def right_or_refused(model: Olmo3, folder: Path, tokens: list[int] | None = None) -> bool:
    """Whether what was saved is still taken; if so it must be right, and the caches exact."""
    session = open_session(model, folder)
    try:
        session.resume()
    except SessionError as error:
        one_line(error)
        assert list(session.tokens) == []
        assert goes_on(model, session)
        return False
    assert list(session.tokens) in ([], ids(140) if tokens is None else tokens)
    assert goes_on(model, session)
    return True


def payloads(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def stray(folder: Path) -> list[str]:
    """Files that are neither the index nor a whole payload."""
    return [
        path.name
        for path in folder.iterdir()
        if path.name != "caches.json" and (path.name.startswith(".") or path.name.count(".") != 4)
    ]


# What was saved goes on


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("window", [8, 128])
def test_a_saved_conversation_goes_on_and_runs_only_what_is_new(
    tmp_path: Path, window: int, bits: int | None
) -> None:
    model = random_model({**CONFIG, "sliding_window": window})
    first = open_session(model, tmp_path, kv_bits=bits)
    first.prefill(ids(600))
    first.save()
    expected = first.prefill(ids(5, 3))
    second = open_session(model, tmp_path, kv_bits=bits)
    second.resume()
    assert list(second.tokens) == ids(600)
    assert second.match([*ids(600), *ids(5, 3)]) in (600, 604)
    found = second.prefill(ids(5, 3))
    assert float(mx.abs(found - expected).max()) < TOLERANCE


def test_resuming_where_nothing_was_saved_gives_an_empty_session(model: Olmo3, tmp_path: Path) -> None:
    session = open_session(model, tmp_path / "nothing")
    session.resume()
    assert list(session.tokens) == []
    assert not (tmp_path / "nothing").exists()
    usable(model, session, tmp_path / "nothing")


def test_an_empty_conversation_can_be_saved(model: Olmo3, tmp_path: Path) -> None:
    open_session(model, tmp_path).save()
    session = open_session(model, tmp_path)
    session.resume()
    assert list(session.tokens) == []
    assert goes_on(model, session)


def test_saving_twice_writes_nothing_twice(model: Olmo3, folder: Path) -> None:
    session = open_session(model, folder)
    session.resume()
    before = {path.name for path in payloads(folder)}
    session.save()
    assert {path.name for path in payloads(folder)} == before


def test_earlier_snapshots_can_be_gone_back_to_after_a_restart(model: Olmo3, tmp_path: Path) -> None:
    session = open_session(model, tmp_path)
    for start in range(0, 900, 300):
        session.prefill(ids(900)[start : start + 300])
        session.snapshot()
    session.save()
    session = open_session(model, tmp_path)
    session.resume()
    assert session.goto(300) in (0, 300)
    assert goes_on(model, session)


@pytest.mark.parametrize("seed", range(4))
def test_saving_again_and_again_along_branches_always_loads_the_last(
    model: Olmo3, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    session = open_session(model, tmp_path)
    for step in range(8):
        session.goto(rng.randint(0, len(session.tokens)))
        session.prefill(ids(rng.randint(1, 200), seed=100 * seed + step))
        session.save()
        again = open_session(model, tmp_path)
        again.resume()
        assert list(again.tokens) == list(session.tokens)
        if rng.random() < 0.5:
            session = again
    assert goes_on(model, session)
    assert stray(tmp_path) == []


def test_another_number_of_tokens_to_rewind_takes_the_same_files(model: Olmo3, folder: Path) -> None:
    for rewind in (0, 64, 512):
        session = open_session(model, folder, rewind=rewind)
        session.resume()
        assert list(session.tokens) == ids(140)
        assert goes_on(model, session)


# What is damaged or of something else is refused


@pytest.mark.parametrize(
    ("options", "word"), [({"identity": "others"}, "model"), ({"form": "4 bits"}, "form of cache")]
)
def test_files_of_another_model_or_form_are_refused(
    model: Olmo3, folder: Path, options: dict[str, str], word: str
) -> None:
    assert word in refused(model, folder, **options)


def test_another_format_version_is_refused(model: Olmo3, folder: Path) -> None:
    index = json.loads((folder / "caches.json").read_text())
    (folder / "caches.json").write_text(json.dumps({**index, "format": "2"}))
    assert "format version" in refused(model, folder)


def test_payloads_of_another_model_are_refused_though_the_index_is_of_this_one(
    model: Olmo3, folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_session(random_model(CONFIG, seed=5), other, identity="others")
    for path in payloads(folder):
        path.unlink()
    for path in payloads(other):
        shutil.copy(path, folder)
    assert "missing" in refused(model, folder)


@pytest.mark.parametrize("which", range(6))
def test_a_missing_file_is_refused(model: Olmo3, folder: Path, which: int) -> None:
    path = payloads(folder)[which]
    path.unlink()
    if ".sliding." in path.name:  # the window may not need it
        right_or_refused(model, folder)
    else:
        assert "missing" in refused(model, folder)


def test_the_payloads_alone_are_nothing(model: Olmo3, folder: Path) -> None:
    (folder / "caches.json").unlink()
    session = open_session(model, folder)
    session.resume()
    usable(model, session, folder)


@pytest.mark.parametrize("kind", ["full", "sliding", "caches"])
def test_a_file_cut_short_anywhere_is_refused(model: Olmo3, saved: Path, tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    for path in [path for path in saved.iterdir() if kind in path.name]:
        length = path.stat().st_size
        cuts = {0, 1, 7, 8, 9, 100, length // 2, length - 1, *(rng.randrange(length) for _ in range(3))}
        for cut in sorted(cuts):
            folder = Path(shutil.copytree(saved, tmp_path / f"{path.name}-{cut}"))
            (folder / path.name).write_bytes(path.read_bytes()[:cut])
            taken = right_or_refused(model, folder)
            assert not (taken and kind != "sliding"), (path.name, cut)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_payload_with_one_changed_byte_is_refused(
    model: Olmo3, saved: Path, tmp_path: Path, kind: str
) -> None:
    rng = random.Random(kind)
    for path in [path for path in payloads(saved) if f".{kind}." in path.name]:
        length = path.stat().st_size
        places = {0, 7, 8, 20, length - 1, *(rng.randrange(400) for _ in range(3))}
        places |= {rng.randrange(length) for _ in range(4)}
        for place in sorted(places):
            folder = Path(shutil.copytree(saved, tmp_path / f"{path.name}-{place}"))
            data = bytearray(path.read_bytes())
            data[place] ^= 1 << rng.randrange(8)
            (folder / path.name).write_bytes(data)
            taken = right_or_refused(model, folder)
            assert not (taken and kind == "full"), (path.name, place)


def test_an_index_with_one_changed_byte_is_never_taken_for_something_else(
    model: Olmo3, saved: Path, tmp_path: Path
) -> None:
    """Another token, another beginning of what is kept, a name misspelt: right, or refused."""
    original = (saved / "caches.json").read_bytes()
    text = original.decode()
    places = set(random.Random(0).sample(range(len(original)), 12))
    for word in ("format", "identity", "form", "blocks", "tokens", "captured"):
        at = text.index(f'"{word}"')
        places |= {at, at + 2, at + len(word) + 2}
    begins = [i for i in range(len(text)) if text.startswith('"captured": ', i)]
    places |= {begin + len('"captured": ') + digit for begin in begins for digit in range(3)}
    wrong = []
    for place in sorted(places):
        for change in (1, 2, 0x80):
            folder = tmp_path / "changed"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(saved, folder)
            data = bytearray(original)
            data[place] ^= change
            (folder / "caches.json").write_bytes(data)
            try:
                right_or_refused(model, folder)
            except Exception as error:
                context = data[max(0, place - 15) : place + 15]
                wrong.append(f"byte {place}, {bytes(context)!r}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} times: " + "\n".join(wrong[:4])


@pytest.mark.parametrize("captured", [0, 1, 5, 99, 101, 10**30, -1, -(10**30), 1.5, "1", True, [], {}, None])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_the_index_says_of_the_window_is_not_believed(
    model: Olmo3, folder: Path, captured: Any, which: int
) -> None:
    index = json.loads((folder / "caches.json").read_text())
    index["blocks"][which]["captured"] = captured
    (folder / "caches.json").write_text(json.dumps(index))
    right_or_refused(model, folder)


DAMAGED = {
    "empty": b"",
    "not JSON": b"{blocks",
    "not UTF-8": b'{"format": "\xff\xfe"}',
    "null": b"null",
    "a number": b"7",
    "a text": b'"1"',
    "a list": b"[]",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "deeply nested": b"[" * 200_000,
    "null bytes": bytes(1000),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_index_is_refused(model: Olmo3, folder: Path, data: bytes) -> None:
    (folder / "caches.json").write_bytes(data)
    assert "caches.json" in refused(model, folder)


BLOCKS: dict[str, Any] = {
    "null": None,
    "a number": 3,
    "a text": "abc",
    "an object": {"tokens": [1], "captured": 0},
    "a list of null": [None],
    "a list of lists": [[1, 2]],
    "no tokens": [{"captured": 0}],
    "no captured": [{"tokens": [1]}],
    "tokens null": [{"tokens": None, "captured": 0}],
    "tokens a number": [{"tokens": 5, "captured": 0}],
    "tokens empty": [{"tokens": [], "captured": 0}],
    "a token null": [{"tokens": [None], "captured": 0}],
    "a token a text": [{"tokens": ["x"], "captured": 0}],
    "a token huge": [{"tokens": [10**30], "captured": 0}],
    "a token just too big": [{"tokens": [2**63], "captured": 0}],
    "a token negative": [{"tokens": [-1], "captured": 0}],
    "a token infinite": [{"tokens": [float("inf")], "captured": 0}],
    "a token not a number": [{"tokens": [float("nan")], "captured": 0}],
    "a token of the wrong vocabulary": [{"tokens": [128], "captured": 0}],
    "a token a list": [{"tokens": [[1]], "captured": 0}],
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_an_index_with_values_of_the_wrong_kind_is_refused(model: Olmo3, folder: Path, blocks: Any) -> None:
    index = json.loads((folder / "caches.json").read_text())
    (folder / "caches.json").write_text(json.dumps({**index, "blocks": blocks}))
    refused(model, folder)


@pytest.mark.parametrize("change", ["another token", "one fewer", "one more", "blocks swapped", "one block"])
def test_tokens_that_do_not_match_the_files_are_refused(model: Olmo3, folder: Path, change: str) -> None:
    index = json.loads((folder / "caches.json").read_text())
    blocks = index["blocks"]
    match change:
        case "another token":
            blocks[0]["tokens"][3] ^= 1
        case "one fewer":
            blocks[-1]["tokens"].pop()
        case "one more":
            blocks[-1]["tokens"].append(1)
        case "blocks swapped":
            blocks[0], blocks[1] = blocks[1], blocks[0]
        case "one block":
            blocks[:] = [{"tokens": ids(140), "captured": 0}]
    (folder / "caches.json").write_text(json.dumps(index))
    assert "missing" in refused(model, folder)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_files_of_two_blocks_that_changed_places_are_refused(model: Olmo3, tmp_path: Path, kind: str) -> None:
    """Each is whole and of this model, but holds other tokens' keys and values."""
    session = open_session(model, tmp_path)
    for seed in range(2):
        session.prefill(ids(50, seed))
        session.snapshot()
    session.save()
    one, two = (path for path in payloads(tmp_path) if f".{kind}." in path.name)
    names = [path.name.split(".") for path in (one, two)]
    one.rename(tmp_path / "waiting")
    two.rename(tmp_path / ".".join([names[0][0], *names[1][1:]]))
    (tmp_path / "waiting").rename(tmp_path / ".".join([names[1][0], *names[0][1:]]))
    assert not right_or_refused(model, tmp_path, [*ids(50), *ids(50, 1)])


def test_a_file_of_one_kind_renamed_to_the_other_is_refused(model: Olmo3, folder: Path) -> None:
    for path in payloads(folder):
        swapped = {"full": "sliding", "sliding": "full"}[path.name.split(".")[1]]
        path.rename(folder / ("x" + path.name.replace(path.name.split(".")[1], swapped)))
    for path in payloads(folder):
        path.rename(folder / path.name[1:])
    refused(model, folder)


def test_a_folder_where_a_file_should_be_is_refused(model: Olmo3, folder: Path) -> None:
    path = payloads(folder)[0]
    path.unlink()
    path.mkdir()
    session = open_session(model, folder)
    with pytest.raises(SessionError) as error:
        session.resume()
    one_line(error.value)
    assert goes_on(model, session)


def test_an_index_that_is_a_folder_is_refused(model: Olmo3, folder: Path) -> None:
    (folder / "caches.json").unlink()
    (folder / "caches.json").mkdir()
    session = open_session(model, folder)
    with pytest.raises(SessionError) as error:
        session.resume()
    one_line(error.value)
    assert goes_on(model, session)


def test_other_peoples_files_are_left_alone(model: Olmo3, folder: Path) -> None:
    for name in ("notes.txt", "model.safetensors", "a.b.safetensors"):
        (folder / name).write_text("mine")
    session = open_session(model, folder, identity="others")
    with pytest.raises(SessionError):
        session.resume()
    session.clear()
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "model.safetensors", "a.b.safetensors"}


def test_a_damaged_file_of_a_snapshot_costs_the_run_of_its_tokens_and_goes(
    model: Olmo3, tmp_path: Path
) -> None:
    session = open_session(model, tmp_path, snapshot_bytes=0)
    for branch in (ids(300), ids(300, 1), ids(300, 2)):
        session.prefill(branch[session.match(branch) :])
        session.snapshot()
    session.goto(0)
    damaged = payloads(tmp_path)
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    held = session.match([*ids(300), 1])
    session.prefill([*ids(300), 1][held:])
    assert list(session.tokens) == [*ids(300), 1]
    assert goes_on(model, session)
    session.save()
    again = open_session(model, tmp_path)
    again.resume()
    assert list(again.tokens) == list(session.tokens)
    assert goes_on(model, again)
    data = [path.read_bytes() for path in payloads(tmp_path)]
    assert not [content for content in data if content.endswith(b"?")]  # they would never be found again


# What a review found


def test_many_blocks_are_resumed_with_few_open_files_and_are_never_in_memory_twice(tmp_path: Path) -> None:
    """A Mac lets a process open 256 files; a conversation has a few spans for each turn."""
    program = f"""
import resource, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import mlx.core as mx
from pathlib import Path
from test_session_files import CONFIG, ids, open_session, random_model
model = random_model(CONFIG)
session = open_session(model, Path({str(tmp_path)!r}))
for seed in range(120):
    session.prefill(ids(10, seed))
    session.snapshot()
session.save()
tokens, held = list(session.tokens), session.nbytes
del session
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
mx.clear_cache(); before = mx.get_active_memory(); mx.reset_peak_memory()
session = open_session(model, Path({str(tmp_path)!r}))
session.resume()
assert list(session.tokens) == tokens
assert mx.get_peak_memory() - before < 1.7 * session.nbytes, (mx.get_peak_memory() - before, session.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]


def test_files_of_another_form_are_not_taken_for_ones_own(model: Olmo3, tmp_path: Path) -> None:
    """They have the same spans' names: what should be saved was thought to be there."""
    plain = open_session(model, tmp_path)
    plain.prefill(ids(100))
    plain.save()
    other = open_session(model, tmp_path, form="8 bits", kv_bits=8)
    other.prefill(ids(100))
    other.save()
    again = open_session(model, tmp_path, form="8 bits", kv_bits=8)
    again.resume()
    assert list(again.tokens) == ids(100)
    assert len(payloads(tmp_path)) == 2  # and the others are gone


def test_what_was_forgotten_is_not_left_on_the_disk(model: Olmo3, folder: Path) -> None:
    session = open_session(model, folder)
    session.resume()
    session.clear()
    assert list(folder.iterdir()) == []
