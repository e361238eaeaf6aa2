# Two commands do everything on a machine with Python 3.11 or newer and make:
#   make lab    install, fetch the default model, open the course
#   make test   install, then run all tests and all notebooks
.PHONY: lab test fast notebooks bench bench-gpu lint clean chromium

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# two workers with a thread each are faster than one with two; tests of several threads set their number themselves
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --ignore=tests/browser -n 2

lab: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/qlora-lab open

test: $(READY) chromium
	$(BIN)/python tools/notebooks.py --check
	$(PYTEST) tests qlora_lab -m "not slow"
	$(BIN)/qlora-lab fetch smollm2-135m
	$(PYTEST) tests -m slow
	$(BIN)/pytest tests/browser --browser-runs 2
	$(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout=1200 --nbval-sanitize-with=nbval_sanitize.cfg notebooks

fast: $(READY)
	$(PYTEST) tests qlora_lab -m "not slow"

# run every notebook top to bottom and store its outputs; a second run changes no file
notebooks: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/python tools/notebooks.py
	$(BIN)/python -c "import qlora_lab as ql; open('notebooks/explorer.png', 'wb').write(ql.NormalFloatExplorer().png)"

# speed beside bitsandbytes and torchao on this machine: bench/cpu.json, its picture, the README's section.
# torchao lies apart: where it is installed, transformers imports it, and notebooks print its warnings
bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/bench torchao
	PYTHONPATH=$(VENV)/bench $(BIN)/python bench/cpu.py

# the same on a GPU, checked first: bench/gpu-<device>.json and the table of bench/README.md
bench-gpu: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/bench torchao
	PYTHONPATH=$(VENV)/bench $(BIN)/python bench/gpu.py

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# .ready says that the environment is complete; it is made again when what it was made from has changed
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "the venv module is incomplete; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -c "import matplotlib.font_manager"
	touch $@

# the browser tests use Debian's Chromium; where it cannot be installed they are skipped, and say so
chromium: | $(READY)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
		echo "Chromium is not installed, so the browser tests are skipped: sudo apt-get install chromium"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
