"""group_norm_silu against its float64 definition, and as a citizen of autograd and compile."""

from collections.abc import Callable

import pytest
import torch
from fastgan_kernels import dispatch, norm_silu
from fastgan_kernels.norm_silu import group_norm_silu, group_norm_silu_ref
from oracle import DEVICE, DTYPES, assert_as_accurate, gradients
from torch import Tensor

# N, C, H, W, groups: the published networks' kinds of groups, scaled down, then the nasty ones.
SHAPES = {
    "groups of 4": (2, 32, 8, 8, 8),
    "groups of 8": (2, 64, 4, 4, 8),
    "groups of 12, CIFAR's 384": (1, 48, 8, 8, 4),
    "groups of 6, ADM's 192": (2, 24, 8, 8, 4),
    "groups of 18, ADM's 576": (1, 72, 4, 4, 4),
    "groups of 36, ADM's 1152": (1, 72, 4, 4, 2),
    "groups of 42, ADM's 1344": (1, 168, 2, 2, 4),
    "one read of 32 x 32": (1, 16, 32, 32, 2),
    "one read as tiles of 16 and 8": (1, 24, 32, 32, 4),
    "one read as tiles of 64 and 8": (2, 72, 16, 15, 4),
    "swept, 48 x 48": (1, 32, 48, 48, 2),
    "swept, last tile partial": (1, 48, 45, 47, 2),
    "swept, slab wider than 128": (1, 336, 10, 10, 2),
    "odd channels": (2, 5, 3, 3, 1),
    "one group": (2, 40, 4, 4, 1),
    "one pixel": (3, 64, 1, 1, 16),
    "one channel": (2, 1, 5, 3, 1),
    "one channel a group": (2, 16, 4, 4, 16),
}
ALL = "pre_shift scale shift"
EMBEDDINGS = {"plain": "", "song": "pre_shift", "adm": "scale shift", "all": ALL}


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    embedding: str = ALL,
    mean: float = 0.5,
    std: float = 2.0,
) -> dict[str, Tensor]:
    """Inputs of the op by name; the parameters are float32 masters, as in the networks."""
    n, c, h, w, _ = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    x = (normal(n, c, h, w) * std + mean).to(dtype).to(memory_format=torch.channels_last)
    inputs = {"x": x, "weight": 1 + 0.3 * normal(c), "bias": 0.3 * normal(c)}
    return inputs | {name: normal(n, c).to(dtype) * 0.5 for name in embedding.split()}


def run(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], groups: int, **options: object
) -> dict[str, Tensor]:
    """The output and the gradients of all inputs, by name."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y = function(num_groups=groups, **leaves, **options)
    return {"y": y, **gradients([y], leaves)}


def check(inputs: dict[str, Tensor], groups: int, **options: object) -> None:
    def plain(**arguments: object) -> Tensor:
        dispatch.use("library")
        y = group_norm_silu(**arguments)  # type: ignore[arg-type]
        dispatch.use("triton")
        return y

    double = {name: value.double() for name, value in inputs.items()}
    exact = run(group_norm_silu_ref, double, groups, **options)
    ours = run(group_norm_silu, inputs, groups, **options)
    assert_as_accurate(ours, run(plain, inputs, groups, **options), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype, poisoned: None) -> None:
    shape = SHAPES[name]
    check(make(shape, dtype), shape[-1])


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("act", [True, False])
def test_every_embedding(embedding: str, act: bool, poisoned: None) -> None:
    check(make((2, 24, 4, 4, 4), torch.float32, EMBEDDINGS[embedding]), 4, act=act, eps=1e-3)


@pytest.mark.parametrize("shape", [(2, 32, 8, 8, 8), (1, 32, 48, 48, 2)])
def test_large_mean_small_deviation(shape: tuple[int, ...], poisoned: None) -> None:
    """E[x^2] - E[x]^2 would lose all digits here; eps keeps the gradients finite."""
    check(make(shape, torch.float32, "", mean=1e3, std=1e-2), shape[-1], eps=1e-6)
    inputs = make(shape, torch.float32, "", mean=1e3, std=1e-2)
    y = group_norm_silu(inputs["x"], shape[-1], act=False, eps=1e-6)
    assert abs(float(y.std()) - 1) < 0.02


def test_without_weight_and_bias(poisoned: None) -> None:
    inputs = make((2, 24, 4, 4, 4), torch.float32, "shift")
    check({name: inputs[name] for name in ("x", "shift")}, 4)


@pytest.mark.parametrize("layout", ["nchw", "sliced channels", "sliced rows", "expanded"])
def test_other_layouts_are_copied(layout: str) -> None:
    x = make((2, 48, 8, 8, 4), torch.float32)["x"]
    other = {
        "nchw": x.contiguous(),
        "sliced channels": x[:, 8:32],
        "sliced rows": x[:, :, 1:7, 2:],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }[layout]
    dense = other.clone().contiguous(memory_format=torch.channels_last)
    y = group_norm_silu(other, 4)
    assert torch.equal(y, group_norm_silu(dense, 4))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("gradient", ["expanded", "nchw", "sliced"])
def test_any_layout_of_the_incoming_gradient(gradient: str) -> None:
    x = make((2, 24, 4, 4, 4), torch.float32)["x"].requires_grad_()
    dense = torch.randn(2, 24, 4, 4, device=DEVICE)
    dy = {
        "expanded": torch.ones(1, device=DEVICE).expand(2, 24, 4, 4),
        "nchw": dense,
        "sliced": torch.randn(2, 24, 9, 4, device=DEVICE)[:, :, 1::2],
    }[gradient]
    (found,) = torch.autograd.grad(group_norm_silu(x, 4), x, dy)
    double = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(group_norm_silu_ref(double, 4), double, dy.double())
    assert torch.allclose(found.double(), exact, atol=1e-5)


def test_chunked_and_shared_embeddings() -> None:
    """scale and shift as halves of one affine map's rows; one row of pre_shift for all samples."""
    x = make((2, 24, 4, 4, 4), torch.float32)["x"]
    rows = torch.randn(2, 48, device=DEVICE)
    scale, shift = rows.chunk(2, dim=1)
    y = group_norm_silu(x, 4, scale=scale, shift=shift, pre_shift=rows[:1, :24])
    exact = group_norm_silu_ref(x, 4, scale=scale, shift=shift, pre_shift=rows[:1, :24])
    assert torch.allclose(y, exact, atol=1e-5)


