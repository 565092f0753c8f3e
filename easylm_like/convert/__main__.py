"""Convert between a run's checkpoints and Hugging Face folders; a result that is not proven equal is not kept.

python -m easylm_like.convert to-hf   --run=WORKDIR --out=DIR [--step=N] [--dtype=bfloat16]
python -m easylm_like.convert from-hf --model=DIR --out=WORKDIR --template=koala
"""

import argparse
import json
import sys
from pathlib import Path

from easylm_like.command import run_command
from easylm_like.errors import UserError


def main(argv: list[str]) -> None:
    """Parse the arguments and convert."""
    parser = argparse.ArgumentParser(prog="python -m easylm_like.convert", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf = commands.add_parser("to-hf", help="a checkpoint into a folder that transformers and others load")
    to_hf.add_argument("--run", type=Path, required=True, help="the work directory of the run")
    to_hf.add_argument("--out", type=Path, required=True)
    to_hf.add_argument("--step", type=int, help="which checkpoint; default: the latest")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    from_hf = commands.add_parser(
        "from-hf", help="a folder of the LLaMA family into a checkpoint to start training from"
    )
    from_hf.add_argument("--model", type=Path, required=True)
    from_hf.add_argument("--out", type=Path, required=True, help="a work directory; config.model.init_from takes it")
    from_hf.add_argument("--template", default="koala", help="the template it will be trained with")
    args = parser.parse_args(argv)
    if args.command == "to-hf":
        convert_to_hf(args.run, args.out, args.step, args.dtype)
    else:
        convert_from_hf(args.model, args.out, args.template)


def convert_to_hf(run: Path, out: Path, step: int | None, dtype: str) -> None:
    """Write the checkpoint of `step` (default: the latest) as a Hugging Face folder and prove it."""
    from easylm_like.atomic import atomic_folder
    from easylm_like.convert.verify import probe_prompts, verify_logits, verify_tokenizer
    from easylm_like.data.template import get_template
    from easylm_like.data.tokenizer import load_tokenizer
    from easylm_like.hf.folder import ORIGIN_FILE, read_json, write_folder
    from easylm_like.train.checkpoint import load_params, read_run_info, saved_digest, shape_from_json

    step, info = read_run_info(run / "checkpoints", step)
    origin = {"step": step, "checkpoint": saved_digest(run / "checkpoints", step), "dtype": dtype, "run": info}
    if (out / ORIGIN_FILE).is_file() and _same(read_json(out / ORIGIN_FILE), origin):
        print(f"{out}: already holds step {step} of {run} in {dtype}")
        return
    tokenizer = load_tokenizer(run / "tokenizer")
    if tokenizer.digest != info["tokenizer"]:
        raise UserError(f"{run}/tokenizer is not the one that trained this checkpoint; put that one back")
    template, shape = get_template(str(info["template"])), shape_from_json(info["shape"])
    params = load_params(run / "checkpoints", step)
    with atomic_folder(out, mark=ORIGIN_FILE) as folder:
        write_folder(folder, shape, params, tokenizer, template, dtype=dtype, origin=origin)
        proof = verify_logits(shape, params, folder, probe_prompts(tokenizer, template, 128))
        verify_tokenizer(folder, tokenizer, template)
    print(
        f"{out}: step {step} in {dtype}; logits at {proof.positions} positions equal to {proof.largest:.1e} of their "
        "spread, ids equal to transformers'"
    )


def convert_from_hf(model: Path, out: Path, template: str) -> None:
    """Write a Hugging Face folder as checkpoint 0 of the work directory `out` and prove it."""
    from easylm_like.atomic import atomic_folder
    from easylm_like.convert.load import model_digest
    from easylm_like.convert.verify import probe_prompts, verify_logits
    from easylm_like.data.template import get_template
    from easylm_like.data.tokenizer import load_tokenizer
    from easylm_like.hf.folder import read_params, read_shape
    from easylm_like.train.checkpoint import load_params, read_run_info, save_params, shape_to_json

    shape, tokenizer = read_shape(model), load_tokenizer(model)
    info: dict[str, object] = {
        "shape": shape_to_json(shape),
        "template": template,
        "tokenizer": tokenizer.digest,
        "source": {"path": str(model), "digest": model_digest(model)},
    }
    if (out / "checkpoints").is_dir() and read_run_info(out / "checkpoints")[1] == info:
        print(f"{out}: already holds {model}")
        return
    probes = probe_prompts(tokenizer, get_template(template), 128)
    with atomic_folder(out) as folder:
        save_params(folder / "checkpoints", read_params(model, shape), info)
        (folder / "tokenizer").mkdir()
        tokenizer.save(folder / "tokenizer")
        proof = verify_logits(shape, load_params(folder / "checkpoints", 0), model, probes)
    print(f"{out}: logits at {proof.positions} positions equal to {proof.largest:.1e} of their spread")


def _same(old: dict[str, object], new: dict[str, object]) -> bool:
    return {key: old.get(key) for key in new} == json.loads(json.dumps(new))


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
