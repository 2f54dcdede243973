"""Every bad input: exit code 2, one message that says what to do, nothing written or compiled."""

import os
import subprocess
import sys

import pytest
from run_tools import DIGITS, ROOT, assert_one_message, train

from bnresearch import config as configs
from bnresearch.errors import UserError
from bnresearch.train import run

ONE = "parallel.devices=1"  # where devices do not matter
EIGHT = "parallel.devices=8"

# What is given -> what the message has to name.
OVERRIDES = {
    # Keys and types.
    "optim.learning_rat=0.1": ("'optim.learning_rat'", "did you mean optim.learning_rate"),
    "model.mlp.width=(8,)": ("'model.mlp.width'", "did you mean model.mlp.widths"),
    "normalisation=x": ("'normalisation'", "known: data, distributed, dtype, init, model"),
    "optim.learning_rate=fast": ("optim.learning_rate='fast'", "no float", "such as 0.1"),
    "seed=1.5": ("seed='1.5'", "no int", "such as 0"),
    "optim.sgd.nesterov=maybe": ("optim.sgd.nesterov='maybe'", "no bool", "such as False"),
    "model.mlp.widths=(8, 1.5)": ("item of model.mlp.widths=1.5", "type float, not int"),
    "model.mlp.widths=(8, 'a')": ("item of model.mlp.widths='a'", "type str, not int"),
    "model=3": ("model is a group of keys", "did you mean one of its keys"),
    "optim.schedule=cosine": ("did you mean optim.schedule.name=cosine?",),
    "data={}": ("data is a group of keys", "did you mean one of its keys"),
    # Names, each with the list.
    "norm.kind=bach": ("norm.kind 'bach'", "batch, ", "group, ", "layer, "),
    "model.name=mpl": ("model.name 'mpl'", "mlp, nf_resnet, plain, resnet"),
    "data.name=digit": ("dataset 'digit'", "did you mean digits?", "list datasets"),
    "parallel.mode=vmap": ("parallel.mode 'vmap'", "jit, pmap, shard_map"),
    "optim.name=sdg": ("optim.name 'sdg'", "adamw, lamb, lars, sgd"),
    "optim.schedule.name=linear": ("'linear'", "constant, cosine, one_cycle, step"),
    "task.name=regression": ("task.name 'regression'", "classification"),
    "model.mlp.activation=rleu": ("activation 'rleu'", "elu, gelu, identity", "tanh"),
    "model.mlp.placement=after": ("placement 'after'", "after_act, before_act"),
    "dtype=float16": ("dtype 'float16'", "float32, bfloat16"),
    "norm.scope=host": ("norm.scope 'host'", "global, device, group:N"),
    "norm.scope=group:0": ("norm.scope 'group:0'", "global, device, group:N"),
    "norm.batch.correction=2": ("norm.batch.correction 2", "0, 1"),
    "train.accumulate_statistics=all": ("'all'", "microbatch, batch"),
    "data.augment=cutmix": ("data.augment 'cutmix'", "crop, crop_flip, none"),
    # Numbers out of range.
    "optim.learning_rate=-0.1": ("optim.learning_rate=-0.1 is negative", "give 0 or more"),
    "optim.learning_rate=nan": ("optim.learning_rate=nan is not a finite number",),
    "optim.learning_rate=inf": ("optim.learning_rate=inf is not a finite number",),
    "optim.learning_rate=1e39": ("optim.learning_rate=1e+39 is too large", "up to 3.4e+38"),
    "optim.weight_decay=-1": ("optim.weight_decay=-1.0 is negative",),
    "optim.weight_decay=nan": ("optim.weight_decay=nan is not a finite number",),
    "optim.clip_norm=-1": ("optim.clip_norm=-1.0 is negative",),
    "optim.sgd.momentum=1.0": ("optim.sgd.momentum=1.0", "[0, 1)"),
    "optim.adamw.b2=1.5": ("optim.adamw.b2=1.5", "[0, 1)"),
    "optim.schedule.cosine.final=2": ("optim.schedule.cosine.final=2.0", "[0, 1]"),
    "optim.schedule.step.boundaries=(0.7, 0.2)": ("boundaries=(0.7, 0.2)", "rising"),
    "optim.schedule.one_cycle.rise=1": ("0 < rise < 1",),
    "norm.batch.decay=1.1": ("norm.batch.decay=1.1", "[0, 1]"),
    "norm.batch.decay=nan": ("norm.batch.decay=nan is not a finite number",),
    "norm.batch.epsilon=-1e-5": ("norm.batch.epsilon=-1e-05 is negative",),
    "task.classification.label_smoothing=1": ("label_smoothing=1.0", "[0, 1)"),
    "model.mlp.dropout=1": ("model.mlp.dropout is 1.0", "below 1"),
    "model.mlp.widths=(8, 0)": ("model.mlp.widths has 0", "above 0"),
    "data.validation_fraction=1": ("data.validation_fraction is 1.0", "between 0 and 1"),
    "data.workers=-2": ("data.workers is -2", "at least -1"),
    "data.batch_size=0": ("data.batch_size=0", "at least 1"),
    "data.batch_size=5000": ("data.batch_size is 5000", "1298 training examples", "smaller"),
    "data.eval_batch_size=0": ("data.eval_batch_size is 0", "at least 1"),
    "data.batch_size=3000000000": ("data.batch_size is 3000000000", "below 2**31"),
    "data.eval_batch_size=3000000000": ("data.eval_batch_size is 3000000000", "below 2**31"),
    "data.eval_batch_size=200000000": ("eval_batch_size=200000000", "48 GiB", "smaller batches"),
    "data.image_size=200000": ("data.image_size is 200000", "below 2**15"),
    "data.image_size=20000": ("data.batch_size=60", "89 GiB", "(data.image_size)"),
    "seed=-1": ("seed=-1 is negative",),
    "seed=2147483648": ("seed=2147483648 is too large", "below 2**31"),
    "train.accumulate=0": ("train.accumulate=0", "at least 1"),
    "train.keep=0": ("train.keep=0", "at least 1"),
    "parallel.devices=-1": ("parallel.devices=-1 is negative",),
    "parallel.devices=9": ("parallel.devices=9", "8 cpu device(s)", "give 0"),
    # Durations.
    "train.duration=10": ("train.duration='10'", "'10ep'", "'500st'"),
    "train.duration=-1ep": ("train.duration='-1ep'", "'10ep'"),
    "train.duration=0st": ("train.duration='0st'", "longer than nothing"),
    "train.log_every=often": ("train.log_every='often'", "'10ep'"),
    "train.eval_every=never": ("train.eval_every='never'", "'10ep'"),
    "train.checkpoint_every=0ep": ("train.checkpoint_every='0ep'", "longer than nothing"),
    "optim.schedule.warmup=5": ("optim.schedule.warmup='5'", "'10ep'"),
    "optim.schedule.warmup=3st": ("warmup='3st' (3 steps)", "training (3 steps)", "shorten"),
}

