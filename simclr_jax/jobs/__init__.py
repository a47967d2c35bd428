"""The jobs, one file each: what `python -m simclr_jax JOB` runs."""
