"""The settings on a command line, KEY=VALUE: Hydra's grammar, our types, what no type tells."""

import math
import os
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fastgan import config as cfg
from fastgan.launch import checks, run
from fastgan.launch.cli import compose
from tests.hostile.damage import damaged, each
from tests.hostile.harness import Case, Suite

LINES = ["experiment=demo", "run_dir=run", "batch=32", "optim.lr_g=1e-3", "seed=7"]
LINES += ["total_images=8k"]
NUMBERS = [
    "nan", "inf", "-inf", "1e400", "-1", "0x10", "1_0", "010", "1e3", "'8'", "null", "true", "[8]",
    "{a:8}", "9" * 30, "9" * 5000, "1e", "8.5", "8,9", "range(1,3)", "int(8.5)", "float(nan)",
    "str(8)", "8 8", "\"8\"k", "choice(8,9)", "8M", "${seed}", "${batch}",
]  # fmt: skip
KEYS = ["batch", "optim.lr_g", "total_images", "loss.r1_gamma", "eval.images"]
LARGE = [
    "batch=1000000000000", "keep=99999999999999999999", "generator.steps=1000000000",
    "discriminator.width=1000000000", "eval.batch=1e9", "eval.sampler.steps=1000000000",
    "tick=99999999999999999999M", "snapshot=1" + "0" * 4200, "ema.half_life=" + "9" * 5000,
    "total_images=0.0000001k", "loss.r1_interval=99999999999999999999", "seed=9223372036854775808",
    "loss.published_batch_gpu=9223372036854775808", "freeze.level=99999999999999999999",
    "optim.decay_from=nan", "optim.decay_from=2", "ema.ramp=nan", "ema.ramp=-inf",
    "generator.mid_sigma=inf", "discriminator.sigma=inf", "optim.lr_g=0", "optim.lr_d=1e308",
    "data.max_images=-5", "batch_gpu=1e3", "batch_gpu=[8]", "batch_gpu=" + "9" * 4000,
]  # fmt: skip
GRAMMAR = [
    "", "=", "==", "=1", "batch", "batch=", "batch==8", "batch=8=9", "+", "+=1", "++", "~",
    "~batch", "~batch=8", "+batch=8", "++batch=8", "+new=1", "++new.a.b=1", "~absent", "batch =8",
    " batch=8", "batch@x=8", "@=1", "a@b@c=1", "batch.=8", ".batch=8", "..=1", "a..b=1", "optim=1",
    "optim=null", "optim=[]", "optim={lr_g:1,lr_g:2}", "optim={lr_g:nan}", "optim.lr_g.x=1",
    "optim={a:1}", "data={path:{a:1}}", "discriminator.weights={a:{b:1}}", "published=${",
    "discriminator.weights={1:2}", "discriminator.backbones=[[a]]", "init.network=[1]",
    "discriminator.backbones=[null]", "init.network={a:[1,{b:2}]}", "published={a:${b}}",
    "experiment=../../../etc/passwd", "experiment=/etc/passwd", "experiment=demo,absent",
    "experiment=[demo]", "experiment=null", "experiment=..", "experiment=experiment/demo",
    "experiment=demo.yaml", "experiment@x=demo", "experiment=${oc.env:HOME}", "hydra.run.dir=/",
    "hydra=absent", "hydra/launcher=absent", "hydra.searchpath=[file:///etc]", "hydra.verbose=[a]",
    "hydra.mode=MULTIRUN", "_target_=os.system", "+_target_=os.system", "batch=glob(*)",
    "+optim._target_=posix.system", "+hydra.callbacks.x._target_=posix.system", "batch=f(",
    *("batch=" + mark for mark in ("'8", "\"8", "[8", "{8", "8]", "(8)", "8)", "\\", "\\n")),
    "batch=extend_list(1)", "batch=cast(8)", "batch=eval(8)", "batch=__import__('os')",
    "run_dir='a\nb'", "run_dir=\x1b[31m", "run_dir=\u202e", "run_dir=\ud800", "\x1b[31m=1",
    "a\nb=1", "batch='\x1b[2J'", "optim.lr_g='a\n\nb'", "device=\x1b", "engine='\n'", "\u00e4=1",
    "experiment='a\nb'", "+a\x07b=1", "eval.sampler.kind='\x1b[2J'",
    *(key + "x" * 5000 + "=1" for key in ("", "batch=", "experiment=", "device=")),
]  # fmt: skip
INTERPOLATIONS = [
    "seed=${oc.env:ABSENT}", "seed=${oc.env:HOME}", "seed=${oc.decode:'5'}", "run_dir=${run_dir}",
    "run_dir=${oc.decode:'${oc.env:HOME}'}", "seed=${oc.create:{a:1}}", "run_dir=${a:${b:${c}}}",
    "run_dir=${oc.select:absent}", "run_dir=${oc.dict.keys:optim}", "seed=${seed", "run_dir=${}",
    "run_dir=${hydra:runtime.cwd}", "run_dir=${package:../../../etc/passwd}", "run_dir=${...}",
    "run_dir=${package:\x00}", "run_dir=${now:%s}", "run_dir=${eval:1}", "run_dir=${oc.env:[a]}",
    "data.path=${run_dir}", "data=${optim}", "optim=${data}", "optim=${optim}", "published=${.}",
    "init.network=${init}", "published=${..}", "run_dir=" + "${run_dir}" * 50,
    "run_dir=" + "${" * 100, "run_dir=" + "${a:" * 40 + "1" + "}" * 40,
    "run_dir=" + "${oc.decode:" * 20 + "1" + "}" * 20,
]  # fmt: skip
NESTED = [
    *(f"published={'[' * n}{']' * n}" for n in (10, 50, 100, 400)),
    *(f"published={'{a:' * n}1{'}' * n}" for n in (10, 50, 100, 300)),
    *("published=" + mark * 2000 for mark in ("[", "{", "(", "'", '"', "\\", "$", "a,", "[]", ",")),
    "published=[" + "1," * 3000 + "1]", ".".join("a" * 500) + "=1",
]  # fmt: skip


