# make demo    from scikit-learn's digits to a table, in minutes
# make test    lint and the test suite; as root on Debian also on a real SLURM of two nodes, which it installs and brings up
# make test-slurm   only what runs on that SLURM
# make soak    one training on that SLURM, disturbed twenty times at random
# make lint    ruff (format and lint) and mypy
# make bench   what a step and a sample cost, how fast data comes and how long scores take, on this machine
# make clean   remove the environment (results stay)
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
READY := .venv/ready
export PATH := $(BIN):$(PATH)
export PYTHONUNBUFFERED := 1
# Some machines set it; then every job of a workflow would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.PHONY: demo test test-slurm soak lint bench clean
.DELETE_ON_ERROR:

demo: $(READY)
	snakemake --profile profiles/local --quiet rules host
	@haste table

# Both suites run side by side: jobs of a cluster mostly wait, and go first, as the other suite fills both cores to the
# end. What SLURM's said comes before the summary of the other.
# Each process begins with a half of the tests, and takes over from the other when it is done: a file's tests share
# what they set up.
test: lint
	trap 'kill $$(jobs -p) 2> /dev/null' EXIT; \
	pytest -n 2 --dist loadfile tests/slurm > .venv/slurm.txt 2>&1 & slurm=$$!; \
	nice -n 5 pytest -n 2 --dist worksteal --ignore tests/slurm; rest=$$?; \
	wait $$slurm; slurm=$$?; \
	cat .venv/slurm.txt; \
	test $$slurm = 0 -a $$rest = 0

test-slurm: $(READY)
	pytest -n 2 --dist loadfile tests/slurm

soak: $(READY)
	pytest -s tests/slurm/soak.py

lint: $(READY)
	ruff format --check .
	ruff check .
	mypy

# Where there is a GPU, of the network that tables are about.
LARGE := $(if $(shell command -v nvidia-smi),--model SiT-XL/2 --batch 32 --precision bf16 --compile)

bench: $(READY)
	python benchmarks/step.py $(LARGE)
	python benchmarks/memory.py
	python benchmarks/throughput.py
	python benchmarks/data.py
	python benchmarks/pictures.py
	python benchmarks/sampling.py --samples 512
	python benchmarks/score.py --samples 5000 --real 3000
	python benchmarks/saving.py

# The environment is made again only when what it is made from changes.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check -r requirements.lock
	pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:
	rm -rf .venv
