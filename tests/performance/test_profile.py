"""Where a step's time goes: kinds by name, traces to shares, and the command on a small network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgan_kernels.aot.__main__ import builds

from fastgan.performance import profile
from fastgan.performance.profile import KINDS, kind_of, read_events, summary, table
from tests.command_line import network_file
from tests.performance.conftest import Tool

ATEN = "void at::native::"
ELEMENTWISE = ATEN + "vectorized_elementwise_kernel<4, at::native::"
WINDOW = "step"
ADDITION = ELEMENTWISE + "CUDAFunctor_add<float>, std::array<char*, 3>>"
# As they stand in traces of A100 and H100 class GPUs.
NAMES = {
    "convolution": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_"
        "warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x64>",
        "fastgan::norm_silu_conv_backward",
        "_convolution_input_grad_kernel",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16, float>",
        "triton_tem_fused_convolution_7",
        "triton_tem_fused_addmm_2",
        "triton_poi_fused_addmm_relu_4",
        "triton_poi_fused_convolution_leaky_relu_2",
        "aten::addmm",
        "MmBackward0",
    ],
    "norm": [
        ATEN + "(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16, float>",
        ATEN + "(anonymous namespace)::ComputeInternalGradientsCUDAKernel<float>",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>",
        ELEMENTWISE + "(anonymous namespace)::silu_kernel(at::TensorIteratorBase&)>",
        "triton_poi_fused_convolution_native_group_norm_silu_12",
        "graph_2_cpp_fused_native_group_norm_silu_5",
        "fastgan::group_norm_silu_backward",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 64, 4>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_kernel0_0",
        "triton_per_fused__softmax_5",
        "triton_tem_fused_bmm_3",
    ],
    "optimiser": [
        ATEN + "(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, "
        "at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, 0, false>>",
        "triton_for_fused_2",
        "aten::_foreach_lerp_",
    ],
    "copies": [
        "Memcpy HtoD (Pageable -> Device)",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>",
        ATEN + "elementwise_kernel<128, 4, gpu_kernel_impl_nocast<direct_copy_kernel_cuda>>",
        ATEN + "(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2>, unsigned int, 4>",
        "triton_poi_fused__to_copy_3",
        "aten::cat",
    ],
    "resampling": [
        ATEN + "(anonymous namespace)::upsample_bilinear2d_out_frame<float, float>",
        ATEN + "(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>",
        "void dgrad2d_c1_k1_nhwc_kernel<__half, float>",
        "triton_poi_fused__unsafe_index_add_6",
        "fastgan::resize_normalize_adjoint",
    ],
    "other": [
        ADDITION,
        ATEN + "reduce_kernel<512, 1, at::native::ReduceOp<float, MeanOps<float>>>",
        "triton_poi_fused__to_copy_add_mul_4",
        "triton_poi_fused_convert_element_type_mul_4",
        "Torch-Compiled Region: 0/0",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_by_the_names_of_kernels_and_operators(kind: str) -> None:
    assert {name: kind_of([name]) for name in NAMES[kind]} == dict.fromkeys(NAMES[kind], kind)


def test_our_own_kernels() -> None:
    kinds = {"_kernel": "resampling", "_adjoint_kernel": "resampling", "_add_kernel": "other"}
    found = {(b.module, b.kernel) for b in builds([torch.bfloat16])}
    assert set(kinds) < {kernel for _, kernel in found}
    for module, kernel in found:
        # The only one whose name is a norm's too is known by its operator.
        resized = module == "fastgan_kernels.resize_normalize"
        names = [kernel, *(["fastgan::resize_normalize"] if resized else [])]
        assert kind_of(names) == ("resampling" if resized else kinds.get(kernel, "norm")), kernel


def test_a_nameless_kernel_is_what_launched_it() -> None:
    assert kind_of([ADDITION, "aten::mul_", "aten::native_group_norm"]) == "norm"
    assert kind_of(["aten::copy_", "aten::convolution"]) == "copies"
    # A library's resampling is a convolution, and still resampling.
    convolution = NAMES["convolution"][0]
    assert kind_of([convolution, "aten::convolution", "fastgan::resample2x"]) == "resampling"
    assert kind_of([ADDITION], "update") == kind_of([ADDITION], "EMA") == "optimiser"


def event(cat: str, name: str, tid: int, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur} | {
        "args": {key.replace("_", " "): value for key, value in args.items()}
    }


def gpu_events() -> list[dict[str, Any]]:
    """Python on thread 7, autograd's on 8, one stream (70), and a copy on another one (71)."""
    node = "autograd::engine::evaluate_function: ConvolutionBackward0"
    return [
        event("user_annotation", WINDOW, 7, 100, 1000),
        event("user_annotation", "step/G", 7, 110, 145),
        event("user_annotation", "step/generate", 7, 112, 30),
        event("cpu_op", "aten::native_group_norm", 7, 113, 25, External_id=2),
        event("cpu_op", "aten::mul", 7, 114, 10, External_id=3),
        event("cuda_runtime", "cudaLaunchKernel", 7, 115, 5, correlation=1),
        event("cpu_op", "fastgan::resample2x", 7, 151, 20, External_id=4),
        event("cuda_driver", "cuLaunchKernel", 7, 155, 5, correlation=2),
        event("cpu_op", node, 8, 200, 50, External_id=5),
        event("cpu_op", "aten::add_", 8, 240, 8, External_id=6),
        event("user_annotation", "step/EMA", 7, 260, 30),
        event("cuda_runtime", "cudaLaunchKernel", 7, 265, 5, correlation=7),
        event("kernel", "before the window", 70, 20, 30, correlation=9),
        event("kernel", ADDITION, 70, 200, 300, correlation=1, External_id=3),
        # Triton's launcher is known by its correlation only.
        event("kernel", "_fused_kernel", 70, 500, 100, correlation=2),
        event("kernel", "sm90_xmma_dgrad", 70, 700, 200, correlation=3, External_id=5),
        event("kernel", ADDITION, 70, 900, 50, correlation=4, External_id=6),
        event("kernel", "any", 70, 1050, 500, correlation=7),  # to the window's end
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 71, 650, 100, correlation=77),
        event("gpu_user_annotation", "step/EMA", 70, 500, 100),
    ]


