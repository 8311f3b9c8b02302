# `make book` and `make test` are all that a fresh machine needs; `make help` lists the rest.
# uv is used where it is installed, otherwise venv and pip.

PYTHON  ?= python3
VENV    ?= .venv
PROFILE ?= cpu
ONLY    ?=
WORKERS ?= 2
PORT    ?= 8000
ARGS    ?=

BIN := $(VENV)/bin
UV  ?= $(shell command -v uv 2>/dev/null)
# Two cores are shared by two test processes; more threads only get in each other's way.
QUIET := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
# glibc gives large tensors back to the system at once, and every step begins with new pages: a fifth
# to a third of the time of small networks, more when two processes share a machine.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
BOOK_SOURCES := _config.yml _toc.yml $(shell find book chapters src/advlearn data/results data/checkpoints -type f \
	-not -path '*/.ipynb_checkpoints/*' -not -path '*/__pycache__/*' 2>/dev/null)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book test test-browser run reference sweep stamp lab serve bench links clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | \
		awk -F ':.*## ' '{ printf "make %-13s %s\n", $$1, $$2 }'

book: _build/.book ## build the web book into _build/html from the stored outputs
	@echo "The book is in _build/html/index.html"

test: $(VENV)/.dev ## all tests, offline, on the embedded data (ARGS="-k fgsm" for some)
	$(QUIET) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

test-browser: $(VENV)/.dev _build/.book ## the book in a real headless Chromium, where there is one
	$(BIN)/python -m pytest -m browser $(ARGS)

run: $(VENV)/.dev ## run the chapters: PROFILE=smoke|cpu|gpu|paper, ONLY=01
	$(BIN)/python tools/run.py --profile $(PROFILE) --only '$(ONLY)' $(ARGS)

reference: $(VENV)/.dev ## run the chapters and store their outputs in chapters/
	$(BIN)/python tools/run.py --profile $(PROFILE) --only '$(ONLY)' --reference $(ARGS)

sweep: $(VENV)/.dev ## run the grids in sweeps/, or go on with them: PROFILE=cpu, ONLY=05, WORKERS=2
	$(BIN)/python tools/sweep.py --profile $(PROFILE) --only '$(ONLY)' --workers $(WORKERS) $(ARGS)

stamp: $(BIN)/python ## carry address and version from pyproject.toml to every place
	$(BIN)/python tools/stamp.py

lab: $(VENV)/.dev ## open the chapters in JupyterLab
	$(BIN)/jupyter lab chapters

serve: book ## show the built book on http://localhost:8000 (PORT=)
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

bench: $(VENV)-bench/.done ## speed of the attacks beside other libraries
	$(VENV)-bench/bin/python bench/run.py $(ARGS)

links: $(VENV)/.book ## check the external links of the book (needs the network)
	$(BIN)/jupyter-book build . --builder linkcheck

clean: ## remove what was built; environments and downloads stay
	rm -rf _build dist .pytest_cache .ruff_cache .hypothesis
	find src tests tools bench book -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Sphinx repeats no warning for a page it has already read: after a failure, read all of them again.
_build/.book: $(BOOK_SOURCES) $(VENV)/.book _build/.extensions
	$(BIN)/jupyter-book build . -W -n --keep-going || { rm -rf _build/.doctrees; exit 1; }
	@touch $@

# Nor does it read a page again, or copy a style, because only an extension or a style has changed.
_build/.extensions: $(wildcard book/_ext/*.py) $(shell find book/_static -type f 2>/dev/null)
	@rm -rf _build/.doctrees
	@mkdir -p _build
	@touch $@

# --- environments -----------------------------------------------------------------------------

ifneq ($(UV),)
install = $(UV) pip install --python $(1)/bin/python
else
install = $(1)/bin/python -m pip --disable-pip-version-check install
endif

$(BIN)/python:
ifneq ($(UV),)
	$(UV) venv --clear --python "$$($(PYTHON) -c \
		'import sys; print(sys.executable if sys.version_info >= (3, 10) else ">=3.10")' || echo ">=3.10")" $(VENV)
else
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo \
		"Python 3.10 or newer is needed, and '$(PYTHON)' is not. Install one, or name it:" \
		"make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
		"'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu:" \
		"sudo apt-get install python3-venv. Or install uv." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
endif

# Only what builds the book; no torch, so that reading it takes no gigabytes.
$(VENV)/.book: pyproject.toml tools/requirements.py | $(BIN)/python
	@test -n "$(UV)" || $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python tools/requirements.py book > $@.txt
	$(call install,$(VENV)) -r $@.txt
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.book
	$(call install,$(VENV)) -e '.[book,dev]'
	@touch $@

# The peers' pins clash with each other and with the book, so they are installed without their
# dependencies, in an environment of their own that sees the book's packages but cannot change them.
# One that cannot be installed is left out.
$(VENV)-bench/.done: bench/requirements.txt $(VENV)/.dev
	$(BIN)/python -m venv --clear --without-pip $(VENV)-bench
	$(BIN)/python -c "import glob, sysconfig; \
		folder, = glob.glob('$(VENV)-bench/lib/python3*/site-packages'); \
		here = sysconfig.get_path('purelib'); \
		open(folder + '/book.pth', 'w').write(f'import site; site.addsitedir({here!r})\n')"
	grep -v '^ *\(#\|$$\)' bench/requirements.txt | while read -r peer; do \
		$(call install,$(VENV)-bench) --no-deps "$$peer" || echo "left out: $$peer" >&2; done
	@touch $@
