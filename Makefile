# Everything happens in .venv, which is made on first use from the versions and hashes in requirements.lock and, for
# tests and lints, requirements-dev.lock.

PYTHON ?= python3
# PyTorch comes from pip's own index: for Linux on x86 that is the CUDA build. TORCH_INDEX names another index for it
# alone, such as one of CPU builds: make install TORCH_INDEX=https://...
# CUDA=1 takes it and what it needs from requirements-cuda.lock, by hashes; Linux on x86 alone.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
CUDA ?=
TRITON ?= triton==3.9.0

# What the commands import: Python writes their byte code once, here, instead of in the first run of each.
USED := import flows.pipeline, flows.stage_runner.run, mlflow.store.tracking.sqlalchemy_store, dvc.commands.repro, \
	prefect.server.api.server, matplotlib.pyplot, sklearn.datasets, cm_core.metrics.torchvision_shim as shim; \
	shim.ensure_torchvision(); import torch_fidelity.metrics

BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --quiet --no-compile # Python compiles a module when it is first used
BY_HASH := $(PIP_INSTALL) --no-deps --require-hashes
# Of make lock, audit and sbom; they stand outside .venv, whose packages they list.
UV := uv==0.13.8
AUDIT_TOOLS := pip-audit==2.10.1 cyclonedx-bom==7.5.0 pip-licenses==5.5.5
LOCKS := requirements.lock requirements-cuda.lock requirements-integrations.lock# of the image
INTEGRATIONS := prefect-docker==0.7.4 prefect-kubernetes==0.8.0
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help install demo repro ui doctor triton test test-all soak lint format docs lock images audit sbom

help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv; the other targets do it by themselves (3 minutes, 2 GB)

$(INSTALLED): requirements.lock requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "Making .venv (1 of 4): $$(cat requirements.lock requirements-dev.lock | grep -c ==) packages"
	@$(PYTHON) -m venv .venv
	@sed -n '/^pip==/,/[^\\]$$/p' requirements.lock > .venv/pip.lock
	@$(BY_HASH) -r .venv/pip.lock # older ones take twice as long for the rest
	@$(BY_HASH) -r requirements.lock -r requirements-dev.lock
	@echo "Making .venv (2 of 4): $(if $(CUDA),requirements-cuda.lock,$(TORCH))"
	@$(if $(CUDA),$(BY_HASH) -r requirements-cuda.lock,$(PIP_INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH))
	@echo "Making .venv (3 of 4): this project"
	@$(PIP_INSTALL) --quiet --no-deps --no-build-isolation --editable . # twice quiet: setuptools warns of what is meant
	@echo "Making .venv (4 of 4): byte code of the modules in use"
	@PYTHONDONTWRITEBYTECODE= PREFECT_HOME=$(CURDIR)/.cm/prefect $(BIN)/python -W ignore -c "$(USED)"
	@touch $@

demo: $(INSTALLED) ## Real images, a teacher, a distilled and an isolated student, their metrics (5 minutes on 2 cores)
	@$(BIN)/cm demo

repro: $(INSTALLED) ## Bring the workspace up to date with params/active.yaml through DVC alone
	@$(BIN)/dvc repro

ui: $(INSTALLED) ## Show the runs in MLflow's pages on http://127.0.0.1:5000
	@DO_NOT_TRACK=true MLFLOW_SERVER_ALLOWED_HOSTS=127.0.0.1:5000,localhost:5000 \
		$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

doctor: $(INSTALLED) ## Check what is installed, reachable and writable
	@$(BIN)/cm doctor

triton: .venv/triton ## Get Triton (1 GB) for the tests alone: they then interpret the GPU kernels (CI does)

.venv/triton: $(INSTALLED)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP_INSTALL) --no-deps --target $@ $(TRITON)

# Processes that run tests, a file at a time; each has its share of the cores (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test: $(INSTALLED) ## Run the fast tests
	@$(PYTEST)

# On a slow machine a test of several processes may miss a time limit that is a promise to users while another one runs.
test-all: $(INSTALLED) ## Run the slow tests too: kills, servers, S3 (CI does); what fails must pass alone
	@$(PYTEST) --run-slow || { test $$? = 1 && echo "make test-all: once more, one after another, what failed" && \
		$(BIN)/python -m pytest --run-slow --last-failed --last-failed-no-failures none; } # 1: tests failed, nothing else

