"""The pictures and the card of an exported network: grid.png and README.md of its folder."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan import config as cfg
from fastgan.checkpoint.network_file import NetworkFile
from fastgan.common.errors import shown
from fastgan.evaluation.protocol import versions
from fastgan.launch import build
from fastgan.models import Precond
from fastgan.models.sampling import save_grid

CPU = torch.device("cpu")
ROWS = COLUMNS = 8
_WIDTH = 128  # of an image in the grid, in pixels
_BATCH = 16
_LONGEST = 10_000  # characters of a text that are looked at
UNSPECIFIED = "unspecified"
LICENSES = {
    "CC-BY-NC-SA-4.0": (
        "Creative Commons Attribution-NonCommercial-ShareAlike 4.0 International "
        "(CC BY-NC-SA 4.0): **no commercial use**; whoever passes the weights on, or weights "
        "trained from them, names their makers and keeps this licence "
        "(https://creativecommons.org/licenses/by-nc-sa/4.0/)."
    ),
    "CC-BY-4.0": (
        "Creative Commons Attribution 4.0 International (CC BY 4.0): whoever passes the weights "
        "on names their makers (https://creativecommons.org/licenses/by/4.0/)."
    ),
    "Apache-2.0": "Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0).",
    "MIT": "MIT License (https://opensource.org/license/mit).",
    UNSPECIFIED: (
        "Not specified: the file these weights come from names no licence. Ask whoever publishes "
        "them."
    ),
}
# What --license may give to a network that has none.
GIVEN = [name for name in LICENSES if name != UNSPECIFIED]


def is_generator(network: Precond) -> bool:
    """Whether it has D2O's shifted preconditioning, so that one step makes an image."""
    return network.eps > 0


def sampler(network: Precond) -> cfg.SamplerConfig:
    """How its images are drawn: one step of a generator, 18 of Heun's of a denoiser."""
    if is_generator(network):
        return cfg.SamplerConfig()
    return cfg.SamplerConfig(kind="heun", steps=18)


def draw(network: Precond, count: int) -> Tensor:
    """uint8 images [count, C, H, W] of the seeds 0, 1, ..., classes drawn as evaluation does."""
    sample = build.sample_fn(network, sampler(network), CPU)
    seeds = list(range(count))
    return torch.cat([sample(seeds[at : at + _BATCH]) for at in range(0, count, _BATCH)])


