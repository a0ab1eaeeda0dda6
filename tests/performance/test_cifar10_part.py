"""Part `cifar10` of the GPU report: its files, its order, what comes home."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.gpu_report import cifar10, cifar10_plot
from benchmarks.gpu_report.markdown import markdown
from benchmarks.gpu_report.parts import all_parts, select
from fastgan.common.errors import UserError

HEADER = {
    "chip": "NVIDIA H200", "device": "cuda", "dry_run": False, "datetime": "d", "software": {},
}  # fmt: skip


def scores(value: float) -> dict:
    return {"resnet56": {"metric": "FD-resnet56", "value": value, "n": 10_000}}


def trained(*values: float) -> dict:
    points = [{"kimg": 100.0 * (k + 1), "value": value} for k, value in enumerate(values)]
    speed = {"median": 2000.0, "n": 9}
    return {"curve": points, "metric": "FD-resnet56", "img_per_sec": speed}


FOUND = {
    "real": HEADER | {"scores": scores(0.5)},
    "pretrain": HEADER | trained(40.0, 9.0),
    "teacher": HEADER | {"scores": scores(8.0), "untuned": scores(300.0)},
    "d2o_f": HEADER | trained(30.0, 7.0) | {"scores": scores(6.5)},
}


def test_it_runs_where_it_is_asked_for() -> None:
    assert not [case for case in select(all_parts(), [], False) if case.part == "cifar10"]
    found = select(all_parts(), ["cifar10"], False)
    assert [case.name for case in found][:4] == ["real", "pretrain", "teacher", "d2o_f"]
    # Training that did not end goes on, also in a later run.
    assert [case.name for case in found if case.resumes] == ["pretrain", *cifar10.FINE_TUNES]


def test_training_images_come_whole_or_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGAN_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=r"cifar10-32x32-train\.zip is not there.*gpu-report\.md"):
        cifar10._training_images(tmp_path)
    name = "cifar10-32x32-train.zip"
    for piece, content in (("01", b"second"), ("00", b"first ")):
        (tmp_path / f"data/{name}.{piece}").write_bytes(content)
    joined = cifar10._training_images(tmp_path)
    assert joined.read_bytes() == b"first second" and joined.parent == tmp_path
    for piece in ("00", "01"):
        (tmp_path / f"data/{name}.{piece}").unlink()
    (tmp_path / f"data/{name}").write_bytes(b"whole")
    assert cifar10._training_images(tmp_path).read_bytes() == b"whole"


def test_later_stages_want_the_earlier_ones(tmp_path: Path) -> None:
    study = cifar10.Study(tmp_path / "cifar10/d2o_f", True)
    with pytest.raises(UserError, match=r"no teacher, .*the case cifar10/pretrain would make it"):
        cifar10.fine_tuned(study, "d2o_f")


def test_the_curve_of_a_run(tmp_path: Path) -> None:
    lines = [
        {"Progress/kimg": 1.0, "Timing/img_per_sec": 10.0},
        {"Progress/kimg": 2.0, "Timing/img_per_sec": 30.0},
        {"Progress/kimg": 2.0, "Metric/FD-resnet56": 7.5},
        {"Progress/kimg": 3.0, "Timing/img_per_sec": 20.0},
    ]
    log = tmp_path / "stats.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert cifar10.curve(log) == {
        "curve": [{"kimg": 2.0, "value": 7.5}],
        "metric": "FD-resnet56",
        "img_per_sec": {"median": 20.0, "n": 3},
    }


def test_table_and_picture(tmp_path: Path) -> None:
    report = {"dry_run": False, "missing": {}, "cifar10": cifar10.merged(FOUND)}
    text = markdown(report)
    assert "| real | 0.5 | - |" in text and "| untuned | 300 | - |" in text
    assert "| d2o_f | 6.5 | 2000 |" in text and "| pretrain | - | 2000 |" in text
    cifar10_plot.write(report, tmp_path)
    assert Image.open(tmp_path / "cifar10.png").size > (500, 300)
    cifar10_plot.write({"dry_run": False}, tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