def test_a_trace_of_a_gpu() -> None:
    found = summary(gpu_events(), WINDOW, 1, on_device=True)
    spent = {kind: round(1e3 * ms) for kind, ms in found["kinds"].items() if ms}
    # The copy, which nothing says who launched, hides 50 of the convolution.
    assert spent == {
        **{"norm": 300, "resampling": 100, "copies": 100, "convolution": 150, "other": 50},
        **{"optimiser": 50, "gaps": 250},
    }
    phases = {path: round(1e3 * sum(ms.values())) for path, ms in found["phases"].items()}
    # Backward runs on a thread of its own while Python waits inside its phase.
    assert phases == {"EMA": 50, "G": 300, "G/generate": 300, "outside": 100}
    assert {k: round(1e3 * ms) for k, ms in found["phases"]["G"].items()} == {
        **{"resampling": 100, "convolution": 150, "other": 50}
    }
    halves = summary(gpu_events(), WINDOW, 2, on_device=True)
    assert found["milliseconds"] == 1 and halves["milliseconds"] == 0.5


def test_a_trace_of_a_cpu_counts_self_times() -> None:
    found = summary(
        [
            event("user_annotation", WINDOW, 7, 0, 100),
            event("cpu_op", "aten::convolution", 7, 10, 50),
            event("user_annotation", "step/D", 7, 20, 30),
            event("cpu_op", "aten::copy_", 7, 25, 10),
            event("cpu_op", "aten::add", 7, 70, 10),
            event("cpu_op", "aten::add", 8, 0, 100),  # another thread's
        ],
        WINDOW,
        1,
        on_device=False,
    )
    kinds = {kind: round(1e3 * ms) for kind, ms in found["kinds"].items() if ms}
    assert kinds == {"convolution": 40, "copies": 10, "other": 10, "gaps": 40}
    assert {k: round(1e3 * ms) for k, ms in found["phases"]["D"].items()} == {"copies": 10}


def test_the_command(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "WARMUP", 1)
    out = tmp_path / "new" / "folder"
    init = f"init.path={network_file(tmp_path / 'tiny.safetensors')}"
    small = ("--tiny", "device=cpu", init, "loss.r1_interval=2", "share_fakes=false")
    code, told, _ = tool(
        "profile_step.py", "experiment=demo", *small, "--iterations", 1, "--out", out
    )
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == ["profile.json", "trace.json.gz"]
    report = json.loads((out / "profile.json").read_text())
    assert told.startswith(table(report)) and str(out) in told
    assert "not known on this device" in told and "none of these numbers is a speed" in told
    assert (report["batch"], report["engine"], report["precision"]) == (2, "plain", "published")
    assert report["torch"] == torch.__version__ and "--tiny" in report["command"]
    assert report["img_per_sec"] == pytest.approx(2 / report["seconds_per_iteration"])
    for found in report["profiles"].values():
        kinds, phases = found["kinds"], found["phases"]
        assert sum(kinds.values()) == pytest.approx(found["milliseconds"], rel=1e-6)
        assert all(kinds[kind] > 0 for kind in ("convolution", "norm", "optimiser", "copies"))
        by_phase = sum(ms for of_phase in phases.values() for ms in of_phase.values())
        assert by_phase + kinds["gaps"] == pytest.approx(found["milliseconds"], rel=1e-6)
        parts = {"G", "G/generate", "G/encode", "G/judge", "G/update", "D", "D/encode", "EMA"}
        assert parts <= set(phases)
        assert sum(phases["outside"].values()) < 0.2 * found["milliseconds"]
    ran = [e["name"].split() for e in read_events(out / "trace.json.gz")]
    assert [int(r[1]) % 2 for r in ran if r[0] == "iteration"] == [1, 1, 0, 0]
    assert "R1" in report["profiles"]["r1"]["phases"]
    assert "R1" not in report["profiles"]["step"]["phases"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experiment=imagenet128", "--tiny"], "imagenet64_d2o_f"),
        (["experiment=demo", "engine=warp"], "engine"),
        (["experiment=demo", "--iterations", 0], "--iterations 0"),
        (["engine=plain"], "experiment=cifar10_uncond_d2o_f"),
        (["experiment=demo", "batch_gpu=auto", "device=cpu"], "batch_gpu=N"),
        (["experiment=demo", "--out", __file__, "device=cpu"], "--out FOLDER"),
        (["experiment=demo", "device=cuda"], "use device=cpu"),
        (["--fast"], "--fast"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[object], told: str, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, error = tool("profile_step.py", *arguments)
    assert (status, out) == (1, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert told in error
