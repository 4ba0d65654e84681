# What CI runs is what a developer runs. Everything installs into .venv, from nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SCALE ?= mini
HARDWARE ?=
RUNS ?= results/runs
MINUTES ?= 9
OUT ?= results/gpu
SUFFIX := $(if $(filter full,$(SCALE)),,_mini)
ifeq ($(filter $(SCALE),mini full),)
$(error SCALE=$(SCALE) is not known: choose mini or full)
endif
SHALLOW := bert$(SUFFIX)_shallow
comma := ,
CONTROLS := method=fitted$(comma)mat_equal
ON := $(if $(HARDWARE),hardware=$(HARDWARE))

.DEFAULT_GOAL := help
.PHONY: help demo test lint table1 table1-controls table2 table3 tables claims figures report bench gpu lowest robust clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

$(VENV)/installed: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(VENV)/installed ## four methods on a mini BERT over prose that ships with Python: table and loss curves, minutes
	$(RUN) launch.py -m name=demo method=baseline,rand,multirate,mat
	$(RUN) -m results.demo

test: $(VENV)/installed lint ## lint, types and tests
	$(RUN) -m pytest

lint: $(VENV)/installed ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Of an experiment, and, with a second argument, of rows that its sweep does not have.
define train-and-show
	$(RUN) launch.py -m +experiment=$(1) runs=$(RUNS) $(ON)
	$(if $(2),$(RUN) launch.py -m +experiment=$(1) runs=$(RUNS) $(ON) $(2))
	$(RUN) -m results.tables $(1) --runs $(RUNS)
	$(RUN) -m results.curves $(1) --runs $(RUNS)
endef

table1: $(VENV)/installed ## train BERT on WikiText-2 with the four methods, then Table 1 (SCALE=mini or full)
	$(call train-and-show,table1$(SUFFIX),model=$(SHALLOW) method=baseline)

table1-controls: table1 ## the controls beside Table 1, then their table (SCALE=mini or full)
	$(call train-and-show,table1_controls$(SUFFIX),model=$(SHALLOW) method=fitted)

table2: $(VENV)/installed ## train Switch on WikiText-103 (mini: enwiki2015) with the four methods and two controls, then Table 2
	$(call train-and-show,table2$(SUFFIX),$(CONTROLS))

table3: $(VENV)/installed ## train VGG16 on CIFAR-10 with the four methods and two controls, then Table 3
	$(call train-and-show,table3$(SUFFIX),$(CONTROLS))

tables: $(VENV)/installed ## every table whose runs are there
	$(RUN) -m results.tables all --runs $(RUNS)

claims: $(VENV)/installed ## every claim of the paper and of the controls, with its interval and verdict
	$(RUN) -m results.claims --runs $(RUNS)
	$(RUN) -m results.alpha --runs $(RUNS)

figures: $(VENV)/installed ## the runs behind Figures 1 to 5 (complete ones are skipped), then the figures (SCALE=mini or full)
	for n in 1 2 3 4 5; do $(RUN) launch.py -m +experiment=figure$$n$(SUFFIX) runs=$(RUNS) $(ON) || exit; done
	$(RUN) -m results.figures all --suffix=$(SUFFIX) --runs $(RUNS)

report: $(VENV)/installed ## results/report.html: every run in one page that opens without a network
	$(RUN) -m results.report --runs $(RUNS)

bench: $(VENV)/installed ## time the dense step, the gates and the estimator against their peers
	$(RUN) -m benchmarks.step
	$(RUN) -m benchmarks.switch
	$(RUN) -m benchmarks.vgg
	$(RUN) -m benchmarks.gates
	$(RUN) -m benchmarks.peers
	$(RUN) -m benchmarks.fidelity
	$(RUN) -m benchmarks.scaling
	$(RUN) -m benchmarks.compiled
	$(RUN) -m benchmarks.attach

gpu: $(VENV)/installed ## what needs a CUDA device, as far as MINUTES go; call it again until all is done
	$(RUN) -m benchmarks.gpu --minutes $(MINUTES) --out $(OUT)

lowest: ## the lowest declared versions together, in an environment of their own: a short run
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m tests.lowest | xargs .venv-lowest/bin/python -m pip install --quiet
	.venv-lowest/bin/python launch.py runs=.venv-lowest/runs train.pflops=2e-4 train.marks=[]
	.venv-lowest/bin/python -m mat.show .venv-lowest/runs

robust: $(VENV)/installed ## 60 bad configurations and 60 damaged run folders: told in one sentence, or right
	$(RUN) -m tests.robust

clean: ## remove smoke runs and caches; results stay
	rm -rf runs .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