def write_grid(network: Precond, path: Path) -> None:
    """8 x 8 images of the seeds 0-63; a class for each row, spread over all of them."""
    label_dim, rows, labels = network.label_dim, [], []
    for row in range(ROWS):
        each = row * label_dim // ROWS if label_dim > ROWS else row % max(label_dim, 1)
        one_class = each if label_dim else None
        sample = build.sample_fn(network, sampler(network), CPU, one_class=one_class)
        rows.append(sample(list(range(row * COLUMNS, (row + 1) * COLUMNS))))
        labels.append(f"class {each}")
    scale = max(1, _WIDTH // network.model.img_resolution)
    save_grid(torch.cat(rows), path, COLUMNS, row_labels=labels if label_dim else None, scale=scale)


def difference(first: Tensor, second: Tensor) -> dict[str, float]:
    """Of two sets of uint8 images [N, C, H, W]: n, mean and largest difference of their values, and
    equal_pixels, the share of pixels that are the same."""
    assert first.shape == second.shape and first.dtype == second.dtype == torch.uint8
    apart = (first.int() - second.int()).abs()
    return {
        "n": len(first),
        "mean": apart.double().mean().item(),
        "largest": int(apart.max()),
        "equal_pixels": (apart.amax(1) == 0).double().mean().item(),
    }


def code(value: object, limit: int = 120) -> str:
    """A number or text as one code span of at most `limit` characters, give or take escapes.

    Nothing in it becomes a link, an image or HTML, in a table neither.
    """
    if value is None:
        return "-"
    text = " ".join(value[:_LONGEST].split()) if isinstance(value, str) else value
    # What would end the span, and what would end a table's cell.
    line = shown(text, limit).strip().replace("`", "\\x60").replace("|", "\\x7c")
    return f"`{line}`" if line else "-"


def leaves(value: object, most: int = 40) -> list[tuple[str, Any]]:
    """The first `most` values in a JSON value with their dotted names, lists of numbers whole."""
    return list(islice(_leaves(value, ""), most))


def listed(value: object, most: int = 12, limit: int = 400) -> str:
    """The same as one code span: `name resnet56, n 50000`."""
    found = (f"{name} {shown(leaf)}" for name, leaf in leaves(value, most))
    return code(", ".join(found), limit)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table of cells that are markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _leaves(value: object, name: str) -> Iterator[tuple[str, Any]]:
    prefix = f"{name}." if name else ""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves(child, prefix + shown(str(key), 40))
    elif not isinstance(value, list):
        yield name, "null" if value is None else value
    elif len(value) <= 16 and all(isinstance(each, int | float) for each in value):
        yield name, " ".join(map(shown, value))
    else:
        for index, child in enumerate(value):
            yield from _leaves(child, f"{prefix}{index}")


@dataclass(frozen=True)
class Card:
    """What a card tells; `network` and `file` are the exported ones, `source` what they are of."""

    name: str
    network: Precond
    file: NetworkFile
    source: NetworkFile
    dtype: str
    rounding: Mapping[str, float]
    numbers: list[dict[str, Any]]
    program: Mapping[str, int] | None
    note: str | None
    sha256: Mapping[str, str]

    def markdown(self) -> str:
        """The whole card. What the files hold is quoted letter by letter, `note` as it is."""
        said = self.file.metadata["license"]
        sections = {
            "What it is": [self._what_it_is()],
            "Licence": [LICENSES.get(said) or f"{code(said)}, as the file that was exported says."],
            "Numbers": self._numbers(),
            f"What {self.dtype} changes": [self._rounding()],
            "How to use it": self._use(),
            "Origin": [table(("what", "value"), _rows(self.file.provenance))],
            "Files": [table(("file", "sha256"), [(n, code(s)) for n, s in self.sha256.items()])],
            "Made with": [listed(versions())],
        }
        lines = [f"# {self.name}", *self._introduction()]
        for title, paragraphs in sections.items():
            lines += [f"## {title}", *paragraphs]
        return "\n\n".join(lines) + "\n"

    def _introduction(self) -> list[str]:
        size, label_dim = self.network.model.img_resolution, self.network.label_dim
        kind = "grey" if self.network.model.img_channels == 1 else "RGB"
        images = f"{kind} images of {size} x {size} pixels"
        images += f" in {label_dim} classes" if label_dim else ""
        if is_generator(self.network):
            what, how = f"A one-step generator of {images}", "one step each"
        else:
            what, how = f"An EDM diffusion denoiser of {images}", "18 steps of Heun's sampler each"
        picture = f"![Images of the seeds 0-63](grid.png)\n\nSeeds 0-63, {how}, not selected."
        note = [self.note] if self.note else []
        return [f"{what}, {self._size():,} parameters.", *note, picture]

    def _size(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())

    def _what_it_is(self) -> str:
        source, said = self.source, self.file.metadata
        base = "random weights"
        if said["base_model"]:
            base = f"{code(said['base_model'])}, sha256 {code(said['base_sha256'])}"
        rows = [
            ("parameters", f"{self._size():,}"),
            ("images seen in training", f"{self.file.nimg:,}"),
            ("trained from", base),
            ("exported from", f"{code(source.path.name)}, sha256 {code(source.sha256)}"),
            ("weights", f"{self.dtype}, buffers as they were"),
            *_rows(self.file.config),
        ]
        return table(("what", "value"), rows)

    def _numbers(self) -> list[str]:
        if not self.numbers:
            return ["None were given."]
        before, after = self.source.state, self.file.state
        same = all(torch.equal(t.float(), after[name].float()) for name, t in before.items())
        other = f"the weights before rounding, {code(self.source.path.name)}"
        columns = ("metric", "value", "n", "seeds", "sampler", "extractor", "reference")
        return [
            f"Measured with {'exactly these weights' if same else other}.",
            table(columns, map(_result, self.numbers)),
        ]

    def _rounding(self) -> str:
        d = self.rounding
        return (
            f"{d['n']} images of the seeds 0-{d['n'] - 1}, drawn with the weights before and "
            f"after: mean difference {d['mean']:.4f} of 255, largest {d['largest']}, equal pixels "
            f"{d['equal_pixels']:.2%}."
        )

    def _use(self) -> list[str]:
        file = self.file.path.name
        heun = "" if is_generator(self.network) else " sampler.kind=heun sampler.steps=18"
        commands = (
            f"python -m fastgan.sample checkpoint={file} out=images.png seeds=0-63{heun}",
            f"python -m fastgan.evaluate checkpoint={file} reference=DATA out=fid.json{heun} ...",
            f"python -m fastgan.train init.path={file} ...",
        )
        shell = "\n".join(("```", *commands, "```"))
        program = self._use_of(self.program) if self.program else []
        return [shell, "`device=cpu` where there is no GPU.", *program]

    def _use_of(self, program: Mapping[str, int]) -> list[str]:
        model, label_dim = self.network.model, self.network.label_dim
        size = f"{model.img_channels}, {model.img_resolution}, {model.img_resolution}"
        lines = [
            "```python",
            "import torch",
            f'generate = torch.export.load("{self.name}.pt2").module()',
            f"z = torch.randn(16, {size})",
            f"images = generate(z{', labels' if label_dim else ''})  # uint8 [16, {size}]",
            "```",
        ]
        if label_dim:
            lines.insert(4, f"labels = torch.eye({label_dim})[torch.randint({label_dim}, (16,))]")
        return [
            "Or with PyTorch alone, in float32 on the CPU:",
            "\n".join(lines),
            f"Of the {program['values']:,} values of {program['images']} images the program draws "
            f"all as the network does, but for {program['off_by_one']:,} that differ by 1.",
        ]


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(code(name), code(value)) for name, value in leaves(dict(values))]


def _result(found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table, from what `read_result` accepted."""
    told = (listed(found[key]) for key in ("sampler", "extractor", "reference"))
    value = f"{found['value']:.4g}" + (" (rank deficient)" if found.get("rank_deficient") else "")
    return (code(found["metric"]), value, code(found["n"]), code(found["seeds"]), *told)
