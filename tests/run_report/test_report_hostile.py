"""Run directories that somebody made to harm: escaped, bounded, inside, or left out and said so."""

import base64
import json
import os
import struct
import zlib
from pathlib import Path

import pytest

from tests.run_report.pages import (
    add_checkpoint,
    add_sample,
    make_run,
    metric,
    page_of,
    set_state,
    tick,
)

SCRIPT = "<script>alert(1)</script>"
ATTACKS = [
    SCRIPT,
    '"><img src=x onerror=alert(1)></pre></style></title>{{ 7 * 7 }}{% raw %}<script src=//evil>',
    "_$\\frac{1}{$ \\dangerous javascript:alert(1)\u202e\x00\x1b[31m\ud800",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_texts_are_escaped_wherever_they_come_from(attack: str, tmp_path: Path) -> None:
    lines = [tick(1), metric(1, 2.0, attack), tick(2), metric(2, 3.0, attack)]
    # What UTF-8 and file names can hold of it.
    text = attack.encode(errors="replace").decode()
    name = text.replace("/", "_").replace("\0", "")
    settings = {"experiment_name": text, "total_images": text, text: {text: [text]}}
    run = make_run(tmp_path / "run", lines, **settings)
    with (run / "config.yaml").open("a") as file:
        file.write("# turned \u202e around\n")
    (run / "log.txt").write_text(f"warning: {text}\n")
    set_state(run, "failed", 2000, attack)
    add_sample(run, 1000)
    add_checkpoint(run, 1000, "0" * 64, **{f"Metric/{attack}": 1.0})
    add_checkpoint(run, 2000, attack)
    page = page_of(run, make_run(tmp_path / name, lines, seed=text))
    assert "{{" not in page.source.replace("{{ 7 * 7 }}", "") and page.words[1] != "49"
    assert SCRIPT not in page.source and "\u202e" not in page.source and "\0" not in page.source
    if attack == SCRIPT:
        assert page.words[1] == SCRIPT and page.pre[0] == f"warning: {SCRIPT}"
        assert f"{SCRIPT} = 2" in page.text


def png(width: int, height: int, body: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_only_sound_pngs_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    good = add_sample(run, 1)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    bad = [
        b"\x89",
        bytes(flipped),
        f"<svg onload={SCRIPT}>".encode(),
        png(5000, 5000, b"\0" * 5001 * 5000),
        good + b"\0" * (5 << 20),
    ]
    for nimg, content in enumerate(bad, 2):
        (run / "samples" / f"{nimg:010d}.png").write_bytes(content)
    (run / "samples" / "..png").write_bytes(good)
    page = page_of(run)
    assert [base64.b64decode(uri.partition(",")[2]) for uri in page.images()] == [good]
    for nimg in range(2, 2 + len(bad)):
        assert f"left out: samples/{nimg:010d}.png" in page.text


def test_links_do_not_lead_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    secret = tmp_path / "secret"
    secret.write_text("warning: root:x:0:0\n" + tick(1, Loss_G=42.42) + "\n")
    real = make_run(tmp_path / "real")
    add_sample(real, 1)
    set_state(real, "done", 8000, "somebody else's")
    (run / "samples").mkdir()
    links: dict[str, str | Path] = {
        "samples/0000000007.png": "/etc/passwd",
        "samples/0000000008.png": real / "samples" / "0000000001.png",
        "samples/0000000009.png": "0000000009.png",
        "state.json": real / "state.json",
        "log.txt": secret,
        "stats.jsonl": secret,
        "checkpoints": real,
    }
    for name, target in links.items():
        (run / name).symlink_to(target)
    (run / "report.html").symlink_to(secret)
    page = page_of(run)
    assert page.images() == [] and page.titles() == []
    assert "root:x" not in page.text and "None in the log." in page.text
    assert "not known" in page.words and "somebody else's" not in page.text
    for name in links:
        assert f"left out: {name}" in page.text
    assert secret.read_text().startswith("warning: root") and not (run / "report.html").is_symlink()


def test_pipes_folders_and_files_without_end(tmp_path: Path) -> None:
    names = ["log.txt", "stats.jsonl", "state.json"]
    kinds = {"pipe": os.mkfifo, "folder": os.mkdir}
    kinds["huge"] = lambda path: (path.touch(), os.truncate(path, 1 << 33))
    for kind, make in kinds.items():
        run = make_run(tmp_path / kind)
        for name in names:
            make(run / name)
        text = page_of(run).text
        assert all(f"left out: {name}" in text for name in names), kind
    (run / "stats.jsonl").write_bytes(b"{}\n" * 300_000)
    assert "left out: stats.jsonl, more than 200000 lines" in page_of(run).text


def test_numbers_at_the_edge_are_drawn(tmp_path: Path) -> None:
    values = [0, -1e29, 1e29, 5e-324, -5e-324, 1e-300, 1.0]
    keys = ("Loss_G", "Loss_R1", "Loss_diversity", "Timing_img_per_sec", "Timing_mfu")
    keys += ("Progress_skipped", "timestamp", "Loss_sign_real")
    lines = [tick(k, **dict.fromkeys(keys, v)) for k, v in enumerate(values)]
    lines += [metric(len(values), 1e29), tick(9e14, timestamp=253_402_300_798)]
    run = make_run(tmp_path / "run", lines)
    set_state(run, "running", 2**63 - 1)
    assert len(page_of(run).titles()) == 8
    alone = make_run(tmp_path / "alone", [tick(0, **dict.fromkeys(keys, 5e-324))])
    set_state(alone, "running", 0)
    page_of(alone)


def test_damaged_checkpoints_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_checkpoint(run, 1, "a" * 64, a=float("nan"), b=2.5)
    texts = ["", "[]", '{"nimg": 1}', '{"nimg": 1, "metrics": [], "sha256": {}}', "[" * 9999]
    texts.append(json.dumps({"nimg": -1, "metrics": {}, "sha256": {"ema.safetensors": "b" * 64}}))
    for k, text in enumerate(texts):
        add_checkpoint(run, 10 + k, "c" * 64).write_text(text)
    page = page_of(run)
    assert "a" * 64 in page.words and "b = 2.5" in page.text and "a = " not in page.text
    assert page.text.count("left out: checkpoints/") == len(texts)
