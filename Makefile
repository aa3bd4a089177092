dists  := core bench $(patsubst %/pyproject.toml,%,$(wildcard core/*/pyproject.toml callbacks/*/pyproject.toml plugins/*/pyproject.toml strategies/*/pyproject.toml))
python := .venv/bin/python
pip    := $(python) -m pip install --quiet --disable-pip-version-check
# A process for each core, one thread each. Tests that share something slow to make stay in one process (xdist_group).
pytest := OMP_NUM_THREADS=1 $(python) -m pytest -n auto --dist loadgroup

.PHONY: train bench fuzz gpu test test-all test-gpu test-slow test-deepspeed isolated certify table zoo format lint clean

# The main job: train on the standard library's own source, side by side. Options: make train ARGS="--text notes.txt --plain-only"
train: .venv/ready
	$(python) "templates/project/{{cookiecutter.folder}}/train.py" $(ARGS)

# Each technique against its baseline and controls, into benchmarks/. Some hours; goes on where it was stopped. SIZE=smoke takes a minute.
bench: .venv/ready
	for folder in $(filter-out core core/%,$(dists)); do $(python) $$folder/benchmark.py --size $(or $(SIZE),cpu) --out benchmarks/$(or $(MACHINE),cpu-2core) $(ARGS) || exit 1; done

# Random runs, broken and resumed: make fuzz ARGS="--minutes 60 --seed 1000". Seeds 0 to 99 are tests.
fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(python) -m eke.testing.fuzz $(ARGS)

# All that waits for a GPU, the most telling first: make gpu ARGS="--minutes 8". A machine without network: tools/wheels.py.
gpu: .venv/ready
	$(python) tools/gpu.py $(ARGS)

# The gate, on all cores: everything but what needs a GPU, takes minutes, or is to the byte what it was when it passed (the
# last line says how much). One file: make test ARGS=core/tests/test_spec.py
test: .venv/ready
	$(pytest) $(or $(ARGS),--changed)

# The same and nothing left out by hash.
test-all: .venv/ready
	$(pytest) $(ARGS)

test-gpu: .venv/ready
	$(python) -m pytest -m gpu $(ARGS)

# What takes minutes: among it every pair of techniques by itself.
test-slow: .venv/ready
	$(pytest) -m slow $(ARGS)

# ZeRO on DeepSpeed, on two CPU processes. Installs DeepSpeed, which builds a part of itself at its first start (g++, ninja).
test-deepspeed: .venv/ready
	DS_BUILD_OPS=0 $(pip) --no-build-isolation hjson ninja py-cpuinfo deepspeed
	PATH="$(CURDIR)/.venv/bin:$$PATH" OMP_NUM_THREADS=1 $(python) -m pytest strategies/eke-zero/tests/test_deepspeed.py $(ARGS)

# Each distribution from its wheel, in an environment that holds only what it declares.
isolated: .venv/ready
	OMP_NUM_THREADS=1 $(python) tools/isolated.py $(or $(ARGS),$(dists))

# Run each technique's tests and write what its contract passed into its package, for eke list to show and for make test to
# leave out what has not changed since.
certify: .venv/ready
	$(pytest) -q --certify $(or $(ARGS),$(addsuffix /tests,$(filter-out core core/% bench,$(dists))))

# The table of techniques in README.md, from metadata, records and stored measurements.
table: .venv/ready
	$(python) tools/readme_table.py

# What each technique does on each model of the zoo: into its package, by its tests, and into docs/zoo.md.
zoo: .venv/ready
	$(pytest) -q --zoo -k in_the_zoo $(or $(ARGS),$(addsuffix /tests,$(filter-out core core/% bench,$(dists))))
	$(python) tools/zoo_page.py

format: .venv/ready
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

lint: .venv/ready
	$(python) -m ruff check .
	$(python) -m ruff format --check .

clean:
	rm -rf .venv .isolated

.venv/ready: requirements.txt $(dists:=/pyproject.toml)
	python3 -m venv .venv
	$(pip) -r requirements.txt
	$(pip) --no-build-isolation $(addprefix -e ,$(dists))
	touch $@
