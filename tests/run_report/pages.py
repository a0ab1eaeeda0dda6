"""Run directories made by hand, and pages taken apart."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from fastgan.run_report.page import write_report

VOID = {"meta", "img"}
CONFIG: dict[str, Any] = {
    "experiment_name": "test_run",
    "run_dir": "runs/test",
    "total_images": "8k",
    "loss": {"kind": "nonsaturating", "r1_gamma": 1e-4},
    "discriminator": {"kind": "projected", "backbones": ["one", "two"]},
}


class Page(HTMLParser):
    """A page's elements and texts; balanced, without scripts, referring to nothing outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.table_cells: list[str] = []
        self.pre: list[str] = []
        self.source = text
        self.feed(text)
        self.close()
        self.text = "\n".join(self.words)
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        outside = ("http://", "https://", "@import", "xlink:")
        assert not [bad for bad in outside if bad in text.lower()]
        policy = [a["content"] for t, a in self.tags if t == "meta" and "http-equiv" in a]
        assert len(policy) == 1 and (policy[0] or "").startswith("default-src 'none'; img-src data")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "link", "form", "base", "a"), tag
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data"):
                local = "data:image/png;base64," if tag == "img" else "#"
                assert value and value.startswith(local), (tag, name)
            # url() in a style must stay in the page as well.
            assert "url(" not in (value or "").replace("url(#", ""), (tag, name)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" in self.open or not data.strip():
            return
        self.words.append(" ".join(data.split()))
        if self.open[-1] in ("td", "code", "strong"):
            self.table_cells.append(data.strip())
        if self.open[-1] == "pre":
            self.pre.append(data)

    def fact(self, label: str) -> str:
        """What the head says beside a label."""
        return self.words[self.words.index(label) + 1]

    def titles(self) -> list[str]:
        """The charts'."""
        labels = [a["aria-label"] for _, a in self.tags if a.get("class") == "drawing"]
        return [(label or "").removesuffix(" over thousands of images") for label in labels]

    def images(self) -> list[str]:
        return [attributes["src"] or "" for tag, attributes in self.tags if tag == "img"]


def page_of(run: Path, *against: Path) -> Page:
    return Page(write_report(run, against=against).read_text())


def tick(kimg: float, **values: Any) -> str:
    """A line of stats.jsonl; Loss_G stands for Loss/G."""
    record = {
        "Progress/kimg": kimg,
        "Timing/img_per_sec": 100.0,
        "Resources/peak_gpu_mem_gb": 0.0,
        "Loss/G": 1.5,
        "Loss/D": 2.5,
        "Progress/skipped": 0,
        "timestamp": 1.7e9 + 10 * kimg,
    }
    return json.dumps(record | {key.replace("_", "/", 1): value for key, value in values.items()})


def metric(kimg: float, value: float, name: str = "FD-x") -> str:
    return json.dumps({"Progress/kimg": kimg, f"Metric/{name}": value})


def make_run(folder: Path, lines: list[str] | None = None, **config: Any) -> Path:
    """A run of CONFIG with these statistics and nothing else."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    if lines is not None:
        (folder / "stats.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def set_state(run: Path, status: str, nimg: int, message: str = "") -> None:
    state = {"status": status, "nimg": nimg, "exit_code": None, "message": message}
    (run / "state.json").write_text(json.dumps(state))


def add_sample(run: Path, nimg: int) -> bytes:
    (run / "samples").mkdir(exist_ok=True)
    path = run / "samples" / f"{nimg:010d}.png"
    pixels = np.random.default_rng(nimg).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def add_checkpoint(run: Path, nimg: int, sha256: str, **metrics: Any) -> Path:
    file = run / "checkpoints" / f"{nimg:010d}" / "meta.json"
    file.parent.mkdir(parents=True)
    facts = {"nimg": nimg, "metrics": metrics, "sha256": {"ema.safetensors": sha256}}
    file.write_text(json.dumps(facts))
    return file
