"""Spans name what they hold; the store keeps the most recently used under its budget, to the byte."""

import random

import mlx.core as mx
import pytest

from olmo3_mlx import SessionError
from olmo3_mlx.config import FULL, SLIDING
from olmo3_mlx.sessions.spans import Payload, Span, SpanStore, payload_bytes


def payload(size: int, value: float = 0.0) -> Payload:
    """Two arrays of one layer, `size` bytes together."""
    return [[mx.full((1, 1, size // 8, 1), value), mx.full((1, 1, size // 8, 1), value)]]


def span(number: int) -> Span:
    return Span(None, ()).child([number])


class Folder:
    """Files in memory, which may be damaged or refuse to take more."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, str], Payload] = {}
        self.damaged = self.full = False
        self.writes = 0
        self.seen: list[int] = []
        self.store: SpanStore | None = None

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self.held

    def read(self, span: Span, layer_type: str) -> Payload:
        if self.damaged:
            raise SessionError("damaged")
        return self.held[span.name, layer_type]

    def write(self, span: Span, layer_type: str, payload: Payload) -> None:
        assert self.store is not None
        self.seen.append(self.store.nbytes)
        if self.full:
            raise SessionError("full")
        self.writes += 1
        self.held[span.name, layer_type] = payload


def store_with_files(limit: int) -> tuple[SpanStore, Folder]:
    files = Folder()
    store = SpanStore(limit, files)
    files.store = store
    return store, files


# Spans


def test_a_spans_name_says_all_tokens_up_to_its_end() -> None:
    root = Span(None, ())
    assert root.child([1, 2]).child([3]).name == root.child([1, 2]).child([3]).name
    names = [
        root.name,
        root.child([1, 2, 3]).name,
        root.child([1, 2]).name,
        root.child([1, 2]).child([3]).name,
        root.child([1, 3]).child([3]).name,
        root.child([3]).name,
        root.child([12, 3]).name,
        root.child([1]).child([2]).child([3]).name,
    ]
    assert len(set(names)) == len(names)


def test_the_same_tokens_behind_a_span_are_the_same_child() -> None:
    root = Span(None, ())
    child = root.child([1, 2])
    assert root.child((1, 2)) is child
    assert list(root.children.values()) == [child]
    assert (child.start, child.stop, child.parent) == (0, 2, root)


def test_a_chain_goes_from_the_beginning_and_leaves_the_root_out() -> None:
    root = Span(None, ())
    first = root.child([1])
    second = first.child([2, 3])
    assert second.chain() == [first, second]
    assert root.chain() == []
    assert second.start == 1
    assert second.stop == 3


def test_the_spans_that_a_text_begins_with_are_found_in_all_branches() -> None:
    root = Span(None, ())
    a = root.child([1, 2])
    b = a.child([3])
    c = a.child([3, 4])
    other = root.child([1, 9])
    assert dict(root.branches([1, 2, 3, 4, 5])) == {root: 0, a: 2, b: 3, c: 4, other: 1}
    assert dict(root.branches([1, 2, 3])) == {root: 0, a: 2, b: 3, c: 3, other: 1}
    assert dict(root.branches([1])) == {root: 0, a: 1, other: 1}
    assert dict(root.branches([1, 9])) == {root: 0, a: 1, other: 2}
    assert dict(root.branches([])) == {root: 0, a: 0, other: 0}


def test_a_chain_of_very_many_spans_is_matched() -> None:
    root = last = Span(None, ())
    for token in range(3000):
        last = last.child([token])
    assert len(last.chain()) == 3000
    assert len(list(root.branches(range(3000)))) == 3001


# The store


def test_what_was_put_is_got_and_counted() -> None:
    store = SpanStore(1000)
    one = payload(80, 1.0)
    store.put(span(1), FULL, one)
    assert store.nbytes == payload_bytes(one) == 80
    assert store.get(span(1), FULL) is one
    assert store.has(span(1), FULL)
    assert not store.has(span(1), SLIDING)
    assert not store.has(span(2), FULL)
    store.put(span(1), FULL, payload(160))
    assert store.nbytes == 160
    store.drop(span(1), FULL)
    assert store.nbytes == 0
    store.drop(span(1), FULL)
    assert store.nbytes == 0


def test_what_is_gone_is_a_session_error() -> None:
    with pytest.raises(SessionError, match="is gone"):
        SpanStore(100).get(span(1), FULL)


def test_what_the_two_types_of_layers_hold_of_a_span_comes_and_goes_separately() -> None:
    store = SpanStore(1000)
    store.put(span(1), FULL, payload(80))
    store.put(span(1), SLIDING, payload(40))
    assert store.nbytes == 120
    store.drop(span(1), FULL)
    assert store.nbytes == 40
    assert store.has(span(1), SLIDING)


def test_the_least_recently_used_goes_first() -> None:
    store = SpanStore(240)
    for number in (1, 2, 3):
        store.put(span(number), FULL, payload(80))
    store.get(span(1), FULL)
    store.put(span(4), FULL, payload(80))
    assert [store.has(span(number), FULL) for number in (1, 2, 3, 4)] == [True, False, True, True]
    assert store.nbytes == 240


def test_asking_whether_it_is_there_is_no_use_of_it() -> None:
    store = SpanStore(160)
    for number in (1, 2):
        store.put(span(number), FULL, payload(80))
    assert store.has(span(1), FULL)
    store.put(span(3), FULL, payload(80))
    assert not store.has(span(1), FULL)


def test_what_is_larger_than_the_budget_is_not_kept_and_drives_nothing_out() -> None:
    store = SpanStore(240)
    for number in (1, 2):
        store.put(span(number), FULL, payload(80))
    store.put(span(3), FULL, payload(320))
    assert not store.has(span(3), FULL)
    assert store.has(span(1), FULL)
    assert store.has(span(2), FULL)


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_holds_whatever_is_done_and_the_count_is_right(seed: int) -> None:
    rng = random.Random(seed)
    store, files = store_with_files(1000)
    if seed % 2:
        store.files = None
    values: dict[tuple[int, str], float] = {}
    for step in range(300):
        number, layer_type = rng.randrange(12), rng.choice([FULL, SLIDING])
        match rng.choice(["put", "put", "get", "drop"]):
            case "put" if not store.has(span(number), layer_type):
                values[number, layer_type] = float(step)
                store.put(span(number), layer_type, payload(8 * rng.randint(1, 60), float(step)))
            case "get" if store.has(span(number), layer_type):
                found = store.get(span(number), layer_type)
                assert found[0][0][0, 0, 0, 0].item() == values[number, layer_type]
            case "drop":
                store.drop(span(number), layer_type)
        assert store.nbytes <= 1000
        assert store.nbytes == sum(payload_bytes(held) for _, held in store._held.values())
        assert len(store._held) <= 24
    assert all(size <= 1000 for size in files.seen)


def test_what_leaves_memory_goes_to_the_files_once() -> None:
    store, files = store_with_files(80)
    one = payload(80, 1.0)
    store.put(span(1), FULL, one)
    assert files.writes == 0
    store.put(span(2), FULL, payload(80, 2.0))
    assert (files.writes, store.nbytes) == (1, 80)
    assert store.has(span(1), FULL)
    assert store.get(span(1), FULL) is one
    store.put(span(1), FULL, one)
    store.put(span(2), FULL, payload(80, 2.0))
    assert files.writes <= 2


def test_while_things_go_to_the_files_memory_never_holds_more_than_the_budget() -> None:
    store, files = store_with_files(200)
    for number in range(10):
        store.put(span(number), FULL, payload(80))
    assert files.seen
    assert max(files.seen) <= 200


def test_files_that_take_no_more_cost_what_they_do_not_take_and_the_budget_holds() -> None:
    store, files = store_with_files(100)
    files.full = True
    for number in range(4):
        store.put(span(number), FULL, payload(80))
        assert store.nbytes <= 100
    assert store.has(span(3), FULL)
    assert not store.has(span(0), FULL)


def test_a_damaged_file_is_a_session_error() -> None:
    store, files = store_with_files(0)
    store.put(span(1), FULL, payload(80))
    files.damaged = True
    with pytest.raises(SessionError):
        store.get(span(1), FULL)


def test_clearing_lets_go_of_memory() -> None:
    store = SpanStore(10**6)
    mx.clear_cache()
    before = mx.get_active_memory()
    big = payload(400_000)
    mx.eval(big)
    store.put(span(1), FULL, big)
    del big
    store.clear()
    mx.clear_cache()
    assert (store.nbytes, mx.get_active_memory()) == (0, before)
    assert not store.has(span(1), FULL)


def test_a_payload_without_layers_takes_no_memory() -> None:
    store = SpanStore(0)
    store.put(span(1), FULL, [])
    assert store.nbytes == 0
    assert store.get(span(1), FULL) == []