# Combinations: several overrides -> what the message has to name.
COMBINATIONS = [
    ((EIGHT,), ("data.batch_size=60", "8 devices", "multiple of 8", "parallel.devices")),
    ((ONE, "train.accumulate=7"), ("data.batch_size=60", "7 microbatches", "multiple of 7")),
    (
        (EIGHT, "data.batch_size=24", "train.accumulate=2"),
        ("data.batch_size=24", "8 devices x 2 microbatches", "multiple of 16"),
    ),
    (
        (EIGHT, "data.batch_size=64", "norm.scope=group:3"),
        ("norm.scope=group:3", "8 devices", "[1, 2, 4, 8]"),
    ),
    (
        (ONE, "model.name=resnet", "model.resnet.depth=21"),
        ("model.resnet.depth 21", "20", "26"),
    ),
    (
        (ONE, "model.name=resnet", "model.resnet.family=imagenet", "model.resnet.depth=18"),
        ("8x8", "at least 32x32", "model.resnet.stem=cifar", "data.image_size"),
    ),
    (
        (
            ONE,
            "model.name=plain",
            f"model.plain.widths={(8,) * 5}",
            f"model.plain.convs={(1,) * 5}",
        ),
        ("8x8", "at least 16x16", "fewer stages"),
    ),
    (
        (ONE, "model.name=plain", "model.plain.convs=(1, 1)"),
        ("model.plain.convs (1, 1)", "one number per stage"),
    ),
    (
        (ONE, "data.name=synthetic", "data.synthetic.shape=(8, 8)"),
        ("data.synthetic.shape is (8, 8)", "(height, width, channels)"),
    ),
    (
        (
            ONE,
            "data.name=synthetic",
            "data.synthetic.shape=(128, 128, 3)",
            "data.synthetic.examples=1000000",
            "data.in_memory=yes",
        ),
        ("data.in_memory=yes", "49,152 pixel values", "57 GiB", "in_memory=no"),
    ),
]

# Refused while the step is traced: before anything is compiled, but not before anything is loaded.
TRACED = [
    (
        (ONE, "norm.kind=group", "norm.group.groups=32"),
        ("norm.group.groups=32", "100 features", "1, 2, 4, 5, 10, 20, 25, 50, 100"),
    ),
    ((ONE, "norm.kind=group", "norm.group.groups=0"), ("norm.group.groups=0", "choose one of")),
    (
        (
            ONE,
            "model.name=resnet",
            "model.resnet.width=0.3",
            "norm.kind=group",
            "norm.group.groups=2",
        ),
        ("norm.group.groups=2", "5 features"),
    ),
    (
        (ONE, "norm.kind=layer", "norm.layer.over=batch"),
        ("norm.layer.over 'batch'", "example", "features"),
    ),
    ((ONE, "data.batch_size=1"), ("one single value", "larger batch", "norm.kind=group|layer")),
    ((ONE, "model.mlp.widths=(3000000000,)"), ("GiB", "smaller model")),
    ((ONE, "train.accumulate=60"), ("one single value", "larger batch")),
    *(
        (
            (EIGHT, "data.batch_size=8", "norm.scope=device", f"parallel.mode={mode}"),
            ("one single value", "wider norm.scope"),
        )
        for mode in ("jit", "shard_map", "pmap")
    ),
]

