# Two commands do everything on a machine with Python 3.11 or newer and make:
#   make lab    install, fetch the default model, open the course
#   make test   install, then run all tests and all notebooks
.PHONY: lab test fast browser notebooks lint clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHROMIUM := $(or $(wildcard /usr/bin/chromium),$(VENV)/.chromium)

lab: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/qlora-lab open

test: $(READY) $(CHROMIUM)
	$(BIN)/python tools/notebooks.py --check
	$(BIN)/pytest tests qlora_lab --ignore=tests/browser -m "not slow"
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/pytest tests --ignore=tests/browser -m slow
	$(BIN)/pytest tests/browser --browser-runs 5
	$(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout=1200 --nbval-sanitize-with=nbval_sanitize.cfg notebooks

fast: $(READY)
	$(BIN)/pytest tests qlora_lab --ignore=tests/browser -m "not slow"

# run every notebook top to bottom and store its outputs; a second run changes no file
notebooks: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/python tools/notebooks.py
	$(BIN)/python -c "import qlora_lab as ql; open('notebooks/explorer.png', 'wb').write(ql.NormalFloatExplorer().png)"

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# one file says that the environment is complete; it is older than what it was made from when that has changed
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	$(BIN)/python -c "import matplotlib.font_manager"
	touch $@

# the browser tests use Debian's Chromium; where it may not be installed they are skipped, and say so
$(CHROMIUM): | $(READY)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	else \
		echo "Chromium is not installed, so the browser tests are skipped: sudo apt-get install chromium"; \
	fi
	@touch $(VENV)/.chromium

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
