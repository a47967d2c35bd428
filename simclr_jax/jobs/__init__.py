"""The jobs, one file each: `run(config, workdir, **options)`; its docstring is its help."""

JOBS = (
  *("pretrain", "linear_eval", "finetune", "distill", "knn", "transfer", "embed", "predict"),
  *("study", "convert", "demo", "plan", "bench"),
)

# Their `run` takes no config.
WITHOUT_CONFIG = ("bench", "convert")
