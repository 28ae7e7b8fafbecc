# make demo    two sites on this machine, one guest, migrated plain and gated, with a report
# make test    everything: linters, unit tests, and real libvirt where this is root
# make lint    ruff, mypy --strict, import-linter
# make bench   the figures of the papers, measured here
# make fuzz    the tracker against hostile bytes, FUZZ_S seconds for each target
# make nova    Nova's package in .venv-nova, for the tests of its driver
# Each installs what is missing first (tools/setup).

PYTEST_FLAGS ?=
FUZZ_S ?= 120
FUZZ_TARGETS ?= frames capture definition pattern state tracker blocks waiting

.PHONY: setup lint test unit demo bench nova fuzz clean

setup:
	@tools/setup

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

unit: setup
	.venv/bin/pytest -m "not lab" $(PYTEST_FLAGS)

test: lint nova
	.venv/bin/pytest $(PYTEST_FLAGS)

demo: setup
	.venv/bin/virtgrid lab demo

bench: setup
	.venv/bin/virtgrid bench hold
	.venv/bin/virtgrid bench migrate
	.venv/bin/virtgrid bench protocols
	.venv/bin/virtgrid bench tracker
	.venv/bin/virtgrid bench sandbox
	.venv/bin/virtgrid bench network
	.venv/bin/virtgrid bench grid

# Nova and its 150 packages, in an environment of their own, with our wheel beside them as operators have it.
nova: setup
	UV_PROJECT_ENVIRONMENT=.venv-nova UV_PYTHON_DOWNLOADS=never \
	    .venv-uv/bin/uv sync --quiet --frozen --no-dev --no-editable --reinstall-package virtgrid --extra nova \
	    --python /usr/bin/python3

# In an environment of its own: nothing else needs atheris.
fuzz: setup
	UV_PROJECT_ENVIRONMENT=.venv-fuzz UV_PYTHON_DOWNLOADS=never \
	    .venv-uv/bin/uv sync --quiet --frozen --no-dev --group fuzz --python /usr/bin/python3
	set -e; for target in $(FUZZ_TARGETS); do .venv-fuzz/bin/python tests/fuzz/run.py $$target $(FUZZ_S); done

clean:
	rm -rf .venv .venv-uv .venv-fuzz .venv-nova .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
