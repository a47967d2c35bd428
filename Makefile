# Every target does its own set-up, once; the commands below also work by hand after `sh scripts/setup.sh dev`.
.PHONY: demo test lint bench

demo:
	@sh scripts/setup.sh
	.venv/bin/python -m simclr_jax demo --config=configs/demo.py --workdir=runs/demo

# PYTEST_ARGS="-k lars" for a part of the suite.
test:
	@sh scripts/setup.sh dev
	.venv/bin/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

lint:
	@sh scripts/setup.sh dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	@PATH=.venv/bin:$$PATH; if command -v shellcheck >/dev/null; then \
	  echo shellcheck; shellcheck --external-sources launch/*.sh launch/slurm.sbatch scripts/*.sh; \
	else echo "lint: no shellcheck on this kind of machine; the shell scripts were not checked."; fi

# Loss, input and step against the alternatives; `.venv/bin/pip install -e ".[bench]"` brings PyTorch and lightly.
# BENCH_ARGS="--only=step --rounds=3" for a part of it.
bench:
	@sh scripts/setup.sh
	.venv/bin/python -m simclr_jax bench --workdir=runs/bench $(BENCH_ARGS)
