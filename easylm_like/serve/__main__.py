"""Talk to models: over OpenAI's HTTP interface and on a web page, or in this terminal.

python -m easylm_like.serve --model=DIR [--model=NAME=DIR ...] [--host=0.0.0.0] [--port=8000] [--slots=8]
python -m easylm_like.serve chat --model=DIR

DIR is a Hugging Face folder, a run's work directory or one of its checkpoints. Ctrl+C or SIGTERM lets running answers
finish; a second one ends the server at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from easylm_like.command import run_command
from easylm_like.errors import UserError

if TYPE_CHECKING:
    from easylm_like.convert.load import OpenModel
    from easylm_like.serve.engine import Engine

MEBIBYTE = 1 << 20


def main(argv: list[str]) -> None:
    """Parse the arguments and serve, or chat."""
    if argv[:1] == ["chat"]:
        _chat(_chat_parser().parse_args(argv[1:]))
    else:
        _serve(_serve_parser().parse_args(argv))


def named_models(given: Sequence[str]) -> dict[str, Path]:
    """Return the folder of every --model by its name: NAME=DIR says it, of DIR alone it is the last part.

    Raises:
        UserError: two have one name.
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, _, folder = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        path = Path(folder)
        name = name or _own_name(path.absolute())
        if name in folders:
            raise UserError(f"two models are called {name}: name them, --model={name}-2={path}")
        folders[name] = path
    return folders


def _own_name(path: Path) -> str:
    """Return a folder's name; that of a checkpoint is the run's and the step."""
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}-{path.name}"
    return path.name


def _serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m easylm_like.serve",
        description=__doc__.split("\n")[0],
        epilog="`chat` in place of the options above talks in this terminal: python -m easylm_like.serve chat --help",
    )
    parser.add_argument("--model", action="append", required=True, help="DIR or NAME=DIR; may be given again")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in: then give keys, too")
    parser.add_argument("--port", type=_number(int, 0, 65535), default=8000)
    parser.add_argument("--slots", type=_number(int, 1), default=8, help="answers that are written at a time")
    parser.add_argument("--queue", type=_number(int, 1), default=64, help="requests that may wait for a slot")
    _add_engine_arguments(parser)
    parser.add_argument("--max_tokens", type=_number(int, 1), default=512, help="of a chat that does not say")
    parser.add_argument("--timeout", type=_number(float, 0.1), default=600.0, help="seconds that an answer may take")
    parser.add_argument("--grace", type=_number(float, 0), default=30.0, help="seconds to finish answers at the end")
    parser.add_argument("--max_body", type=_number(float, 0.001), default=8.0, help="largest request, in MiB")
    parser.add_argument("--api_key_file", type=Path, help="one key a line; or EASYLM_LIKE_API_KEYS in the environment")
    parser.add_argument("--cors", action="append", default=[], help="origin of a page that may call; may be repeated")
    return parser


def _chat_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m easylm_like.serve chat", description="Talk to a model here.")
    parser.add_argument("--model", required=True, help="a Hugging Face folder, a work directory or a checkpoint")
    _add_engine_arguments(parser)
    parser.set_defaults(slots=1, queue=1)
    return parser


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    context = "most tokens of prompt and answer together; default: what the model was made for, up to 4096"
    parser.add_argument("--context", type=_number(int, 2), default=0, help=context)
    dtypes = ("auto", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="auto: float32 on CPUs, else bfloat16")
    parser.add_argument("--int8", action="store_true", help="weights in 8 bits: half the memory, a little worse")
    parser.add_argument("--template", help="the prompt format, where the model's folder does not say")
    parser.add_argument("--tensor", type=_number(int, 1), default=1, help="devices that share each layer's heads")
    parser.add_argument("--fsdp", type=_number(int, 1), default=1, help="devices that share what is left; slower")
    parser.add_argument("--compilation_cache", default="~/.cache/easylm_like", help="compiled programs; not on CPUs")
    parser.add_argument("--prefix_gib", type=_number(float, 0), default=1.0, help="memory for the beginnings of texts")
    one_size = "an answer does not depend on what else is answered, to the last bit; slower where little runs"
    parser.add_argument("--one_size", action="store_true", help=one_size)


def _number(kind: type[int] | type[float], least: float, most: float = float("inf")) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"{text} must be at least {least:g}" + (f" and at most {most:g}" if most < float("inf") else "")
            )
        return number

    return parse


def _serve(args: argparse.Namespace) -> None:
    from easylm_like.convert.load import open_model
    from easylm_like.serve.api import Service
    from easylm_like.serve.asked import Defaults
    from easylm_like.serve.limits import BodyLimits, read_keys
    from easylm_like.serve.server import address, listen, run

    folders = named_models(args.model)
    service = Service(
        defaults=Defaults(max_tokens=args.max_tokens, timeout=args.timeout),
        limits=BodyLimits(most_bytes=int(args.max_body * MEBIBYTE)),
        keys=read_keys(args.api_key_file),
        origins=tuple(args.cors),
    )
    models = {name: open_model(folder, args.template) for name, folder in folders.items()}
    listener = listen(args.host, args.port)

    if not service.keys and args.host not in ("127.0.0.1", "::1", "localhost"):
        print("note: whoever reaches this address may use it; give keys with --api_key_file=", file=sys.stderr)

    def load() -> None:
        for name, model in models.items():
            engine = _engine(model, args)
            service.engines[name] = engine
            print(f"{name}: context {engine.context}, slots {engine.slots}, {_manner(engine)}", flush=True)
        print(f"serving on {address(listener)}", flush=True)

    run(service, listener, load, grace=args.grace)


def _chat(args: argparse.Namespace) -> None:
    from easylm_like.convert.load import open_model
    from easylm_like.serve.terminal import chat

    engine = _engine(open_model(args.model, args.template), args)
    try:
        chat(engine)
    finally:
        engine.close()


def _engine(model: "OpenModel", args: argparse.Namespace) -> "Engine":
    import jax

    from easylm_like.compiled import keep_compiled
    from easylm_like.model.partition import MeshConfig, make_mesh
    from easylm_like.serve.engine import Engine, EngineConfig

    names = ("slots", "context", "queue", "dtype", "int8", "prefix_gib", "one_size")
    config = EngineConfig(**{name: getattr(args, name) for name in names})
    devices = jax.devices()
    keep_compiled(args.compilation_cache, devices[0].platform)
    mesh = make_mesh(MeshConfig(fsdp=args.fsdp, tensor=args.tensor), devices[: args.fsdp * args.tensor])
    return Engine(model, mesh, config, say=_say)


def _say(text: str) -> None:
    """Show how far the start is, on a line that renews itself; a log has no use for it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def _manner(engine: "Engine") -> str:
    from easylm_like.serve.chat import can_chat

    if engine.template is not None and can_chat(engine):
        return f"template {engine.template.name}"
    return "its own chat template" if can_chat(engine) else "no chat template: completions only"


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
