"""The kind of a GPU kernel follows from its name, here as profiles print it, cut off after some hundred characters."""

import pytest

NAMESPACE = 'void at::native::(anonymous namespace)::'
COPY = 'void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIter'
CAST = 'void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::Ten'
KERNELS = {  # from profiles of PyTorch 2 on GPUs, but for those of this package
    'matrix products': [
        'nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT',
        'ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn',
        'ampere_sgemm_64x64_nt',
        'sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_',
        'sm80_xmma_fprop_implicit_gemm_tf32f32_tf32f32_f32_nhwckrsc_nchw_tilesize128x128x16_stage4_warps',
        'void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x64_16x6_tn_align4>(T1::Params)',
        'void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, fal',
        'void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>',
        'triton_tem_fused_addmm_3',
    ],
    'attention': [
        'forward_kernel',
        'query_kernel',
        'key_kernel',
        'pair_kernel',
        'fold_kernel',
        'fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloa',
        'fmha_cutlassB_f32_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel<float,',
        'void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<32, 128, 128, 4, false, false, cut',
        NAMESPACE + 'softmax_warp_forward<float, float, float, 8, false, false>(float*, float const*, int, int, int)',
        'void at::native::cunn_SoftMaxBackward<4, float, float, float, at::native::SoftMaxBackwardEpilog',
        'triton_per_fused__softmax_add_7',
    ],
    'norms': [
        'post_norm_kernel',
        'post_norm_backward_kernel',
        NAMESPACE + 'vectorized_layer_norm_kernel<float, float, false>(int, float, float const*, float const*)',
        NAMESPACE + 'layer_norm_grad_input_kernel_vectorized<float, float, false>(float const*, float const*)',
        NAMESPACE + 'GammaBetaBackwardCUDAKernelTemplate<float, float, 32u, 1u, 32u, true, true, false>(long, long)',
        NAMESPACE + 'RowwiseMomentsCUDAKernel<float>(long, float, float const*, float*, float*)',
        'triton_per_fused_native_layer_norm_15',
        'triton_red_fused_native_layer_norm_native_layer_norm_backward_1',
    ],
    'GELU and other elementwise': [
        'void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIter',
        'void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::arra',
        'void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<at::native::Bina',
        'triton_poi_fused_add_addmm_gelu_mul_0',
        'triton_poi_fused__to_copy_gelu_4',
    ],
    'copies and casts': [
        COPY,
        CAST,
        'Memcpy HtoD (Pageable -> Device)',
        'Memcpy DtoD (Device -> Device)',
        'Memset (Device)',
        NAMESPACE + 'CatArrayBatchedCopy_aligned16_contig<at::native::(anonymous namespace)::OpaqueType<2u>, unsigne',
        'void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<ch',
        'void at::native::index_elementwise_kernel<128, 4, at::native::gpu_index_kernel<at::native::inde',
        'void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int, 2, 2, ',
        'triton_poi_fused__to_copy_4',
        'triton_poi_fused_clone_permute_12',
    ],
    'reductions': [
        'void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<f',
        'triton_red_fused_add_sum_0',
        'triton_per_fused_mul_sum_31',
    ],
    'optimizer': [
        NAMESPACE + 'multi_tensor_apply_kernel<at::native::(anonymous namespace)::TensorListMetadata<2>, at::native:',
        NAMESPACE + 'multi_tensor_apply_kernel<at::native::(anonymous namespace)::FusedOptimizerTensorListMetadata<4',
    ],
    'rest': ['void roi_align_forward_cuda_kernel<float>(int, float const*', 'forward_kernel_of_others(float*)'],
}


@pytest.mark.parametrize('kind, name', [(kind, name) for kind, names in KERNELS.items() for name in names])
def test_a_kernel_has_its_kind(load_tool, kind, name):
    assert load_tool('kernel_kinds').kind_of_kernel(name) == kind
