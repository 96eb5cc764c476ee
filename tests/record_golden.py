"""Make olmo3_mlx/doctor/golden.json, what `olmo3 doctor` holds the demo against, or look whether it is right.

    python tests/record_golden.py            compare the file with what would be recorded
    python tests/record_golden.py --record   write it: after the demo's files have changed

The ids are the program's own, chosen greedily; that each of them is the likeliest, and by how much, and all
logits come from the float64 oracle in NumPy, which imports nothing of the program.
"""

import dataclasses
import json
import sys
from typing import Any

import mlx.core as mx
import numpy as np
from oracle import Array, forward

from olmo3_mlx import Olmo3
from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.doctor.demo_checks import sha256
from olmo3_mlx.doctor.golden import GOLDEN, Golden
from olmo3_mlx.generation.loop import decode, prefill

QUESTION = "How many layers does Olmo 3 7B have?"
GREEDY = 200
FILES = (
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief – and kind."},
    {"role": "user", "content": "What is 17 + 25?\n<b>Exactly</b>, please."},
    {"role": "assistant", "content": "42", "tool_calls": None},
    {"role": "user", "content": "And the weather in Zürich?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
        ],
    },
    {"role": "tool", "content": '{"celsius": 21}'},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


def dequantized(model: Olmo3) -> dict[str, Array]:
    """The weights as float64, unpacked here: MLX's way of packing is its documented one."""
    tensors = model.tensors()
    found: dict[str, Array] = {}
    for name, array in tensors.items():
        path = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if f"{path}.scales" not in tensors:
            found[name] = np.array(array).astype(np.float64)
            continue
        codes = np.array(array)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        scales, biases = (
            np.array(tensors[f"{path}.{part}"]).astype(np.float64) for part in ("scales", "biases")
        )
        groups = codes.reshape(*scales.shape, -1)
        found[name] = (groups * scales[..., None] + biases[..., None]).reshape(len(scales), -1)
    return found


def recorded() -> Golden:
    """What the file should say."""
    checkpoint = Checkpoint.open("demo")
    tokenizer, model = checkpoint.tokenizer, checkpoint.load("float32")
    rendered = tokenizer.apply_chat_template(MESSAGES, tools=TOOLS)
    prompt = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}]))
    caches = model.make_caches()
    first = prefill(model, prompt, caches)
    ids = [*prompt, *decode(model, first, caches, lambda rows: mx.argmax(rows, axis=-1), GREEDY)]
    config = json.loads((checkpoint.folder / "config.json").read_text())
    logits = forward(config, dequantized(model), ids[:-1])
    following = logits.argmax(axis=-1).tolist()
    assert following[len(prompt) - 1 :] == ids[len(prompt) :], "the program chose other ids than the oracle"
    ordered = np.sort(logits, axis=-1)
    positions, sampled = list(range(0, len(logits), 8)), list(range(5, logits.shape[-1], 128))
    positions += [len(logits) - 1]
    return Golden(
        files={name: sha256(checkpoint, name) for name in FILES},
        messages=MESSAGES,
        tools=TOOLS,
        rendered=rendered,
        rendered_ids=tokenizer.encode(rendered),
        prompt_tokens=len(prompt),
        ids=ids,
        following=following,
        leads=np.round(ordered[:, -1] - ordered[:, -2], 4).tolist(),
        spreads=np.round(logits.std(axis=-1), 4).tolist(),
        positions=positions,
        sampled=sampled,
        logits=np.round(logits[np.ix_(positions, sampled)], 5).tolist(),
    )


def main() -> int:
    found = json.dumps(dataclasses.asdict(recorded()), ensure_ascii=False) + "\n"
    if "--record" in sys.argv[1:]:
        GOLDEN.write_text(found, encoding="utf-8")
        print(f"{GOLDEN}: {len(found)} characters")
        return 0
    same = GOLDEN.read_text(encoding="utf-8") == found
    print(f"{GOLDEN} is {'what would be recorded' if same else 'another: --record writes it'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
