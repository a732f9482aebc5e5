"""The `nvlm` command. Arguments are parsed before torch is imported, so `--help` and a typing mistake answer at once.

Bad input is one sentence on stderr and exit code 2; Ctrl-C ends with 130.
"""

import argparse
import sys
from collections.abc import Sequence


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="micro-d", help="bundled name or checkpoint folder (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--no-compile", action="store_true", help="decode in plain PyTorch, without a C++ compiler")
    parser.add_argument(
        "--quantize",
        nargs="+",
        default=[],
        metavar="PART=METHOD",
        help="vision=int8_dynamic; decoder, cross, head = int8 or int4 weights",
    )
    parser.add_argument("--check", action="store_true", help="name the first layer that gives inf or nan; slow")
    parser.add_argument("--graphs", action="store_true", help="static stages, captured into CUDA graphs on a GPU")


def _style_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--style",
        choices=("hf", "megatron", "template"),
        default="hf",
        help="how turns are written; template is the checkpoint's own (default: %(default)s)",
    )


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--min-p", type=float, default=0.0, help="0 is off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is off")
    parser.add_argument("--seed", type=int, help="of the draws; default: a new one each run")
    parser.add_argument("--stop", action="append", default=[], help="a text that ends the answer; may be repeated")


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON line instead")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvlm", description="NVLM-D, -X and -H: ask a picture a question.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser(
        "ask", help="answer one question about pictures", usage="nvlm ask [IMAGE ...] PROMPT [options]"
    )
    ask.add_argument("words", nargs="+", metavar="[IMAGE ...] PROMPT", help="picture files, then the question")
    ask.add_argument("--plan", action="store_true", help="print the tile plan of every picture first")
    ask.add_argument("--timings", action="store_true", help="print seconds a stage afterwards")

    chat = commands.add_parser("chat", help="talk about pictures: /image FILE adds one, /quit leaves")
    chat.add_argument("images", nargs="*", metavar="IMAGE", help="pictures of the first question")

    info = commands.add_parser("info", help="what a model is, and how it would tile a picture")
    info.add_argument("name", help="bundled name, published name (nvlm-d-72b) or checkpoint folder")
    info.add_argument("images", nargs="*", metavar="IMAGE", help="pictures to plan")
    info.add_argument("--draw", metavar="FILE", help="save the first picture with its tiles drawn on it")

    profile = commands.add_parser(
        "profile",
        help="one request stage by stage, beside plain PyTorch",
        usage="nvlm profile [IMAGE ...] PROMPT [options]",
    )
    profile.add_argument("words", nargs="+", metavar="[IMAGE ...] PROMPT", help="picture files, then the question")
    profile.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    profile.add_argument("--rounds", type=int, default=3, help="runs the medians are of (default: %(default)s)")
    profile.add_argument("--trace", metavar="FILE.json", help="save the profiler's trace, for Perfetto or Chrome")
    profile.add_argument("--png", metavar="FILE", help="save the stages as bars (needs matplotlib)")

    train = commands.add_parser("train", help="train a micro model from seeds")
    train.add_argument("task", choices=("micro",))
    train.add_argument("--variant", choices=("d", "x", "h"), required=True)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", required=True, help="folder for the checkpoint")
    train.add_argument("--work", default="work", help="folder for the tower and features the variants share")
    train.add_argument("--steps", type=int, help="of the decoder")
    train.add_argument("--tower-steps", type=int, help="of the vision tower")
    train.add_argument("--documents", type=int, help="number of training pictures")
    train.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")

    evaluate = commands.add_parser("eval", help="exact answers on rendered documents of a fresh seed")
    evaluate.add_argument("task", choices=("micro",))
    evaluate.add_argument("--variant", choices=("d", "x", "h"), required=True)
    evaluate.add_argument("--model", help="checkpoint folder (default: the bundled micro model)")
    evaluate.add_argument("--seed", type=int, default=12345)
    evaluate.add_argument("--samples", type=int, default=500)
    evaluate.add_argument("--open-mask", action="store_true", help="NVLM-X: let every tile tag see every tile")
    evaluate.add_argument("--blank-tiles", action="store_true", help="keep only the thumbnail's pixels")

    runs = {"ask": ask, "chat": chat, "info": info, "profile_stages": profile, "train": train, "evaluate": evaluate}
    for name, command in runs.items():
        command.set_defaults(run=name)
    for command in (ask, chat, profile):
        _model_options(command)
    for command in (ask, chat):
        _style_option(command)
        _sampling_options(command)
    for command in (ask, chat, info, profile, evaluate):
        _json_option(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        from nvlm_runtime import commands

        return getattr(commands, args.run)(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, OSError) as error:
        print(f"nvlm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
