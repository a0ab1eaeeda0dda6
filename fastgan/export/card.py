"""The card of an exported network: README.md of its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastgan.checkpoint.network_file import NetworkFile
from fastgan.evaluation.protocol import versions
from fastgan.export.markdown import code, leaves, listed, table
from fastgan.export.pictures import Difference, is_generator
from fastgan.export.program import Checked
from fastgan.models import Precond

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
_NOT_COMPARABLE = (
    "Measured by the training when it saved the weights, with its own settings, for its own use: "
    "not to be compared with other numbers."
)


@dataclass(frozen=True)
class Card:
    """What a card tells; `network` and `file` are the exported ones, `source` what they are of."""

    name: str
    network: Precond
    file: NetworkFile
    source: NetworkFile
    dtype: str
    rounding: Difference
    numbers: list[dict[str, Any]]
    training_metrics: dict[str, float]
    program: Checked | None
    note: str | None
    sha256: Mapping[str, str]

    def markdown(self) -> str:
        """The whole card. What the files hold is quoted letter by letter, `note` as it is."""
        sections = {
            "What it is": [self._what_it_is()],
            "Licence": [self._licence()],
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
        return [f"{what}, {_grouped(_size(self.network))} parameters.", *self._note(), picture]

    def _note(self) -> list[str]:
        return [self.note] if self.note else []

    def _what_it_is(self) -> str:
        source, said = self.source, self.file.metadata
        base = "random weights"
        if said["base_model"]:
            base = f"{code(said['base_model'])}, sha256 {code(said['base_sha256'])}"
        rows = [
            ("parameters", _grouped(_size(self.network))),
            ("images seen in training", _grouped(self.file.nimg)),
            ("trained from", base),
            ("exported from", f"{code(source.path.name)}, sha256 {code(source.sha256)}"),
            ("weights", f"{self.dtype}, buffers as they were"),
            *_rows(self.file.config),
        ]
        return table(("what", "value"), rows)

    def _licence(self) -> str:
        said = self.file.metadata["license"]
        return LICENSES.get(said) or f"{code(said)}, as the file that was exported says."

    def _numbers(self) -> list[str]:
        found = []
        if self.numbers:
            columns = ("metric", "value", "n", "seeds", "sampler", "extractor", "reference")
            found += [self._measured_with(), table(columns, map(_result, self.numbers))]
        if self.training_metrics:
            rows = [(code(k), code(f"{v:.4g}")) for k, v in self.training_metrics.items()]
            found += [_NOT_COMPARABLE, table(("metric", "value"), rows)]
        return found or ["None were given."]

    def _measured_with(self) -> str:
        before, after = self.source.state, self.file.state
        if all(torch.equal(tensor.float(), after[name].float()) for name, tensor in before.items()):
            return "Measured with exactly these weights."
        return f"Measured with the weights before rounding, {code(self.source.path.name)}."

    def _rounding(self) -> str:
        d = self.rounding
        return (
            f"{d.n} images of the seeds 0-{d.n - 1}, drawn with the weights before and after: mean "
            f"difference {d.mean:.4f} of 255, largest {d.largest}, equal pixels "
            f"{d.equal_pixels:.2%}."
        )

    def _use(self) -> list[str]:
        file = self.file.path.name
        heun = "" if is_generator(self.network) else " sampler.kind=heun sampler.steps=18"
        commands = (
            f"python -m fastgan.sample checkpoint={file} out=images.png seeds=0-63{heun}",
            f"python -m fastgan.evaluate checkpoint={file} reference=DATA out=fid.json{heun} ...",
            f"python -m fastgan.train init.path={file} ...",
        )
        without = "`device=cpu` where there is no GPU."
        return [_fenced("\n".join(commands)), without, *(self._program() if self.program else [])]

    def _program(self) -> list[str]:
        assert self.program is not None
        model, label_dim = self.network.model, self.network.label_dim
        size = f"{model.img_channels}, {model.img_resolution}, {model.img_resolution}"
        lines = [
            "import torch",
            f'generate = torch.export.load("{self.name}.pt2").module()',
            f"z = torch.randn(16, {size})",
            f"images = generate(z{', labels' if label_dim else ''})  # uint8 [16, {size}]",
        ]
        if label_dim:
            lines.insert(3, f"labels = torch.eye({label_dim})[torch.randint({label_dim}, (16,))]")
        p = self.program
        return [
            "Or with PyTorch alone, in float32 on the CPU:",
            _fenced("\n".join(lines), "python"),
            f"Of the {_grouped(p.values)} values of {p.images} images the program draws all as the "
            f"network does, but for {_grouped(p.off_by_one)} that differ by 1.",
        ]


def _size(network: Precond) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(code(name), code(value)) for name, value in leaves(dict(values))]


def _result(found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table, from what `read_result` accepted."""
    told = (listed(found[key]) for key in ("sampler", "extractor", "reference"))
    value = f"{found['value']:.4g}" + (" (rank deficient)" if found.get("rank_deficient") else "")
    return (code(found["metric"]), value, code(found["n"]), code(found["seeds"]), *told)


def _grouped(number: int) -> str:
    return f"{number:,}"


def _fenced(text: str, language: str = "") -> str:
    return f"```{language}\n{text}\n```"
