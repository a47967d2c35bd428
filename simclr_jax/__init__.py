"""SimCLR in JAX: contrastive pretraining at any scale, and everything that turns the encoder into a result."""

__all__ = ["load_encoder"]


def load_encoder(path: str):
  """Returns (encode, config) of the checkpoint at `path`.

  `encode` turns images u8 or f32 in [0, 1] [N, H, W, 3] into features f32[N, D]; H and W should be the config's
  `data.image_size`. `config` is the training run's, as a ConfigDict.

  Args:
    path: a run's workdir, or one of its checkpoints/STEP folders.

  Raises:
    UserError: there is no checkpoint, or it does not fit its config.
  """
  # Imported here so that `import simclr_jax` costs nothing.
  from simclr_jax import inference

  return inference.load_encoder(path)
