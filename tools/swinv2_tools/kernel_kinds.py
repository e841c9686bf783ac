"""Kinds of operators and of GPU kernels, by their names in a profile: what a share of time belongs to."""

from __future__ import annotations

import re

OPERATORS = {  # of a CPU
    'matrix products': 'mm addmm bmm baddbmm baddbmm_ _linear_pointwise mkldnn_convolution mkldnn_linear',
    'fused attention': '_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention '
    '_efficient_attention_forward _efficient_attention_backward',
    'softmax': '_softmax _softmax_backward_data exp_',
    'copies': 'copy_ clone index index_select index_copy_ index_put_ _index_put_impl_ cat flip roll constant_pad_nd '
    'fill_ stack',
    'norms and GELU': 'native_layer_norm native_layer_norm_backward gelu gelu_backward linalg_vector_norm div div_',
}
KIND_OF_OPERATOR = {name: kind for kind, names in OPERATORS.items() for name in names.split()}

MOVES = '_to_copy|clone|copy|cat|stack|flip|roll|index|index_select|constant_pad_nd|permute|view|fill|zeros|new_zeros'
KERNELS = (  # the first kind whose expression is found in the name
    ('optimizer', r'multi_tensor_apply(?!.*Copy)|[Aa]dam'),  # PyTorch's foreach and fused optimizers
    (
        'attention',
        r'^(forward|query|key|pair|fold)_kernel(_\w+)?$'  # of swinv2_mm
        r'|fmha|flash_(fwd|bwd)|AttentionKernel|_sdpa_|triton_tem_fused\w*attention|[Ss]oft_?[Mm]ax',
    ),
    ('norms', r'^post_norm_(backward_)?kernel(_\w+)?$|[Ll]ayer_?[Nn]orm|GammaBeta|RowwiseMoments|batch_?norm|bn_[bf]w'),
    ('matrix products', r'gemm|gemv|nvjet|cutlass|xmma|splitKreduce|triton_tem_|convol|conv2d|fprop|dgrad|wgrad'),
    (
        'copies and casts',
        r'^Mem(cpy|set)|copy_kernel|multi_tensor_apply|CatArray|FillFunctor|[Ii]ndex|gather|scatter|roll_|flip|nchwToNhwc|nhwcToNchw'
        rf'|^triton_poi_fused(_({MOVES}))+_\d+$',
    ),
    ('reductions', r'[Rr]educe|^triton_(red|per)_'),
    ('GELU and other elementwise', r'elementwise|^triton_poi_|dropout'),
)


def kind_of_operator(name: str) -> str:
    """The kind of an operator of PyTorch, such as ``aten::mm``; ``rest`` if it is of none."""
    return KIND_OF_OPERATOR.get(name.rpartition('::')[2], 'rest')


def kind_of_kernel(name: str) -> str:
    """The kind of a kernel, copy or fill on a GPU, by its name in a profile; ``rest`` if it is of none."""
    return next((kind for kind, expression in KERNELS if re.search(expression, name)), 'rest')


def is_kernel(name: str) -> bool:
    """Whether something that ran on a GPU is a kernel, as opposed to a copy or fill of memory."""
    return not name.startswith(('Memcpy', 'Memset'))
