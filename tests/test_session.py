"""Sessions by their properties: whatever was appended, taken back, branched, kept, saved and loaded, the
logits are those of a fresh run, and no token runs that need not; and errors leave a session that goes on.
"""

import gc
import inspect
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TINY, random_model
from test_completion import IM_END

from olmo3_mlx import CacheError, CacheOptions, Olmo3, OptionError, Session
from olmo3_mlx.generation.loop import prefill
from olmo3_mlx.sessions.files import SessionFiles
from olmo3_mlx.sessions.spans import Span, SpanStore

TOLERANCE = 1e-4  # on logits of about 10, in float32
VOCABULARY = TINY["vocab_size"]
PLENTY = 10**9
# Narrow and of three layers, because most of the time goes into the fresh runs that logits are held against;
# with heads that can be quantized, and room for long conversations.
LONG = {
    **TINY, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 32,
    "num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "max_position_embeddings": 8192,
}  # fmt: skip

MODELS: dict[int, Olmo3] = {}


def model_of(window: int) -> Olmo3:
    """LONG with this window."""
    if window not in MODELS:
        MODELS[window] = random_model({**LONG, "sliding_window": window})
    return MODELS[window]


@pytest.fixture(scope="module")
def model() -> Olmo3:
    return model_of(8)


def draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def ids(count: int, seed: int = 0) -> list[int]:
    return draw(random.Random(seed), count)


def fresh(model: Olmo3, tokens: Sequence[int], **caches: Any) -> mx.array:
    """The logits after these tokens, as caches that never held anything else give them."""
    return prefill(model, tokens, model.make_caches(**caches))


def worst(found: mx.array, expected: mx.array) -> float:
    return float(mx.abs(found - expected).max())


def goes_on(model: Olmo3, session: Session, **caches: Any) -> bool:
    """Whether the session is consistent, and gives the logits of a fresh run from here on."""
    tokens = list(session.tokens)
    assert {cache.offset for cache in session.caches} == {len(tokens)}
    new = ids(3, seed=len(tokens) + 1)
    return worst(session.prefill(new), fresh(model, [*tokens, *new], **caches)) < TOLERANCE


