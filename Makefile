# One command for each thing that a person or a workflow does. Everything is installed below .venv and .cache.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

UV_VERSION := 0.13.8
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .cache/uv/bin/uv)
PY := .venv/bin/python
SOURCES := $(shell git ls-files --cached --others --exclude-standard '*pyproject.toml' 'proto/*.proto' proto/hatch_build.py)
RUST_SOURCES := $(shell git ls-files --cached --others --exclude-standard '*Cargo.toml' 'flash-transport/crates/*/src/*.rs')

# Rust, from where it is, or else below .cache.
ifeq ($(shell cargo --version 2>/dev/null),)
export RUSTUP_HOME := $(CURDIR)/.cache/rust/rustup
export CARGO_HOME := $(CURDIR)/.cache/rust/cargo
export PATH := $(CARGO_HOME)/bin:$(PATH)
CARGO := .cache/rust/.done
endif

.PHONY: help demo edge install test test-helm fuzz lint format golden smoke-full-size bench-overhead bench-combined bench-model bench-planner bench-link bench-restart proto-breaking stubs wheels lock clean uv docs test-deploy test-compose test-pods test-terraform images chart

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

.cache/uv/bin/uv:
	python3 -m venv .cache/uv
	.cache/uv/bin/pip install --quiet uv==$(UV_VERSION)

.cache/rust/.done:
	python3 -m venv .cache/rust/venv
	.cache/rust/venv/bin/pip install --quiet puccinialin==0.1.14
	.cache/rust/venv/bin/python -c 'from puccinialin import setup_rust; setup_rust(".cache/rust")'
	rustup component add clippy rustfmt
	@touch $@

# As the other locks, that of the Rust workspace names no index: cargo puts in its own.
Cargo.lock: requirements/cargo.lock | $(CARGO)
	requirements/cargo-lock.sh

# An environment is installed from a lock of exact versions and hashes; the workspace's own packages are editable.
# Whether those of Rust have changed, cargo knows.
RUST_PACKAGES := openpi-flash-transport openpi-flash-edge
define install
	$(UV) venv --quiet --allow-existing --python '>=3.11,<3.14' .venv
	$(UV) pip install --quiet --python .venv -r requirements/$(1).txt --build-constraints requirements/build.txt $(2)
	@touch $@
endef

.venv/.demo: requirements/demo.txt requirements/build.txt $(SOURCES) | $(filter .cache/%,$(UV))
	$(call install,demo)

.venv/.dev: requirements/dev.txt requirements/build.txt $(SOURCES) $(RUST_SOURCES) Cargo.lock | $(filter .cache/%,$(UV))
	$(call install,dev,$(addprefix --reinstall-package ,$(RUST_PACKAGES)))

# openpi's own client, unmodified, in an environment of its own: it needs an older numpy than ours.
STOCK_CLIENT := .cache/openpi-client-env/.done
$(STOCK_CLIENT): requirements/openpi-client.txt | $(filter .cache/%,$(UV))
	$(UV) venv --quiet --clear --python '>=3.10,<3.13' $(@D)
	$(UV) pip install --quiet --python $(@D) -r $<
	@touch $@

# Modal's package, with which apps are deployed, in an environment of its own: no service needs it.
MODAL := .cache/modal-env/.done
$(MODAL): requirements/modal.txt | $(filter .cache/%,$(UV))
	$(UV) venv --quiet --clear --python '>=3.11,<3.14' $(@D)
	$(UV) pip install --quiet --python $(@D) -r $<
	@touch $@

uv: | $(filter .cache/%,$(UV))
	@echo $(UV)

demo: .venv/.demo ## Make a tiny checkpoint, serve it, drive it with camera-like pictures (no GPU, no PyTorch)
	.venv/bin/openpi-flash demo

install: .venv/.dev ## Everything into .venv: both backends, the QUIC client and edge

