"""What is measured: every op at every shape of the published networks, made, compared with float64
and only then timed."""

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastgan_kernels import dispatch
from fastgan_kernels.aot.shapes import NETWORKS, Network
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import DEVICE, DTYPE, ON_GPU

DIRECTIONS = ("forward", "backward")
# PyTorch's operators as one would write them: its convolution too, which keeps its input.
LIBRARY = "library,frozen_conv2d=reference"
# Candidate -> what dispatch takes for it. Without these a case cannot be compared.
REQUIRED = {"library": LIBRARY, "compile": LIBRARY, "ours": "triton"}
Inputs = dict[str, Any]
"""Tensors by argument name."""
Normal = Callable[..., Tensor]
"""(*size, std=1, dtype=DTYPE) -> random numbers, images channels_last."""


@dataclass(frozen=True)
class Shape:
    """Channels in and out, pixels a side, and what else tells one call of an op from another."""

    cin: int
    cout: int
    size: int
    kernel: int = 3
    embedding: str = ""
    act: bool = True
    resample: str = ""

    def __str__(self) -> str:
        channels = f"C{self.cin}" if self.cin == self.cout else f"{self.cin}to{self.cout}"
        kind = [self.resample, self.embedding.replace(" ", "_"), "" if self.act else "linear"]
        kind.append("" if self.kernel == 3 else f"{self.kernel}x{self.kernel}")
        return "-".join(filter(None, [channels, f"{self.size}px", *kind]))


@dataclass(frozen=True)
class Case:
    """An op at one shape; `count`: how often it occurs in one pass of the network."""

    op: str
    network: Network
    shape: Shape
    count: int = 1

    def __str__(self) -> str:
        return f"{self.network.name}-{self.shape}"

    @property
    def batch(self) -> int:
        return self.network.batch

    @property
    def channels(self) -> int:
        """The more numerous of in and out."""
        return max(self.shape.cin, self.shape.cout)

    @property
    def pixels(self) -> int:
        """Of one channel of the input."""
        return self.shape.size**2


def norms(network: Network) -> Iterator[tuple[Shape, int]]:
    for n, count in network.norms().items():
        yield Shape(n.channels, n.channels, n.size, embedding=n.embedding, act=n.act), count


def norm_convolutions(network: Network) -> Iterator[tuple[Shape, int]]:
    """A block's 3 x 3 convolutions with the norm in front, where nothing is resampled in between;
    the second one's norm takes the embedding."""
    for b in network.blocks:
        if not b.resample:
            yield Shape(b.cin, b.cout, b.size), b.count
        yield Shape(b.cout, b.cout, b.out_size, embedding=network.embedding), b.count


def blocks(network: Network) -> Iterator[tuple[Shape, int]]:
    """Without attention, which is the same library call in every candidate."""
    for b in network.blocks:
        yield Shape(b.cin, b.cout, b.size, resample=b.resample), b.count


# Shapes of a network's ops, each with how often it is there; one may come several times.
TABLES: dict[str, Callable[[Network], Iterable[tuple[Shape, int]]]] = {
    "group_norm_silu": norms,
    "frozen_conv2d": lambda n: ((Shape(*s), count) for s, count in n.convolutions().items()),
    "norm_silu_conv": norm_convolutions,
    "frozen_unet_block": blocks,
    "resample2x": lambda n: ((Shape(c, c, s, resample=way), 1) for c, s, way in n.resamplings()),
    "resize_normalize": lambda n: [(Shape(3, 3, n.resolution), 1)],
}


def published(op: str) -> list[Case]:
    """Every case of `op`, network by network."""
    cases = []
    for network in NETWORKS:
        found: Counter[Shape] = Counter()
        for shape, count in TABLES[op](network):
            found[shape] += count
        cases += [Case(op, network, shape, count) for shape, count in found.items()]
    return cases


