"""Convert models from and to every format of the LLaMA family; a result that is not proven equal is not kept.

python -m easylm_like.convert to-hf    --model=MODEL --out=DIR [--dtype=bfloat16]
python -m easylm_like.convert to-gguf  --model=MODEL --out=DIR [--type=Q8_0]
python -m easylm_like.convert to-orbax --model=MODEL --out=WORKDIR --template=koala
python -m easylm_like.convert difference make    --model=MODEL --base=MODEL --out=DIR
python -m easylm_like.convert difference recover --difference=DIR --base=MODEL --out=DIR

MODEL is a run's work directory or one of its checkpoints, a Hugging Face folder (safetensors or .bin), Meta's folder
(consolidated.*.pth with params.json), a streaming checkpoint of EasyLM, a .gguf file, or a .bin of llama2.c.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from easylm_like.command import run_command

if TYPE_CHECKING:
    from easylm_like.convert.export import Options
    from easylm_like.convert.source import Hints


def main(argv: list[str]) -> None:
    """Parse the arguments and convert."""
    parser = argparse.ArgumentParser(prog="python -m easylm_like.convert", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="a folder that transformers and most servers load")
    to_gguf = commands.add_parser("to-gguf", help="one file for llama.cpp and what is built on it")
    to_orbax = commands.add_parser("to-orbax", help="a checkpoint that training begins with, or goes on from elsewhere")
    for command in (to_hf, to_gguf, to_orbax):
        _add_model(command, "--model")
        _add_proof(command)
        command.add_argument("--vocab_size", type=int, help="rows of the vocabulary; new ones are the mean of the old")
    for command in (to_hf, to_orbax):
        command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as it is stored")
    to_gguf.add_argument("--type", default="F16", help="F32, F16 (default), BF16, Q8_0, Q4_0, Q4_1, Q5_0 or Q5_1")
    _add_card(to_hf)
    _add_difference(commands)
    args = parser.parse_args(argv)
    if args.command == "difference":
        _difference(args)
    else:
        _export(args)


def _add_model(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(name, type=Path, required=True, dest="model", help="a model in any format")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--step", type=int, help="which checkpoint of a work directory; default: the latest")
    command.add_argument("--tokenizer", type=Path, help="its folder or file; default: what lies with the model")
    command.add_argument("--template", help="what it is trained with; default: what the model's files say")
    command.add_argument("--shape", help="a name such as llama2_7b, or a config.json, where the files do not say it")


def _add_proof(command: argparse.ArgumentParser) -> None:
    command.add_argument("--prompt", action="append", default=[], help="text to compare logits on; may be given again")
    command.add_argument("--dialogues", type=Path, help="conversations (JSONL) whose ids are compared")


def _add_card(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shard_gb", type=float, default=5.0, help="the largest file, in GB of 10^9 bytes")
    command.add_argument("--evaluation", type=Path, help="report.json of `python -m eval report`, for the model card")
    command.add_argument("--base_model", help="OWNER/NAME on the hub, for the model card")
    command.add_argument("--licence", help="a licence by the hub's name for it, for the model card")


def _add_difference(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    difference = commands.add_parser("difference", help="release what training changed, for those who have the base")
    actions = difference.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="the difference of a model from its base")
    recover = actions.add_parser("recover", help="the model again, as a Hugging Face folder")
    _add_model(make, "--model")
    _add_model(recover, "--difference")
    _add_card(recover)
    for action in (make, recover):
        action.add_argument("--base", type=Path, required=True, help="the model that was trained on, in any format")


def _difference(args: argparse.Namespace) -> None:
    from easylm_like.convert.release import make, recover

    if args.action == "make":
        make(args.model, args.base, args.out, _hints(args))
    else:
        recover(args.model, args.base, args.out, _hints(args), _card_options(args))


def _export(args: argparse.Namespace) -> None:
    from easylm_like.convert.export import Options, export
    from easylm_like.convert.gguf.write import parse_type

    target = args.command.removeprefix("to-")
    options = _card_options(args) if target == "hf" else Options()
    options = replace(options, vocab_size=args.vocab_size, prompts=tuple(args.prompt), dialogues=args.dialogues)
    stored = {"gguf_type": parse_type(args.type)} if target == "gguf" else {"dtype": args.dtype}
    export(target, args.model, args.out, _hints(args), replace(options, **stored))


def _hints(args: argparse.Namespace) -> "Hints":
    from easylm_like.convert.source import Hints

    return Hints(args.tokenizer, args.template, args.shape, args.step)


def _card_options(args: argparse.Namespace) -> "Options":
    from easylm_like.convert.export import Options

    return Options(
        shard_bytes=int(args.shard_gb * 1e9),
        evaluation=args.evaluation,
        base_model=args.base_model,
        licence=args.licence,
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
