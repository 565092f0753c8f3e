"""The chunked loss against the plain one: time and memory of value and gradients of x and the head.

    python -m benchmarks.loss [--vocabulary=32000,128256] [--rounds=3]

The plain loss makes all logits at once and lets jax.grad find the rest. 2,048 tokens, all of them trained on, and with
35 % trained on, in stretches as answers are (on real dialogues the share is about that). Width 768 at 32,000 and 2,048
at 128,256, unless --width says otherwise. Each run is a fresh process; runs take turns. "temporaries" is what XLA plans
beside inputs and results, "grown" what the process grew by at its greatest after the inputs were made, results and
compiler included. The values must agree. Asserts no times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.train_case import MIB, process_mib

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {32_000: 768, 128_256: 2_048}
ANSWER = 128  # tokens in a stretch that is trained on


def main() -> None:
    """Run every setting in turns and print a line each, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", default="32000,128256")
    parser.add_argument("--width", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--share", default="1.0,0.35", help="of the tokens that are trained on")
    parser.add_argument("--dtype", default="float32", help="of x and of the matmuls; the head is float32")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in a process, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        print(json.dumps(measure(**json.loads(flags.child))))
        return
    print(f"{'V':>7} {'D':>5} {'trained':>7}  {'loss':8} {'ms':>8} {'temporaries MiB':>15} {'grown MiB':>9}")
    for vocabulary in map(int, flags.vocabulary.split(",")):
        width = flags.width or WIDTHS.get(vocabulary, 768)
        for share in map(float, flags.share.split(",")):
            setting = {"V": vocabulary, "D": width, "n": flags.tokens, "share": share, "dtype": flags.dtype}
            race(setting | {"repeats": flags.repeats}, flags.rounds)


def race(setting: dict[str, Any], rounds: int) -> None:
    """Run both losses in turns and print their best times and memory."""
    runs: dict[str, list[dict[str, float]]] = {"chunked": [], "plain": []}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, "-m", "benchmarks.loss", "--child", json.dumps(setting | {"name": name})]
            output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs[name].append(json.loads(output.splitlines()[-1]))
    best = {name: {key: min(run[key] for run in of) for key in of[0]} for name, of in runs.items()}
    for name, of in best.items():
        print(
            f"{setting['V']:7} {setting['D']:5} {setting['share']:7.0%}  {name:8} {of['ms']:8.0f} "
            f"{of['temporaries']:15,.0f} {of['grown']:9,.0f}",
            flush=True,
        )
    ratios = sorted(a["ms"] / b["ms"] for a, b in zip(*runs.values(), strict=True))
    print(
        f"{'':23}ratio    {statistics.median(ratios):8.2f} "
        f"{best['chunked']['temporaries'] / best['plain']['temporaries']:15.2f} "
        f"{best['chunked']['grown'] / best['plain']['grown']:9.2f}   (times {ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )
    values = [runs[name][0]["value"] for name in runs]
    if abs(values[0] - values[1]) > 1e-3 * abs(values[1]):
        sys.exit(f"the losses are {values}: not the same thing was computed")


def measure(name: str, V: int, D: int, n: int, share: float, dtype: str, repeats: int) -> dict[str, float]:
    """Return the median milliseconds, the MiB and the value of one loss."""
    import jax
    import jax.numpy as jnp

    losses: dict[str, Callable[..., jax.Array]] = {"chunked": chunked, "plain": plain}
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD = jax.random.normal(keys[0], (1, n, D)).astype(dtype)
    head_VD = jax.random.normal(keys[1], (V, D)) * D**-0.5
    targets_BT = jax.random.randint(keys[2], (1, n), 0, V)
    weights_BT = ((jnp.arange(n) % ANSWER) < share * ANSWER).astype(jnp.float32)[None]
    arrays = jax.block_until_ready((x_BTD, head_VD, targets_BT, weights_BT))
    before = process_mib()
    step = jax.jit(jax.value_and_grad(losses[name], argnums=(0, 1))).lower(*arrays).compile()
    plan = step.memory_analysis()
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        value, gradients = jax.block_until_ready(step(*arrays))
        seconds.append(time.perf_counter() - began)
        del gradients
    return {
        "ms": 1000 * statistics.median(seconds[1:]),
        "temporaries": plan.temp_size_in_bytes / MIB if plan else 0.0,
        "grown": process_mib("VmHWM") - before,
        "value": float(value),
    }


def chunked(x_BTD: Any, head_VD: Any, targets_BT: Any, weights_BT: Any) -> Any:
    """Return the mean loss as train/loss.py computes it."""
    from easylm_like.train.loss import LossTerms, weighted_loss

    terms = LossTerms(vocab_size=head_VD.shape[0])
    return weighted_loss(x_BTD, head_VD, targets_BT, weights_BT, terms)[0] / weights_BT.sum()


def plain(x_BTD: Any, head_VD: Any, targets_BT: Any, weights_BT: Any) -> Any:
    """Return the mean loss from whole logits."""
    import jax.numpy as jnp
    import optax

    head_VD = head_VD.astype(x_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    return (weights_BT * nll_BT).sum() / weights_BT.sum()


if __name__ == "__main__":
    main()
