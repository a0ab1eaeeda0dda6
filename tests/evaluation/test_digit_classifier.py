"""The classifier whose features measure generated digits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastgan.common.errors import UserError
from fastgan.data.dataset import Digits
from fastgan.evaluation.classifiers import (
    DigitClassifier,
    accuracy,
    load_classifier,
    save_classifier,
    train_classifier,
)
from fastgan.evaluation.extractors import load_extractor
from fastgan.launch.cli import packaged_file


@pytest.fixture(scope="module")
def trained() -> DigitClassifier:
    return train_classifier(Digits("train"), iterations=80)


def test_it_learns(trained: DigitClassifier) -> None:
    val = Digits("val")
    assert accuracy(trained, val) > 0.8 > 0.3 > accuracy(DigitClassifier().eval(), val)
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())


def test_training_is_a_function_of_its_arguments(trained: DigitClassifier) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = train_classifier(Digits("train"), iterations=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    same, other = (train_classifier(Digits("train"), iterations=3, seed=s) for s in (0, 1))
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
        assert not torch.equal(weight, other.state_dict()[name])


def test_a_file_gives_the_same_features(trained: DigitClassifier, tmp_path: Path) -> None:
    save_classifier(trained, tmp_path / "c.safetensors")
    images = torch.from_numpy(Digits("val").all_images[:5])
    features = trained(images)
    assert features.shape == (5, 32) and (features >= 0).all() and features.std() > 0
    assert torch.equal(load_classifier(tmp_path / "c.safetensors")(images), features)
    extractor = load_extractor(f"classifier:{tmp_path / 'c.safetensors'}", device="cpu")
    assert extractor.dim == 32 and extractor.name == "classifier"
    assert torch.equal(extractor(images), features)


def test_the_one_that_ships_is_good() -> None:
    network = load_classifier(packaged_file("assets/digits/classifier.safetensors"))
    assert accuracy(network, Digits("test")) > 0.95


def test_other_files_are_refused(tmp_path: Path) -> None:
    junk, other, large = (tmp_path / f"{n}.safetensors" for n in ("junk", "other", "large"))
    junk.write_bytes(b"\x00" * 100)
    save_file({"x": torch.zeros(1)}, other)
    large.write_bytes(b"\x00" * (2 << 20))
    for path in (junk, other, large, tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(UserError, match=f"no digit classifier .*{path.name}") as caught:
            load_classifier(path)
        assert "\n" not in str(caught.value)
