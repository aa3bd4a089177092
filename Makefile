dists  := core $(patsubst %/pyproject.toml,%,$(wildcard callbacks/*/pyproject.toml plugins/*/pyproject.toml strategies/*/pyproject.toml))
python := .venv/bin/python

# The main job: train on the standard library's own source, side by side. Options: make train ARGS="--text notes.txt --plain-only"
.PHONY: train
train: .venv/ready
	$(python) "templates/project/{{cookiecutter.folder}}/train.py" $(ARGS)

.venv/ready: requirements.txt $(dists:=/pyproject.toml)
	python3 -m venv .venv
	$(python) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(python) -m pip install --quiet --disable-pip-version-check --no-build-isolation $(addprefix -e ,$(dists))
	touch $@
