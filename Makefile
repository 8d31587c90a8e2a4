# The interface of the suite: `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON  ?= python3.11
VENV    ?= .venv
CONFIG  ?= configs/llama31-8b.yaml
# Where unset, outputs/ and the config's name.
RUN     ?=
PYTEST_ARGS ?=
# An index of CPU builds of torch, such as PyTorch's own; without it pip takes torch from its default index,
# where Linux builds bring several gigabytes of CUDA with them.
TORCH_INDEX ?=
# A profile in slurm/clusters/, or a path.
CLUSTER ?= generic
DRY_RUN ?=
# One unit, such as penalty-seed0 or a shard's name: of make PHASE, submit-all, submit-PHASE and cancel.
UNIT    ?=
# Tasks side by side, of make run; where unset, as slurm.local has it.
WORKERS ?=
# How many, and how much memory each has in GiB: for `make plan`.
GPUS    ?= 4x80
# What make compare reads and where it writes.
RUNS ?=
OUT ?= outputs/compare

PY := $(VENV)/bin/python

# A caller's value as one word of the shell's, whatever it holds: quotes, spaces, `;` and `$`. Only what make itself
# sets is expanded.
given = $(if $(filter command environment,$(firstword $(origin $1))),$(value $1),$($1))
quoted = '$(subst ','\'',$1)'
arg = $(call quoted,$(call given,$1))
# Variables on the command line that are no variable of this file are overrides of the config, `ppo.steps=2`.
KNOWN := WORKERS PYTHON VENV CONFIG RUN UNIT CLUSTER DRY_RUN GPUS RUNS OUT DATA PATHS JOBS PYTEST_ARGS TORCH_INDEX KIND BASE SARM_IMAGES \
  ACCOUNTING SHELL MAKEFLAGS DEBIAN_MIRROR SLURM_CONF_EXTRA SARM_% HF_% PIP_% APPTAINER_% TMPDIR %_PROXY %_proxy
OVERRIDES := $(filter-out $(KNOWN),$(foreach pair,$(MAKEOVERRIDES),$(if $(findstring =,$(pair)),$(if \
  $(filter command,$(firstword $(origin $(firstword $(subst =, ,$(pair)))))),$(firstword $(subst =, ,$(pair)))))))
# make hands variables of its command line on to what it runs, and expands them for that.
WORDS := CONFIG RUN UNIT CLUSTER RUNS OUT DATA PATHS JOBS GPUS DRY_RUN KIND BASE $(OVERRIDES)
unexport $(WORDS)
# A recipe's lines are each a shell's.
define line_break


endef
$(foreach name,$(WORDS),$(if $(findstring $(line_break),$(value $(name))),$(error $(name) holds a line break; give it without)))

# A run that is there already has a config of its own, and is taken under that where no CONFIG is given.
OWN := $(if $(filter file default,$(origin CONFIG)),$(if $(call given,RUN),$(shell test ! -e $(call arg,RUN)/config.yaml || echo 1)))
config = $(if $(OWN),,--config $(call arg,CONFIG))
# the stem of CONFIG, cut off by the shell, which unlike make knows names with spaces
run = --run $(if $(call given,RUN),$(call arg,RUN),"outputs/$$(basename -- $(call arg,CONFIG) | sed 's/\.[^.]*$$//')")
unit = $(if $(call given,UNIT),--unit $(call arg,UNIT))
overrides = $(foreach name,$(OVERRIDES),$(call quoted,$(name)=$(value $(name))))
dry = $(if $(filter-out 0 no false off n No False Off N NO FALSE OFF,$(call given,DRY_RUN)),--dry-run)
# A list of words, each as it is, patterns of file names apart.
listed = $(foreach word,$(call given,$1),$(foreach one,$(or $(wildcard $(word)),$(word)),$(call quoted,$(one))))
cluster = --cluster $(call arg,CLUSTER)
PHASES := fetch check_sarm encode probe select steer cards calibrate ppo evaluate report

SUBMIT := $(addprefix submit-,$(PHASES))
# What takes overrides; anything else would pass them over without a word.
TAKING := check-sarm run doctor submit-all train-sarm plan serve-reward $(PHASES) $(SUBMIT)
ifeq ($(MAKELEVEL),0)
ifneq ($(OVERRIDES),)
$(foreach goal,$(filter-out $(TAKING),$(or $(MAKECMDGOALS),help)),$(error make $(goal) takes no $(firstword $(OVERRIDES)); overrides of the config are for $(TAKING)))
endif
endif

.PHONY: help setup setup-light demo check-sarm probe-study test test-slow test-browser test-docs check bench run status watch doctor verify cancel unlock sbatch submit-all compare plan train-sarm export serve-reward lock mutants format clean login $(PHASES) $(SUBMIT)