def cases() -> list[Case]:
    groups = {"grammar": GRAMMAR, "interpolation": INTERPOLATIONS, "nesting": NESTED}
    groups |= {"large": LARGE, "number": [f"{key}={n}" for key, n in product(KEYS, NUMBERS)]}
    few = [c for c in damaged("\n".join(LINES).encode(), seed=11) if c.kind != "foreign"][::6]
    return [
        *few,
        *(c for kind, texts in groups.items() for c in each(kind, texts, _after_others, None)),
        Case("valid", "nothing but an experiment", b"experiment=demo", "valid"),
        Case("many", "300 settings", _after_others(*["seed=1"] * 300)),
    ]


def _after_others(*overrides: str) -> bytes:
    return "\0".join([*LINES, *overrides]).encode("utf-8", "surrogatepass")


def read(path: Path) -> None:
    """Composes the configuration of a training, one override a line, and checks it."""
    content = path.read_bytes()
    overrides = os.fsdecode(content).split("\0" if b"\0" in content else "\n")
    config = compose("train", cfg.TrainConfig, overrides)
    checks.check_train(config)
    plan = run.schedule(config)
    assert 0 < checks.local_batches(config, 1) <= config.batch < 1 << 24
    assert 0 < plan.total_images < 1 << 60 and 0 < plan.tick < 1 << 60
    assert 0 < checks.images(config.ema.half_life, "ema.half_life", least=1) < 1 << 60
    assert config.generator.steps <= 1000 and config.discriminator.width <= 1 << 16
    assert config.eval.images <= 10_000_000 and config.optim.lr_g > 0 and config.optim.lr_d > 0
    for value in _numbers(config):
        assert math.isfinite(value) and abs(value) < 1 << 63


def _numbers(config: Any) -> list[float]:
    """The numbers of all typed keys."""
    values = [getattr(config, field.name) for field in fields(config)]
    nested = [n for v in values if is_dataclass(v) for n in _numbers(v)]
    return nested + [v for v in values if isinstance(v, int | float)]


SUITE = Suite("command line", "overrides.txt", cases, read, named="")
