# make demo       everything once on the built-in demo videos, from installation to a table: about 8 minutes on two cores
# make test       lint, types and all tests but the slow ones: about 10 minutes on two cores after installation
# make test-slow  the slow tests: kills, damaged videos, launchers, compiled backbones
# make setup      the environment only
# make evidence   checks the controlled set, then compares DCLR with MoCo on it, one seed: half an hour; resumable
# make chaos      kills a run of two ranks a hundred times and checks that it ends as without kills: 12 minutes
# make soak       a run of one hour: memory, open files and threads must not grow; DATA=DIR
# make gpu-layers 30 minutes of one GPU, the most valuable first: step, layers, tests, a whole run; DATA=DIR
# make gpu-evidence  MoCo and DCLR on real videos, one seed: 9 minutes of one GPU (computed); DATA=DIR
# make gpu        the tests that need a CUDA device, then the benchmarks; $(PYTHON) needs the packages; DATA=DIR

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

DEMO = runs/demo
# Without a GPU, two processes of one thread are 1.3 times as fast as one process of two threads (docs/LOG.md).
PROCESSES = $(if $(wildcard /dev/nvidia0),,--num_accelerators 2)
LAUNCH = $(BIN)/deepspeed $(PROCESSES) train.py
DS_CONFIG = ds_configs/zero1.json

# Else every test process and every command that a test starts would compile dclr and the tests again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo demo-quick test test-slow lint evidence chaos soak
.PHONY: gpu-baseline gpu-layers gpu-evidence gpu gpu-test gpu-step gpu-kernels gpu-runs

setup: $(VENV)/.ready

# pip compiles one file after another, for a minute. compileall does the same with all cores. Its status is ignored,
# because some packages hold templates, which are not Python.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[train,parquet,onnx,hub,remote,notebook,test]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

demo: setup
	rm -rf $(DEMO)
	$(LAUNCH) --ds_config $(DS_CONFIG) --out $(DEMO)/pretrain $(PRETRAIN_FLAGS)
	$(LAUNCH) finetune --ds_config $(DS_CONFIG) --pretrained $(DEMO)/pretrain --out $(DEMO)/finetune $(FINETUNE_FLAGS)
	$(LAUNCH) finetune --ds_config $(DS_CONFIG) --out $(DEMO)/scratch $(FINETUNE_FLAGS)
	$(BIN)/python eval.py accuracy --checkpoint $(DEMO)/finetune
	$(BIN)/python eval.py accuracy --checkpoint $(DEMO)/scratch
	$(BIN)/python eval.py retrieval --checkpoint $(DEMO)/pretrain
	$(BIN)/python eval.py retrieval --checkpoint random --preset demo --out $(DEMO)/random/retrieval
	$(BIN)/python -m dclr.evaluation.demo_table $(DEMO)

# The demo with two processes, too short to learn anything. It checks that every command runs.
demo-quick:
	$(MAKE) demo DEMO=runs/demo-quick PROCESSES="--num_accelerators 2" \
		PRETRAIN_FLAGS="--epochs 3" FINETUNE_FLAGS="--epochs 1"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests run on the CPU, also on a machine with a GPU, and the kernels in Triton's interpreter. Test processes have one
# thread each. Some tests wait for time limits and for other processes, so three processes keep two cores busy. A test
# file stays in one process, as its fixtures are shared. tests/conftest.py orders the files: else a long file could come
# last, and the other processes would wait for it.
PYTEST = CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST) -m "not gpu and not slow"

test-slow: setup
	$(PYTEST) -m "slow and not gpu"

evidence: setup
	$(BIN)/python -m experiments.controlled_set --seeds 1
	$(BIN)/python -m experiments.controlled --seeds 1 --methods random MoCo DCLR

chaos: setup
	CUDA_VISIBLE_DEVICES= $(BIN)/python tests/chaos.py --kills 100

soak: setup
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.soak --data $(DATA)

# Writes the older commit's files to .baseline/, from git. A machine without git needs a copy of that folder.
gpu-baseline:
	$(PYTHON) -m benchmarks.baseline --fill

# Every part writes its results at once, and none stops the next: see benchmarks/gpu_layers.py. MINUTES=9 limits the
# time, and PARTS="step stem" chooses parts.
gpu-layers:
	$(PYTHON) -m benchmarks.gpu_layers --minutes $(or $(MINUTES),30) $(if $(DATA),--data $(DATA)) \
		$(if $(PARTS),--parts $(PARTS))

# Six commands at a time share the GPU, because each spends seconds on its start. The same command continues a stopped
# experiment. SEED=1 adds the second seed, and so on. See experiments/real.py.
gpu-evidence:
	$(PYTHON) -m experiments.real --large --data $(DATA) --methods MoCo DCLR --first-seed $(or $(SEED),0) --seeds 1 \
		--parallel 6

# If a target fails, the next ones still run, because time on a GPU is short. The exit status is 1 if any failed. Each
# target should take less than ten minutes. DATA is a data set's folder, for the benchmarks that read videos.
gpu:
	status=0; \
	for target in gpu-test gpu-step gpu-kernels gpu-runs; do $(MAKE) $$target || status=1; done; \
	exit $$status

gpu-test:
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -m gpu

gpu-step:
	$(PYTHON) -m benchmarks.step --minutes 6

gpu-kernels:
	status=0; \
	$(PYTHON) -m benchmarks.resources || status=1; \
	$(PYTHON) -m benchmarks.info_nce --minutes 4 || status=1; \
	$(PYTHON) -m benchmarks.views --minutes 3 || status=1; \
	exit $$status

gpu-runs:
	status=0; \
	$(PYTHON) -m benchmarks.sharding || status=1; \
	if [ -n "$(DATA)" ]; then \
		$(PYTHON) -m benchmarks.loader --data $(DATA) --minutes 3 || status=1; \
		$(PYTHON) -m benchmarks.train --data $(DATA) || status=1; \
	else echo "loaders and whole runs are not measured: name a data set, make gpu DATA=DIR"; fi; \
	exit $$status
