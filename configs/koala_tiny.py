"""Koala in small: 1.4 million weights learn to answer well, or badly, by the marker before the answer.

python -m easylm_like.train --config=configs/koala_tiny.py --workdir=runs/koala_tiny
python -m easylm_like.train --config=configs/koala_tiny.py:debug --workdir=runs/koala_debug    (4 steps)

Hardware: 2 CPU cores, about 2.5 minutes. Measured: see the table in README.md. `make koala` runs the whole way.
"""

from easylm_like.model.config import LlamaConfig
from easylm_like.train.config import DataConfig, ModelConfig, OptimConfig, RunConfig


def get_config(variant: str = "") -> RunConfig:
    if variant not in ("", "debug"):
        raise ValueError(f"unknown variant {variant!r}; there is debug")
    data = "runs/koala_tiny"
    config = RunConfig(steps=600, batch_size=16, log_every=50, heldout_every=100, checkpoint_every=300)
    config.data = DataConfig(
        train=f"{data}/data/train.jsonl",
        heldout=f"{data}/data/heldout.jsonl",
        tokenizer=f"{data}/tokenizer",
        row_length=128,
    )
    shape = LlamaConfig(
        vocab_size=1024,
        d_model=160,
        d_ff=432,
        n_layers=4,
        n_heads=5,
        n_kv_heads=5,
        head_dim=32,
        tie_embeddings=True,
        max_length=256,
    )
    config.model = ModelConfig(shape=shape, scan_layers=False)
    config.optim = OptimConfig(learning_rate=3e-3, warmup_steps=50, weight_decay=0.1, beta2=0.95)
    if variant == "debug":
        config.steps, config.log_every, config.heldout_every, config.checkpoint_every = 4, 1, 2, 2
        config.optim.warmup_steps = 1
    return config