# The text of a config file -> what the message has to name besides the file.
FILES = {
    "seed = 1": ("no get_config()", "ConfigDict"),
    "get_config = 1": ("no get_config()", "ConfigDict"),
    "def get_config(:": ("SyntaxError", "correct the file"),
    "raise RuntimeError('boom')": ("RuntimeError: boom", "correct the file"),
    "import sys; sys.exit(3)": ("SystemExit: 3", "correct the file"),
    "def get_config(): raise ZeroDivisionError('boom')": ("ZeroDivisionError: boom",),
    "def get_config(): raise TypeError('boom\\nboom')": ("TypeError: boom boom",),
    "def get_config(size): return size": ("TypeError", "'size'"),
    "def get_config(): pass": ("returns a NoneType", "default_config()"),
    "def get_config(): return {'seed': 1}": ("returns a dict", "default_config()"),
    "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 1})": (
        "is missing",
        "default_config()",
    ),
}
# The same with a default config that one line changes.
LINES = {
    "config.optim.learning_rat = 0.1": ("'optim.learning_rat'", "did you mean"),
    "config.optim.learning_rate = '0.1'": ("TypeError", "correct the file"),
    "config.train.accumulate = True": ("train.accumulate=True", "type bool, not int"),
    "config.model.mlp.widths = (8, True)": ("item of model.mlp.widths=True", "type bool, not int"),
    "del config.seed": ("'seed' is missing", "default_config()"),
}
HEAD = """\
from bnresearch.config import default_config

def get_config():
    config = default_config()
"""

COMPILED_BY_TRAINING = {"jit(init)", "jit(run)"}  # the state, and the step in its loop


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_bad_value_is_refused(override, refused, compiled):
    devices = [] if override.startswith("parallel.devices") else [ONE]
    refused(train(*devices, override), *OVERRIDES[override])
    assert not COMPILED_BY_TRAINING & set(compiled)


@pytest.mark.parametrize(("overrides", "parts"), COMBINATIONS)
def test_a_bad_combination_is_refused(overrides, parts, refused, compiled):
    refused(train(*overrides), *parts)
    assert not COMPILED_BY_TRAINING & set(compiled)


@pytest.mark.parametrize(("overrides", "parts"), TRACED)
def test_what_the_trace_shows_is_refused_before_compiling(overrides, parts, refused, compiled):
    refused(train(*overrides), *parts)
    # Reading the data has orders drawn on the device.
    assert not COMPILED_BY_TRAINING & set(compiled)


def test_a_good_config_compiles_what_the_last_test_looks_for(tmp_path, compiled):
    config = configs.load(DIGITS, [ONE, "train.duration=3st", "model.mlp.widths=(7,)"])
    run(config, tmp_path / "run", show="off")
    assert set(compiled) >= COMPILED_BY_TRAINING


@pytest.mark.parametrize("text", FILES, ids=[parts[0] for parts in FILES.values()])
def test_a_config_file_that_cannot_be_used_is_refused(text, tmp_path, refused):
    (tmp_path / "mine.py").write_text(text)
    refused(train(config="mine.py"), *FILES[text])


@pytest.mark.parametrize("line", LINES)
def test_a_config_file_with_a_bad_line_is_refused(line, tmp_path, refused):
    (tmp_path / "mine.py").write_text(f"{HEAD}    {line}\n    return config\n")
    refused(train(ONE, config="mine.py"), *LINES[line])


def test_a_known_dataset_that_is_absent_is_refused_without_network(tmp_path, monkeypatch, refused):
    for scheme in ("http", "https", "all"):
        for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper()):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    refused(train(ONE, "data.name=cifar100"), "'cifar100'", str(tmp_path / "sets"), "TFDS_DATA_DIR")


def test_a_program_gets_the_same_words_as_an_exception(tmp_path):
    config = configs.default_config()
    config.norm.kind = "bach"
    with pytest.raises(UserError, match="unknown norm.kind 'bach'; choose one of: batch, "):
        run(config, tmp_path / "run")
    with pytest.raises(UserError, match="display 'loud'; choose one of: auto, bar, lines, off"):
        run(configs.load(DIGITS, [ONE]), tmp_path / "run", show="loud")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (train("optim.learning_rat=1"), OVERRIDES["optim.learning_rat=0.1"]),
        (train(config="no.py"), ("'no.py' does not exist",)),
        (train(workdir="/proc/bnresearch/run"), ("/proc/bnresearch/run", "--workdir")),
        (train("norm.kind=group"), ("norm.group.groups=32", "100 features")),
    ],
)
def test_the_program_itself_says_no_more_than_that(argv, parts, tmp_path):
    command = [sys.executable, "-m", "bnresearch", *argv]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_message(done.stderr, parts)
    assert list(tmp_path.iterdir()) == []
