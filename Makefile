# The README's commands. All they make lives in this folder: packages, caches and temporary files in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
TRITON := .venv/triton

export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TMPDIR := $(CURDIR)/.venv/tmp
export MPLCONFIGDIR := $(CURDIR)/.venv/matplotlib
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo examples reproduce test triton coverage mutants lint docs bench format wheel release clean

help:
	@echo "make demo    distil a small ResNet on handwritten digits, in less than a minute"
	@echo "make examples  a classifier, a sentence encoder and a language model, each with a smaller student: minutes; fetches 120 MB"
	@echo "make reproduce  the published CIFAR table: hours on a GPU, weeks on a CPU; stops and goes on"
	@echo "make test    the tests, all of them"
	@echo "make triton  the kernels for GPUs, in Triton's interpreter; on Linux"
	@echo "make coverage  the tests that cover src, slower: each line must run"
	@echo "make mutants  how many faults put into src on purpose the tests find: an hour; stops and goes on"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the pages, into site/"
	@echo "make bench   the benchmarks, in at most half an hour; stops and goes on"
	@echo "make wheel   the package as sdist and wheel, into dist/"
	@echo "make release  the checklist of a release; publishes nothing"
	@echo "make clean   remove .venv, .bounds, caches and what was built; runs/, which may hold the results of weeks, stays"

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	mkdir -p $(TMPDIR)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade "pip>=25.1" # knows dependency groups
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[examples,store,transformers]" --group dev
	touch $@

reproduce: $(READY)
	python examples/cifar_resnet.py --reproduce --out runs/reproduce

demo: $(READY)
	python examples/cifar_resnet.py --out runs/digits

examples: $(READY)
	python examples/image_classifier.py
	python examples/fetch.py
	python examples/sentence_encoder.py
	python examples/causal_lm.py

# Two workers, each with one thread, so that two cores are never asked for more.
test: $(READY)
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal

# An environment of its own, which has what .venv has, and Triton: with Triton, PyTorch looks for a GPU wherever it traces.
ifeq ($(shell uname -s),Linux)
$(TRITON)/ready: $(READY) .ci/triton.txt
	rm -rf $(TRITON)
	$(BIN)/python -m venv --without-pip $(TRITON)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> "$$($(TRITON)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	$(BIN)/python -m pip --python $(TRITON)/bin/python install --quiet --requirement .ci/triton.txt
	touch $@

triton: $(TRITON)/ready
	OMP_NUM_THREADS=1 $(TRITON)/bin/python -m pytest tests/engine/test_triton.py
else
$(TRITON)/ready: $(READY) # nothing: Triton is for Linux

triton:
	@echo "Triton is for Linux: the kernels for GPUs are not tested here."
endif

# What is traced and the study would take much longer than without coverage, and cover nothing that the others do not.
coverage: $(READY)
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal -m "not compile and not study" --cov --cov-fail-under=100

mutants: $(READY)
	python benchmarks/mutants.py --out docs/results/mutants

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

format: $(READY)
	python docs/write_index.py
	ruff check --fix .
	ruff format .

docs: $(READY)
	sphinx-build --fresh-env --fail-on-warning --keep-going --quiet --doctree-dir .venv/doctrees docs site

bench: $(READY)
	python benchmarks/train_step.py
	python benchmarks/losses.py

wheel: $(READY)
	python -m build

release: $(READY)
	.ci/release

clean:
	rm -rf .venv .bounds dist site .coverage .mypy_cache .pytest_cache .ruff_cache
