# Two commands do everything on a machine with Python 3.11 or newer and make:
#   make lab    install, fetch the default model, open the course
#   make test   install, then run all tests and all notebooks
.PHONY: lab test fast trust notebooks bench bench-gpu lint clean chromium

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

lab: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/qlora-lab open

# every stage runs, whichever fails; `make test STAGES="fast slow"` runs these
test: $(READY) chromium
	$(BIN)/python tools/stages.py $(STAGES)

fast: $(READY)
	$(BIN)/python tools/stages.py fast

# kills, failing disks, rivals and damaged files by numbers (docs/trust.md); less than 15 minutes
trust: $(READY)
	$(BIN)/python tools/trust.py

# run every notebook top to bottom and store its outputs; a second run changes no file
notebooks: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/python tools/notebooks.py
	$(BIN)/python -c "from qlora_lab.show.normal_float import NormalFloatExplorer; open('notebooks/explorer.png', 'wb').write(NormalFloatExplorer().png)"

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
