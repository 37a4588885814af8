# Two commands for a newcomer: `make demo` and `make test`. Both make the environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO := save/demo
# One test process a core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: demo test test-all lint format table tables clean

.venv/.ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/.ready
	$(BIN)/python train_backdoor_cifar.py --dataset synthetic --widen-factor 0.125 --epoch 12 --batch-size 64 \
		--lr-schedule one-cycle --poison-rate 0.1 --threads 1 --output-dir $(DEMO) --overwrite
	$(BIN)/python optimize_mask_cifar.py --output-dir $(DEMO) --checkpoint $(DEMO)/last_model.th \
		--trigger-info $(DEMO)/trigger_info.th --val-frac 0.05 --nb-iter 500 --print-every 100 --threads 1 --overwrite
	$(BIN)/python prune_neuron_cifar.py --output-dir $(DEMO) --mask-file $(DEMO)/mask_values.txt --val-frac 0.05 \
		--checkpoint $(DEMO)/last_model.th --trigger-info $(DEMO)/trigger_info.th --max-acc-drop 1 --threads 1 --overwrite
	@ls $(DEMO)/*.png $(DEMO)/*.pdf

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m benchmarks.tables --check

tables: .venv/.ready
	$(BIN)/python -m benchmarks.tables

.venv/.tables: .venv/.ready requirements-tables.txt
	$(BIN)/python -m pip install --quiet -r requirements-tables.txt
	touch $@

table: .venv/.tables
	$(BIN)/python -m tables $(or $(TABLE),$(error which? make table TABLE=tables/main.yaml)) $(OPTIONS)

format: .venv/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(DEMO)
