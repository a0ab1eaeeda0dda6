"""What batch_gpu=auto advises where the batch that it finds is small."""

from pathlib import Path

import pytest

from fastgan.common.errors import UserError
from tests.test_batch_probe import Card, config, settled


@pytest.mark.parametrize(
    ("batch", "published", "checkpoint", "advised"),
    [
        (24, 64, False, True),
        (24, 6, False, True),
        (24, 4, False, False),
        (4, 64, False, False),  # all at once
        (24, 64, True, False),
    ],
)
def test_a_batch_below_the_published_one_names_the_last_resort(
    *,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    batch: int,
    published: int,
    checkpoint: bool,
    advised: bool,
) -> None:
    made = config(tmp_path, batch)
    made.loss.published_batch_gpu, made.generator.checkpoint = published, checkpoint
    settled(made, Card(total=100), 14)
    assert made.batch_gpu == 4
    told = capsys.readouterr().out
    assert (", generator.checkpoint=true would allow a larger one; " in told) == advised
    with pytest.raises(UserError, match="not even one") as refused:
        made.batch_gpu = "auto"
        settled(made, Card(total=1), 14)
    assert ("generator.checkpoint=true" in str(refused.value)) != checkpoint
