# Every target makes its own environment in .venv; nothing outside this folder is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What pip is asked for first, so that no other requirement chooses a build of PyTorch; `make demo TORCH=...` takes another.
TORCH ?= torch==2.13.0

# Where Triton keeps what it has compiled.
export TRITON_CACHE_DIR := $(CURDIR)/build/triton

.PHONY: help demo test check test-slow kernels reference bench clean

help:
	@echo "make demo       install, compress the quickstart model, generate pictures, print where the report is"
	@echo "make test       lint, types and tests"
	@echo "make test-slow  what takes minutes: kills and resumes, installs other packages to compare with"
	@echo "make kernels    compile every Triton kernel for every architecture (minutes) and write kernels/machine_code.md"
	@echo "make reference  retrain the reference models from nothing (hours; resumes)"
	@echo "make bench      run the benchmark recipes and print the tables of README.md"
	@echo "make clean      remove build/ and the environment"

$(VENV)/torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[openvino]"
	@touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[openvino,gpu,tensorrt,server,dev]"
	@touch $@ $(VENV)/demo

# Fewer held-out prompts than the recipe asks for (512), and no other ways to be fast beside it, so that it takes minutes;
# the engine is the recipe's. How much faster it must be is left open: this machine may be another than the recipe's.
QUICK := --set evaluate.samples=32 --set 'evaluate.threads=[2]' --set 'evaluate.against=[]'
QUICK += --set gates.attribute_accuracy.max_loss=0.03 --set gates.latency_ms.min_ratio=1.0

demo: $(VENV)/demo
	$(BIN)/compress recipes/quickstart.yaml $(QUICK)
	$(BIN)/compress run build/quickstart --seed 1 -o build/pictures \
	  --prompt "a large red circle at the left on a plain teal background" \
	  --prompt "a small white square left of a large blue cross on a dotted brown background"
	@echo "The report is build/quickstart/report.html"

test check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy compress export kernels serve
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

kernels: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m kernels.matrix

reference: $(VENV)/demo
	$(BIN)/python -m recipes.reference.train

bench: $(VENV)/demo
	$(BIN)/python -m recipes.benchmarks

clean:
	rm -rf build $(VENV)
