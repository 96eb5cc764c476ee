"""The hub, and the library as a program of one's own uses it."""

from collections.abc import Iterator

from same_output_cases.case import GREEDY, Case, bash, group, step

LIBRARY = """
import mlx.core as mx
from olmo3_mlx import Chat, Session, generate, load, rewind, stream
model, tokenizer = load("demo")
ids = mx.array([tokenizer.encode("Once upon a time there was a ship.")])
for keywords in ({}, {"kv_bits": 8}, {"kv_bits": 4, "kv_group_size": 32, "kv_start": 4}, {"rewind": 0}):
    caches = model.make_caches(**keywords)
    logits = model(ids, caches)
    print(keywords, [cache.offset for cache in caches], sum(cache.nbytes for cache in caches))
    print(mx.argmax(logits[0], axis=-1).tolist(), logits[0, -1, :3].tolist())
    if keywords.get("rewind") != 0:
        rewind(caches, 3)
        print(caches[0].offset, model(ids[:, -3:], caches)[0, -1, :3].tolist())
session = Session(model, kv_bits=8, kv_group_size=32, kv_start=16, context=300)
print(generate(model, tokenizer, "What is 17 + 25?", session=session, temperature=0).token_ids)
print(session.nbytes, session.context, len(session.tokens))
print([piece.text for piece in stream(model, tokenizer, "Hello", max_tokens=4, temperature=0)])
chat = Chat(model, tokenizer, system="You are terse.", temperature=0, max_tokens=9)
print("".join(piece.text for piece in chat.send("Hello")), chat.tokens, chat.messages)
for wrong in (
    lambda: model.make_caches(kv_bits=3), lambda: model.make_caches(kv_bits=8, kv_group_size=48),
    lambda: Session(model, context=0), lambda: Session(model, kv_start=-1),
    lambda: model(mx.array([[9999]])), lambda: generate(model, tokenizer, ""),
    lambda: load("demo", dtype="int8"), lambda: load("no/such/folder"), lambda: model.make_caches(rewind=-1),
):
    try:
        print(wrong())
    except Exception as error:
        print(type(error).__name__, error)
"""


def cases() -> Iterator[Case]:
    yield from revisions()
    yield from downloads()
    yield from refusals()
    yield from library()


def revisions() -> Iterator[Case]:
    yield from group(
        "revisions",
        {
            "offline": "revisions allenai/Olmo-3-1025-7B",
            "offline, json": "revisions allenai/Olmo-3-1025-7B --json",
            "no hub id": "revisions demo",
            "an empty name": 'revisions ""',
            "a folder": "revisions ./tiny",
        },
    )
    known = {
        "table": "revisions olmo/tiny",
        "json": "revisions olmo/tiny --json",
        "unknown": "revisions olmo/no",
    }
    yield from group("revisions of a hub", known, needs="hub")


def downloads() -> Iterator[Case]:
    tiny = f"generate Hello --model olmo/tiny --raw {GREEDY} --max-tokens 6"
    offline = {"HF_HUB_OFFLINE": "1"}
    yield Case(
        "hub: generate, then offline",
        (
            step(tiny),
            step(tiny, variables=offline),
            step(f"{tiny} --revision stage1 --json"),
            step("inspect --model olmo/tiny", variables=offline),
        ),
        needs="hub",
    )
    yield Case(
        "hub: inspect fetches no weights",
        (
            step("inspect --model olmo/tiny"),
            step(tiny, variables=offline),
            step("inspect --model olmo/tiny --json"),
        ),
        needs="hub",
    )
    yield Case(
        "hub: convert",
        (
            step("convert olmo/tiny dest --group-size 32 --no-card"),
            step("convert olmo/tiny staged --group-size 32 --no-card --revision stage1 --no-keep"),
            step("compare olmo/tiny dest --tokens 64 --length 32 --json"),
            step("compare olmo/tiny olmo/tiny --tokens 64 --length 32 --revision-b stage1"),
        ),
        needs="hub",
    )
    yield Case(
        "hub: convert, calling for more of the hub",
        (
            step("convert olmo/tiny dest --group-size 32 --no-keep --card"),
            step("convert tiny dest --group-size 32 --no-card --tokenizer olmo/tiny"),
            step("convert olmo/tiny cast --dtype bfloat16 --revision stage1"),
        ),
        needs="hub",
    )


def refusals() -> Iterator[Case]:
    yield from group(
        "hub wrong",
        {
            "unknown id": "generate Hello --model olmo/no",
            "unknown revision": "generate Hello --model olmo/tiny --revision stage9",
            "unknown id, convert": "convert olmo/no dest",
            "unknown revision, convert": "convert olmo/tiny dest --revision stage9",
            "unknown id, compare": "compare olmo/no tiny",
            "upload without a login": "convert tiny dest --upload you/tiny",
        },
        needs="hub",
    )


def library() -> Iterator[Case]:
    examples = (
        "generate.py",
        "stream.py",
        "chat.py",
        "long_context.py --tokens 256",
        "generate.py 'Who made you?'",
        "quantize.py",
    )
    for line in examples:
        yield Case(f"example: {line}", (bash(f"$PYTHON $CHECKOUT/examples/{line}"),))
    yield Case("library", (bash("$PYTHON -", LIBRARY),))
