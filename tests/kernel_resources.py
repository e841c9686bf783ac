"""Compile the Triton kernels for GPUs that need not be there, and print as JSON what they need; run as a program.

The argument is a JSON list of [kernel, compute capability, dtype, channels], of a head for attention and of the map for
the post-norm. Printed are the resources of each, and by kernel the parameters whose values would compile it anew.
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

from swinv2_mm.ops import attention_kernels, flash_cuda, fused_block, post_norm_kernels

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', 'cuobjdump')
KERNELS = {
    name.rpartition('_')[0]: kernel
    for module in (attention_kernels, post_norm_kernels)
    for name, kernel in vars(module).items()
    if name.endswith('_kernel')
}
IN_DTYPE_OF_PRODUCTS = {
    'attention': ('qkv', 'out', 'grad', 'grad_qkv'),
    'post_norm': ('branch', 'half', 'grad_half', 'grad_branch'),
}
IN_FLOAT32 = {
    'attention': ('scale', 'table', 'lse', 'delta', 'grad_scale', 'pairs', 'grad_table'),
    'post_norm': ('x', 'weight', 'bias', 'scale', 'out', 'grad', 'total', 'sums'),
}
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def family(name):
    return 'post_norm' if name.startswith('post_norm') else 'attention'


def launched_with(name, dtype, channels):
    """The compile-time parameters of a kernel and the options of the compiler."""
    if family(name) == 'post_norm':
        x = torch.empty(1, channels, device='meta')
        return fused_block._compiled(x, x, has_half=dtype != 'fp32')[1]
    if name == 'fold':
        return flash_cuda.FOLD
    tile = flash_cuda.tile_of(name, DTYPES[dtype], channels)
    return dict(D=channels, BLOCK=tile.block, INNER=tile.inner, **flash_cuda._compiled(tile, DTYPES[dtype]))


def compiled(name, capability, dtype, channels):
    kernel, settings = KERNELS[name], launched_with(name, dtype, channels)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        argument = parameter.name
        if parameter.is_constexpr:
            signature[argument], constants[argument] = 'constexpr', settings[argument]
        elif is_pointer(name, argument):
            signature[argument] = f'*{dtype if argument in IN_DTYPE_OF_PRODUCTS[family(name)] else "fp32"}'
            if not parameter.do_not_specialize:
                attributes[(i,)] = [['tt.divisibility', 16]]
        else:
            signature[argument] = 'fp32' if argument == 'eps' else 'i32'
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {key: value for key, value in settings.items() if key not in (*constants, 'INNER')}
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def is_pointer(name, argument):
    return argument in IN_DTYPE_OF_PRODUCTS[family(name)] + IN_FLOAT32[family(name)]


def resources(name, capability, dtype, channels):
    """Registers per thread, bytes of spills per thread, and bytes of shared memory per program."""
    kernel = compiled(name, capability, dtype, channels)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(kernel.asm['cubin'])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, '-res-usage', file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf'{key}:(\d+)', usage)[1]) for key in ('REG', 'STACK', 'LOCAL'))
    return dict(registers=registers, spills=stack + local, shared=kernel.metadata.shared)


def specialized(name):
    """The parameters of a kernel of which some values, such as 1 and multiples of 16, compile it anew."""
    return [
        parameter.name
        for parameter in KERNELS[name].params
        if not (parameter.is_constexpr or parameter.do_not_specialize or is_pointer(name, parameter.name))
    ]


if __name__ == '__main__':
    cases = json.loads(sys.argv[1])
    print(json.dumps([[resources(*case) for case in cases], {name: specialized(name) for name in KERNELS}]))
