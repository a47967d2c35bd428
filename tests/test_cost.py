"""Costs: model FLOPs from the trace, exchanges and memory from the compiled program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from simclr_jax.hardware import chips, cost, sharding
from simclr_jax.models import resnet


def forward(model, size, views=1):
  images = jax.ShapeDtypeStruct((views, size, size, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  return lambda train=False: cost.matrix_flops(
    lambda v, x: model.apply(v, x, train=train, mutable=["batch_stats"]), variables, images
  )


def test_a_resnet_50_takes_the_published_multiply_adds():
  # 4,089,184,256 in the literature (224 pixels, stride on the 3x3 convolution), the classifier's 2,048,000 included.
  assert forward(resnet.ResNet(depth=50), 224)() == 2 * (4_089_184_256 - 2_048_000)


def test_flops_grow_with_the_batch_and_not_with_rematerialisation():
  model = resnet.ResNet(depth=10, width=0.25)
  once = forward(model, 32)(train=True)
  assert forward(model, 32, views=6)(train=True) == 6 * once
  assert forward(resnet.ResNet(depth=10, width=0.25, remat="blocks"), 32)(train=True) == once


def test_loops_count_per_iteration_and_groups_by_their_own_channels():
  a, b = jnp.ones((3, 4)), jnp.ones((4, 4))
  assert cost.matrix_flops(lambda a, b: lax.fori_loop(0, 7, lambda _, x: x @ b, a), a, b) == 7 * 2 * 3 * 4 * 4
  images, kernel = jnp.ones((2, 8, 8, 6)), jnp.ones((3, 3, 2, 12))
  convolve = lambda x, k: lax.conv_general_dilated(
    x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
  )
  assert cost.matrix_flops(convolve, images, kernel) == 2 * (2 * 8 * 8 * 12) * (3 * 3 * 2)


def compiled(function, *shapes, in_specs, out_specs):
  mesh = sharding.data_mesh()
  sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
  return jax.jit(sharded).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


@pytest.mark.devices(8)
@pytest.mark.optimized
def test_collectives_count_with_their_bytes_once_per_iteration_of_a_loop():
  rows = PartitionSpec("data")

  def function(x):
    def turn(carry, _):
      return carry + lax.psum(carry, "data") * 0, None

    total, _ = lax.scan(turn, jnp.sum(x), None, length=5)
    return total[None] + jnp.sum(lax.all_gather(x, "data", tiled=True))

  found = cost.collectives(compiled(function, (16, 3), in_specs=rows, out_specs=rows), 8)
  counts = {item.kind: (item.calls, item.bytes) for item in found}
  assert counts == {"all-reduce": (5, 5 * 4), "all-gather": (1, 16 * 3 * 4)}
  assert {item.purpose for item in found} == {"loss"}, "all inside shard_map, as only the loss is"


def test_an_asynchronous_collective_counts_once_by_its_result():
  hlo = """HloModule step

ENTRY %main (p: bf16[4,8]) -> bf16[32,8] {
  %p = bf16[4,8]{1,0:T(8,128)} parameter(0)
  %ag-start = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%p), metadata={op_name="jit(f)/shard_map/all_gather"}
  ROOT %ag-done = bf16[32,8]{1,0} all-gather-done(%ag-start)
}
"""
  (item,) = cost.collectives(hlo, 8)
  assert (item.kind, item.calls, item.bytes, item.purpose) == ("all-gather", 1, 32 * 8 * 2, "loss")


def test_a_collective_without_a_name_has_the_purpose_of_its_consumer():
  hlo = """ENTRY %main (p: f32[4,8]) -> f32[8,4] {
  %p = f32[4,8] parameter(0)
  %written = f32[4,8]{1,0} all-reduce(%p), channel_id=1, to_apply=%add
  ROOT %taken = f32[8,4] transpose(%written), metadata={op_name="jit(step)/jvp()/shard_map/transpose"}
}
"""
  (item,) = cost.collectives(hlo, 8)
  assert item.purpose == "loss"


def test_a_loop_without_a_known_count_runs_as_often_as_its_condition_says():
  hlo = """HloModule step

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]) parameter(0)
  %bound = s32[]{:T(256)} constant(16)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %b = (s32[], f32[8]) parameter(0)
  %x = f32[8] get-tuple-element(%b), index=1
  %reduced = f32[8] all-reduce(%x), to_apply=%add, metadata={op_name="jit(step)/jvp(SimCLR)/stem_bn1/sum"}
  ROOT %next = (s32[], f32[8]) tuple(%i, %reduced)
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %loop = (s32[], f32[8]) while(%p), condition=%condition, body=%body
}
"""
  (item,) = cost.collectives(hlo, 8)
  assert (item.calls, item.bytes, item.purpose) == (16, 16 * 8 * 4, "batch norm")


def test_a_merged_collective_is_not_taken_for_the_losss():
  line = """ENTRY %main (p: f32[8]) -> (f32[], f32[8]) {
  %p = f32[8] parameter(0)
  ROOT %merged = (f32[], f32[8]) all-reduce(%s, %p), metadata={op_name="jit(step)/jvp()/shard_map/psum"}
}
"""
  (item,) = cost.collectives(line, 8)
  assert (item.purpose, item.shapes, item.bytes) == ("parameters", ("f32[]", "f32[8]"), 36)


@pytest.mark.devices(8)
def test_a_device_holds_its_part_of_a_split_array():
  mesh = sharding.data_mesh()
  arrays = {
    "split": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding.batched(mesh)),
    "whole": jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=sharding.replicated(mesh)),
  }
  assert cost.bytes_per_device(arrays) == 2 * 4 * 4 + 3 * 2


@pytest.mark.parametrize("kind", chips.CHIPS)
def test_every_chip_has_facts_of_a_sensible_size_and_a_source(kind):
  chip = chips.CHIPS[kind]
  assert 16 * 2**30 <= chip.memory <= 192 * 2**30
  # A chip does 50 to 600 FLOPs in the time that a byte takes.
  assert 50 < chip.flops / chip.bandwidth < 600
  assert chip.source


def test_a_cpu_is_no_chip():
  assert chips.chip_of(jax.devices()[0]) is None
