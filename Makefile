# `make demo` and `make test` each set up all they need; either may come first.
#
#   make demo   train an ODConv RetinaNet on generated shapes, evaluate it, draw the results
#   make test   the test suite
#   make lint   ruff and mypy
#   make faults trainings that are killed, on full disks, with broken files: many minutes
#   make fuzz   3,000 layers with options drawn by chance, against the formula
#   make load   memory and open files over 2,000 iterations, many image sizes, many threads
#   make study      the tables and figures of docs/study.md, from the logs of its runs
#   make study-run  train the runs that have no log yet: hours
#   make cuda   the tests and the benchmark on a GPU, written to work_dirs/benchmark_cuda*.json
#   make clean  remove what the above made, the virtual environment included

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
READY := $(VENV)/.ready

DEMO_CONFIG := configs/odconv/retinanet_od_r18_shapes.py
DEMO_DIR := work_dirs/demo
DEMO_DATA := data/shapes

.PHONY: demo test lint faults fuzz load cuda study study-run clean setup

setup: $(READY)

$(READY): setup.py $(wildcard requirements/*.txt) tools/setup_venv.sh
	PYTHON='$(PYTHON)' TORCH='$(TORCH)' tools/setup_venv.sh '$(VENV)'
	touch $@

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

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

study: $(READY)
	$(BIN)/python tools/study/table.py

study-run: $(READY)
	$(BIN)/python tools/make_shapes_dataset.py data/shapes_hard --hard --train 12000 --val 1000 --size 128 128
	$(BIN)/python tools/study/run.py

# The package's own environment has PyTorch for CPUs: name one with CUDA by TORCH, or by BIN.
cuda: $(READY)
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make cuda: PyTorch sees no GPU")'
	$(BIN)/python -m pytest -m cuda --numprocesses=0
	$(BIN)/python tools/benchmark.py --table --device cuda --out work_dirs/benchmark_cuda.json
	$(BIN)/python tools/benchmark.py --compiled --device cuda --out work_dirs/benchmark_cuda_compiled.json

demo: $(READY)
	$(BIN)/python tools/make_shapes_dataset.py $(DEMO_DATA)
	$(BIN)/python tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO_DIR)
	$(BIN)/python tools/analysis_tools/plot_curves.py $(DEMO_DIR) --out $(DEMO_DIR)/curves.png
	$(BIN)/python tools/image_demo.py $(DEMO_DATA)/val $(DEMO_CONFIG) \
	    "$$(cat $(DEMO_DIR)/last_checkpoint)" --limit 6 --out-dir $(DEMO_DIR)/detections
	@echo
	@echo "Curves:     $(DEMO_DIR)/curves.png"
	@echo "Detections: $(DEMO_DIR)/detections/*.png"

clean:
	rm -rf '$(VENV)' work_dirs data/shapes build *.egg-info mmdet_odconv/.mim