soak: $(INSTALLED) ## Run the tests of many minutes: whole flows, killed workers, a browser
	@$(BIN)/python -m pytest --run-soak -m soak

lint: $(INSTALLED) ## Check style, formatting, which module imports which, and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy --no-error-summary

format: $(INSTALLED) ## Fix style and formatting
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

docs: .venv/docs ## Build the documentation into site/; its tools are installed at the first call
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build # --quiet would hide warnings from `strict`, too

.venv/docs: $(INSTALLED) requirements-docs.lock
	@$(BY_HASH) -r requirements-docs.lock
	@touch $@

lock: $(INSTALLED) .venv/uv ## Write all lock files from what .venv holds, after trying other versions in it
	@$(PIP) check
	@sed -n 's/^\([^# ][^ ]*==[^ ]*\).*/\1/p' requirements-docs.lock > .venv/requirements-docs
	@$(PIP) freeze --all --exclude-editable --exclude torch | grep -vxFf .venv/requirements-docs > .venv/freeze
	@! grep -E ' @ |\+|^triton=' .venv/freeze || { echo "requirements.lock: CPU PyTorch, released versions only" >&2; exit 1; }
	@$(BIN)/python infra/lock.py .venv/freeze .venv/requirements .venv/requirements-dev
	@echo "$(TORCH)" > .venv/requirements-cuda
	@$(call HASHED,requirements,--no-deps --universal)
	@$(call HASHED,requirements-dev,--no-deps)
	@$(call HASHED,requirements-docs,--no-deps)
	@printf '%s\n' $(INTEGRATIONS) > .venv/requirements-integrations
	@$(call HASHED,requirements-cuda,$(BESIDES))
	@$(call HASHED,requirements-integrations,$(BESIDES))

# What .venv/requirements does not hold, in versions that go with it.
BESIDES = --constraint .venv/requirements --python-platform x86_64-manylinux_2_28 \
	$$(sed 's/==.*//; s/^/--no-emit-package /' .venv/requirements)

# Write NAME.lock, its comment kept, from the list .venv/NAME: all files of each version, for other machines too.
HASHED = .venv/uv/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate .venv/$(1) $(2) -o .venv/hashed && \
	{ sed '/^[^\#]/,$$d' $(1).lock; cat .venv/hashed; } > .venv/lock && mv .venv/lock $(1).lock

.venv/uv: $(INSTALLED)
	@$(PIP_INSTALL) --target $@ $(UV)

images: ## Pin the images of infra/ by digest; IMAGE=REGISTRY/consistency-pipeline:TAG names yours there, too
	@$(PYTHON) infra/pin.py $(if $(IMAGE),--image $(IMAGE))

audit: .venv/audit ## Compare what the image holds with the known vulnerabilities; without an answer it fails
	@PYTHONPATH=.venv/audit $(BIN)/python -m pip_audit --strict --require-hashes --disable-pip \
		$(foreach lock,$(LOCKS),-r $(lock)) || \
		{ echo "make audit: a package is vulnerable, or nobody answered for one: see above" >&2; exit 1; }

sbom: .venv/audit .venv/image ## Write build/sbom.cdx.json (CycloneDX) and build/NOTICES.txt (licences) of what the image holds
	@mkdir -p build
	@cat $(LOCKS) | PYTHONPATH=.venv/audit $(BIN)/python -W ignore -m cyclonedx_py requirements - \
		--pyproject pyproject.toml --output-reproducible -o build/sbom.cdx.json
	@PYTHONPATH=.venv/audit:.venv/image $(BIN)/python -m piplicenses --python $(BIN)/python --with-urls \
		--with-license-file --no-license-path --format plain-vertical --output-file build/NOTICES.txt \
		--packages $$(sed -n 's/^\([^# ]*\)==.*/\1/p' $(LOCKS)) > /dev/null
	@$(BIN)/python infra/notices.py build/NOTICES.txt $(LOCKS)
	@echo "build/sbom.cdx.json, build/NOTICES.txt"

.venv/audit: $(INSTALLED)
	@$(PIP_INSTALL) --target $@ $(AUDIT_TOOLS)

.venv/image: $(INSTALLED) requirements-cuda.lock requirements-integrations.lock # what .venv lacks of the image, to read
	@rm -rf $@
	@$(BY_HASH) --target $@ --platform manylinux_2_28_x86_64 --only-binary :all: \
		-r requirements-cuda.lock -r requirements-integrations.lock
