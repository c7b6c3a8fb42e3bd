# Every command works on a fresh machine: it makes the virtual environment it runs in.
PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
BIN = $(VENV)/bin

# Of the random draws of test-all; `make test-all SEED=…` draws the same again.
SEED := $(shell $(PYTHON) -c 'import random; print(random.randrange(2**31))')

# Tests start many interpreters; each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-benchmarks test-mutants test-oldest test-newest lint types docs bench-gpu clean

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.digits_vqa.demo
	$(BIN)/python -m benchmarks.digits_unified.demo

PYTEST = -m pytest -n auto --dist worksteal
FULL = TEST_BUDGET=full TEST_SEED=$(SEED)

# The everyday tier, see tests/support/budget.py.
test: $(VENV)/.installed
	$(BIN)/python $(PYTEST)

# All tests, and as much of each as the README's promises name.
test-all: $(VENV)/.installed
	$(FULL) $(BIN)/python $(PYTEST) --hypothesis-seed=$(SEED)

# What holds the benchmarks; a part of test-all.
test-benchmarks: $(VENV)/.installed
	$(FULL) $(BIN)/python $(PYTEST) tests/benchmarks

# The library is broken on purpose, in one place after the other: does a test notice?
test-mutants: $(VENV)/.installed
	$(BIN)/python .ci/mutants.py

# What depends on the releases of others, on the oldest transformers, torch, PEFT and Triton that are supported.
OLDEST = tests/patching/test_families.py tests/patching/test_original_classes.py tests/patching/test_packing.py \
	tests/adapter/test_peft.py tests/modules/test_private.py tests/kernels/test_launches.py \
	tests/kernels/test_direct_launches.py \
	"tests/kernels/test_interpreter.py::test_kernels_in_tritons_interpreter[test_cross_attention_interpreted]"
OLDEST_AT_NIGHT = tests/patching/test_qwen_vl.py tests/patching/test_llava.py tests/models/test_zoo.py \
	tests/adapter/test_peft_methods.py tests/unified tests/experts
test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python $(PYTEST) $(OLDEST) $(if $(filter full,$(TEST_BUDGET)),$(OLDEST_AT_NIGHT))

# All tests on the newest releases, of these packages the pre-releases too: tells early what others are about to change.
# tests/modules/test_private.py fails first where it is something that emma_adapter/modules/private.py relies on. Installed anew each time.
PRERELEASES = torch,torchvision,triton,transformers,tokenizers,safetensors,huggingface-hub,peft,accelerate,trl,datasets,einops
test-newest:
	test -d $(NEWEST_VENV) || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade --upgrade-strategy eager --all-releases $(PRERELEASES) \
		--editable ".[test]"
	$(NEWEST_VENV)/bin/python $(PYTEST)

# Time and memory of the fusions and their Triton kernels; without a GPU, a subset of it.
bench-gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.kernels.run

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

types: $(VENV)/.installed
	$(BIN)/mypy

# The documentation, in site/; a warning is an error.
docs: $(VENV)/.installed
	$(BIN)/zensical build --clean --strict

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

$(OLDEST_VENV)/.installed: pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/pip install --quiet --editable ".[test]" --constraint tests/oldest.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(NEWEST_VENV) demo-output site