def test_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen norm computes dx alone; without dx the second sweep is left out."""
    asked: list[frozenset[str]] = []
    original = norm_silu.group_norm_silu_backward

    def spy(*arguments: object, **options: object) -> object:
        asked.append(options["wanted"])  # type: ignore[arg-type]
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(norm_silu, "group_norm_silu_backward", spy)
    inputs = make((2, 24, 4, 4, 4), torch.float32, "pre_shift")
    inputs["x"].requires_grad_()
    group_norm_silu(num_groups=4, **inputs).sum().backward()
    inputs["x"].requires_grad_(False)
    inputs["bias"].requires_grad_()
    group_norm_silu(num_groups=4, **inputs).sum().backward()
    assert asked == [frozenset({"x"}), frozenset({"affine"})]
    assert inputs["bias"].grad is not None and inputs["weight"].grad is None


def test_the_same_bits_every_time() -> None:
    inputs = make((2, 24, 8, 8, 4), torch.float32)
    first, again = (run(group_norm_silu, inputs, 4) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_keeps_the_input_and_nothing_of_its_size() -> None:
    x = make((2, 24, 8, 8, 4), torch.float32)["x"].requires_grad_()
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        group_norm_silu(x, 4)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_gradcheck_of_the_definition() -> None:
    dispatch.use("auto")
    inputs = {
        k: v.double().requires_grad_() for k, v in make((2, 6, 2, 3, 2), torch.float32).items()
    }

    def function(*values: Tensor) -> Tensor:
        return group_norm_silu(num_groups=2, **dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


def test_r1_takes_the_definition_or_says_no() -> None:
    """A second derivative is exact inside twice_differentiable and refused outside, never wrong."""
    x = make((2, 8, 2, 2, 2), torch.float32)["x"].requires_grad_()
    with dispatch.twice_differentiable():
        (g,) = torch.autograd.grad(group_norm_silu(x, 2).square().sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum(), x)
    (g,) = torch.autograd.grad(group_norm_silu_ref(x, 2).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(g.square().sum(), x)
    assert torch.equal(found, expected)
    (g,) = torch.autograd.grad(group_norm_silu(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
        torch.autograd.grad(g.square().sum(), x)


def test_opcheck() -> None:
    inputs = make((2, 24, 4, 4, 4), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    arguments = (leaves["x"], 4, leaves["weight"], leaves["bias"], 1e-5)
    per_sample = (leaves["pre_shift"], leaves["scale"], leaves["shift"])
    torch.library.opcheck(torch.ops.fastgan.group_norm_silu, (*arguments, *per_sample, True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_eager_in_one_graph(backend: str) -> None:
    inputs = make((2, 24, 4, 4, 4), torch.float32)
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend=backend)
    eager, found = run(group_norm_silu, inputs, 4), run(compiled, inputs, 4)
    assert all(torch.equal(eager[name], found[name]) for name in eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "num_groups 5 does not divide the 24 channels of x"),
        ({"x": torch.zeros(2, 24, 4)}, r"x has shape \[2, 24, 4\]"),
        ({"x": torch.zeros(2, 24, 4, 4, dtype=torch.int32)}, "x is torch.int32"),
        ({"weight": torch.ones(23)}, r"weight has shape \[23\], \[24\] would fit x"),
        ({"scale": torch.ones(3, 24)}, r"scale has shape \[3, 24\], \[2, 24\] would fit x"),
        ({"x": torch.zeros(2, 24, 4, 4, dtype=torch.float64)}, "no kernel for float64"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 24, 4, 4), "num_groups": 4} | change
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments)


def test_cpu_tensors_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgan_kernels.runtime.INTERPRETED", False)
    with pytest.raises(ValueError, match="CPU tensors need TRITON_INTERPRET=1"):
        group_norm_silu(torch.zeros(2, 24, 4, 4), 4)
    dispatch.use("auto")
    assert torch.equal(group_norm_silu(torch.zeros(2, 24, 4, 4), 4), torch.zeros(2, 24, 4, 4))
