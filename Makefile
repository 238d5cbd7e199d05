# `make quickstart` and `make test` do all the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
OUTPUT ?= output/quickstart
PY = .venv/bin/python
# Each worker is one torch thread, so that results do not depend on the machine's core count.
PYTEST = $(PY) -m pytest -n $(TEST_WORKERS) --dist worksteal
TEST_WORKERS ?= 2
SCENES_TIME = about 45 minutes on 2 CPU cores (the sum of its parts)
QUICKSTART_TIME = 3 to 5 minutes on 2 CPU cores, after the installation
TEST_TIME = 3 to 5 minutes on 2 CPU cores, after the installation

VERSIONS_TIME = 10 to 30 minutes on 2 CPU cores, and 14 GB of disk
# For a Python that is not on the PATH: make test-versions PYTHON313=/path/to/python3.13
PYTHON313 ?= python3.13

.PHONY: help demo quickstart quickstart-time scenes test test-time test-long test-all test-versions lint clean

help:
	@echo "make quickstart  Install, pretrain on 4,000 digits that come with a package, evaluate, draw."
	@echo "                 Takes $(QUICKSTART_TIME)."
	@echo "make demo        Install, then start a page on this machine that shows what a model sees in"
	@echo "                 photographs. Flags of tools/demo.py: make demo DEMO='--model_path FILE'."
	@echo "make scenes      Segment and detect digits in scenes made of them. Takes $(SCENES_TIME)."
	@echo "make test        Install, then run the tests that a newcomer needs."
	@echo "                 Takes $(TEST_TIME)."
	@echo "make test-long   Run the long tests: real kills, several processes, real training."
	@echo "                 Takes 30 to 45 minutes."
	@echo "make test-all    Run both sets of tests."
	@echo "make test-versions  Run the newcomer's tests with the lowest versions and on Python 3.13."
	@echo "                 Downloads about 8 GB, takes $(VERSIONS_TIME)."
	@echo "make lint        Check style, formatting, types and the direction of imports."
	@echo "make clean       Remove the virtual environments, .venv and .venv-*."

# A first prerequisite, so that the time is said before the installation starts.
quickstart-time:
	@echo "This takes $(QUICKSTART_TIME)."

test-time:
	@echo "This takes $(TEST_TIME)."

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv

export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The stamps are written last: an interrupted installation starts again. torch and its libraries are
# gigabytes, so that installation shows pip's progress; the second one is small.
.venv/.run: requirements.txt pyproject.toml | .venv/bin/python
	$(PY) -m pip install -r requirements.txt
	@touch $@

.venv/.dev: requirements-dev.txt .venv/.run
	$(PY) -m pip install --quiet -r requirements-dev.txt
	@touch $@

# Each evaluation runs twice: with the pretrained weights, and with the same model untrained
# (for fine-tuning: trained from scratch).
WEIGHTS = $(OUTPUT)/pretrain/model.safetensors
KNN = $(PY) main_knn.py --config cfgs/quickstart/knn.yaml
LINCLS = $(PY) main_lincls.py --config cfgs/quickstart/lincls.yaml
FINETUNE = $(PY) main_finetune.py --config cfgs/quickstart/finetune.yaml
MAE_VIS = $(PY) tools/run_mae_vis.py --config cfgs/quickstart/pretrain.yaml
EXPLAIN = $(PY) tools/vit_explain.py --config cfgs/quickstart/finetune.yaml

