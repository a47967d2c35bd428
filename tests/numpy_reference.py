"""Slow float64 twins of what the package computes, written from the formulas and not from its code."""

import math

import numpy as np


def nt_xent(z, temperature, normalize=True):
  """Returns loss, gradient [N, 2, D] and metrics of the dense definition, for z [N, 2, D].

  Equation 1 of Chen et al. 2020, all 2N rows against all 2N columns.
  """

  def row(i, logits, others):
    lse, p = _softmax(logits, others)
    positive = i ^ 1
    # p - 1 as minus the sum of the others, which does not cancel when p is close to 1.
    p[positive] = -(p.sum() - p[positive])
    return lse - logits[positive], p

  return _contrastive(z, temperature, normalize, row)


def sup_con(z, label, temperature, normalize=True):
  """Returns loss, gradient and metrics of equation 2 of Khosla et al. 2020, for label [N]."""
  labels = np.repeat(label, 2)

  def row(i, logits, others):
    lse, p = _softmax(logits, others)
    positives = others & (labels == labels[i])
    return np.mean(lse - logits[positives]), p - positives / positives.sum()

  return _contrastive(z, temperature, normalize, row)


def dcl(z, temperature, normalize=True):
  """Returns loss, gradient and metrics of Yeh et al. 2021: the softmax is over the negatives alone."""

  def row(i, logits, others):
    positive = np.arange(len(logits)) == (i ^ 1)
    lse, p = _softmax(logits, others & ~positive)
    return lse - logits[positive][0], p - positive

  return _contrastive(z, temperature, normalize, row)


def _softmax(logits, chosen):
  top = logits[chosen].max()
  p = np.where(chosen, np.exp(np.where(chosen, logits, top) - top), 0)
  return np.log(p.sum()) + top, p / p.sum()


def _contrastive(z, temperature, normalize, row):
  """Returns the mean over i of row(i, logits of i, mask of the others) -> (loss, slope by each logit)."""
  z = np.asarray(z, np.float64)
  n, _, dim = z.shape
  rows = z.reshape(2 * n, dim)
  squared = np.maximum(np.sum(rows * rows, axis=1, keepdims=True), 1e-12)
  u = rows / np.sqrt(squared) if normalize else rows
  logits = u @ u.T / temperature
  row_losses, slopes = zip(*(row(i, logits[i], np.arange(2 * n) != i) for i in range(2 * n)), strict=True)
  slopes = np.stack(slopes)
  grad = (slopes + slopes.T) @ u / (2 * n * temperature)
  if normalize:
    along = np.where(squared > 1e-12, np.sum(u * grad, axis=1, keepdims=True), 0)
    grad = (grad - u * along) / np.sqrt(squared)
  return np.mean(row_losses), grad.reshape(n, 2, dim), _contrast_metrics(logits.reshape(n, 2, n, 2))


def _contrast_metrics(logits):
  n = logits.shape[0]
  correct = entropy = correct_top1 = 0
  for i in range(n):
    across = logits[i, 0, :, 1]
    p = np.exp(across - across.max())
    p /= p.sum()
    correct += int(np.argmax(across) == i)
    entropy -= np.sum(p * np.log(p + 1e-8))
    for view in (0, 1):
      # A list in the order of the images; of the row's own image only the positive is a candidate.
      candidates = [(logits[i, view, j, w], j == i) for j in range(n) for w in (0, 1) if (j, w) != (i, view)]
      correct_top1 += max(candidates, key=lambda candidate: candidate[0])[1]
  return {
    "contrast_acc": correct / n,
    "contrast_entropy": entropy / n,
    "contrast_top1": correct_top1 / (2 * n),
  }


def learning_rate(step, *, peak, warmup_steps, total_steps):
  """Returns the rate of one 0-based step: linear warm-up, then half a cosine."""
  if step < warmup_steps:
    return peak * step / warmup_steps
  done = min(step - warmup_steps, total_steps - warmup_steps) / (total_steps - warmup_steps)
  return peak * 0.5 * (1 + math.cos(math.pi * done))


def lars_step(w, buffer, grad, rate, *, weight_decay, momentum, trust_coefficient, adapted):
  """Returns the tensor and its momentum buffer after one step of LARS (You et al. 2017)."""
  trust = 1.0
  if adapted:
    grad = grad + weight_decay * w
    if np.linalg.norm(w) > 0 and np.linalg.norm(grad) > 0:
      trust = trust_coefficient * np.linalg.norm(w) / np.linalg.norm(grad)
  buffer = momentum * buffer + rate * trust * grad
  return w - buffer, buffer


def nesterov_steps(w, grads, rates, momentum):
  """Returns w after Nesterov steps with the learning rate inside the buffer."""
  v = 0.0 * w
  for grad, rate in zip(grads, rates, strict=True):
    v = momentum * v - rate * grad
    w = w + momentum * v - rate * grad
  return w


def adam_steps(w, grads, rates, b1=0.9, b2=0.999, eps=1e-7):
  """Returns w after steps of Adam in TensorFlow's form: epsilon outside of the bias correction."""
  m = v = 0.0 * w
  for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad * grad
    w = w - rate * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
  return w
