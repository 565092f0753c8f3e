r"""Koala's recipe on a real pretrained model and real dialogues.

python -m data_prep build --config=configs/data/koala_stories.py:../shared/data --out=runs/koala_stories/data
python -m easylm_like.convert to-orbax --model=../shared/data/models/stories260K-hf \
    --out=runs/koala_stories/start --template=koala
python -m easylm_like.train --config=configs/koala_stories.py --workdir=runs/koala_stories

Variants: "" starts from stories260K (260 thousand weights; measured: 12 minutes on 2 CPU cores beside other work, and
the losses in README.md); "smollm2" from SmolLM2-135M-Instruct converted into runs/koala_smollm2/start (tried for 4
steps only; hours on 2 CPU cores, by estimate); "debug" takes 4 steps.
"""

from easylm_like.data.dataset import TooLong
from easylm_like.model.config import Remat
from easylm_like.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig


def get_config(variant: str = "") -> RunConfig:
    if variant not in ("", "smollm2", "debug"):
        raise ValueError(f"unknown variant {variant!r}; there are smollm2 and debug")
    config = RunConfig(steps=300, batch_size=8, log_every=20, heldout_every=100)
    config.data = DataConfig(
        train="runs/koala_stories/data/train.jsonl",
        heldout="runs/koala_stories/data/heldout.jsonl",
        row_length=512,
        too_long=TooLong.CUT,
    )
    config.model = ModelConfig(init_from="runs/koala_stories/start")
    config.optim = OptimConfig(learning_rate=2e-3, warmup_steps=20, beta2=0.95)
    if variant == "smollm2":
        config.model = ModelConfig(init_from="runs/koala_smollm2/start", remat=Remat.INPUTS)
        config.optim.learning_rate = 1e-4
    if variant == "debug":
        config.steps, config.log_every, config.optim.warmup_steps = 4, 1, 1
    return config
