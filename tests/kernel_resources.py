"""Compile the Triton kernels for GPUs that need not be there, and print what each needs as JSON; run as a program.

The argument is a JSON list of [kernel, compute capability, dtype, head_dim], tiles are those of `flash_cuda.tile_of`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from swinv2_mm.ops import attention_kernels, flash_cuda

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', 'cuobjdump')
TENSORS = ('qkv', 'out', 'grad', 'grad_qkv')  # in the dtype of a call, all others are float32
POINTERS = (*TENSORS, 'scale', 'table', 'lse', 'delta', 'grad_scale', 'pairs', 'grad_table')
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def constants_of(name, dtype, head_dim, tile):
    if name == 'fold':
        return dict(flash_cuda.FOLD)
    constants = dict(D=head_dim, BLOCK=tile.block, PRECISION='tf32x3' if dtype == 'fp32' else 'ieee')
    return constants if name == 'pair' else dict(constants, INNER=tile.inner)


def compiled(name, capability, dtype, head_dim, tile):
    kernel = getattr(attention_kernels, f'{name}_kernel')
    constants = constants_of(name, dtype, head_dim, tile)
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = 'constexpr'
        elif argument in POINTERS:
            signature[argument] = f'*{dtype if argument in TENSORS else "fp32"}'
            attributes[(i,)] = [['tt.divisibility', 16]]
        else:
            signature[argument] = 'i32'
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def resources(name, capability, dtype, head_dim, tile=None):
    """Registers per thread, bytes of spills per thread, and bytes of shared memory per program."""
    tile = tile or flash_cuda.tile_of(name, DTYPES[dtype], head_dim)
    kernel = compiled(name, capability, dtype, head_dim, tile)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(kernel.asm['cubin'])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf'{key}:(\d+)', usage)[1]) for key in ('REG', 'STACK', 'LOCAL'))
    return dict(registers=registers, spills=stack + local, shared=kernel.metadata.shared)


if __name__ == '__main__':
    print(json.dumps([resources(*case) for case in json.loads(sys.argv[1])]))
