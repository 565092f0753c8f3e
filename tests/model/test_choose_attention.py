"""Which backend trains: the fastest that the devices, the model and the rows allow, or a sentence why not."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from easylm_like.errors import UserError
from easylm_like.model.attention import choose_attention
from easylm_like.model.config import Attention, Compute, LlamaConfig
from easylm_like.model.presets import get_preset

HALF = replace(get_preset("llama32_1b"), compute=Compute(dtype="bfloat16"))
WHOLE = replace(HALF, compute=Compute(dtype="float32"))
FORGETS = replace(HALF, compute=Compute(dtype="bfloat16", forget=0.1))
AUTO, XLA, CHUNKED, CUDNN, SPLASH = Attention


def mesh(platform: str, kind: str, capability: str = "", sequence: int = 1) -> Any:
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    return SimpleNamespace(devices=np.array([device]), shape={"sequence": sequence})


H100, A100 = mesh("gpu", "NVIDIA H100 80GB HBM3", "9.0"), mesh("gpu", "NVIDIA A100-SXM4-80GB", "8.0")
TPU, CPU = mesh("tpu", "TPU v5p"), mesh("cpu", "cpu")


@pytest.mark.parametrize(
    ("devices", "config", "row_length", "chosen"),
    [
        (H100, HALF, 4096, CUDNN),
        (H100, WHOLE, 4096, CHUNKED),
        (H100, FORGETS, 4096, CHUNKED),
        (A100, HALF, 4096, CHUNKED),
        (TPU, WHOLE, 4096, SPLASH),
        (TPU, FORGETS, 4096, SPLASH),
        (TPU, HALF, 4000, CHUNKED),
        (CPU, WHOLE, 77, CHUNKED),
        (mesh("gpu", "NVIDIA H100 80GB HBM3", "9.0", sequence=2), HALF, 4096, CHUNKED),
    ],
)
def test_auto_takes_the_fastest_that_can(devices: Any, config: LlamaConfig, row_length: int, chosen: Attention) -> None:
    assert choose_attention(AUTO, config, devices, row_length) == chosen
    assert choose_attention(chosen, config, devices, row_length) == chosen


@pytest.mark.parametrize(
    ("wanted", "devices", "config", "row_length", "sentence"),
    [
        (CUDNN, CPU, HALF, 4096, "model.attention cudnn: it runs on NVIDIA GPUs, the devices are cpu; take auto"),
        (CUDNN, H100, WHOLE, 4096, "computes in bfloat16 or float16, not float32"),
        (CUDNN, A100, HALF, 4096, r"compute capability 9.0 \(Hopper\), the devices have 8.0"),
        (SPLASH, H100, HALF, 4096, "it runs on TPU, the devices are NVIDIA H100"),
        (SPLASH, TPU, HALF, 4000, "multiple of 128, such as 3968"),
        (
            CUDNN,
            mesh("gpu", "NVIDIA H100 80GB HBM3", "9.0", sequence=4),
            HALF,
            4096,
            "cannot look beyond a piece of a row.* mesh.sequence is 4",
        ),
    ],
)
def test_what_cannot_be_is_said(
    wanted: Attention, devices: Any, config: LlamaConfig, row_length: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        choose_attention(wanted, config, devices, row_length)
