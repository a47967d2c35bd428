"""pytorch: a SimCLR step in PyTorch, as fast as its own means make it; imported only where PyTorch is installed."""

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from simclr_jax.models import resnet

TRUST, MOMENTUM, WEIGHT_DECAY, RATE = 1e-3, 0.9, 1e-4, 0.1


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
  """Returns a convolution and its batch norm."""
  return nn.Sequential(
    nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs, momentum=0.1)
  )


class Block(nn.Module):
  """A residual block, basic or bottleneck, with the stride on the first 3x3 convolution."""

  def __init__(self, inputs: int, filters: int, stride: int, *, bottleneck: bool, project: bool):
    super().__init__()
    outputs = 4 * filters if bottleneck else filters
    if bottleneck:
      shapes = [(inputs, filters, 1, 1), (filters, filters, 3, stride), (filters, outputs, 1, 1)]
    else:
      shapes = [(inputs, filters, 3, stride), (filters, outputs, 3, 1)]
    self.parts = nn.ModuleList([convolution(*shape) for shape in shapes])
    nn.init.zeros_(self.parts[-1][1].weight)
    self.shortcut = convolution(inputs, outputs, 1, stride) if project else nn.Identity()

  def forward(self, x):
    y = x
    for part in self.parts[:-1]:
      y = functional.relu(part(y))
    return functional.relu(self.parts[-1](y) + self.shortcut(x))


def network(depth: int, width: float, *, small_images: bool, layers: int, out_dim: int) -> nn.Sequential:
  """Returns encoder and projection head, those of `models.resnet` and `models.heads`."""
  filters = resnet.channels(64, width)
  parts = [convolution(3, filters, 3) if small_images else convolution(3, filters, 7, 2), nn.ReLU()]
  parts += [] if small_images else [nn.MaxPool2d(3, 2, 1)]
  bottleneck = depth in resnet.BOTTLENECK_BLOCKS
  features = filters
  for group, blocks in enumerate(resnet.BLOCKS[depth]):
    for block in range(blocks):
      filters, stride = resnet.channels(64 * 2**group, width), 2 if group > 0 and block == 0 else 1
      parts.append(Block(features, filters, stride, bottleneck=bottleneck, project=block == 0))
      features = 4 * filters if bottleneck else filters
  parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
  for layer in range(1, layers + 1):
    outputs = out_dim if layer == layers else features
    parts += [nn.Linear(features, outputs, bias=False), nn.BatchNorm1d(outputs)]
    parts += [] if layer == layers else [nn.ReLU()]
  return nn.Sequential(*parts)


def nt_xent(z, temperature: float = 0.1):
  """Returns the loss of embeddings [2N, D], the views of an image adjacent, from all logits at once."""
  z = functional.normalize(z.float(), dim=1)
  logits = z @ z.T / temperature
  logits.fill_diagonal_(float("-inf"))
  return functional.cross_entropy(logits, torch.arange(len(z), device=z.device) ^ 1)


class Lars:
  """Momentum with layer-wise rates for kernels; scales and biases take neither decay nor trust ratio."""

  def __init__(self, parameters):
    parameters = list(parameters)
    self.kernels = [p for p in parameters if p.ndim > 1]
    self.others = [p for p in parameters if p.ndim == 1]
    self.velocities = [torch.zeros_like(p) for p in (*self.kernels, *self.others)]

  @torch.no_grad()
  def step(self) -> None:
    """Moves the parameters by their gradients, which it drops."""
    grads = list(torch._foreach_add([p.grad for p in self.kernels], self.kernels, alpha=WEIGHT_DECAY))
    norms, lengths = torch._foreach_norm(self.kernels), torch._foreach_norm(grads)
    torch._foreach_mul_(
      grads, [TRUST * norm / length.clamp_min(1e-12) for norm, length in zip(norms, lengths, strict=True)]
    )
    grads += [p.grad for p in self.others]
    torch._foreach_mul_(self.velocities, MOMENTUM)
    torch._foreach_add_(self.velocities, grads, alpha=RATE)
    torch._foreach_sub_([*self.kernels, *self.others], self.velocities)
    for parameter in (*self.kernels, *self.others):
      parameter.grad = None


def trainer(keys: dict, images: int, size: int, *, compiled: bool) -> Callable[[int], dict]:
  """Returns steps -> what they took, of a SimCLR step on ready-made views in channels_last.

  On a GPU under autocast to bfloat16, on a CPU in float32.

  Args:
    keys: of `network`.
    images: of a batch, half of its views.
    size: of the views.
    compiled: whether torch.compile takes the network and the loss.
  """
  torch.manual_seed(0)
  torch.backends.cudnn.benchmark = True
  torch.set_float32_matmul_precision("high")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = network(**keys).to(device, memory_format=torch.channels_last).train()
  views = torch.rand(2 * images, 3, size, size, device=device).to(memory_format=torch.channels_last)
  optimizer = Lars(model.parameters())

  def loss_of(views):
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
      z = model(views)
    return nt_xent(z)

  loss_of = torch.compile(loss_of) if compiled else loss_of

  def run(steps: int) -> dict:
    begin = time.perf_counter()
    for _ in range(steps):
      value = loss_of(views)
      value.backward()
      optimizer.step()
    last = value.item()  # Waits for the device.
    return {"seconds": (time.perf_counter() - begin) / steps, "loss": last, "torch": torch.__version__}

  return run


def parameters(keys: dict) -> int:
  """Returns how many numbers a network has."""
  return sum(p.numel() for p in network(**keys).parameters())
