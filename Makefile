# What a developer, a newcomer and CI do here. `make` alone lists it. Needs Python 3.11 or newer, bash and git.
# make PYTHON=/path/to/python chooses the interpreter that .venv is made with.

UV_VERSION := 0.13.8
python := .venv/bin/python
# Many short processes import the same big libraries: let the first one keep what it compiled, whatever the machine says.
export PYTHONDONTWRITEBYTECODE :=
.DEFAULT_GOAL := help
.PHONY: help setup koala check ahead-tpu ahead-cuda format lock
# A recipe that fails must not leave a stamp that says it succeeded.
.DELETE_ON_ERROR:

help:
	@echo "make koala   train, convert and evaluate a small Koala on this machine, in runs/koala_tiny"
	@echo "make setup   .venv with what training, converting and evaluating need"
	@echo "make check   format, lint, types, tests, and the tests on the built wheel: what CI runs"
	@echo "make ahead-tpu, make ahead-cuda   compile the training step for TPUs or GPUs that are not here, and check what is in it"
	@echo "make format  rewrite the files as the check wants them"
	@echo "make lock    choose the newest versions that setup.cfg allows and write requirements.lock"

setup: .venv/.locked

koala: .venv/.locked
	$(python) -m data_prep demo --out=runs/koala_tiny/raw
	$(python) -m data_prep build --config=configs/data/koala_tiny.py --out=runs/koala_tiny/data
	$(python) -m data_prep tokenizer --data=runs/koala_tiny/data/train.jsonl --vocab_size=1024 --out=runs/koala_tiny/tokenizer
	$(python) -m easylm_like.train --config=configs/koala_tiny.py --workdir=runs/koala_tiny
	$(python) -m easylm_like.convert to-hf --model=runs/koala_tiny --out=runs/koala_tiny/hf
	$(python) -m eval answers --model=runs/koala_tiny/hf --prompt="What is the capital of France?" --marker=good --marker=bad
	$(python) -m eval report --model=runs/koala_tiny/hf --data=runs/koala_tiny/data/heldout.jsonl \
		--run=runs/koala_tiny --out=runs/koala_tiny/report --score --row_length=128

check: .venv/.torch
	scripts/check.sh

# Not in the check: the library that compiles for TPUs has 0.5 GB, those for NVIDIA's GPUs have 4 GB. Neither needs a device.
ahead-tpu ahead-cuda: ahead-%: .venv/.torch
	.venv/bin/uv pip install --quiet --python $(python) --constraint requirements.lock --requirement setup.cfg --extra $*
	$(python) -m pytest tests/train/test_compile_ahead.py -k $*

format: .venv/.locked
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

lock: .venv/.locked
	.venv/bin/uv pip compile setup.cfg --extra data --extra eval --extra serve --extra track --extra dev --upgrade --quiet \
		--universal --python-version 3.11 --fork-strategy requires-python --generate-hashes \
		--config-file scripts/lock.toml --no-emit-package torch --custom-compile-command "make lock" \
		--output-file requirements.lock

.venv/.locked: requirements.lock
	scripts/make_venv.sh $(UV_VERSION) "$(PYTHON)"
	@touch $@

# torch, the tests' independent reference, comes from plain pip and not from the lock: its builds for CPU and GPU are different
# wheels of one version, and pip, unlike uv, finds one that a machine keeps beside the registry.
.venv/.torch: .venv/.locked setup.cfg
	$(python) -m pip install --quiet --disable-pip-version-check "$$(sed -n 's/ *\(torch\) *== */\1==/p' setup.cfg)"
	@touch $@