help:  ## list the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1|/' | column -t -s '|'
	@echo "  make PHASE            one phase by itself: $(PHASES)"
	@echo "  make submit-PHASE     one phase by itself as Slurm jobs"
	@echo variables: CONFIG=$(call arg,CONFIG) RUN=$(call arg,RUN) CLUSTER=$(call arg,CLUSTER) UNIT= DRY_RUN= VENV=$(call arg,VENV)
	@echo "  and overrides of the config, such as ppo.steps=2"

# It is what nearly every other target needs first, and has a word to say only where it was asked for.
setup: $(VENV)/.installed  ## make the virtual environment with everything pinned (CPU)
	@$(if $(filter setup,$(MAKECMDGOALS)),echo "installed: $(VENV) as requirements/cpu.lock pins it; next: make demo",:)

$(VENV)/.installed: requirements/cpu.lock requirements/constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on PATH; install Python 3.11 or give PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/constraints.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/cpu.lock
	@touch $@

setup-light:  ## the login node's environment: submission and status, no torch
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements/light.lock
	@echo "installed: $(VENV) with what a login node needs; next: make doctor CLUSTER=..."

demo: setup  ## the whole pipeline on SmolLM2-135M on this machine's CPU
	@$(PY) -m slurm.local --config configs/smollm2.yaml --run outputs/smollm2

run: setup  ## the whole pipeline on this machine: CONFIG=... RUN=... WORKERS=...
	@$(PY) -m slurm.local $(config) $(run) $(if $(call given,WORKERS),--workers $(call arg,WORKERS)) $(overrides)

$(filter-out fetch,$(PHASES)): setup
	@$(PY) -m jobs $@ $(config) $(run) $(unit) $(overrides)

check-sarm: check_sarm  ## is the SARM opened right? its figures beside those of its card: CONFIG=... RUN=...

# Any environment will do: the full one where there is one.
login:
	@test -x $(PY) || $(MAKE) --no-print-directory setup-light

fetch: login  ## models and data, as the cluster's profile says (HF_TOKEN for a gated model): CLUSTER=... CONFIG=... RUN=...
	@$(PY) -m slurm.fetch $(cluster) $(config) $(run) $(overrides)

doctor: login  ## look over cluster and run before submitting: CLUSTER=... CONFIG=... RUN=...
	@$(PY) -m slurm.doctor $(cluster) $(config) $(run) $(overrides)

submit-all: login  ## the whole run as dependent Slurm jobs: CLUSTER=... CONFIG=... RUN=..., DRY_RUN=1 to look first
	@$(PY) -m slurm.submit $(cluster) $(config) $(run) $(unit) $(dry) $(overrides)

$(SUBMIT): submit-%: login
	@$(PY) -m slurm.submit $(cluster) $(config) $(run) --phase $* $(unit) $(dry) $(overrides)

sbatch: login  ## write stand-alone scripts as a cluster's profile has them into outputs/sbatch/: CLUSTER=...
	@$(PY) -m slurm.sbatch $(cluster)

status: login  ## what is done, what runs, and why the rest is not: RUN=...
	@$(PY) -m slurm.status $(run) || test $$? -eq 1

watch: login  ## the run as it goes, in this terminal, local or on Slurm: RUN=...
	@$(PY) -m slurm.watch $(run) || test $$? -eq 1

verify: login  ## hash every published file of a run: RUN=...
	@$(PY) -m slurm.status $(run) --hashes

cancel: login  ## cancel a run's Slurm jobs, or one unit's: RUN=... UNIT=...
	@$(PY) -m slurm.status $(run) --cancel $(unit)

unlock: login  ## remove a run's locks that an owner on another host left behind: RUN=...
	@$(PY) -m slurm.lock $(run)

# Every phase up to select, and the report; what is done already is skipped.
probe-study: CONFIG := configs/probe-study.yaml
probe-study: RUN := outputs/probe-study
probe-study: setup  ## the causal probe on the shipped SARM and real data, replicated across data sets: DATA=folder (docs/probing.md)
	@test -n $(call arg,DATA) || { echo "error: give the folder of rewardbench2_safety/ and rmb_harmlessness/ as DATA=...; docs/probing.md says what they hold" >&2; exit 2; }
	@data=$$(realpath -- $(call arg,DATA)); for phase in fetch encode probe select report; do \
	  $(PY) -m jobs $$phase $(config) $(run) "data.sources.rb2.path=$$data/rewardbench2_safety" "data.sources.rmb.path=$$data/rmb_harmlessness" || exit $$?; \
	done

plan: login  ## memory, disk and GPU-hours of PPO, and how it would be cut: CONFIG=... GPUS=4x80
	@$(PY) -m sarm.ppo.learner.memory_plan --config $(if $(OWN),$(call quoted,$(call given,RUN)/config.yaml),$(call arg,CONFIG)) --gpus $(call arg,GPUS) $(overrides)

