"""What batch, parts, hosts and data must be to each other, wherever the order of examples is computed."""

from simclr_jax import errors


def check(source, batch_size, shards, seed, shuffle_window, process_count):
  """Raises a UserError for numbers that do not fit each other."""
  if shards < 1 or batch_size < 1 or batch_size % shards:
    raise errors.UserError(
      f"a batch of {batch_size} does not split into {shards} data shards; use a multiple of the shards."
    )
  if shards % process_count:
    raise errors.UserError(
      f"{shards} data shards do not split over {process_count} hosts; use a multiple of the hosts."
    )
  if source.num_examples < shards:
    raise errors.UserError(
      f"{source.name} has {source.num_examples} examples for {shards} data shards; "
      f"use at most {source.num_examples} shards."
    )
  if not 0 <= seed < 2**31:
    raise errors.UserError(f"seed {seed} does not fit; use one from 0 to {2**31 - 1}.")
  if shuffle_window < 1:
    raise errors.UserError(f"a shuffle window of {shuffle_window} records; use at least 1.")


def check_evaluation(batch_size: int, process_count: int) -> None:
  """Raises a UserError unless an evaluation's batch splits over the hosts."""
  if batch_size < 1 or batch_size % process_count:
    raise errors.UserError(
      f"an evaluation batch of {batch_size} does not split over {process_count} hosts; use a multiple."
    )
