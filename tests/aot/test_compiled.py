"""What is read from the compiler's answers, and that no op is forgotten; the compiling itself is `make aot`."""

import pytest
from aot import cases, compiled

from kvc_jax.kernels import backends

PTXAS = """
ptxas info    : Compiling entry function 'paged_decode_attend' for 'sm_90a'
ptxas info    : Function properties for paged_decode_attend
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 142 registers, used 1 barriers, 48 bytes smem
I1123 subprocess_compilation.cc:356] ptxas info    : Compiling entry function 'loop_add_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_add_fusion
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""


def test_kernels_are_read_from_what_ptxas_says():
  assert compiled.kernels_in(PTXAS * 2) == [
      compiled.Kernel("paged_decode_attend", registers=142, spills=20, stack=16),
      compiled.Kernel("loop_add_fusion", registers=30, spills=0, stack=0)]


def test_copies_are_found_with_their_size():
  hlo = """
  %copy.1 = bf16[100,2,16,128]{3,2,1,0} copy(%p), metadata={op_name="x"}
  %start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%p)
  %fusion = f32[1000]{0} fusion(%copy.1), kind=kLoop
  ROOT %copy.2 = pred[] copy(%q)
"""
  assert list(compiled.copies_in(hlo)) == [100 * 2 * 16 * 128 * 2, 32, 1]


@pytest.mark.parametrize("capability", compiled.CAPABILITIES.values())
def test_every_promise_of_the_table_has_a_case(capability):
  found = cases.cases(capability)
  for op, entries in backends.TABLE.items():
    for support in entries:
      if support.capabilities[0] <= capability <= support.capabilities[1]:
        shapes = [case.shape for case in found if (case.op, case.backend) == (op, support.backend)]
        assert support.dtypes <= {shape.dtype for shape in shapes}
        assert support.head_dims <= {shape.head_dim for shape in shapes}
        assert support.block_sizes <= {shape.block_size for shape in shapes}
