"""How do I ask one question? python examples/generate.py [--model MODEL] [PROMPT]"""

import argparse

from olmo3_mlx import generate, load

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="demo", help="demo, a folder, or a hub id")
parser.add_argument("prompt", nargs="?", default="How many layers does Olmo 3 7B have?")
args = parser.parse_args()

model, tokenizer = load(args.model)
answer = generate(model, tokenizer, args.prompt, max_tokens=100, temperature=0)
print(answer.text)
print(f"{answer.generation_tokens} tokens, finish reason {answer.finish_reason}")
