# Each target installs what it needs first; after `sh scripts/setup.sh dev` the commands below also work by hand.
.PHONY: demo test lint bench

demo:
	@sh scripts/setup.sh
	.venv/bin/python -m simclr_jax demo --config=configs/demo.py --workdir=runs/demo

# PYTEST_ARGS="-m 'not slow'" or "-k lars" selects a part of the suite.
test:
	@sh scripts/setup.sh dev
	.venv/bin/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint:
	@sh scripts/setup.sh dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	@PATH=.venv/bin:$$PATH; if command -v shellcheck >/dev/null; then \
	  echo shellcheck; shellcheck --external-sources launch/*.sh launch/slurm.sbatch scripts/*.sh; \
	else echo "lint: shellcheck is not available on this platform; the shell scripts were not checked."; fi

# Measures loss, input and step against the alternatives; `.venv/bin/pip install -e ".[bench]"` adds PyTorch and lightly.
# BENCH_ARGS="--only=step --rounds=3" selects a part.
bench:
	@sh scripts/setup.sh
	.venv/bin/python -m simclr_jax bench --workdir=runs/bench $(BENCH_ARGS)
