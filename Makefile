# `make demo` and `make test` each set up all they need; either may come first.
#
#   make demo   train an ODConv RetinaNet on generated shapes, evaluate it, draw the results
#   make test   the test suite; with STACK=onedl or TORCH=torch==VERSION on other packages
#   make lint   ruff and mypy
#   make slow   whole tools one after another, every detector of MMDetection: ten minutes
#   make faults trainings that are killed, on full disks, with broken files: many minutes
#   make fuzz   3,000 layers with options drawn by chance, against the formula
#   make load   memory and open files over 2,000 iterations, many image sizes, many threads
#   make study      the tables and figures of docs/study.md, from the logs of its runs
#   make study-run  train the runs that have no log yet: hours
#   make road       pretrain a small backbone as a classifier, and train a detector from it
#   make docs   the documentation, as a site in site/; docs-serve shows it while you write
#   make docs-check  runs the code of the documentation
#   make cuda   the tests and the benchmark on a GPU, written to work_dirs/benchmark_cuda*.json
#   make clean  remove what the above made, the virtual environment included

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
# Another torch or stack goes to an environment of its own: .venv-torch-2.14.1, .venv-onedl.
TORCH ?= torch==2.13.0
STACK ?= openmmlab
VENV ?= .venv$(patsubst %,-%,$(filter-out openmmlab,$(STACK)))$(subst ==,-,$(patsubst %,-%,\
    $(filter-out torch==2.13.0,$(notdir $(firstword $(TORCH))))))
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# mmpretrain needs torchvision, of the same release as PyTorch and built for the same devices.
ROAD_TORCH ?= torch==2.1.2 torchvision==0.16.2 numpy<2 opencv-python<4.12
ROAD_DIR := work_dirs/road

DEMO_CONFIG := configs/odconv/retinanet_od_r18_shapes.py
DEMO_DIR := work_dirs/demo
DEMO_DATA := data/shapes

DOCS_READY := $(VENV)/.docs-ready

.PHONY: demo test slow lint faults fuzz load docs docs-serve docs-check cuda study study-run road pretrain-and-detect \
    clean setup

setup: $(READY)

$(READY): setup.py $(wildcard requirements/*.txt) tools/setup_venv.sh
	PYTHON='$(PYTHON)' TORCH='$(TORCH)' STACK='$(STACK)' tools/setup_venv.sh '$(VENV)'
	touch $@

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults

fuzz: $(READY)
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_properties.py

load: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m load --numprocesses=0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS_READY): $(READY) requirements/docs.txt
	$(BIN)/python -m pip install --quiet -r requirements/docs.txt
	touch $@

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

docs-check: $(READY)
	DOCS_CHECK=1 $(BIN)/python -m pytest -n0 -m 'slow or not slow' tests/test_docs.py

study: $(READY)
	$(BIN)/python tools/study/table.py

study-run: $(READY)
	$(BIN)/python tools/study/make_shapes_dataset.py data/shapes_hard --hard --train 12000 --val 1000 --size 128 128
	$(BIN)/python tools/study/run.py

road:
	$(MAKE) pretrain-and-detect TORCH='$(ROAD_TORCH)'

pretrain-and-detect: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/pretrain.txt
	$(BIN)/python tools/study/make_shapes_dataset.py data/shapes_classification --classification \
	    --train 22000 --val 1000 --size 64 64 --seed 1
	$(BIN)/python tools/train.py configs/pretrain/od_r18_shapes.py --work-dir $(ROAD_DIR)/classifier
	$(BIN)/python tools/study/make_shapes_dataset.py data/shapes_hard_small --hard --train 8000 --val 500 \
	    --size 128 128
	SHAPES_HARD_ROOT=data/shapes_hard_small $(BIN)/python tools/train.py \
	    configs/pretrain/retinanet_od_r18_shapes-hard.py --work-dir $(ROAD_DIR)/detector --cfg-options \
	    model.backbone.init_cfg.checkpoint="$$(cat $(ROAD_DIR)/classifier/last_checkpoint)" \
	    train_cfg.max_epochs=1 param_scheduler.1.end=1 param_scheduler.1.T_max=1

# The package's own environment has PyTorch for CPUs: name one with CUDA by TORCH, or by BIN.
cuda: $(READY)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make cuda: PyTorch sees no GPU")'
	$(BIN)/python -m pytest -m cuda --numprocesses=0
	$(BIN)/python tools/benchmark.py --table --device cuda --out work_dirs/benchmark_cuda.json
	$(BIN)/python tools/benchmark.py --compiled --device cuda --out work_dirs/benchmark_cuda_compiled.json

# Threads that spin while they wait make it several times slower where other programs run.
demo: export OMP_WAIT_POLICY := passive
demo: $(READY)
	$(BIN)/python tools/study/make_shapes_dataset.py $(DEMO_DATA) --train 1200
	$(BIN)/python tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO_DIR)
	$(BIN)/python tools/analysis_tools/plot_curves.py $(DEMO_DIR) --out $(DEMO_DIR)/curves.png
	$(BIN)/python tools/image_demo.py $(DEMO_DATA)/val $(DEMO_CONFIG) \
	    "$$(cat $(DEMO_DIR)/last_checkpoint)" --limit 6 --score-thr 0.5 --out-dir $(DEMO_DIR)/detections
	@echo
	@echo "Curves:     $(DEMO_DIR)/curves.png"
	@echo "Detections: $(DEMO_DIR)/detections/*.png"

clean:
	rm -rf '$(VENV)' .venv .venv-* work_dirs data/shapes build site *.egg-info mmdet_odconv/.mim
