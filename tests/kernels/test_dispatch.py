"""Which implementation runs, and what is said about it."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.dispatch import (
    IMPLEMENTATIONS,
    choose,
    implementation,
    twice_differentiable,
    use,
)
from fastgan_kernels.norm_silu_conv import table as conv_table

ROOT = Path(__file__).resolve().parents[2]
FOUND_OUT = (
    dispatch.unknown_architecture,
    conv_table.unmeasured,
    dispatch._say_once,
)
TRITON_OPS = [op for op, names in IMPLEMENTATIONS.items() if "triton" in names]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was found out about the GPU, and what was said, is forgotten."""
    use("auto")
    for function in FOUND_OUT:
        function.cache_clear()
    yield
    for function in FOUND_OUT:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An NVIDIA GPU of sm_90 on which nothing was measured, as far as the choice can see."""
    monkeypatch.setattr("fastgan_kernels.runtime.INTERPRETED", False)
    monkeypatch.setattr(conv_table, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", dispatch.FLOATS)
@pytest.mark.parametrize("capability", dispatch.KNOWN_ARCHITECTURES)
def test_a_known_gpu_runs_the_first_implementation(
    op: str, dtype: torch.dtype, capability: tuple[int, int], gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda: capability)
    conv_table.path(capability).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(op, "cuda", dtype).implementation == IMPLEMENTATIONS[op][0]


@pytest.mark.parametrize("setting", ["auto", "triton"])
def test_what_was_not_measured_runs_as_library(setting: str, gpu: pytest.MonkeyPatch) -> None:
    """Its own kernel only for who names it."""
    use(setting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose("norm_silu_conv", "cuda", torch.bfloat16)
    assert choice.implementation == "library"
    assert "nothing was measured on sm_90" in choice.reason
    use("norm_silu_conv=triton")
    assert choose("norm_silu_conv", "cuda", torch.bfloat16).implementation == "triton"


@pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0), (7, 5)])
def test_a_gpu_never_tried_falls_back_with_one_line(
    capability: tuple[int, int], gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            for dtype in dispatch.FLOATS:
                assert choose("group_norm_silu", "cuda", dtype).implementation == "library"
    assert len(said) == 1
    assert f"sm_{capability[0]}{capability[1]}" in str(said[0].message)
    assert "\n" not in str(said[0].message)


def test_rocm_falls_back(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.version, "hip", "6.2")
    with pytest.warns(UserWarning, match="never tried on this kind of GPU"):
        assert choose("resample2x", "cuda", torch.bfloat16).implementation == "library"


def test_without_triton(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr("fastgan_kernels.runtime.HAS_TRITON", False)
    with pytest.warns(UserWarning, match="triton is not installed"):
        assert choose("group_norm_silu", "cuda", torch.bfloat16).implementation == "library"
    use("triton")
    with pytest.raises(ValueError, match="cannot run as triton"):
        choose("group_norm_silu", "cuda", torch.bfloat16)


def test_the_package_imports_without_triton() -> None:
    """As on aarch64: the kernels are there, uncallable, and every op works."""
    program = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "sys.modules['triton'] = None\n"
        "import torch, kernels\n"
        "x = torch.randn(1, 8, 4, 4)\n"
        "print(kernels.group_norm_silu(x, 2).shape, kernels.resample2x(x, [1, 1], up=True).shape)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "torch.Size([1, 8, 4, 4]) torch.Size([1, 8, 8, 8])\n", done.stderr


@pytest.mark.parametrize("device", ["cpu", "meta", "cuda"])
def test_float64_is_for_checking(device: str, gpu: pytest.MonkeyPatch) -> None:
    assert choose("group_norm_silu", device, torch.float64).implementation == "reference"


def test_the_cpu_takes_the_definition_even_where_kernels_could_run() -> None:
    choice = choose("group_norm_silu", "cpu", torch.float32)
    assert (choice.implementation, choice.reason) == ("reference", "not on a GPU")


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    use("triton")
    monkeypatch.setenv(dispatch.VARIABLE, "library")
    choice = choose("group_norm_silu", "cpu", torch.float32)
    assert choice.implementation == "library" and "FASTGAN_KERNELS=library" in choice.reason


def test_one_op_at_a_time() -> None:
    use("library,resample2x=reference,group_norm_silu=auto")
    found = {op: implementation(op, "cpu", torch.float32) for op in IMPLEMENTATIONS}
    assert found.pop("resample2x") == found.pop("group_norm_silu") == "reference"
    assert set(found.values()) == {"library"}


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_triton_for_all_means_those_that_have_one(op: str) -> None:
    use("triton")
    expected = "triton" if op in TRITON_OPS else "library"
    expected = "reference" if op == "norm_silu_conv" else expected  # as auto says, on a CPU
    assert implementation(op, "cpu", torch.float32) == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cuda", "no 'cuda', in kernels=cuda, one of auto, triton, library, reference would do"),
        ("apex", "no 'apex'"),
        ("norm=triton", "no op 'norm', in kernels=norm=triton, one of group_norm_silu"),
        ("resample2x=apex", "no 'apex', in kernels=resample2x=apex, one of auto, triton"),
        ("library,,", "no ''"),
    ],
)
def test_a_wrong_setting_is_named_and_not_taken(setting: str, message: str) -> None:
    use("library")
    with pytest.raises(ValueError, match=message):
        use(setting)
    assert implementation("resample2x", "cpu", torch.float32) == "library"


def test_what_cannot_run_is_said(gpu: pytest.MonkeyPatch) -> None:
    use("triton")
    with pytest.raises(ValueError, match=r"CPU tensors need .*reference or auto"):
        choose("group_norm_silu", "cpu", torch.float32)
    with pytest.raises(ValueError, match="no kernel for float64"):
        choose("group_norm_silu", "cuda", torch.float64)


def test_r1_takes_the_definition_whatever_is_asked() -> None:
    use("triton")
    with twice_differentiable(), twice_differentiable():
        assert implementation("group_norm_silu", "cpu", torch.float32) == "reference"
    assert implementation("group_norm_silu", "cpu", torch.float32) == "triton"


def test_compiled_code_follows_the_setting() -> None:
    """One graph each; R1 and a new setting make another."""

    def f(x: torch.Tensor) -> torch.Tensor:
        return x + {"reference": 1, "library": 2}[implementation("resample2x", "cpu", x.dtype)]

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    x = torch.zeros(1)
    assert compiled(x).item() == 1
    use("library")
    assert compiled(x).item() == 2
    with twice_differentiable():
        assert compiled(x).item() == 1
    assert compiled(x).item() == 2


def test_the_command_prints_a_row_for_each_op_and_dtype() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kernels"], capture_output=True, text=True, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    devices = 2 if torch.cuda.is_available() else 1
    assert len(lines) == 1 + len(IMPLEMENTATIONS) * devices * 4
    assert lines[0].split()[:3] == ["op", "device", "dtype"]
    assert all("reference" in line for line in lines if " cpu " in line)


def test_the_command_refuses_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    command = [sys.executable, "-m", "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no 'fast', in FASTGAN_KERNELS=fast, one of auto")
    assert len(done.stderr.splitlines()) == 1
