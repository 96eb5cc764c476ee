"""How do I show an answer while it is made? python examples/stream.py [--model MODEL] [PROMPT]"""

import argparse

from olmo3_mlx import load, stream

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo", help="demo, a folder, or a hub id")
parser.add_argument("prompt", nargs="?", default="Who made Olmo 3?")
args = parser.parse_args()

model, tokenizer = load(args.model)
for piece in stream(model, tokenizer, args.prompt, max_tokens=100, temperature=0):
    print(piece.text, end="", flush=True)
    if piece.finish_reason:
        print(f"\n{piece.generation_tokens} tokens, finish reason {piece.finish_reason}")