quickstart: quickstart-time .venv/.run
	$(PY) main_pretrain.py --config cfgs/quickstart/pretrain.yaml --output_dir $(OUTPUT)/pretrain
	$(KNN) --finetune $(WEIGHTS) --output_dir $(OUTPUT)/knn
	$(KNN) --finetune random --class_tokens 1 --output_dir $(OUTPUT)/knn_untrained
	$(LINCLS) --finetune $(WEIGHTS) --output_dir $(OUTPUT)/lincls
	$(LINCLS) --finetune random --class_tokens 1 --output_dir $(OUTPUT)/lincls_untrained
	$(FINETUNE) --finetune $(WEIGHTS) --output_dir $(OUTPUT)/finetune
	$(FINETUNE) --class_tokens 1 --layer_decay 1 --output_dir $(OUTPUT)/finetune_untrained
	$(PY) tools/results_table.py $(OUTPUT)
	$(MAE_VIS) --model_path $(WEIGHTS) --num_images 6 --save_path $(OUTPUT)/reconstructions
	$(EXPLAIN) --finetune $(OUTPUT)/finetune/model.safetensors --reader avg --num_images 6 --save_path $(OUTPUT)/rollout
	$(PY) tools/plot_run.py $(OUTPUT)/pretrain
	@printf '%s\n' '' 'Done. In $(OUTPUT) are, besides the weights and what the table above comes from:' \
	  '  pretrain/report.html      the pretraining: curves, pictures, settings' \
	  '  reconstructions/grid.png  what the model paints over the gaps' \
	  '  rollout/rollouts.png      where the fine-tuned classifier looks' \
	  'Next, pretrain on your own images, in any folder structure and without labels:' \
	  '  sh run_pretrain.sh --config cfgs/pretrain/Vit-S_100E_GAP.yaml --data_path FOLDER'

# Segmentation and detection of scenes that are composed from the same digits, each evaluation also
# with the same model untrained (for fine-tuning: trained from scratch).
SCENES ?= output/scenes
SCENE_WEIGHTS = --finetune $(SCENES)/pretrain/model.safetensors

scenes: .venv/.run
	$(PY) main_pretrain.py --config cfgs/scenes/pretrain.yaml --output_dir $(SCENES)/pretrain
	for stage in knn lincls; do \
	  run="$(PY) main_$$stage.py --config cfgs/scenes/$$stage.yaml --output_dir $(SCENES)/$$stage"; \
	  $$run $(SCENE_WEIGHTS) && $${run}_untrained --finetune random || exit 1; \
	done
	for task in segment detect; do \
	  run="$(PY) main_finetune.py --config cfgs/scenes/$$task.yaml --output_dir $(SCENES)/$$task"; \
	  $$run $(SCENE_WEIGHTS) && $${run}_untrained --layer_decay 1 || exit 1; \
	done
	$(PY) tools/results_table.py $(SCENES)

.venv/.demo: .venv/.run
	$(PY) -m pip install --quiet -e '.[demo]'
	@touch $@

demo: .venv/.demo
	$(PY) tools/demo.py $(DEMO)

test: test-time .venv/.dev
	$(PYTEST) -m "not long and not gpu"

test-long: .venv/.dev
	$(PYTEST) -m "long and not gpu"

test-all: .venv/.dev
	$(PYTEST) -m "not gpu"

# By hand only. Of each package in pyproject.toml the lowest version that it admits, and then the
# pinned set on the newest Python.
LOWEST = import tomllib; \
  project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*(name.split(",")[0].replace(">=", "==") + ".*" for name in project["dependencies"]))
NEWCOMER = -m pytest -n $(TEST_WORKERS) --dist worksteal -m "not long and not gpu"

.venv-torch29/.dev: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-torch29
	sed /^-r/d requirements-dev.txt > .venv-torch29/dev.txt
	.venv-torch29/bin/python -m pip install -r .venv-torch29/dev.txt -e . \
	  $$($(PYTHON) -c '$(LOWEST)')
	@touch $@

.venv-py313/.dev: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON313) -m venv --clear .venv-py313
	.venv-py313/bin/python -m pip install -r requirements-dev.txt
	@touch $@

test-versions:
	@echo "This downloads about 8 GB and takes $(VERSIONS_TIME)."
	$(MAKE) .venv-torch29/.dev
	.venv-torch29/bin/python $(NEWCOMER)
	@$(PYTHON313) --version > /dev/null 2>&1 \
	  || echo "Python 3.13 is not tried: $(PYTHON313) does not start; set PYTHON313 to one."
	@! $(PYTHON313) --version > /dev/null 2>&1 \
	  || { $(MAKE) .venv-py313/.dev && .venv-py313/bin/python $(NEWCOMER); }

lint: .venv/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo --no-cache

clean:
	rm -rf .venv .venv-torch29 .venv-py313
