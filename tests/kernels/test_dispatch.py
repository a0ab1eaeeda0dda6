"""Which implementation runs, and what is said about it; apex and xformers where they lack."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fastgan_kernels import __main__ as command
from fastgan_kernels import dispatch
from fastgan_kernels.dispatch import (
    IMPLEMENTATIONS,
    choose,
    implementation,
    twice_differentiable,
    use,
)
from fastgan_kernels.norm_silu import _apex_module, group_norm_silu, group_norm_silu_ref
from fastgan_kernels.norm_silu_conv import plans as conv_table
from fastgan_kernels.runtime import FLOATS
from oracle import DEVICE, assert_as_accurate
from torch import Tensor, nn
from torch.nn import functional as F

BF16 = torch.bfloat16
CACHES = (
    dispatch.unknown_architecture,
    conv_table.unmeasured,
    dispatch._say_once,
    dispatch.fused_adam,
    _apex_module,
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was found out about the GPU, and what was said, is forgotten."""
    use("auto")
    for function in CACHES:
        function.cache_clear()
    yield
    for function in CACHES:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An NVIDIA GPU of sm_90 on which nothing was measured, as far as the choice can see."""
    monkeypatch.setattr("fastgan_kernels.runtime.INTERPRETED", False)
    monkeypatch.setattr(conv_table, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


@pytest.mark.parametrize("capability", dispatch.KNOWN_ARCHITECTURES)
def test_a_known_gpu_runs_the_first_implementation(
    capability: tuple[int, int], gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda: capability)
    conv_table.path(capability).touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op, names in IMPLEMENTATIONS.items():
            assert {choose(op, "cuda", dtype).implementation for dtype in FLOATS} == {names[0]}


@pytest.mark.parametrize("setting", ["auto", "triton"])
def test_what_was_not_measured_runs_as_library(setting: str, gpu: pytest.MonkeyPatch) -> None:
    """Its own kernel only for who names it."""
    use(setting)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose("norm_silu_conv", "cuda", BF16)
    assert choice.implementation == "library"
    assert "nothing was measured on sm_90" in choice.reason
    use("norm_silu_conv=triton")
    assert choose("norm_silu_conv", "cuda", BF16).implementation == "triton"


@pytest.mark.parametrize(
    ("target", "value", "reason"),
    [
        *(("torch.cuda.get_device_capability", c, "tried on sm_") for c in ((8, 9), (12, 0))),
        ("torch.version.hip", "6.2", "never tried on this kind of GPU"),
        ("fastgan_kernels.runtime.HAS_TRITON", False, "triton is not installed"),
    ],
)
def test_a_gpu_never_tried_falls_back_with_one_line(
    target: str, value: object, reason: str, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(target, (lambda: value) if isinstance(value, tuple) else value)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = {choose("group_norm_silu", "cuda", dtype).implementation for dtype in FLOATS * 2}
    assert found == {"library"} and len(said) == 1
    assert reason in str(said[0].message) and "\n" not in str(said[0].message)
    use("triton")
    with pytest.raises(ValueError, match=f"cannot run as triton .*{reason}"):
        choose("group_norm_silu", "cuda", BF16)


def test_the_package_imports_without_triton() -> None:
    """As on aarch64: the kernels are there, uncallable, and every op works."""
    program = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "sys.modules['triton'] = None\n"
        "import torch, fastgan_kernels as k\n"
        "x = torch.randn(1, 8, 4, 4)\n"
        "print(k.group_norm_silu(x, 2).shape, k.resample2x(x, [1, 1], up=True).shape)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(dispatch.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "torch.Size([1, 8, 4, 4]) torch.Size([1, 8, 8, 8])\n", done.stderr


def test_float64_and_the_cpu_take_the_definition(gpu: pytest.MonkeyPatch) -> None:
    """Even where kernels could run."""
    for device in ("cpu", "meta", "cuda"):
        assert choose("group_norm_silu", device, torch.float64).implementation == "reference"
    gpu.setattr("fastgan_kernels.runtime.INTERPRETED", True)
    choice = choose("group_norm_silu", "cpu", torch.float32)
    assert (choice.implementation, choice.reason) == ("reference", "not on a GPU")


def test_settings_for_all_and_for_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment wins; triton for all means those that have one, and were measured."""

    def found() -> dict[str, str]:
        return {op: implementation(op, "cpu", torch.float32) for op in IMPLEMENTATIONS}

    use("library,resample2x=reference,group_norm_silu=auto")
    by_name = dict.fromkeys(("resample2x", "group_norm_silu"), "reference")
    assert found() == dict.fromkeys(IMPLEMENTATIONS, "library") | by_name
    use("triton")
    ours = dict.fromkeys(
        [op for op in IMPLEMENTATIONS if "triton" in IMPLEMENTATIONS[op]], "triton"
    )
    expected = dict.fromkeys(IMPLEMENTATIONS, "library") | ours
    assert found() == expected | {"norm_silu_conv": "reference"}  # as auto says, on a CPU
    monkeypatch.setenv(dispatch.VARIABLE, "library")
    choice = choose("group_norm_silu", "cpu", torch.float32)
    assert choice == dispatch.Choice("library", "asked for by FASTGAN_KERNELS=library")


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