test: .venv/.dev $(STOCK_CLIENT) $(MODAL) Cargo.lock ## All tests
	cargo test --workspace --locked --quiet
	OMP_NUM_THREADS=1 $(PY) -m pytest -q $(PYTEST_ARGS)

# helm, kubectl and the control plane are built below .cache from their Go modules; cold, that is some 15 minutes of CPU.
test-helm: .venv/.dev ## The Helm chart against a real Kubernetes control plane with simulated nodes (Go; no container runs)
	tests/deploy/kubernetes/build-tools.sh .cache/kubernetes/bin
	KUBERNETES_TOOLS=.cache/kubernetes/bin $(PY) -m pytest -q tests/deploy/kubernetes/helm_checks.py $(PYTEST_ARGS)

IMAGES := action-torch action-torch-compile action-jax planner gateway edge tools
TAGS ?= latest
images: ## Container images for GPUs, tagged TAGS (latest); REGISTRY=… names them for it, PUSH=1 pushes, IMAGES=… some alone
	for image in $(IMAGES); do \
		name=$(if $(REGISTRY),$(REGISTRY)/)openpi-flash/$$image; \
		DOCKER_BUILDKIT=1 docker build --file deploy/docker/Dockerfile --target $$image --build-arg ACCELERATOR=cuda \
			--label org.opencontainers.image.revision=$$(git rev-parse HEAD) $(TAGS:%=--tag $$name:%) .; \
		$(if $(PUSH),for tag in $(TAGS); do docker push $$name:$$tag; done,:); done

chart: ## The Helm chart, as a package in dist/ (helm)
	for values in deploy/helm/openpi-flash/ci/*.yaml; do helm lint --strict --values $$values deploy/helm/openpi-flash; done
	helm package deploy/helm/openpi-flash --destination dist

# A Docker engine that is there is used, or one is started as root; tests/deploy/engine.sh says what is missing.
WITH_ENGINE = OPENPI_BUILD_CA=$${OPENPI_BUILD_CA:-$${SSL_CERT_FILE:-}} tests/deploy/engine.sh
test-compose: .venv/.dev $(STOCK_CLIENT) ## Images and docker-compose.yaml on a Docker engine of this machine
	$(WITH_ENGINE) $(PY) -m pytest -s -x tests/deploy/compose_checks.py

test-pods: .venv/.dev $(STOCK_CLIENT) ## The Helm chart with real pods, on a kubelet of this machine (root, Docker, Go)
	tests/deploy/kubernetes/have-node.sh
	tests/deploy/kubernetes/build-tools.sh .cache/kubernetes/bin node
	KUBERNETES_TOOLS=.cache/kubernetes/bin $(WITH_ENGINE) $(PY) -m pytest -s -x tests/deploy/kubernetes/pods_checks.py

# What stands in for AWS, in an environment of its own. cloud-init, where apt has it, is unpacked there and not installed.
TERRAFORM_ENV := .cache/terraform-env
$(TERRAFORM_ENV)/.done: requirements/terraform.txt | $(filter .cache/%,$(UV))
	$(UV) venv --quiet --clear --python '>=3.11,<3.14' $(@D)
	$(UV) pip install --quiet --python $(@D) --require-hashes -r $<
	-cd $(@D) && { apt-get download cloud-init || { apt-get update && apt-get download cloud-init; }; } >apt.log 2>&1 \
		&& dpkg -x cloud-init_*.deb cloud-init
	@touch $@

# The folder's conftest.py, for Compose, needs an environment that this one is not: hence --noconftest, and -p for the fixtures.
test-terraform: $(TERRAFORM_ENV)/.done ## deploy/terraform against a stand-in AWS (terraform 1.9 or newer; ALLOW_SKIPS=1: without cloud-init, systemd)
	CLOUD_INIT=$(wildcard $(TERRAFORM_ENV)/cloud-init) PYTHONPATH=services/common \
		$(<D)/bin/python -m pytest -q -p no:cacheprovider -W ignore::pytest.PytestConfigWarning --timeout 900 \
		--noconftest -p tests.deploy.aws.fixtures -o python_files='*_checks.py' tests/deploy/aws $(PYTEST_ARGS)

# What they share is installed first, since two run at a time.
test-deploy: .venv/.dev $(STOCK_CLIENT) $(TERRAFORM_ENV)/.done ## Deployments, for real: the four above. What this machine cannot run says why
	$(PY) tests/deploy/all.py

# libFuzzer's instrumentation is behind unstable flags, which a stable compiler takes when it is asked like this.
SECONDS ?= 60
FUZZ_TARGETS ?= $(patsubst flash-transport/fuzz/fuzz_targets/%.rs,%,$(wildcard flash-transport/fuzz/fuzz_targets/*.rs))
fuzz: .cache/cargo-fuzz/bin/cargo-fuzz ## Feed every decoder of the Rust workspace what libFuzzer invents (SECONDS=60 each, FUZZ_TARGETS=all)
	cd flash-transport/fuzz && for target in $(FUZZ_TARGETS); do \
		RUSTC_BOOTSTRAP=1 $(CURDIR)/$< run --fuzz-dir . $$target -- -max_total_time=$(SECONDS) -max_len=8192 -print_final_stats=1; done

.cache/cargo-fuzz/bin/cargo-fuzz: | $(CARGO)
	cargo install --quiet --locked --root .cache/cargo-fuzz cargo-fuzz@0.13.2

lint: .venv/.dev Cargo.lock ## ruff, mypy, buf, rustfmt, clippy
	cargo fmt --check
	cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@for package in models/openpi_flash_models services/*/openpi_flash_* clients/python/openpi_flash_client cli/openpi_flash_cli; do \
		echo "mypy $$package"; .venv/bin/mypy --no-error-summary $$package; done
	cd proto && ../.venv/bin/buf lint && ../.venv/bin/buf format --diff --exit-code
	$(MAKE) --no-print-directory proto-breaking

