# Two commands do everything on a machine with Python ≥ 3.11, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
FUZZ := .venv-fuzz
LOWEST := .venv-lowest
NEWEST := .venv-newest

.PHONY: demo test test-all test-clients test-peers test-lowest test-newest fuzz hunt long-runs browser bench bench-all docs mutate lint format clean

demo: $(INSTALLED)
	$(BIN)/lora-fx demo

test: $(INSTALLED) browser
	$(BIN)/pytest

# Every promise for every architecture: up to an hour on two cores. Writes what came of each into tests/matrices.md.
test-all: $(INSTALLED) browser
	$(BIN)/pip install --quiet -c constraints.txt -e '.[quantisers,executorch]'
	$(BIN)/pytest -m "" --matrices tests/matrices.md

# Clients that load what export.generation writes, in environments of their own (.venv-clients, 1.5 GB). Writes tests/clients.md.
test-clients: $(INSTALLED)
	$(BIN)/python tests/clients --write

# Models of timm, torchvision, diffusers, open_clip and sentence-transformers, taken the whole way, in an environment of its own
# (.venv-peers, 3 GB). Writes tests/peers.md. `make test-all` is without: these libraries are large, and half an hour more.
test-peers: $(PEERS)/.installed
	$(PEERS)/bin/python tests/peers --write

# The suite with the oldest releases that pyproject.toml allows (torch: the oldest whose build for a CPU can be installed by its name, see
# tools/lowest_releases.py), in an environment of its own (.venv-lowest, 1.5 GB).
test-lowest: $(LOWEST)/.installed browser
	$(LOWEST)/bin/pytest

# And with the newest that pip finds for torch 2.13 (.venv-newest). An environment stays as it was made: `rm -r .venv-newest` renews it.
test-newest: $(NEWEST)/.installed browser
	$(NEWEST)/bin/pytest

# Every reader of files that strangers give, for a minute, by a coverage-guided fuzzer; in an environment of its own (.venv-fuzz).
fuzz: $(FUZZ)/.installed
	$(FUZZ)/bin/python tests/fuzz

# Random models, adapters, passes and exports, beside PEFT and float64: half an hour; goes on where it was stopped. A seed that fails is
# named with the command that repeats it. `python tests/hunt --help`.
hunt: $(INSTALLED)
	$(BIN)/python tests/hunt --models 300 --results hunt.jsonl

# Many rounds, adapters and requests in one process, and half an hour of Trainer: memory, caches and times. `python tests/long_runs --help`.
long-runs: $(INSTALLED)
	$(BIN)/python tests/long_runs

# The page that pictures are looked at in is tested in a real browser: installed where that takes no question, and else asked for.
browser:
	@command -v chromium chromium-browser google-chrome chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	then apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else false; fi || \
	echo "no browser: the tests of the page will be skipped. Install chromium (Debian: apt install chromium)."

# Are the tests of the arithmetic sharp? Minutes; fails on mutants that survive and are not in tests/mutants_allowed.toml.
mutate: $(INSTALLED)
	$(BIN)/python tools/mutate.py

# What it costs, beside PEFT, on an otherwise idle machine: half an hour to an hour; with `--write` the table of tools/bench/README.md too.
bench: $(INSTALLED)
	$(BIN)/python tools/bench

# Those and generation (tools/bench/generation.py; onnxruntime-genai, where `make test-clients` installed it): 20 minutes more.
bench-all: $(INSTALLED)
	$(BIN)/python tools/bench --all

# The API reference, from the docstrings: plain HTML in docs/, links checked.
docs: $(INSTALLED)
	$(BIN)/python tools/make_docs.py

lint: $(INSTALLED)
	$(BIN)/ruff check lora_fx tests tools
	$(BIN)/ruff format --check lora_fx tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

format: $(INSTALLED)
	$(BIN)/ruff check --fix lora_fx tests tools
	$(BIN)/ruff format lora_fx tests tools

clean:
	rm -rf $(VENV) .venv-clients $(PEERS) $(FUZZ) $(LOWEST) $(NEWEST) demo-output mutants docs hunt.jsonl

# torch first and alone: its pin names a CPU build where one is at hand, and nothing that follows may replace it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[onnx,draw,demo,dev]'
	touch $@

$(PEERS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet -c constraints.txt torch
	$(PEERS)/bin/pip install --quiet -c constraints.txt -e '.[peers]'
	touch $@

$(FUZZ)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/pip install --quiet -c constraints.txt torch
	$(FUZZ)/bin/pip install --quiet -c constraints.txt -e '.[fuzz]'
	touch $@

# What these depend on in turn is not constrained: older releases want older ones than constraints.txt has.
$(LOWEST)/.installed: pyproject.toml tools/lowest_releases.py $(INSTALLED)
	$(PYTHON) -m venv $(LOWEST)
	$(BIN)/python tools/lowest_releases.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet -c $(LOWEST)/constraints.txt torch
	$(LOWEST)/bin/pip install --quiet -c $(LOWEST)/constraints.txt -e '.[onnx,draw,demo,dev]'
	touch $@

$(NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet torch==2.13.0
	$(NEWEST)/bin/pip install --quiet torch==2.13.0 -e '.[onnx,draw,demo,dev]'
	touch $@
