# Every target makes what it needs: `make` in a fresh clone installs the pinned packages into
# .venv, once. After that only `make assets` and BDUTILS_SCALE=full use the network.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help book pdf slides check test colab serve edit notebooks export assets course lint vendor clean

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
COURSE ?= _build/course
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
HTML := _build/html
COLAB := .colab/.installed
CHAPTERS ?=
MATHJAX_SHA256 := 1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09
REVEAL_SHA256 := 359b575dd51bbda32f89b2fd4c7dc46ad7389a805572158916c29252f7a27333
TABLES_SHA256 := 91e723ac9ef91e729e38ebe60872f0bbc82f93c3a937f731040c426645b3d471

export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What is stored in the chapters and what is tested is scale `small`, with nothing from the hub.
check test notebooks colab: export BDUTILS_SCALE := small
check test: export HF_HUB_OFFLINE := 1

LINT := $(BIN)/ruff check .
# Which module may import which: the contracts of pyproject.toml.
WALLS := $(BIN)/lint-imports
TYPES := $(BIN)/mypy
# A Jupyter Book of another version can exit 0 and write nothing: look for the page.
BUILD := $(BIN)/jupyter-book build -W -n --keep-going . && test -s $(HTML)/index.html

# $(call step,NAME,COMMAND) runs COMMAND, prints its wall time and keeps its exit status.
define step
@printf '\n=== %s\n' '$(1)'; start=$$(date +%s); \
if $(2); then result=passed; else result=FAILED; fi; \
printf '=== %s: %s in %d s\n' '$(1)' "$$result" "$$(( $$(date +%s) - start ))"; \
test "$$result" = passed
endef

help:  ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch goes first and alone, so that pip takes the pinned build and looks for no other.
$(STAMP): requirements.txt constraints.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -r requirements.txt -c constraints.txt
	$(PY) -m pip install -q --no-deps -e .
	@touch $@

book: $(STAMP) vendor  ## build the pages from the stored outputs
	$(BUILD)
	@echo "The book is ready: open $(CURDIR)/$(HTML)/index.html or run 'make serve'."

slides: $(STAMP) vendor  ## cut slides from the chapters; 'make book' then takes them along
	$(PY) -m tools.slides

pdf: $(STAMP)  ## make the book as a PDF; needs LaTeX, see CONTRIBUTING.md
	@command -v latexmk > /dev/null || { echo "LaTeX is missing: see CONTRIBUTING.md."; exit 1; }
	$(BIN)/jupyter-book build --builder latex .
	$(MAKE) -C _build/latex LATEXMKOPTS="-interaction=nonstopmode -halt-on-error -silent"
	@echo "The book is ready: $(CURDIR)/_build/latex/book.pdf"

# No browser, no chapter, nothing that must run alone or takes more than seconds.
check: $(STAMP)  ## the quick checks, in two minutes: style, imports, package, tests of seconds
	$(call step,style and types,$(LINT) && $(WALLS) && $(TYPES))
	$(call step,chapters and package in step,$(PY) -m tools.book check)
	$(call step,model and data,$(PY) -m bdutils.assets)
	$(call step,quick tests,$(PY) -m pytest tests -q -n 2 --dist loadfile -m "not alone and not slow" --ignore tests/test_browser.py)

# The pages come first, as some tests read them, and anew: a warning that an earlier build printed is
# not repeated by a later one. What runs alone comes last, and finds the chapters' models trained.
test: $(STAMP) vendor  ## check everything: code, chapters, stored outputs, pages
	$(call step,style and types,$(LINT) && $(WALLS) && $(TYPES))
	$(call step,chapters and package in step,$(PY) -m tools.book check)
	$(call step,book,rm -rf $(HTML) _build/.doctrees && $(BUILD))
	$(call step,model and data,$(PY) -m bdutils.assets)
	$(call step,tests,$(PY) -m pytest tests -q -n 2 --dist loadfile -m "not alone")
	$(call step,stored outputs,OMP_NUM_THREADS=1 $(PY) -m pytest --nbval chapters -n 2 --dist loadscope -q)
	$(call step,tests one at a time,$(PY) -m pytest tests -q -m alone)

# The packages of Colab in an environment of their own: about 6 GB, since torch comes with CUDA.
$(COLAB): tools/colab/colab.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q -r $<
	@touch $@

colab: $(COLAB)  ## run chapters with Colab's versions; CHAPTERS="01 09" takes some of them
	$(dir $(COLAB))bin/python -m tools.colab.run $(CHAPTERS)

# $(call fetched,NAME,VERSION,SHA256,FILE,PARTS,LOSS) unpacks PARTS of a pinned npm package, of
# which FILE is one, unless it is there. Without npm the book is built all the same.
define fetched
@if [ ! -s vendor/_static/vendor/$(1)/$(4) ] && command -v npm > /dev/null; then \
  rm -rf vendor/.npm vendor/_static/vendor/$(1); mkdir -p vendor/.npm vendor/_static/vendor; \
  (cd vendor/.npm && npm pack --silent $(1)@$(2) > /dev/null \
    && echo "$(3)  $(1)-$(2).tgz" | sha256sum --check --quiet \
    && tar xzf $(1)-$(2).tgz $(addprefix package/,LICENSE $(5)) \
    && mv package ../_static/vendor/$(1)) || echo "$(1) could not be fetched: $(6)"; \
  rm -rf vendor/.npm; \
fi
endef

vendor:  ## fetch pinned scripts, so that the pages work offline
	$(call fetched,mathjax,3.2.2,$(MATHJAX_SHA256),es5/tex-mml-chtml.js,$(addprefix es5/,tex-mml-chtml.js output/chtml/fonts input/tex/extensions),formulas will need a network)
	$(call fetched,simple-datatables,10.3.0,$(TABLES_SHA256),dist/umd/simple-datatables.js,dist/umd dist/style.css,tables will not be sortable)
	$(call fetched,reveal.js,5.2.1,$(REVEAL_SHA256),dist/reveal.js,dist/reset.css dist/reveal.css dist/reveal.js plugin/notes/notes.js,there will be no slides)

serve: $(STAMP)  ## show the built book at http://127.0.0.1:8000
	@test -s $(HTML)/index.html || { echo "There is no book yet: run 'make book' first."; exit 1; }
	@echo "The book is at http://127.0.0.1:$(PORT) (stop with Ctrl+C)."
	@$(PY) -m http.server $(PORT) --bind 127.0.0.1 --directory $(HTML)

edit: $(STAMP)  ## open the chapters in JupyterLab
	$(BIN)/jupyter lab chapters

notebooks: $(STAMP)  ## run every chapter again and store its outputs
	$(PY) -m tools.book execute

export: $(STAMP)  ## copy the cells marked '#| export' into bdutils, and the chapters into colab
	$(PY) -m tools.book export

assets: $(STAMP)  ## fetch the model and the data into the cache
	$(PY) -m bdutils.assets

course: $(STAMP)  ## build the exercise sheets into COURSE, for nbgrader
	$(PY) -m tools.course '$(COURSE)'

lint: $(STAMP)  ## check the style of the code, its imports and its types
	$(LINT)
	$(WALLS)
	$(TYPES)

clean:  ## remove what was built; the cache of models and data, .venv and .colab stay
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find bdutils tools benchmarks tests chapters -name __pycache__ -type d -prune -exec rm -rf {} +
