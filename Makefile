# Each target makes .venv and installs what it needs on first use.
PYTHON ?= python3
HOURS ?= 0.05
BIN = .venv/bin

.PHONY: train test soak story bench lab

train: .venv/installed
	$(BIN)/python -m flashlm_helpers train --hours $(HOURS) $(ARGS)

# Threads that wait must not spin: tests have to get along beside other programs.
test soak: export OMP_WAIT_POLICY = PASSIVE
test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb
	$(BIN)/pytest
	FLASHLM_PROFILE=smoke $(BIN)/pytest --nbmake --nbmake-timeout=300 --durations=0 notebooks

# The same tests of what is random (kills, races, damaged files), each tried often: an hour or so.
soak: .venv/installed
	FLASHLM_SOAK=1 $(BIN)/pytest -m soak -s

story: .venv/installed
	$(BIN)/python -m flashlm_helpers generate --checkpoint checkpoints/hybrid-large.pt $(ARGS)

bench: .venv/installed
	$(BIN)/python benchmarks/training.py --preset v4-small $(ARGS)
	$(BIN)/python benchmarks/training.py --preset v4-large --no-loss $(ARGS)
	$(BIN)/python benchmarks/inference.py --preset v4-small

# JupyterLab would ask its maker for news and updates.
lab: .venv/installed
	$(BIN)/jupyter lab --LabApp.news_url=None \
	  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate notebooks

# On Linux, PyPI's torch is the CUDA build: PyTorch's own index has a CPU build of a tenth of its size.
.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	@if [ "$$(uname)" = Linux ]; then \
	  $(BIN)/python -m pip install --quiet --timeout 10 --retries 0 --no-deps \
	    --index-url https://download.pytorch.org/whl/cpu $$(grep '^torch==' requirements.txt) 2>/dev/null \
	  || echo "PyTorch's CPU index does not answer: taking torch from PyPI"; fi
	$(BIN)/python -m pip install --quiet -e ".[peers]"
	touch $@
