"""What kind of work a kernel or operator does, by its name."""

import pytest
import torch
from fastgan_kernels.aot.__main__ import builds

from fastgan.performance.kinds import KINDS, kind_of

ATEN = "void at::native::"
ELEMENTWISE = ATEN + "vectorized_elementwise_kernel<4, at::native::"
# As they stand in traces of A100 and H100 class GPUs.
NAMES = {
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_"
        "warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn",
        "sm80_xmma_dgrad_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc_tilesize128x64x16_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x64>",
        "fastgan::norm_silu_conv_backward",
        "_convolution_input_grad_kernel",
        "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, true, false, true>",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16, float>",
        "triton_tem_fused_convolution_7",
        "triton_tem_fused_addmm_2",
        "triton_poi_fused_convolution_leaky_relu_2",
        "aten::mkldnn_convolution",
        "ConvolutionBackward0",
        "aten::addmm",
        "MmBackward0",
    ],
    "norm": [
        ATEN + "(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16, float>",
        ATEN + "(anonymous namespace)::ComputeFusedParamsCUDAKernel<c10::BFloat16, float>",
        ATEN + "(anonymous namespace)::ComputeInternalGradientsCUDAKernel<float>",
        ATEN + "(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
        ATEN + "batch_norm_collect_statistics_channels_last_kernel<VarFactor, float, float, 4>",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>",
        "void group_norm_nhwc_fwd_one_pass_kernel<Fwd_traits>",
        ELEMENTWISE + "(anonymous namespace)::silu_kernel(at::TensorIteratorBase&)>",
        "triton_red_fused_native_group_norm_3",
        "triton_poi_fused_convolution_native_group_norm_silu_12",
        "triton_red_fused__native_batch_norm_legit_functional_8",
        "graph_2_cpp_fused_native_group_norm_silu_5",
        "fastgan::group_norm_silu_backward",
        "NativeBatchNormBackward0",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4>>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_kernel0_0",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, false>",
        ATEN + "(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "triton_per_fused__softmax_5",
        "triton_tem_fused_bmm_3",
        "aten::bmm",
    ],
    "optimiser": [
        ATEN + "(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, "
        "at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, 0, false>>",
        ATEN + "(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<2>, "
        "at::native::TernaryOpScalarFunctor<float, 2, 2, 0>, at::native::LerpFunctor<float>>",
        "triton_for_fused_2",
        "aten::_foreach_lerp_",
    ],
    "copies": [
        "Memcpy HtoD (Pageable -> Device)",
        "Memset (Device)",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>",
        ATEN + "elementwise_kernel<128, 4, gpu_kernel_impl_nocast<direct_copy_kernel_cuda>>",
        ATEN + "(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2>, unsigned int, 4>",
        ELEMENTWISE + "FillFunctor<float>, std::array<char*, 1>>",
        "triton_poi_fused__to_copy_3",
        "aten::copy_",
        "aten::cat",
    ],
    "resampling": [
        ATEN + "(anonymous namespace)::upsample_bilinear2d_out_frame<float, float>",
        ATEN + "(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>",
        "void conv2d_c1_k1_nhwc_kernel<float, float, float>",
        "void dgrad2d_c1_k1_nhwc_kernel<__half, float>",
        ATEN + "(anonymous namespace)::avg_pool2d_out_cuda_frame_nhwc<float>",
        "triton_poi_fused__unsafe_index_add_6",
        "fastgan::resample2x",
        "fastgan::resize_normalize_adjoint",
    ],
    "other": [
        ELEMENTWISE + "CUDAFunctor_add<float>, std::array<char*, 3>>",
        ATEN + "reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps<float>>>",
        "triton_poi_fused__to_copy_add_mul_4",
        "triton_poi_fused_convert_element_type_mul_4",
        "aten::linalg_vector_norm",
        "Torch-Compiled Region: 0/0",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in NAMES.items() for n in names])
def test_names_of_kernels_and_operators(kind: str, name: str) -> None:
    assert kind in KINDS
    assert kind_of(None, [name]) == kind_of("generator", [name]) == kind


def test_our_own_kernels() -> None:
    expected = {"norm_silu_triton": "norm", "resample": "resampling", "add": "other"}
    expected["resize_normalize"] = "resampling"
    ops = {"resize_normalize": ["fastgan::resize_normalize"]}
    found = {(b.module, b.kernel) for b in builds([torch.bfloat16])}
    assert {module for module, _ in found} == set(expected)
    for module, kernel in found:
        assert kind_of(None, [kernel, *ops.get(module, [])]) == expected[module], kernel


def test_a_nameless_kernel_is_what_launched_it() -> None:
    plain = NAMES["other"][0]
    assert kind_of(None, [plain, "aten::mul_", "aten::native_group_norm"]) == "norm"
    # A library's resampling is a convolution, and still resampling.
    library = [NAMES["convolution"][0], "aten::convolution", "fastgan::resample2x"]
    assert kind_of(None, library) == "resampling"
    assert kind_of(None, ["aten::copy_", "aten::convolution"]) == "copies"


def test_some_phases_are_kinds() -> None:
    convolution = NAMES["convolution"][:1]
    kinds = {
        p: kind_of(p, convolution) for p in ("backbone", "mixing", "heads", "ema", "generator")
    }
    assert kinds == {
        "backbone": "backbone",
        "mixing": "mixing",
        "heads": "heads",
        "ema": "optimiser",
        "generator": "convolution",
    }