def same(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first elements are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def assert_nothing(found: list[str]) -> None:
    assert not found, f"{len(found)} times, first: " + "\n".join(found[:3])


def greedy(logits: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


def rewindable(session: Session) -> int:
    return min(cache.rewindable for cache in session.caches)


# Going back


@pytest.fixture
def unbounded(model: Olmo3) -> Session:
    """A session whose caches can hardly rewind, and whose snapshots all stay."""
    return Session(model, snapshot_bytes=PLENTY, rewind=0)


def test_going_back_a_little_runs_nothing(model: Olmo3) -> None:
    session = Session(model, rewind=64)
    session.prefill(ids(600))
    assert session.goto(536) == 0
    assert list(session.tokens) == ids(600)[:536]
    assert goes_on(model, session)


@pytest.mark.parametrize("position", [-1, 601, 10**30])
def test_a_position_that_is_not_there_is_an_error_that_changes_nothing(model: Olmo3, position: int) -> None:
    session = Session(model)
    session.prefill(ids(600))
    with pytest.raises(CacheError, match=f"0 to 600, got {position}"):
        session.goto(position)
    assert list(session.tokens) == ids(600)
    assert goes_on(model, session)


def test_going_back_far_takes_a_later_snapshot_and_rewinds(model: Olmo3, unbounded: Session) -> None:
    for start in range(0, 900, 100):
        unbounded.prefill(ids(900)[start : start + 100])
        unbounded.snapshot()
    assert unbounded.goto(437) == 0
    assert goes_on(model, unbounded)
    assert unbounded.goto(400) == 0
    assert goes_on(model, unbounded)


def test_a_long_prompt_can_be_gone_back_into(model: Olmo3, unbounded: Session) -> None:
    unbounded.prefill(ids(2100))
    assert unbounded.goto(1600) <= 1600 - 1536
    assert goes_on(model, unbounded)


@pytest.mark.parametrize("rewind", [0, 8, 512])
@pytest.mark.parametrize("window", [8, 128])
def test_the_snapshot_that_prefill_is_asked_for_is_one(window: int, rewind: int) -> None:
    """Wherever the passes begin and end, and however little the caches keep."""
    model = model_of(window)
    for before, turn, total in ((0, 190, 200), (0, 300, 700), (30, 226, 230), (0, 511, 513)):
        session = Session(model, rewind=rewind)
        session.prefill(ids(before + total)[:before] or ids(1))
        begin = len(session.tokens)
        tokens = [*session.tokens, *ids(total, seed=5)]
        session.prefill(tokens[begin:], snapshot=turn)
        session.prefill(ids(window + rewind + 260, seed=2))  # beyond what the caches can rewind
        assert session.match([*tokens[: begin + turn], 1, 2, 3]) == begin + turn, (before, turn, total)
        assert goes_on(model, session)


def test_branches_can_be_switched_between_without_running_a_token(model: Olmo3, unbounded: Session) -> None:
    trunk = ids(300)
    unbounded.prefill(trunk)
    unbounded.snapshot()
    branches = [[*trunk, *ids(400, seed)] for seed in range(1, 5)]
    for branch in branches:
        held = unbounded.match(branch)
        assert held >= 300
        unbounded.prefill(branch[held:])
        unbounded.snapshot()
    for branch in [*branches, *branches[::-1]]:
        assert unbounded.match([*branch, 5]) == 700
        assert list(unbounded.tokens) == branch
    assert goes_on(model, unbounded)


def test_branches_share_what_they_have_in_common(model: Olmo3) -> None:
    """Five branches behind one long beginning take about as much as one such beginning and five ends."""
    session = Session(model, snapshot_bytes=PLENTY, rewind=0)
    trunk = ids(3000)
    session.prefill(trunk)
    session.snapshot()
    session.goto(0)
    one = session.snapshot_bytes
    for seed in range(1, 6):
        branch = [*trunk, *ids(20, seed)]
        held = session.match(branch)
        assert held >= 3000
        session.prefill(branch[held:])
        session.snapshot()
    session.goto(0)
    assert session.snapshot_bytes < 1.2 * one


def test_another_branch_behind_a_turn_leaves_the_first_ones_snapshot(model: Olmo3) -> None:
    session = Session(model, snapshot_bytes=PLENTY, rewind=512)
    first, second = ids(300), [*ids(200), *ids(100, 1)]
    for branch in (first, second):
        session.prefill(branch[session.match(branch) :])
        session.snapshot()
    assert session.match([*first, 1]) == 300
    assert goes_on(model, session)


def test_the_last_id_is_always_left_to_run(model: Olmo3, unbounded: Session) -> None:
    unbounded.prefill(ids(50))
    unbounded.snapshot()
    assert unbounded.match(ids(50)) == 49
    assert unbounded.match(ids(1)) == 0
    assert goes_on(model, unbounded)


def test_forgetting_leaves_nothing(model: Olmo3, unbounded: Session) -> None:
    unbounded.prefill(ids(600))
    unbounded.snapshot()
    unbounded.clear()
    assert (list(unbounded.tokens), unbounded.nbytes, unbounded.snapshot_bytes) == ([], 0, 0)
    assert unbounded.match(ids(600)) == 0
    assert goes_on(model, unbounded)


@pytest.mark.parametrize("types", [["full_attention"] * 3, ["sliding_attention"] * 3])
@pytest.mark.parametrize("disk", [False, True])
def test_models_with_one_kind_of_layer_go_back_too(types: list[str], disk: bool, tmp_path: Path) -> None:
    model = random_model({**LONG, "layer_types": types})

    def make() -> Session:
        files = SessionFiles(tmp_path, "identity", "") if disk else None
        return Session(model, snapshot_bytes=0 if disk else PLENTY, files=files, rewind=0)

    session = make()
    for start in range(0, 600, 200):
        session.prefill(ids(600)[start : start + 200])
        session.snapshot()
    assert session.goto(250) <= 50
    assert goes_on(model, session)
    if disk:
        session.save()
        tokens = list(session.tokens)
        session = make()
        session.resume()
        assert list(session.tokens) == tokens
        assert goes_on(model, session)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_cache_quantized_later_goes_back_to_before_that_as_if_it_had_never_been(
    model: Olmo3, bits: int
) -> None:
    """With kv_start, a fresh run of few tokens is not quantized; neither is one that came back."""
    session = Session(model, snapshot_bytes=PLENTY, kv_bits=bits, kv_start=100)
    session.prefill(ids(60))
    session.snapshot()
    session.prefill(ids(400, 1))
    assert session.goto(60) in (0, 60)
    assert goes_on(model, session, kv_bits=bits, kv_start=100)


def test_a_conversation_of_very_many_turns_can_be_matched(model: Olmo3, unbounded: Session) -> None:
    """One snapshot a turn: their number must not be limited by Python's stack."""
    for token in ids(220):
        unbounded.prefill([token])
        unbounded.snapshot()
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)  # less than a call for each turn
    try:
        assert unbounded.match([*ids(220), 1]) == 220
        assert unbounded.match([*ids(140), 1]) == 140
    finally:
        sys.setrecursionlimit(before)
    assert goes_on(model, unbounded)


# Budgets


class Watched:
    """What SpanStore.nbytes is set to, seen at every moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        held: dict[int, int] = {}

        def read(store: SpanStore) -> int:
            return held.get(id(store), 0)

        def write(store: SpanStore, value: int) -> None:
            held[id(store)] = value
            self.most = max(self.most, value)

        monkeypatch.setattr(SpanStore, "nbytes", property(read, write), raising=False)


@pytest.mark.parametrize("limit", [0, 50_000, 400_000])
def test_the_budget_is_never_passed_even_while_things_are_put_in(
    model: Olmo3, limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    watched = Watched(monkeypatch)
    session = Session(model, snapshot_bytes=limit, files=SessionFiles(tmp_path, "identity", ""), rewind=0)
    for seed in range(6):
        session.match(ids(100, seed))
        session.prefill(ids(300, seed))
        session.snapshot()
    assert watched.most <= limit


def test_what_is_larger_than_the_whole_budget_does_not_drive_the_rest_out(model: Olmo3) -> None:
    session = Session(model, snapshot_bytes=10**6, rewind=0)
    small = [ids(40, seed) for seed in range(3)]
    for branch in small:
        session.match(branch)
        session.prefill(branch)
        session.snapshot()
    session.match(ids(5, 8))
    for start in range(0, 5000, 1000):  # without snapshots in between: one stretch of 2.5 MB
        session._tokens  # noqa: B018
        prefill(model, ids(5000, 9)[start : start + 1000], session.caches)
    session._tokens = ids(5000, 9)
    session.snapshot()
    assert session.match([*small[0], 1]) == 40
    assert session.match([*small[1], 1]) == 40


def test_the_least_recently_used_go_first(model: Olmo3) -> None:
    session = Session(model, snapshot_bytes=PLENTY, rewind=0)
    branches = [ids(200, seed) for seed in range(4)]

    def visit(branch: list[int]) -> int:
        held = session.match([*branch, 1])
        if held < len(branch):
            session.prefill(branch[held:])
            session.snapshot()
        return held

    visit(branches[0])
    session.goto(0)
    one = session.snapshot_bytes
    session = Session(model, snapshot_bytes=3 * one + one // 2, rewind=0)
    for branch in branches[:3]:
        visit(branch)
    assert visit(branches[0]) == 200  # used again
    assert visit(branches[3]) == 0
    session.goto(0)
    assert session.snapshot_bytes <= 3 * one + one // 2
    assert visit(branches[0]) == 200
    assert visit(branches[3]) == 200
    assert visit(branches[1]) == 0  # it had not been used for longest


def test_nothing_grows_without_bound(model: Olmo3) -> None:
    """A small budget, many branches: what is remembered of them is small too."""
    session = Session(model, snapshot_bytes=200_000, rewind=0)

    def spans() -> int:
        gc.collect()
        return sum(isinstance(thing, Span) for thing in gc.get_objects())

    def use(seeds: range) -> None:
        for seed in seeds:
            branch = ids(30, seed)
            session.prefill(branch[session.match(branch) :])
            session.snapshot()

    use(range(40))
    before = spans()
    use(range(40, 140))
    assert spans() <= before + 10


def test_a_budget_of_nothing_keeps_nothing(model: Olmo3) -> None:
    session = Session(model, snapshot_bytes=0, rewind=0)
    for seed in range(5):
        session.match(ids(50, seed))
        session.prefill(ids(300, seed))
        session.snapshot()
        assert session.snapshot_bytes == 0
    assert session.goto(10) == 10
    assert goes_on(model, session)


# Memory


def active() -> int:
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def test_memory_is_what_the_caches_and_snapshots_say() -> None:
    model = model_of(128)
    fresh(model, ids(1500))
    before = active()
    session = Session(model, snapshot_bytes=PLENTY, rewind=0)
    trunk = ids(1200)
    for seed in range(4):
        branch = [*trunk, *ids(300, seed)]
        session.prefill(branch[session.match(branch) :])
        session.snapshot()
        mx.eval([cache.state for cache in session.caches])
        said = session.nbytes + session.snapshot_bytes
        assert active() - before <= 1.1 * said + 100_000
    assert session.match([*trunk, *ids(300, 0), 1]) == 1500
    mx.eval([cache.state for cache in session.caches])
    assert active() - before <= 1.1 * (session.nbytes + session.snapshot_bytes) + 100_000
    session.clear()
    assert active() - before <= 100_000
    del session
    assert active() - before <= 100_000


def test_a_restored_snapshot_is_not_held_twice(model: Olmo3) -> None:
    """What the full-attention caches hold needs no copy among the snapshots."""
    session = Session(model, snapshot_bytes=PLENTY, rewind=0)
    session.prefill(ids(3000))
    session.snapshot()
    there = session.snapshot_bytes
    session.goto(0)
    away = session.snapshot_bytes
    assert away > there + 3000 * 2 * 2 * 32 * 4 - 10_000  # the full layer's keys and values, in float32
    assert session.match([*ids(3000), 1]) == 3000
    assert session.snapshot_bytes <= 1.05 * there


# Options


@pytest.mark.parametrize("context", [0, -1, 8193, 10**30, True, False, 100.5, 100.0, float("nan"), "100"])
def test_a_context_outside_its_range_is_an_option_error(model: Olmo3, context: Any) -> None:
    with pytest.raises(OptionError) as error:
        Session(model, context=context)
    assert "\n" not in str(error.value)
    assert str(context) in str(error.value).replace(",", "")


@pytest.mark.parametrize("budget", [-1, True, 1.5, float("nan"), float("inf"), "1G", None])
def test_a_budget_outside_its_range_is_an_option_error(model: Olmo3, budget: Any) -> None:
    with pytest.raises(OptionError) as error:
        Session(model, snapshot_bytes=budget)
    assert "\n" not in str(error.value)


def test_the_longest_and_the_shortest_context_are_taken(model: Olmo3) -> None:
    assert Session(model).context == Session(model, context=8192).context == 8192
    assert Session(model, context=1, snapshot_bytes=0).context == 1


@pytest.mark.parametrize("options", [{"rewind": -1}, {"kv_bits": 5}, {"kv_start": -2}])
def test_options_of_the_caches_are_checked_at_once(model: Olmo3, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Session(model, **options)


# Answers of a model go into a session and come out of it


def test_an_answer_after_going_back_is_that_of_a_fresh_session(model: Olmo3) -> None:
    def say(session: Session, prompt: list[int]) -> list[int]:
        logits = session.prefill(prompt[session.match(prompt) :])
        return list(session.decode(logits, greedy, 12))

    session = Session(model, snapshot_bytes=PLENTY, rewind=0)
    rng = random.Random(3)
    prompts = [ids(300)]
    for _ in range(6):
        prompt = [*rng.choice(prompts), *draw(rng, rng.randint(1, 60))]
        said = say(session, prompt)
        assert said == say(Session(model), prompt)
        prompts.append([*prompt, *said])
    assert IM_END >= VOCABULARY  # no token of this model ends an answer by chance


def branches_of(session: Session) -> Iterator[Span]:
    """All spans that the session remembers."""
    waiting = [session._snapshots.root]
    while waiting:
        span = waiting.pop()
        yield span
        waiting += span.children.values()


def test_every_span_knows_all_tokens_before_it(model: Olmo3, unbounded: Session) -> None:
    for seed in range(4):
        branch = [*ids(100), *ids(100, seed)]
        unbounded.prefill(branch[unbounded.match(branch) :], snapshot=1)
        unbounded.snapshot()
    names = [span.name for span in branches_of(unbounded)]
    assert len(set(names)) == len(names) > 5


def test_a_later_snapshot_is_restored_and_rewound_where_that_runs_nothing(model: Olmo3) -> None:
    """The nearest way to 290 of 900 is over the snapshot at 300, which keeps 64 tokens to rewind."""
    session = Session(model, snapshot_bytes=PLENTY, rewind=64)
    session.prefill(ids(300))
    session.snapshot()
    session.prefill(ids(600, 1))
    assert session.goto(290) <= 10
    assert goes_on(model, session)


def test_an_answer_that_goes_on_after_the_session_went_elsewhere_spoils_nothing(model: Olmo3) -> None:
    """Two readers of one session: the first one's answer may end or fail, the session stays right."""
    session = Session(model)
    first = session.decode(session.prefill(ids(30)), greedy, 10)
    said = list(itertools.islice(first, 2))
    assert len(said) == 2
    session.prefill(ids(40, 1)[session.match(ids(40, 1)) :])
    with suppress(CacheError):
        list(first)
    assert goes_on(model, session)


def test_a_snapshot_is_not_driven_out_by_what_is_kept_on_the_way_back_to_it(model: Olmo3) -> None:
    """Leaving 400 tokens keeps their keys and values: perhaps in place of the window that is gone to."""
    wrong = []
    for budget in range(20_000, 400_000, 40_000):
        session = Session(model, snapshot_bytes=budget, rewind=0)
        session.prefill(ids(100))
        session.snapshot()
        session.prefill(ids(400, 1))
        session.snapshot()
        try:
            session.goto(100)
        except KeyError as error:
            wrong.append(f"budget {budget}: {error!r}")
        else:
            assert session.snapshot_bytes <= budget
            assert goes_on(model, session)
    assert_nothing(wrong)


# What a review found


@pytest.mark.parametrize("rewind", [0, 16, 512])
@pytest.mark.parametrize("window", [8, 128])
def test_whatever_snapshot_seems_nearest_can_be_rewound_from(window: int, rewind: int) -> None:
    """A restored cache was thought to rewind further than it holds once it was compacted."""
    model = model_of(window)
    session = Session(model, snapshot_bytes=PLENTY, rewind=rewind)
    for seed, length in enumerate((300, 140, 450, 700)):
        session.prefill(ids(length, seed))
        session.snapshot()
    tokens = list(session.tokens)
    for position in range(0, len(tokens), 197):
        ran = session.goto(position)
        assert list(session.tokens) == tokens[:position]
        assert ran <= position
        session.match([*tokens, 1])
        if len(session.tokens) < len(tokens):
            session.prefill(tokens[len(session.tokens) :])
    assert goes_on(model, session)


def test_below_kv_start_a_session_is_as_a_fresh_one_also_through_snapshots(model: Olmo3) -> None:
    """Sliding layers' snapshots from before and full layers' from after the rounding were mixed."""
    how: dict[str, Any] = {"kv_bits": 4, "kv_start": 600}
    session = Session(model, snapshot_bytes=PLENTY, **how)
    session.prefill(ids(900))
    for wanted in (ids(201, 5), [*ids(900)[:512], *ids(40, 6)]):
        held = session.match(wanted)
        session.prefill(wanted[held:])
        assert len({cache.quantized for cache in session.caches}) == 1
        assert goes_on(model, session, **how)


def test_caches_of_another_class_are_gone_back_to_as_any_other(model: Olmo3) -> None:
    """Snapshots asked for the class of a cache: another kind silently got none, and was run anew."""

    class Proxy:
        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def __getattr__(self, name: str) -> Any:
            return getattr(self.cache, name)

    class Proxied:
        config = model.config

        def __call__(self, tokens: mx.array, caches: list[Any], **options: Any) -> mx.array:
            return model(tokens, caches, **options)

        def make_caches(self, options: CacheOptions | None = None) -> list[Any]:
            return [Proxy(cache) for cache in model.make_caches(options)]

    proxied = Proxied()
    session = Session(proxied)
    session.prefill(ids(600))
    session.snapshot()
    session.match([*ids(900, 2), 1])
    session.prefill(ids(900, 2))
    assert session.match([*ids(600), 5]) == 600
    assert list(session.tokens) == ids(600)
    assert {cache.offset for cache in session.caches} == {600}
    assert goes_on(model, session)