format: .venv/.dev $(CARGO) ## Format everything
	cargo fmt
	.venv/bin/ruff check --fix --exit-zero --quiet .
	.venv/bin/ruff format .
	cd proto && ../.venv/bin/buf format --write

# The state before the newest change of the wire.
AGAINST ?= $(shell git log -2 --format=%H -- proto/openpi_flash | tail -1)
proto-breaking: .venv/.dev ## Wire compatibility with AGAINST (default: before the newest change)
	.venv/bin/buf breaking proto --against '.git#ref=$(AGAINST),subdir=proto'

DIR ?= tests/data/golden
golden: .venv/.dev ## Compare both backends with openpi's own numbers in DIR
	$(PY) -m openpi_flash_models.golden $(DIR)

smoke-full-size: .venv/.dev ## Write, load and serve a full-size random pi0.5 on the CPU (14 GB of disk, minutes)
	$(PY) benchmarks/smoke_full_size.py

bench-overhead: .venv/.dev $(STOCK_CLIENT) ## Time outside the model, beside openpi's own arrangement
	OMP_NUM_THREADS=1 $(PY) benchmarks/overhead.py

bench-combined: .venv/.dev ## What a planner costs an action, in each cadence, beside action-only
	OMP_NUM_THREADS=1 $(PY) benchmarks/combined.py

bench-model: .venv/.dev ## The model on this machine, beside what the machine would allow (BENCH_ARGS; benchmarks/gpu.sh: with a GPU's tests)
	$(PY) -m openpi_flash_cli.bench model $(BENCH_ARGS)

bench-batching: .venv/.dev ## 1 to 16 robots on one accelerator, batched and one at a time (BENCH_ARGS)
	OMP_NUM_THREADS=1 $(PY) benchmarks/batching.py $(BENCH_ARGS)

bench-planner: .venv/.dev ## What a subtask costs: first token, each further one, compiling
	$(PY) benchmarks/planner.py

