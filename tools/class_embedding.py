"""Computes the class embedding that a class-conditional discriminator starts from.

    python tools/class_embedding.py DATA DST.safetensors --backbone tf_efficientnet_lite0

DATA is a labelled data set (EDM zip or folder, or `digits`); each row is the mean backbone feature
of one class.
"""

from pathlib import Path

import torch

from fastgan.common.errors import ArgumentParser, UserError, run_command
from fastgan.data import open_dataset
from fastgan.discriminator.backbones import load_backbone
from fastgan.discriminator.class_embedding import class_means, save_class_embedding


def main() -> None:
    parser = ArgumentParser(description="Class means of a backbone's features over a data set.")
    parser.add_argument("data", help="labelled data set: EDM zip, folder, or digits")
    parser.add_argument("dst", type=Path, help="the .safetensors file to write")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="a timm model name")
    parser.add_argument("--weights", help="local weights file (default: timm's download)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.batch < 1:
        raise UserError(f"--batch {options.batch}, on the command line, 1 or more expected")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, on the command line, no GPU here: cpu expected")
    dataset = open_dataset(options.data)
    backbone = load_backbone(options.backbone, options.weights).to(options.device)
    embedding, counts = class_means(backbone, dataset, options.batch)
    origin = {"backbone": backbone.provenance, "dataset": dataset.provenance()}
    save_class_embedding(options.dst, embedding, counts, origin)
    print(f"{options.dst}: {list(embedding.shape)}, {sum(counts)} images, {options.backbone}")


if __name__ == "__main__":
    run_command(main)
