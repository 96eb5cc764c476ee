"""Options that several verbs share."""

import argparse
import os

from olmo3_mlx.caches.options import CacheOptions
from olmo3_mlx.config import GenerationConfig
from olmo3_mlx.conversation.options import GenerationOptions, Options


def add_model(parser: argparse.ArgumentParser, more: str = "", *, positional: bool = False) -> None:
    """--model and --revision; if `positional`, the model may be given without --model too."""
    if positional:
        parser.add_argument(
            "model",
            nargs="?",
            default=argparse.SUPPRESS,
            action=_Model,
            metavar="MODEL",
            help="the model; the same as --model MODEL",
        )
    parser.add_argument(
        "-m",
        "--model",
        action=_Model,
        default=os.environ.get("OLMO3_MODEL") or "demo",
        metavar="MODEL",
        help=f"demo, a checkpoint's folder, or a hub id such as allenai/Olmo-3-7B-Instruct{more} "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--revision", metavar="R", help="a hub id's branch, tag or commit, such as stage1-step10000"
    )


class _Model(argparse.Action):
    """Takes the model's name, and refuses it if it is given both ways."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        by_flag = option_string is not None
        if getattr(namespace, "model_by_flag", by_flag) is not by_flag:
            parser.error("the model is given twice, by itself and with --model: leave one out")
        namespace.model, namespace.model_by_flag = values, by_flag


def add_memory(parser: argparse.ArgumentParser) -> None:
    """How much memory caches may take: --context, --kv-bits, --kv-group-size, --kv-start."""
    group = parser.add_argument_group("memory", "`olmo3 inspect` shows what fits this machine")
    group.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="room for N tokens, prompt and answers together (default: the model's, or what fits)",
    )
    group.add_argument(
        "--kv-bits", type=int, choices=(8, 4), help="quantize the caches (default: as the model computes)"
    )
    group.add_argument(
        "--kv-group-size",
        type=int,
        metavar="N",
        help="numbers that share a scale in quantized caches: 32, 64 or 128 (default: a whole head)",
    )
    group.add_argument(
        "--kv-start",
        type=int,
        default=0,
        metavar="N",
        help="quantize the caches only beyond N tokens (default: %(default)s)",
    )


def cache_options(args: argparse.Namespace) -> CacheOptions:
    """The caches' options of a command line. Raises OptionError for a wrong one."""
    return CacheOptions(args.kv_bits, args.kv_group_size, args.kv_start)


def add_answering(parser: argparse.ArgumentParser) -> None:
    """How to answer; what is left out comes from the checkpoint's generation_config.json."""
    group = parser.add_argument_group(
        "answering", "what is left out comes from the checkpoint's generation_config.json"
    )
    group.add_argument("--system", metavar="S", help="the system message")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="end after N tokens (default: where the context ends)"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest that reach P")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest; 0: from all")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="leave out what is less than P times the likeliest"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1 makes seen tokens less likely"
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    group.add_argument(
        "--stop", action="append", metavar="S", help="end the answer before this text; may be repeated"
    )


def answer_options(args: argparse.Namespace) -> Options:
    """The options of a command line, as `stream` takes them. Raises OptionError for a wrong one."""
    options: Options = {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "seed": args.seed,
        "stop": args.stop,
    }
    GenerationOptions.over(GenerationConfig(), **options)  # now, before a long load
    return options