bench-link: .venv/.dev $(STOCK_CLIENT) | $(filter .cache/%,$(UV)) ## Answer times over an emulated link (root, TUN; QUICK=1: five minutes)
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.link.bench table $(if $(QUICK),--quick) $(BENCH_ARGS)

bench-restart: .venv/.dev $(STOCK_CLIENT) ## Time without answers when edge, gateway or server are killed and started again
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.restart $(BENCH_ARGS)

OUT ?= build/stubs
stubs: | $(filter .cache/%,$(UV)) ## Python stubs for robot code in OUT
	mkdir -p $(OUT)
	$(UV) run --no-project --with grpcio-tools==1.74.0 python -m grpc_tools.protoc \
		-Iproto --python_out=$(OUT) --pyi_out=$(OUT) --grpc_python_out=$(OUT) proto/openpi_flash/v1/*.proto

edge: Cargo.lock ## The QUIC edge and sidecar: target/release/openpi-flash-transport
	cargo build --release --locked --package openpi-flash-transport

wheels: Cargo.lock | $(filter .cache/%,$(UV)) ## What a robot needs, as wheels in dist/
	for package in proto clients/python flash-transport/crates/python flash-transport/crates/transport; do \
		$(UV) build --quiet --wheel --python '>=3.11,<3.14' --build-constraints requirements/build.txt -o dist $$package; done

# Checks the workflows in tests/workflows_test.py.
.cache/bin/actionlint: tools/actionlint/go.mod tools/actionlint/go.sum
	cd tools/actionlint && go build -o $(CURDIR)/$@ github.com/rhysd/actionlint/cmd/actionlint

docs: .venv/.dev ## Write docs/configuration.md from the settings' types and the programs' help, and the chart's table of values
	$(PY) -m openpi_flash_cli.reference docs/configuration.md
	$(PY) -m tests.deploy.kubernetes.values_table

lock: $(CARGO) | $(filter .cache/%,$(UV)) ## Resolve again and write requirements/
	$(UV) lock
	(echo "# Versions of what builds the workspace's own packages: made by \`make lock\`."; \
		printf 'hatchling==1.33.0\ngrpcio-tools==1.74.0\nmaturin==1.16.0\n' | $(UV) pip compile --quiet --no-header --no-annotate --python-version 3.11 -) > requirements/build.txt
	$(UV) export --quiet --no-header --no-annotate --group dev -o requirements/dev.txt >/dev/null
	$(UV) export --quiet --no-header --no-annotate --package openpi-flash --extra jax -o requirements/demo.txt >/dev/null
	(echo "# Modal's package, for deploying: made by \`make lock\`. It can be installed beside the services."; \
		printf 'modal==1.6.4\npython-dotenv==1.2.2\n' | $(UV) pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 --constraints <(grep -v '^-e' requirements/dev.txt) -) > requirements/modal.txt
	# What the container images hold beside the workspace's own packages.
	set -- "gateway openpi-flash-gateway" "tools openpi-flash" "torch openpi-flash-action --extra torch" \
		"jax openpi-flash-planner" "jax-cuda openpi-flash-planner --extra cuda"; \
	for image in "$$@"; do set -- $$image; name=$$1; shift; \
		$(UV) export --quiet --no-header --no-annotate --no-emit-workspace --package "$$@" -o requirements/image-$$name.txt >/dev/null; done
	# What tests of Terraform need.
	printf 'awscli\nboto3\nconfigobj\nflask\nflask-cors\njsonpatch\njsonschema\nmoto[ec2,iam,ssm]\noauthlib\npydantic\npytest\npytest-timeout\npyyaml\nshellcheck-py\n' \
		| $(UV) pip compile --quiet --universal --generate-hashes --no-header --no-annotate --python-version 3.11 -o requirements/terraform.txt - >/dev/null
	cargo update --quiet
	sed 's/^source = .*/source/' Cargo.lock > requirements/cargo.lock

clean: ## Remove what the other targets made
	rm -rf .venv .cache build dist target .mypy_cache .ruff_cache .pytest_cache proto/python
