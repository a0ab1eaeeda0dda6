"""From a Chrome trace of torch.profiler to who used the time: every instant counts once.

The exported trace is read rather than the profiler's own events: its format is the same in all
releases of PyTorch, and a trace taken elsewhere can be analysed here. Times are microseconds.
"""

import gzip
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgan.performance.kinds import kind_of
from fastgan.performance.phases import PREFIX

WINDOW = "profiled iterations"
"""The range that the analysis is confined to."""
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCH = frozenset({"cuda_runtime", "cuda_driver"})
_HOST = frozenset({"cpu_op", "user_annotation"}) | _LAUNCH
# Around every node of a backward pass; it also adds up gradients, which is none of the node's work.
_ENGINE = "autograd::engine::evaluate_function"


@dataclass(slots=True, eq=False)
class Span:
    """An event with a duration, and on the host the event that it happened in."""

    name: str
    category: str
    thread: int
    start: float
    end: float
    arguments: dict[str, Any] = field(default_factory=dict)
    parent: "Span | None" = None

    def around(self) -> "Iterator[Span]":
        """The span itself, then what encloses it, innermost first."""
        span: Span | None = self
        while span is not None:
            yield span
            span = span.parent


@dataclass(frozen=True)
class Work:
    """A kernel (without a GPU: an operator) and the time that is its own, not others' beside it."""

    name: str
    phase: str | None
    kind: str
    microseconds: float


@dataclass(frozen=True)
class Timeline:
    """The window of a trace: `works` in it and the time in which nothing ran, microseconds."""

    works: list[Work]
    launches: int
    on_device: bool
    total: float
    idle: float
    phases: frozenset[str]
    """Those whose ranges occur in the trace."""


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, `.json` or `.json.gz`."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def timeline(events: Iterable[dict[str, Any]], *, on_device: bool) -> Timeline:
    """Who used the time inside the trace's range WINDOW.

    `on_device`: kernels and copies of the GPU; otherwise operators of the CPU by their self time.
    """
    events = list(events)
    host = host_spans(events)
    window = next(span for span in host if span.name == WINDOW)
    ran = _device_spans(events) if on_device else [s for s in host if s.category == "cpu_op"]
    ran.sort(key=lambda span: (span.start, -span.end))
    inside = [span for span in ran if window.start <= span.start < window.end]
    own, idle = exclusive_times(ran, window.start, window.end, innermost=not on_device)
    places = _Places(events, host)
    works = [_work(span, t, places) for span, t in zip(ran, own, strict=True) if t > 0]
    return Timeline(
        works=works,
        launches=sum(span.category in ("kernel", "cpu_op") for span in inside),
        on_device=on_device,
        total=window.end - window.start,
        idle=idle,
        phases=frozenset(s.name.removeprefix(PREFIX) for s in host if s.name.startswith(PREFIX)),
    )


def exclusive_times(
    spans: Sequence[Span], start: float, end: float, *, innermost: bool
) -> tuple[list[float], float]:
    """Splits [start, end] among spans sorted by (start, -end); also returns what none covers.

    Where several are active an instant belongs to the last one that began (`innermost`: operators
    call each other), or to the first (kernels on other streams are hidden behind it).
    """
    edges: list[tuple[float, int, int]] = []
    for i, span in enumerate(spans):
        begins, ends = max(span.start, start), min(span.end, end)
        if begins < ends:
            edges += [(begins, 1, i), (ends, 0, i)]
    sign = -1 if innermost else 1
    own, idle, now = [0.0] * len(spans), 0.0, start
    active: list[int] = []
    ended: set[int] = set()
    for time, opens, i in sorted(edges):
        while active and sign * active[0] in ended:
            heapq.heappop(active)
        if active:
            own[sign * active[0]] += time - now
        else:
            idle += time - now
        now = time
        if opens:
            heapq.heappush(active, sign * i)
        else:
            ended.add(i)
    return own, idle + end - now


