"""Real rows of five public sets, merged with Koala's markers: Alpaca, ShareGPT, HC3, Anthropic HH, OpenAssistant.

python -m data_prep build --config=configs/data/koala_stories.py:../shared/data --out=runs/koala_stories/data

The variant is the folder that holds the native files; alpaca and HC3 are split 90/10 and 95/5 by prompt as in Koala.
"""

from data_prep.config import Format, MixtureConfig, Source


def get_config(variant: str = "") -> MixtureConfig:
    folder = variant or "../shared/data"
    return MixtureConfig(
        sources=(
            Source(
                format=Format.ALPACA,
                path=f"{folder}/alpaca/alpaca_davinci003_0000-2999.json",
                heldout_fraction=0.1,
                licence="CC BY-NC 4.0",
            ),
            Source(
                format=Format.SHAREGPT,
                path=f"{folder}/sharegpt/sharegpt_v3_slice_dev.json",
                heldout_fraction=0.05,
                licence="none stated; users' ChatGPT output",
            ),
            Source(
                format=Format.HC3,
                path=f"{folder}/hc3/hc3_600.jsonl",
                heldout_fraction=0.1,
                licence="CC BY-SA 4.0",
            ),
            Source(
                format=Format.HH,
                path=f"{folder}/hh_rlhf/harmless-base_test_0000-1499.jsonl.gz",
                heldout_fraction=0.1,
                licence="MIT",
            ),
            Source(
                format=Format.OASST,
                path=f"{folder}/oasst/en_100_tree_00-59.jsonl",
                heldout_fraction=0.15,
                licence="Apache-2.0",
            ),
        )
    )