def tiny(cases: Iterable[Case]) -> list[Case]:
    """One case of each kind per network, of one image and few channels (in multiples of the 32
    groups; different ones stay different): to try the code, not to time."""
    found: dict[object, Case] = {}
    for case in cases:
        s, network = case.shape, replace(case.network, batch=1)
        cin, cout = (c if c == 3 else 32 * -(-c // 128) for c in (s.cin, s.cout))
        small = replace(s, cin=cin, cout=cout, size=min(4, s.size))
        kind = network.name, replace(s, cin=s.cin != s.cout, cout=0, size=0)
        found.setdefault(kind, Case(case.op, network, small, case.count))
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Op:
    """How to measure one op.

    inputs: its tensors by name, `x` first, those whose gradients a D2O-F fine-tune computes with
    requires_grad; call: the function that it is given, on them; ours: the public function, exact:
    the definition, which gets float64; floor: (bytes, FLOP) in one direction that no implementation
    does without. others: further candidates, by what dispatch takes. largest: whether the largest
    error is compared too (behind many roundings it is luck).
    """

    name: str
    inputs: Callable[[Case, Normal], Inputs]
    call: Callable[[Callable[..., Tensor], Case, Inputs], Tensor]
    ours: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    floor: Callable[[Case, str], tuple[float, float]]
    others: Mapping[str, str] = field(default_factory=dict)
    largest: bool = True

    @property
    def candidates(self) -> list[str]:
        return [*REQUIRED, *self.others]

    def function(self, case: Case, candidate: str) -> Callable[[Inputs], Tensor]:
        """The candidate; it asks dispatch, which is told here."""
        dispatch.use((REQUIRED | dict(self.others))[candidate])
        call = partial(self.call, self.ours, case)
        if candidate != "compile":
            return call
        torch._dynamo.reset()
        backend = "inductor" if ON_GPU else "aot_eager"
        return torch.compile(call, backend=backend, fullgraph=True, dynamic=False)


def norm_parameters(normal: Normal, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias; parameters of norms are float32 masters."""
    weight, bias = (normal(channels, std=0.3, dtype=torch.float32) for _ in range(2))
    return 1 + weight, bias


def kernel(normal: Normal, cin: int, cout: int, side: int = 3) -> Tensor:
    """Frozen, of a size that keeps the deviation."""
    return normal(cout, cin, side, side, std=(cin * side**2) ** -0.5)


def training(tensors: Inputs) -> Inputs:
    """The same, asking for gradients."""
    return {name: value.requires_grad_() for name, value in tensors.items()}


def make(op: Op, case: Case) -> Inputs:
    """The same numbers for every candidate."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        value = (torch.randn(size, generator=generator, device=DEVICE) * std).to(dtype)
        return value.to(memory_format=torch.channels_last) if len(size) == 4 else value

    return op.inputs(case, normal)


def gradients(y: Tensor, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A backward pass that can be run again and again, from numbers that every dtype holds."""
    wanted = [value for value in inputs.values() if value.requires_grad]
    generator = torch.Generator(DEVICE).manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, device=DEVICE).to(DTYPE).to(y.dtype)
    dy = dy.to(memory_format=torch.channels_last)
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def results(function: Callable[[Inputs], Tensor], inputs: Inputs) -> Inputs:
    """The output, and the gradients that are asked for by name."""
    y = function(inputs)
    names = [f"grad {name}" for name, value in inputs.items() if value.requires_grad]
    return {"y": y.detach(), **dict(zip(names, gradients(y, inputs)(), strict=True))}


def calls(
    function: Callable[[Inputs], Tensor], inputs: Inputs, direction: str
) -> list[Callable[[], object]]:
    """Calls with an x and a dy each; parameters are shared, as they are in training."""
    x = inputs["x"].detach()
    count = measure.copies(2 * x.nbytes)
    sets = [inputs | {"x": x.clone().requires_grad_()} for _ in range(count)]
    if direction == "forward":
        return [partial(function, each) for each in sets]
    return [gradients(function(each), each) for each in sets]


def prepare() -> None:
    """Before anything is measured in this process."""
    # PyTorch otherwise refuses to run a compiled backward a second time on the same forward.
    torch._functorch.config.donated_buffer = False
    torch.backends.cudnn.benchmark = True


def measurable(op: Op) -> list[Case]:
    """The published cases; without a GPU tiny ones."""
    return published(op.name) if ON_GPU else tiny(published(op.name))


def rows(op: Op, words: Iterable[str] = ()) -> Iterator[measure.Content]:
    """Measures `op` where all `words` are in OP-NETWORK-SHAPE-CANDIDATE: a row per case, candidate
    and direction. A candidate that is less accurate than the tests of kernels allow, or breaks, is
    one row with `failed`, a line, and no time."""
    prepare()
    copied, multiplied = (f()["median"] for f in (measure.copy_bandwidth, measure.product_rate))
    for case in measurable(op):
        chosen = [n for n in op.candidates if all(w in f"{op.name}-{case}-{n}" for w in words)]
        with measure.one_stream():
            right = truth(op, case) if chosen else None
        for candidate in chosen:
            about = {"op": op.name, "network": case.network.name, "shape": str(case.shape)}
            about |= {key: getattr(case, key) for key in ("count", "channels", "pixels", "batch")}
            about |= {"candidate": candidate}
            try:
                with measure.one_stream():
                    found = _measured(op, case, candidate, right)
            except Exception as error:
                traceback.print_exc()
                found = [{"failed": f"{type(error).__name__}: {error}".partition("\n")[0]}]
            for row in found:
                if "failed" not in row:
                    moved, flop = op.floor(case, row["direction"])
                    row["floor_seconds"] = max(moved / copied, flop / multiplied)
                yield about | row


def truth(op: Op, case: Case) -> tuple[Inputs, Inputs]:
    """What plain PyTorch finds, and what is right."""
    inputs = make(op, case)
    double = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    plain = results(op.function(case, "library"), inputs)
    return plain, results(partial(op.call, op.exact, case), double)


def accurate(op: Op, case: Case, candidate: str, right: Any) -> Callable[[Inputs], Tensor]:
    """The candidate's function; AssertionError where its result or a gradient is not accurate."""
    # The tests' yardstick of accuracy is the benchmarks' too.
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests/kernels"))
    from oracle import assert_as_accurate

    function = op.function(case, candidate)
    assert_as_accurate(results(function, make(op, case)), *right, largest=op.largest)
    return function


def _measured(op: Op, case: Case, candidate: str, right: Any) -> list[measure.Content]:
    """Seconds of both directions, and bytes kept."""
    function, inputs = accurate(op, case, candidate, right), make(op, case)
    # x, which is there before, is counted too.
    kept = measure.kept_bytes(lambda: function(inputs), inputs["x"].nbytes)
    found = []
    for direction in DIRECTIONS:
        seconds = measure.samples(measure.per_call(calls(function, inputs, direction)))
        found.append({"direction": direction, "kept_bytes": kept, "seconds": seconds})
    return found