compare: setup  ## runs side by side, text and HTML: RUNS="outputs/a outputs/b" OUT=outputs/compare
	@$(PY) -m reports.compare $(call listed,RUNS) --out $(call arg,OUT)

train-sarm: setup  ## train a SARM: CONFIG=configs/train-smollm2.yaml RUN=outputs/train
	@$(PY) -m jobs train_sarm $(config) $(run) $(overrides)

export: setup  ## a run's SAE and latents for SAELens, delphi and upstream's scripts: RUN=...
	@$(PY) -m jobs export $(run)

# Only what was given: a run has a config of its own, and a config may do without a run.
serve-reward: setup  ## the compound reward over HTTP, for TRL, OpenRLHF and verl: RUN=... or CONFIG=... (docs/other-trainers.md)
	@$(PY) -m serving $(if $(filter command environment,$(firstword $(origin CONFIG))),--config $(call arg,CONFIG)) $(if $(call given,RUN),--run $(call arg,RUN)) $(overrides)

# Bytecode is kept whatever the shell says: else each worker, and each process that a test starts, compiles everything again.
test test-slow: export PYTHONDONTWRITEBYTECODE :=
# A worker takes whole files, so that what their tests share is made once, in the order of the folders: otherwise files of
# few but long tests come last. One worker more than cores, up to 8: tests that wait for processes leave a core idle.
test: setup  ## the fast tests: no root, Slurm, Apptainer, network or GPU
	$(PY) -m pytest -n $$(n=$$(nproc); echo $$((n < 8 ? n + 1 : 8))) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slow: setup  ## the slow tests
	$(PY) -m pytest -m "slow and not gpu and not cluster and not docs" $(PYTEST_ARGS)

test-browser: setup  ## the report's pages in headless Chromium: apt-get install chromium chromium-driver
	$(PY) -m pytest -m browser $(PYTEST_ARGS)

test-docs: setup  ## the commands of README and docs, on a tiny run
	$(PY) -m pytest -m docs $(PYTEST_ARGS)

check: setup  ## lint, types, import rules
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	@echo "check: lint, format, types and import rules hold"

format: setup  ## fix what ruff can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	@echo "format: done; git diff shows what changed, make check what is left"

bench: setup  ## speed and memory, each a ratio against a named peer or a limit in one run
	$(PY) benchmarks/scoring.py
	$(PY) benchmarks/effects.py
	$(PY) benchmarks/probe.py $(if $(shell command -v nvidia-smi),,--d-sae 4608 --d-in 576 --k 64 --texts 64 --prompts 100 --permutations 20000)
	$(PY) benchmarks/report.py
	@echo "bench: done; each figure stands above beside its peer or limit"

mutants: setup  ## which one-line faults the tests let through: PATHS="sarm/ppo/losses.py", or a sample of 1,000 over all; JOBS=8
	@test -e $(VENV)/mutmut/.installed || { rm -rf $(VENV)/mutmut; $(PY) -m pip install -q --disable-pip-version-check --no-deps --require-hashes --target $(VENV)/mutmut -r requirements/mutants.lock; touch $(VENV)/mutmut/.installed; }
	@$(PY) tests/mutants.py --mutmut $(VENV)/mutmut $(if $(JOBS),--jobs $(call arg,JOBS)) $(call listed,PATHS)

lock:  ## update the pinned versions within pyproject.toml's ranges; needs uv, and UV_FIND_LINKS at a folder or page with a CPU build of torch
	uv pip compile -q pyproject.toml --extra light --extra report --extra full --extra serve --extra dev -c requirements/constraints.txt --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-package torch -o requirements/cpu.lock
	uv pip compile -q pyproject.toml --extra light --extra report --extra full --extra serve -c requirements/constraints.txt -c requirements/cpu.lock --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate --no-emit-package torch -o requirements/cpu-image.lock
	env -u UV_FIND_LINKS uv pip compile -q pyproject.toml --extra light --extra report --extra full --extra serve -c requirements/constraints.txt --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate -o requirements/cuda.lock
	uv pip compile -q pyproject.toml --extra light --python-version 3.11 --generate-hashes --no-header --no-annotate -o requirements/light.lock
	uv pip compile -q pyproject.toml --extra light --extra report --python-version 3.11 --generate-hashes --no-header --no-annotate -o requirements/report.lock
	uv pip compile -q pyproject.toml --extra mutants -c requirements/cpu.lock --python-version 3.11 --generate-hashes --no-header --no-annotate -o requirements/mutants.lock
	@echo "lock: requirements/*.lock are updated; git diff shows what changed, make setup installs it"

clean:  ## remove the environment and caches, never outputs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	@echo "clean: the environment and caches are gone, outputs/ stands"

include tests/cluster/cluster.mk
