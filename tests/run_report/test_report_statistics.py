"""stats.jsonl and what is healthy, against the training code's own."""

import math
import re
from pathlib import Path

import pytest
import torch

from fastgan.common.run_state import RunState, write_state
from fastgan.run_report.curves import MOST_POINTS, Chart, Curve, curves, draw, thinned, undecided
from fastgan.run_report.run import read_run
from fastgan.run_report.statistics import Statistics, parse_statistics
from fastgan.training import losses
from fastgan.training.monitor import Diverged, Health
from fastgan.training.resume import how_it_ended
from tests.run_report.pages import make_run, metric, tick
from tests.training.test_loop import Counting, train
from tests.training.toys import diffusion_heads, generator, reals

NAN = math.nan


def statistics_of(lines: list[str], end: str = "") -> Statistics:
    return parse_statistics(("".join(f"{line}\n" for line in lines) + end).encode())


def test_a_torn_end_is_left_out_and_broken_lines_are_counted(tmp_path: Path) -> None:
    assert statistics_of([tick(1)], tick(2)).series("Loss/G")[0] == [1, 2]
    bad = ["{", "[]", "null", "", '{"Loss/G": 1}', tick(-1), '{"Progress/kimg": true}', "\0"]
    bad += ["[" * 5000, '{"Progress/kimg": ' + "9" * 5000 + "}", "x" * 100_000]
    found = statistics_of([tick(1), *bad, tick(2)], tick(3)[:40])
    assert found.broken == len(bad) and found.series("Loss/D")[0] == [1, 2]
    notes = read_run(make_run(tmp_path / "run", [*bad, tick(1)])).folder.notes
    assert notes == [f"left out: broken lines of stats.jsonl, {len(bad)} of them"]


def test_what_is_no_finite_number_is_a_gap() -> None:
    texts = ["null", "NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, '"1"', "true"]
    texts += ["[1]", "1e300"]
    lines = [tick(k).replace('"Loss/G": 1.5', f'"Loss/G": {t}') for k, t in enumerate(texts)]
    found = statistics_of(lines)
    assert found.broken == 0 and all(map(math.isnan, found.series("Loss/G")[1]))
    assert len(found.series("Loss/G")[0]) == len(found.values("Loss/D")) == len(texts)


def test_what_a_resumed_run_repeats_counts_once() -> None:
    lines = [tick(1), tick(2), metric(2, 9.0), tick(3), metric(3, 8.0)]
    lines += [tick(2, Loss_G=7.0), metric(2, 5.0), tick(3, Loss_G=6.0)]
    found = statistics_of(lines)
    assert found.series("Loss/G") == ([1, 2, 3], [1.5, 7.0, 6.0])
    assert found.series("Metric/FD-x") == ([2], [5.0])
    assert len(found.times) == 5


def test_only_so_many_metrics() -> None:
    found = statistics_of([metric(1, 1.0, f"m{k}") for k in range(500)])
    assert found.metrics == [f"Metric/m{k}" for k in range(12)]


def test_thinned_means_leave_gaps() -> None:
    many = 10 * MOST_POINTS
    ys = [NAN] * 20 + [float(k) for k in range(20, many)]
    ys[25] = NAN
    x, y = thinned(([float(k) for k in range(many)], ys))
    assert len(x) == len(y) == MOST_POINTS
    assert x[:3] == [4.5, 14.5, 24.5] and all(map(math.isnan, y[:2]))
    assert y[2] == pytest.approx((20 + 21 + 22 + 23 + 24 + 26 + 27 + 28 + 29) / 9)
    assert y[-1] == many - 5.5
    assert len(thinned(([0.0] * (many + 1), [1.0] * (many + 1)))[0]) <= MOST_POINTS


def drawn(points: tuple[list[float], list[float]], log: bool = False) -> list[list[float]]:
    """The strokes of a drawn line: x, y, x, y, ..."""
    curve = Curve("x", "#0072B2", False, points)
    svg = draw(Chart("t", ("Loss/R1",), "", log=log), [curve])
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #0072b2', svg)
    return [[float(x) for x in re.findall(r"-?[\d.]+", part)] for part in path.split("M")[1:]]


def test_a_drawn_line_has_the_values_and_the_gap() -> None:
    first, second = drawn(([0, 1, 3, 4, 5], [0.0, 1.0, 4.0, NAN, 2.0]))
    x0, y0, x1, y1, x2, y2 = first
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 3, abs=1e-3)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(1 / 4, abs=1e-3)
    assert len(second) == 2 and (y0 - second[1]) / (y0 - y2) == pytest.approx(1 / 2, abs=1e-3)


