"""What has to be said before TensorFlow is imported and JAX looks for devices. Imports neither of them."""

import glob
import os


def quiet() -> None:
  """Turns off start-up messages of TensorFlow and libtpu, and oneDNN, whose results depend on the processor."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  # Without a TPU, libtpu would ask a metadata server what this host is, and complain.
  if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # Any; there is none.
