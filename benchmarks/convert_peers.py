"""What benchmarks/convert.py compares with, each a process of its own: PEER IN OUT, run by a Python that has it.

This file imports nothing of easylm_like: EasyLM's environment does not have it.
"""

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path


def copy(model: Path, out: Path) -> None:
    """Copy the files of a folder, as the system copies best."""
    out.mkdir()
    for path in model.iterdir():
        shutil.copyfile(path, out / path.name)


def transformers(model: Path, out: Path) -> None:
    """Load and save with transformers, in the dtype that is stored, in shards as large as the input's."""
    from transformers import AutoModelForCausalLM

    largest = max(path.stat().st_size for path in model.glob("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(model, dtype="auto").save_pretrained(out, max_shard_size=largest)


def easylm_in(model: Path, out: Path) -> None:
    """Make a stream of parameters with EasyLM's convert_hf_to_easylm.py, which loads everything in float32."""
    out.mkdir()
    shutil.copyfile(model / "config.json", out / "config.json")  # the stream says nothing of its shape
    flags = [f"--hf_model={model}", f"--output_file={out / 'streaming_params'}", "--streaming=True"]
    _easylm("convert_hf_to_easylm.py", flags + _shape(model))


def easylm_out(model: Path, out: Path) -> None:
    """Make a Hugging Face folder of such a stream with EasyLM's convert_easylm_to_hf.py, in float16."""
    flags = [f"--load_checkpoint=params::{model / 'streaming_params'}", f"--output_dir={out}"]
    _easylm("convert_easylm_to_hf.py", flags + _shape(model))


def _easylm(script: str, flags: list[str]) -> None:
    """Run one of the scripts of the checkout that is the last argument of this process."""
    checkout = Path(sys.argv[-1])
    sys.path.insert(0, str(checkout))
    sys.argv = [script, *flags]
    runpy.run_path(str(checkout / "EasyLM" / "models" / "llama" / script), run_name="__main__")


def _shape(model: Path) -> list[str]:
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names = [*sizes, "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_theta"]
    fields = json.loads((model / "config.json").read_text())
    return ["--llama.base_model=debug", *(f"--llama.{name}={fields[name]}" for name in names)]


PEERS: dict[str, Callable[[Path, Path], None]] = {
    "copy": copy,
    "transformers": transformers,
    "easylm_in": easylm_in,
    "easylm_out": easylm_out,
}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
