# Two environments, both pinned by constraints.txt: the demo's holds what a user installs and nothing else,
# so that a development tool can never stand in for a missing dependency.
PYTHON ?= python3
SHELL := /bin/bash
RUNS ?= runs

.PHONY: demo test test-all check browser bench models results example-report docs clean
.DELETE_ON_ERROR:

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt torch==2.13.0 -e '.[lab]'
	touch $@

.venv-dev/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-dev
	.venv-dev/bin/python -m pip install -q -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

demo: .venv/ready  ## compare no mixup, input mixup and manifold mixup on the spiral and on handwritten digits
	.venv/bin/manifold-mixup demo --runs $(RUNS)

test: .venv-dev/ready check browser  ## what must pass before a change lands
	.venv-dev/bin/python -m pytest -n 2 --dist loadfile

test-all: .venv-dev/ready check browser  ## the slow tests too
	.venv-dev/bin/python -m pytest -n 2 --dist loadfile -m ''

check: .venv-dev/ready
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/mypy

browser: .venv-dev/ready  ## a browser for the tests of the report: one that is there, or else one that is installed
	.venv-dev/bin/python tests/browser/install.py

bench: .venv-dev/ready
	.venv-dev/bin/python benchmarks/interpolation.py
	.venv-dev/bin/python benchmarks/import_time.py
	.venv-dev/bin/python benchmarks/discovery.py
	.venv-dev/bin/python benchmarks/compiled_op.py
	.venv-dev/bin/python benchmarks/step_overhead.py
	.venv-dev/bin/python benchmarks/peers.py
	.venv-dev/bin/python benchmarks/training.py
	.venv-dev/bin/python benchmarks/report_page.py
	.venv-dev/bin/python benchmarks/graphs.py

docs: .venv-dev/ready  ## the documentation site, in dist/site; make test builds it as well, and runs what it shows
	NO_MKDOCS_2_WARNING=1 .venv-dev/bin/mkdocs build --strict

results: .venv-dev/ready  ## every page and table of docs/results, and those of README.md, from the committed records
	.venv-dev/bin/python docs/results/tables.py
	.venv-dev/bin/python docs/results/studies.py
	.venv-dev/bin/python docs/results/overhead.py
	.venv-dev/bin/python docs/results/training_speed.py
	.venv-dev/bin/python docs/results/families.py --page

example-report: browser  ## the page of the demo in docs/example-report, and its picture in README.md
	.venv-dev/bin/python docs/example-report/make.py --runs $(RUNS)

models: .venv-dev/ready  ## one network of every family of timm: S, exactness and cost, and the table in docs/results
	.venv-dev/bin/python docs/results/families.py --runs $(RUNS)

clean:
	rm -rf .venv .venv-dev dist
