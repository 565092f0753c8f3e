"""Say how good a model is.

python -m eval report  --model=DIR --data=heldout.jsonl --out=DIR [--run=WORKDIR] [--baseline=DIR] [--score]
python -m eval answers --model=DIR --prompt="What is the capital of France?" [--marker=bad] [--temperature=0.7]
python -m eval loss    --model=DIR --data=heldout.jsonl

DIR is a Hugging Face folder or a run's work directory.
"""

import argparse
import sys
from pathlib import Path

from easylm_like.command import run_command


def main(argv: list[str]) -> None:
    """Parse the arguments and evaluate."""
    parser = argparse.ArgumentParser(prog="python -m eval", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="losses, answers and scores of a model, in one folder")
    answers = commands.add_parser("answers", help="what the model says to a prompt")
    loss = commands.add_parser("loss", help="loss per token, by source and marker")
    for command in (report, answers, loss):
        command.add_argument("--model", type=Path, required=True, help="a Hugging Face folder or a work directory")
    for command in (report, loss):
        command.add_argument("--data", type=Path, required=True, help="conversations, JSONL")
        command.add_argument("--row_length", type=int, default=512)
        command.add_argument("--batch_size", type=int, default=8)
    for command in (report, answers):
        command.add_argument("--max_new", type=int, default=64, help="the longest answer, in tokens")
    report.add_argument("--out", type=Path, required=True)
    report.add_argument("--run", type=Path, help="the work directory whose curves are drawn")
    report.add_argument("--baseline", type=Path, help="the model before training")
    report.add_argument("--score", action="store_true", help="count answers that equal the reference")
    report.add_argument("--limit", type=int, default=0, help="answer about this many conversations, of every source")
    answers.add_argument("--prompt", action="append", required=True, help="a user's message; may be given again")
    answers.add_argument("--marker", choices=("good", "bad"), action="append", help="default: good; may be given again")
    answers.add_argument("--temperature", type=float, default=0.0)
    answers.add_argument("--top_p", type=float, default=1.0)
    args = parser.parse_args(argv)
    {"report": _report, "answers": _answers, "loss": _loss}[args.command](args)


def _report(args: argparse.Namespace) -> None:
    from .report import ReportConfig, write_report

    fields = {name: value for name, value in vars(args).items() if name != "command"}
    write_report(ReportConfig(**fields))
    print((args.out / "report.md").read_text())
    places = {"data": args.data.parent, "model": args.model, "report": args.out}
    if args.run is not None:
        places["checkpoints"] = args.run / "checkpoints"
    for name, place in sorted(places.items()):
        print(f"{name + ':':13}{place}")


def _answers(args: argparse.Namespace) -> None:
    from easylm_like.convert.load import load_model
    from easylm_like.data.conversation import Message, Quality, Role
    from easylm_like.model.generate import Sampling

    from .answers import answer

    model, sampling = load_model(args.model), Sampling(temperature=args.temperature, top_p=args.top_p)
    chats = [[Message(Role.USER, prompt)] for prompt in args.prompt]
    for marker in args.marker or ["good"]:
        texts = answer(model, chats, Quality(marker), max_new=args.max_new, sampling=sampling)
        for prompt, text in zip(args.prompt, texts, strict=True):
            print(f"[{marker}] {prompt} -> {text}")


def _loss(args: argparse.Namespace) -> None:
    from easylm_like.convert.load import load_model

    from .loss import conversation_loss
    from .report import table

    losses = conversation_loss(
        load_model(args.model), args.data, row_length=args.row_length, batch_size=args.batch_size
    )
    print(table(losses, {}, {}))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
