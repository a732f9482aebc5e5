"""`nvlm chat`: a conversation about pictures."""

import argparse
import json
import sys
from typing import Any

from nvlm_runtime.commands.answers import output_values, show_stream
from nvlm_runtime.commands.loading import load_model, sampling_params
from nvlm_runtime.inputs.image import open_image


def run(args: argparse.Namespace) -> int:
    """Answers questions line by line from standard input (`nvlm chat`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: an argument, an image or the checkpoint is invalid. At a terminal a bad line is reported instead.
        FileNotFoundError: a file does not exist.
    """
    params = sampling_params(args)
    model = load_model(args)
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    waiting = [open_image(path) for path in args.images]
    interactive = sys.stdin.isatty() and not args.json
    if interactive:
        print("A question a line. /image FILE adds a picture, /quit leaves.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if not line:
            continue
        try:
            if line.startswith("/image "):
                waiting.append(open_image(line.removeprefix("/image ").strip()))
                continue
            content = [{"type": "image"}] * len(waiting) + [{"type": "text", "text": ("\n" if waiting else "") + line}]
            turn = [*messages, {"role": "user", "content": content}]
            prepared = model.prepare(messages=turn, images=images + waiting, style=args.style)
            stream = model.stream(prepared, params=params)
        except (ValueError, OSError) as error:
            if not interactive:
                raise
            print(f"nvlm: {error}", file=sys.stderr)
            continue
        try:
            if args.json:
                for _ in stream:
                    pass
                print(json.dumps(output_values(stream.output, model.config)), flush=True)
            else:
                show_stream(stream)
        except KeyboardInterrupt:
            if not interactive:
                raise
        answer = {"role": "assistant", "content": [{"type": "text", "text": stream.output.text}]}
        messages, images, waiting = [*turn, answer], images + waiting, []
