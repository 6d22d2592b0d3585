# make demo    everything once on the built-in demo videos, from installation to a table of figures: about 10 minutes on two cores
# make test    lint, types and all tests
# make setup   the environment only
# make gpu     the tests that need a CUDA device (PYTHON=python3 VENV= uses the environment that is there)

PYTHON ?= python3
VENV ?= .venv
# With VENV= nothing is installed and $(PYTHON) runs everything.
RUN = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
DEEPSPEED = $(if $(VENV),$(VENV)/bin/deepspeed,deepspeed)
READY = $(if $(VENV),$(VENV)/.ready)

DEMO = runs/demo
LAUNCH = $(DEEPSPEED) $(LAUNCH_FLAGS) train.py
DS_CONFIG = ds_configs/zero1.json

.PHONY: setup demo demo-quick test lint gpu

setup: $(READY)

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

demo: $(READY)
	rm -rf $(DEMO)
	$(LAUNCH) --ds_config $(DS_CONFIG) --out $(DEMO)/pretrain $(PRETRAIN_FLAGS)
	$(LAUNCH) finetune --ds_config $(DS_CONFIG) --pretrained $(DEMO)/pretrain --out $(DEMO)/finetune $(FINETUNE_FLAGS)
	$(LAUNCH) finetune --ds_config $(DS_CONFIG) --out $(DEMO)/scratch $(FINETUNE_FLAGS)
	$(RUN) eval.py accuracy --checkpoint $(DEMO)/finetune
	$(RUN) eval.py accuracy --checkpoint $(DEMO)/scratch
	$(RUN) eval.py retrieval --checkpoint $(DEMO)/pretrain
	$(RUN) eval.py retrieval --checkpoint random --preset demo --out $(DEMO)/random/retrieval
	$(RUN) -m dclr.summary $(DEMO)

# The same through the launcher with two processes, too short to learn: that everything runs.
demo-quick:
	$(MAKE) demo DEMO=runs/demo-quick LAUNCH_FLAGS="--num_accelerators 2" PRETRAIN_FLAGS="--epochs 3" FINETUNE_FLAGS="--epochs 1"

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint
	$(RUN) -m pytest

gpu: $(READY)
	$(RUN) -m pytest -m gpu