def test_the_logarithmic_chart_leaves_zero_out() -> None:
    ((_, a, _, b, _, c),) = drawn(([0, 1, 2, 3], [0.0, 1.0, 10.0, 100.0]), log=True)
    assert a - b == pytest.approx(b - c, abs=1e-3) and a > b


def test_colours_are_of_runs_or_of_keys() -> None:
    chart = Chart("t", ("Loss/G", "Loss/D"), "")
    made = Statistics([{"Progress/kimg": 1.0, "Loss/G": 1.0, "Loss/D": 2.0}])
    alone, two = curves(chart, [("a", made)]), curves(chart, [("a", made), ("b", made)])
    assert [c.label for c in alone] == ["G", "D"] and alone[0].colour != alone[1].colour
    assert [c.label for c in two] == ["a: G", "a: D", "b: G", "b: D"]
    assert two[0].colour == two[1].colour != two[2].colour
    assert [c.dashed for c in two] == [False, True, False, True]


@pytest.mark.parametrize("kind", ["nonsaturating", "hinge"])
def test_undecided_losses_are_those_of_silent_logits(kind: losses.Kind) -> None:
    entries = len(diffusion_heads(generator())(reals(0)))
    settings = [(entries, {"kind": "diffusion"})]
    settings += [(b, {"kind": "projected", "backbones": ["net"] * b}) for b in (1, 2, 3)]
    for branches, discriminator in settings:
        silent = [torch.zeros(4, 5 + b) for b in range(branches)]
        d = losses.fake_loss(silent, kind) + losses.real_loss(silent, kind)
        expected = float(losses.generator_loss(silent, kind).mean()), float(d.mean())
        config = {"loss": {"kind": kind}, "discriminator": discriminator}
        assert undecided(config) == pytest.approx(expected)


@pytest.mark.parametrize(
    "config",
    [{}, {"loss": 1, "discriminator": [1]}, {"loss": {"kind": {}}, "discriminator": {"kind": "x"}},
     {"loss": {"kind": "hinge"}, "discriminator": {"kind": "projected", "backbones": "abc"}}],
)  # fmt: skip
def test_other_settings_have_no_undecided_losses(config: dict) -> None:
    assert undecided(config) is None


def test_every_warning_of_training_is_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(Diverged):
        train(Counting(**{f"k{k}": "skip" for k in range(30)}), run, 400)
    sure = {"Loss/sign_real": 1.0, "Loss/sign_fake": -1.0, "Loss/diversity": 0.1}
    told = Health().warnings(sure)
    assert len(told) == 2
    for state in ("running", "failed", "preempted"):
        write_state(run, RunState(state, 8, None, "why"))
        told.append(how_it_ended(run) or "")
    (run / "state.json").write_text("{")
    told.append(how_it_ended(run) or "")
    with (run / "log.txt").open("a") as log:
        log.write("\n".join([*told, "left out: damaged checkpoint", "16 images are trained in x"]))
    found = read_run(run)
    assert found.warnings[-len(told) - 1 :][:-1] == told
    assert found.warned == len(found.warnings)
    assert [line for line in found.warnings if re.match(r"left out \d+ updates of G", line)]
    assert "images are trained" not in "".join(found.warnings)
