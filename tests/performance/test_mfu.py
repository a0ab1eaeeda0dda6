"""Timing/mfu: images per second over those at the peak of all GPUs."""

import json
from pathlib import Path

import pytest
import torch

from fastgan.common.distributed import World
from fastgan.performance.live_step import measured_config
from fastgan.performance.machines import full_speed
from fastgan.training.monitor import Monitor

CPU = torch.device("cpu")


def world(device: str, size: int = 1) -> World:
    return World(rank=0, local_rank=0, size=size, device=torch.device(device))


def test_peak_of_all_gpus_over_the_work_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    config = measured_config("cifar10_uncond_d2o_f", [])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    found = full_speed(config, config.init.network, world("cuda", size=8))
    # 312 TFLOP/s each; an iteration has about 350 GFLOP an image, by the method's own counts.
    assert found == pytest.approx(8 * 312e12 / 350e9, rel=0.05)


def test_unknown_where_the_peak_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = measured_config("cifar10_uncond_d2o_f", [])
    assert full_speed(config, config.init.network, world("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some other GPU")
    assert full_speed(config, config.init.network, world("cuda")) is None


@pytest.mark.parametrize("speed", [None, 1000.0])
def test_a_tick_reports_it_where_it_is_known(tmp_path: Path, speed: float | None) -> None:
    monitor = Monitor(tmp_path, total_images=8, nimg=0, device=CPU, main=True, full_speed=speed)
    monitor.advance(8)
    monitor.tick({})
    monitor.close()
    line = json.loads((tmp_path / "stats.jsonl").read_text())
    assert ("Timing/mfu" in line) == (speed is not None)
    if speed is not None:
        assert line["Timing/mfu"] == pytest.approx(line["Timing/img_per_sec"] / speed)