def host_spans(events: Iterable[dict[str, Any]]) -> list[Span]:
    """What the CPU did, each span with its parent on the same thread."""
    spans = [_span(e) for e in events if e.get("ph") == "X" and e.get("cat") in _HOST]
    spans.sort(key=lambda span: (span.start, -span.end))
    open_spans: dict[int, Span] = {}
    for span in spans:
        parent = open_spans.get(span.thread)
        while parent is not None and parent.end <= span.start:
            parent = parent.parent
        span.parent = parent
        open_spans[span.thread] = span
    return spans


def _device_spans(events: Iterable[dict[str, Any]]) -> list[Span]:
    return [_span(e) for e in events if e.get("ph") == "X" and e.get("cat") in _DEVICE]


def _span(event: dict[str, Any]) -> Span:
    start = float(event["ts"])
    end = start + float(event.get("dur", 0))
    return Span(event["name"], event["cat"], event["tid"], start, end, event.get("args", {}))


def _work(span: Span, microseconds: float, places: "_Places") -> Work:
    phase, operators = places.of(span)
    return Work(span.name, phase, kind_of(phase, [span.name, *operators]), microseconds)


class _Places:
    """Where in the step's Python code something was started.

    A backward node belongs to the phase of the operator that recorded it: both carry one sequence
    number and, as "Fwd thread id", the number of the thread that counted it.
    """

    def __init__(self, events: Iterable[dict[str, Any]], host: Sequence[Span]) -> None:
        self._launches = _by(host, _LAUNCH, "correlation")
        self._operators = _by(host, frozenset({"cpu_op"}), "External id")
        # Operators that record nothing show the number of the next one that does: the last counts.
        self._forward = {
            (s.thread, s.arguments["Sequence number"]): s
            for s in host
            if "Sequence number" in s.arguments and not s.arguments.get("Fwd thread id")
        }
        self._threads = _forward_threads(events, host)

    def of(self, span: Span) -> tuple[str | None, list[str]]:
        """Its phase, and the names of the operators around it, innermost first."""
        started = self._start_of(span) if span.category in _DEVICE else span
        if started is None:
            return None, []
        names = [s.name for s in started.around() if s is not span and s.category == "cpu_op"]
        return self._phase(started), [n for n in names if not n.startswith(_ENGINE)]

    def _start_of(self, span: Span) -> Span | None:
        """The operator that started a kernel; without one, the call that launched it."""
        operator = self._operators.get(span.arguments.get("External id", 0))
        return operator or self._launches.get(span.arguments.get("correlation", 0))

    def _phase(self, span: Span) -> str | None:
        for around in span.around():
            if around.name.startswith(PREFIX):
                return around.name.removeprefix(PREFIX)
            if around.name.startswith("Optimizer."):  # PyTorch's own range
                return "optimiser"
            forward = self._forward_of(around)
            if forward is not None and forward.start < around.start:
                return self._phase(forward)
        return None

    def _forward_of(self, span: Span) -> Span | None:
        counted_by = self._threads.get(span.arguments.get("Fwd thread id", 0))
        if counted_by is None:
            return None
        return self._forward.get((counted_by, span.arguments.get("Sequence number", -1)))


def _by(spans: Iterable[Span], categories: frozenset[str], argument: str) -> dict[int, Span]:
    """Spans of some categories by the value of an argument, where they have it."""
    chosen = (s for s in spans if s.category in categories and argument in s.arguments)
    return {s.arguments[argument]: s for s in chosen}


def _forward_threads(events: Iterable[dict[str, Any]], host: Sequence[Span]) -> dict[int, int]:
    """The profiler's own numbers of threads -> the system's, from its forward-backward arrows."""
    arrows = [e for e in events if e.get("cat") == "fwdbwd"]
    origin = {e["id"]: e["tid"] for e in arrows if e["ph"] == "s"}
    counted = {
        (s.thread, s.start): s.arguments["Fwd thread id"]
        for s in host
        if s.arguments.get("Fwd thread id")
    }
    threads = {}
    for arrow in arrows:
        number = counted.get((arrow["tid"], float(arrow["ts"])))
        if arrow["ph"] == "f" and number and arrow["id"] in origin:
            threads[number] = origin[arrow["id"]]
    return threads
