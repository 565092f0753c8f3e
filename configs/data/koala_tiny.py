"""The small dialogues of `python -m data_prep demo`, merged as Koala merges its sets.

python -m data_prep demo  --out=runs/koala_tiny/raw
python -m data_prep build --config=configs/data/koala_tiny.py --out=runs/koala_tiny/data

About 5,700 conversations in 2 seconds on a laptop.
"""

from data_prep.config import Format, MixtureConfig, Source


def get_config(variant: str = "") -> MixtureConfig:
    raw = variant or "runs/koala_tiny/raw"  # the folder that `demo` wrote
    files = {Format.ALPACA: "alpaca.json", Format.SHAREGPT: "sharegpt.json", Format.HH: "hh.jsonl"}
    return MixtureConfig(
        sources=tuple(
            Source(
                format=kind,
                path=f"{raw}/train/{file}",
                heldout_path=f"{raw}/heldout/{file}",
                licence="Apache-2.0, made by data_prep/demo.py",
            )
            for kind, file in files.items()
        )
    )
