# Every command works on a fresh machine: it makes the virtual environment it runs in.
PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest
BIN = $(VENV)/bin

.PHONY: demo test test-oldest test-newest lint types docs bench-gpu clean

demo: $(VENV)/.installed
	$(BIN)/python -m benchmarks.digits_vqa.demo
	$(BIN)/python -m benchmarks.digits_unified.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto

# What a patched model promises, on the oldest transformers, torch and Triton that are supported.
test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest -n auto tests/test_families.py tests/test_original_classes.py \
		tests/test_qwen_vl.py tests/test_packing.py tests/test_llava.py tests/test_extraction.py \
		tests/test_encoders.py tests/test_zoo.py tests/test_dispatch.py tests/test_token_mixing.py tests/test_fusion.py \
		tests/test_peft.py tests/test_named.py tests/test_recomputation.py tests/test_concurrency.py \
		tests/test_life_cycle.py tests/test_numbers.py tests/test_private.py tests/test_peft_methods.py tests/test_references.py \
		tests/test_wrapped.py tests/test_quantized.py tests/test_output_folders.py tests/test_hub_pushes.py \
		tests/kernels/test_interpreter.py tests/kernels/test_launches.py tests/kernels/test_compiled.py

# All tests on the newest releases, of these packages the pre-releases too: tells early what others are about to change.
# tests/test_private.py fails first where it is something that emma_adapter/private.py relies on. Installed anew each time.
PRERELEASES = torch,torchvision,triton,transformers,tokenizers,safetensors,huggingface-hub,peft,accelerate,trl,datasets,einops
test-newest:
	test -d $(NEWEST_VENV) || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade pip
	$(NEWEST_VENV)/bin/pip install --quiet --upgrade --upgrade-strategy eager --all-releases $(PRERELEASES) \
		--editable ".[test]"
	$(NEWEST_VENV)/bin/python -m pytest -n auto

# Time and memory of the fusions and their Triton kernels; without a GPU, a subset of it.
bench-gpu: $(VENV)/.installed
	$(BIN)/python -m benchmarks.kernels.run

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
