"""What is read from a compiled program's text: operations, copies, bytes, collectives."""

import jax
import jax.numpy as jnp

from benchmarks import _steps
from benchmarks._program import Program


def kernels(function, *args):
    return _steps.kernels(_steps.operations(jax.jit(function).lower(*args).compile().as_text()))


def test_kernels_are_what_runs():
    x = jnp.ones(8)
    assert kernels(lambda x: jnp.sin(x) + 1, x) == 1
    assert kernels(lambda x: (x @ x, jnp.sort(x)), x) >= 2


def test_kernels_that_a_gpu_launches_together_are_counted():
    """In such a program, two fusions are in a computation that the entry calls."""
    program = """HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%fused_multiply (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %m = f32[8]{0} multiply(%p, %p)
}

%command_buffer (a: f32[8], b: f32[8]) -> (f32[8], f32[8]) {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %loop.1 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_multiply
  %loop.2 = f32[8]{0} fusion(%b), kind=kLoop, calls=%fused_multiply, backend_config={"x":[{"y":"1"}]}
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%loop.1, %loop.2)
}

ENTRY %main.9 (x: f32[8], y: f32[8]) -> (f32[8], /*index=1*/f32[8]) {
  %x = f32[8]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %copy.3 = f32[8]{0} copy(%y)
  %call = (f32[8]{0}, f32[8]{0}) call(%x, %copy.3), to_apply=%command_buffer
  ROOT %out = f32[8]{0} get-tuple-element(%call), index=0
}
"""
    operations = _steps.operations(program)
    assert operations["fusion"] == 2
    assert operations["copy"] == 1
    assert _steps.kernels(operations) == 3


def test_bytes_are_counted_once_for_each_array_and_only_the_part_that_is_touched():
    """A TPU's fast memory is not counted; a gather and a scatter touch rows; a loop counts for each turn."""
    program = """HloModule jit_step

%rows (p.0: f32[100,4], p.1: s32[2]) -> f32[2,4] {
  %p.0 = f32[100,4]{1,0} parameter(0)
  %p.1 = s32[2]{0} parameter(1)
  %same = f32[100,4]{1,0} bitcast(%p.0)
  ROOT %g = f32[2,4]{1,0} gather(%same, %p.1), offset_dims={1}
}

%body (t: (s32[], f32[100])) -> (s32[], f32[100]) {
  %t = (s32[], f32[100]{0}) parameter(0)
  %x = f32[100]{0} get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=0
  %y = f32[100]{0} copy(%x)
  ROOT %both = (s32[], f32[100]{0}) tuple(%n, %y)
}

ENTRY %main (table: f32[100,4], ids: s32[2], x: f32[100]) -> f32[100,4] {
  %table = f32[100,4]{1,0:T(8,128)} parameter(0)
  %ids = s32[2]{0} parameter(1)
  %x = f32[100]{0} parameter(2)
  %fast = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[100]{0:T(128)S(1)} copy-done(%fast)
  %found = f32[2,4]{1,0} fusion(%table, %ids), kind=kLoop, calls=%rows
  %loop = (s32[], f32[100]{0}) while(%near), body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[100,4]{1,0:T(8,128)} scatter(%table, %ids, %found), to_apply=%add
}
"""
    prefetched, gathered, copied, scattered = 400, 2 * 32 + 8, 3 * 800, 3 * 32 + 8
    assert Program(program).counts(least=100) == {
        "kernels": 3,
        "copies": 1,
        "bytes": prefetched + gathered + copied + scattered,
        "collectives": {},
    }


def test_collectives_are_found_by_what_a_device_puts_in():
    """On a TPU an all-reduce of which each device keeps a slice is in a fusion of this name."""
    program = """HloModule jit_step

%all-reduce-scatter (g: f32[8]) -> f32[1] {
  %g = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[8]{0} all-reduce(%g), to_apply=%add
  ROOT %own = f32[1]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={1}
}

ENTRY %main (g: f32[8]) -> f32[8] {
  %g = f32[8]{0} parameter(0)
  %own = f32[1]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %begun = (f32[1]{0}, f32[8]{0}) all-gather-start(%own), dimensions={0}
  ROOT %all = f32[8]{0} all-gather-done(%begun)
}
"""
    assert Program(program).counts()["collectives"] == {"reduce-scatter": [32], "all-gather": [4]}
