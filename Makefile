# Everything here sets itself up: `make demo` and `make test` work on a fresh clone, in any order.
PYTHON ?= python3
UV_VERSION := 0.13.9
MUTMUT_VERSION := 3.8.1
VENV := .venv
RUN := $(VENV)/bin/python
COMPILE := $(VENV)/bin/uv pip compile pyproject.toml --extra tools --extra gateway --extra s3 --universal --python-version 3.11 \
	--no-emit-index-url --no-header --no-annotate
INSTALLED := $(VENV)/.installed

# Every process of the demo and the tests imports torch and FastVideo: twice as long where nobody may keep the bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve demo test lint unit mutants lock clean

serve: $(INSTALLED)  ## frontend, worker and gateway, and the page at http://127.0.0.1:8080; Ctrl-C ends all of it
	$(RUN) -m ltx2_pool.programs.serve

demo: $(INSTALLED)  ## four videos through the real frontend, a table and a contact sheet
	$(RUN) -m ltx2_pool.programs.demo

# On a busy machine a real process may miss a deadline of its test: what failed beside others is run once more, alone, and said.
test: $(INSTALLED) lint  ## the whole suite, two files of tests at a time
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder || { echo 'once more, alone, what failed:' && $(RUN) -m pytest --last-failed --last-failed-no-failures none; }

unit: $(INSTALLED)  ## only what needs no FastVideo
	$(RUN) -m pytest tests/unit --numprocesses 2 --dist loadfile

mutants: $(INSTALLED)  ## changes the core in small ways (.work/mutants), and lists those that no test notices; minutes
	rm -rf .work/mutants && mkdir -p .work/mutants && cp -r ltx2_pool tests pyproject.toml shapes.yaml .work/mutants
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/uv pip install --quiet --constraint requirements-dev.lock mutmut==$(MUTMUT_VERSION)
	cd .work/mutants && LTX2_TEST_HISTORIES=60 PYTHONPATH= $(abspath $(VENV))/bin/mutmut run --max-children 2
	cd .work/mutants && $(abspath $(VENV))/bin/mutmut results

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/vulture

lock: $(VENV)/.uv  ## resolve pyproject.toml into requirements.lock (the image's) and requirements-dev.lock (that, and the tools)
	$(COMPILE) --output-file requirements.lock
	$(COMPILE) --group dev --constraint requirements.lock --output-file requirements-dev.lock

$(VENV)/.uv:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	touch $@

$(INSTALLED): $(VENV)/.uv requirements-dev.lock pyproject.toml
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/uv pip install --quiet --no-deps -r requirements-dev.lock
	VIRTUAL_ENV=$(abspath $(VENV)) $(VENV)/bin/uv pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) .work demo-out image-out load-out build dist *.egg-info
