"""Distillation on unlabelled ImageNet images: v2 section 3.3 (ResNet-50 students).

  simclr-jax distill --config=imagenet_distill:small --config.distill.teacher=RUN \\
    --config.data.dir=DIR --workdir=runs/imagenet-distilled

RUN is a run of finetune (or a converted release) on 1 % or 10 % of the labels, with any encoder; `model.*` describes
the student. To repeat the paper, fine-tune ResNet-152 3x with selective kernels, distil it into itself with :self, and
distil the result into ResNet-50 with :small.

| variant | student                                 | temperature | top-1, 1 % / 10 % of the labels *        |
| :self   | the teacher's network (set model.* so)  | 0.1         | 76.6 / 80.9 (R152 3x + SK, not verified) |
| :small  | ResNet-50                               | 1.0         | 73.9 / 77.5 (v2, abstract)               |

* Published, not reproduced here. 400 epochs with crops and flips; learning rate, weight decay and batch size are
those of pretraining (v2 appendix, not verified).
"""

from simclr_jax import config, errors


def get_config(variant: str = "small"):
  c = config.read("imagenet:v2")
  c.distill.batch_size = 4096
  c.distill.optimizer.warmup_epochs = 20.0  # 5 % of 400.
  if variant == "self":
    c.distill.temperature = 0.1
  elif variant != "small":
    raise errors.UserError(f"configs/imagenet_distill.py has no variant {variant!r}; use :self or :small.")
  return c
