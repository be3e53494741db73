# A menu of everything a developer does here. Each target's line after ## is its entry in `make help`.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SPARK := $(VENV)/.spark
CANDIDATES := python3.13 python3.12 python3.11 python3
PYTHON ?=
PORT ?= 3000
WORKERS ?= auto
TESTS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

# pip's own warnings (a setuptools hint on editable installs) are no news to whoever types make.
PIP_INSTALL = PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet

# A shell line that reads .env, if there is one, as Dagster does: what stands there wins.
READ_ENV = set -a; [ ! -f .env ] || . ./.env; set +a

# A shell line that leaves the first fitting Python in $$python, or says what is missing.
FIND_PYTHON = \
	python=; old=; bare=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); do \
		version=$$("$$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue; \
		"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { old="$$candidate is $$version"; continue; }; \
		"$$candidate" -c 'import ensurepip, venv' 2>/dev/null || { bare="$$candidate $$version"; continue; }; \
		python=$$candidate; break; \
	done; \
	if [ -z "$$python" ] && [ -n "$$bare" ]; then \
		echo "$$bare can't make a virtual environment: ensurepip is missing. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	elif [ -z "$$python" ]; then \
		echo "Python 3.11 or newer is needed$${old:+, and $$old}. Install one, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# An environment that was made in another folder points back there: it is made again. The pinned pip needs half the time of
# the one that Python brings, and compiling on all cores afterwards is faster than pip's own.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml setup.cfg constraints.txt
	@$(FIND_PYTHON); \
	if [ "$$(cat $@ 2>/dev/null)" != "$(CURDIR)" ] || ! $(BIN)/python -c '' 2>/dev/null; then \
		echo "Creating $(VENV) with Python $$version"; \
		"$$python" -m venv --clear $(VENV) || exit; \
	fi; \
	echo "Installing the pinned packages into $(VENV)"
	@rm -f $@
	@$(PIP_INSTALL) --constraint constraints.txt pip setuptools
	@$(PIP_INSTALL) --constraint constraints.txt --no-compile --no-build-isolation --editable '.[plots,dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # a package's template is no Python, and that is fine
	@printf '%s\n' "$(CURDIR)" > $@

.PHONY: install
install: $(STAMP) ## Make .venv with everything in it, and nothing else
	@echo "$(VENV) is ready. To have its commands at hand: . $(BIN)/activate"

# Apart from the rest: Spark is as large as everything else together, and only its engine needs it.
$(SPARK): $(STAMP)
	@echo "Adding Apache Spark to $(VENV)"
	@$(PIP_INSTALL) --constraint constraints.txt --no-compile --no-build-isolation --editable '.[spark]'
	@$(BIN)/telematics spark jars
	@touch $@

.PHONY: spark
spark: $(SPARK) ## Add Apache Spark to .venv, and fetch its jars; it runs on Java 17 or 21
	@echo "$(VENV) has Apache Spark. To use it: TELEMATICS_ENGINE=spark"

.PHONY: demo
demo: $(STAMP) ## Land three waves of a simulated fleet, mirror an insurer's database, show the tables
	@$(READ_ENV); exec $(BIN)/telematics demo

.PHONY: dev
dev: $(STAMP) ## Open the Dagster UI on http://127.0.0.1:3000 (PORT=…), with the demo's history and database
	@$(READ_ENV); DAGSTER_HOME="$$($(BIN)/telematics home)" || exit; export DAGSTER_HOME; \
	exec $(BIN)/telematics beside $(BIN)/dg dev --host 127.0.0.1 --port $(PORT)

.PHONY: test
test: $(STAMP) ## Run all tests but those on Spark, in parallel (TESTS=… picks some)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS)

.PHONY: test-spark
test-spark: $(SPARK) ## Run the tests on Apache Spark: the same cases, and what only Spark has
	@$(BIN)/python -m pytest -n 2 --dist worksteal --spark $(TESTS)

# Apart from the tests: watching every line takes three quarters of their time again.
.PHONY: coverage
coverage: $(STAMP) ## Run all tests, and hold what share of the code they reach
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov

.PHONY: lint
lint: $(SPARK) ## Check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

.PHONY: soak
soak: $(STAMP) ## Run the kill and race tests for much longer, and the whole house under kills for 10 minutes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --soak $(TESTS)

.PHONY: bench
bench: $(STAMP) ## Measure speed and memory against their floors on this machine
	@$(BIN)/python -m benchmarks

.PHONY: constraints
constraints: ## Pin the newest packages that pyproject.toml allows in constraints.txt
	@$(FIND_PYTHON); \
	fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	"$$python" -m venv "$$fresh" && \
	"$$fresh/bin/python" -m pip install --quiet --upgrade pip setuptools '.[plots,dev,spark]' && \
	{ \
		echo "# The exact packages that make installs, written by 'make constraints' with Python $$version."; \
		"$$fresh/bin/python" -m pip freeze --all --exclude telematics_assets; \
	} > "$$fresh/constraints.txt" && cp "$$fresh/constraints.txt" constraints.txt
	@echo "Wrote constraints.txt. Next: make test"

# The jar is in the repository: only who changes its source needs a compiler (a JDK 17) and this.
.PHONY: catalog-jar
catalog-jar: $(STAMP) ## Compile the Spark catalogs in telematics_assets/engines/spark/jvm
	@$(BIN)/telematics spark jars > /dev/null
	@$(BIN)/python -m telematics_assets_tests.engines.spark.catalog_jar

.PHONY: clean
clean: ## Remove .venv, caches and build products (data in .telematics stays)
	@rm -rf $(VENV) build dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	@find . -name __pycache__ -not -path './.telematics/*' -prune -exec rm -rf {} +