def test_compiled_code_follows_the_setting() -> None:
    """One graph each; R1 and a new setting make another."""

    def f(x: Tensor) -> Tensor:
        return x + {"reference": 1, "library": 2}[implementation("resample2x", "cpu", x.dtype)]

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    x = torch.zeros(1)
    assert compiled(x).item() == 1
    use("library")
    assert compiled(x).item() == 2
    with twice_differentiable(), twice_differentiable():
        assert compiled(x).item() == 1
    assert compiled(x).item() == 2


def test_the_command_prints_a_row_for_each_op_and_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastgan_kernels"])
    assert command.main() == 0
    lines = capsys.readouterr().out.splitlines()
    devices = 2 if torch.cuda.is_available() else 1
    assert len(lines) == 1 + len(IMPLEMENTATIONS) * devices * 4
    assert lines[0].split()[:3] == ["op", "device", "dtype"]
    assert all("reference" in line for line in lines if " cpu " in line)
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    assert command.main() == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: no 'fast', in FASTGAN_KERNELS=fast, one of auto")


def module(monkeypatch: pytest.MonkeyPatch, path: str, **content: object) -> None:
    """Installs `path` as an importable module with these names, its parents too."""
    parts = path.split(".")
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[path]).update(content)


class NhwcGroupNorm(nn.GroupNorm):
    """The signature of apex's module."""

    def __init__(self, groups: int, channels: int, eps: float, affine: bool, act: str) -> None:
        super().__init__(groups, channels, eps, affine)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last)
        y = super().forward(x)
        return F.silu(y) if self.act == "silu" else y


@pytest.mark.parametrize("modulated", [True, False])
def test_apex_is_wired_right(modulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "apex.contrib.group_norm", GroupNorm=NhwcGroupNorm)
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    use("group_norm_silu=apex")
    x = torch.randn(2, 32, 4, 4, device=DEVICE)
    weight, bias, *rows = torch.randn(4, 32, device=DEVICE)
    options = {"pre_shift": rows[0][None]}
    if modulated:
        options |= {"scale": rows[0][None], "shift": rows[1][None]}
    y = group_norm_silu(x, 16, weight, bias, **options)
    assert torch.allclose(y, group_norm_silu_ref(x, 16, weight, bias, **options), atol=1e-5)
    assert _apex_module.cache_info().currsize == 1


def obstacle(name: str, device_type: str) -> str | None:
    return dispatch._obstacle("", name, device_type, torch.float32)


def test_libraries_need_to_work_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex has no contrib; an apex built against another CUDA fails in its own ways."""
    module(monkeypatch, "apex")
    module(monkeypatch, "xformers")
    assert obstacle("apex", "cuda") == "apex is not installed"
    assert obstacle("xformers", "cuda") == "xformers is not installed"
    assert dispatch.fused_adam() is None
    module(monkeypatch, "apex.contrib.group_norm", GroupNorm=NhwcGroupNorm)
    assert obstacle("apex", "cpu") == "apex needs a CUDA device"
    assert obstacle("apex", "cuda") is None


@pytest.mark.skipif(obstacle("apex", DEVICE) is not None, reason="apex is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_apex_group_norm_is_as_accurate(dtype: torch.dtype) -> None:
    x = torch.randn(4, 256, 16, 16, device=DEVICE, dtype=dtype)
    weight, bias = (torch.randn(256, device=DEVICE) for _ in range(2))
    results = []
    for setting in ("group_norm_silu=apex", "library"):
        use(setting)
        results.append({"y": group_norm_silu(x, 32, weight, bias)})
    exact = group_norm_silu_ref(x.double(), 32, weight.double(), bias.double())
    assert_as_accurate(*results, {"y": exact})
