"""Every bad study: exit code 2, one message that says what to do, nothing written or compiled."""

import pytest
from bad_study_tools import FULL, FUNCTION, GOOD, NONE, refused_study, replaced
from run_tools import ROOT

from bnresearch import study
from bnresearch.errors import UserError

# What replaces what in GOOD -> what the message has to name.
CHANGES = {
    # Arms.
    "equal": ((NONE, '"none": {}'), ("'batch' and 'none' are the same runs", "first_seed")),
    "same overrides": (
        (NONE, f'{NONE}, "twin": {{"norm.kind": "batch"}}'),
        ("'batch' and 'twin'", "overrides are equal", "first_seed 8 or more apart"),
    ),
    "an option of another choice": (
        (NONE, '"none": {"norm.group.groups": 4}'),
        ("norm.group.groups=4 of 'none' has no effect (norm.kind is 'batch')",),
    ),
    "overlapping seeds": (
        (NONE, f'{NONE}, "twin": Arm(overrides={{"norm.kind": "batch"}}, first_seed=7)'),
        ("'batch' and 'twin'", "8 or more apart"),
    ),
    "negative first seed": (
        (NONE, '"none": Arm(overrides={"norm.kind": "none"}, first_seed=-1)'),
        ("'none'", "first_seed=-1", "0 or more"),
    ),
    "overrides of another type": (
        (NONE, '"none": Arm(overrides="none")'),
        ("the overrides of arm 'none' must be a dict",),
    ),
    "arm of another type": ((NONE, '"none": "none"'), ("'none' in arms is a str", "Arm")),
    "no arms": (
        ('arms={"batch": {"norm.kind": "batch"}, ' + NONE + "}", "arms={}"),
        ("the study has no arms",),
    ),
    # Overrides.
    "unknown key": (
        ('"norm.kind": "none"', '"norm.knid": "none"'),
        ("arm 'none'", "'norm.knid'", "did you mean norm.kind"),
    ),
    "unknown key of all": (
        ('"train.duration"', '"train.durations"'),
        ("overrides of the study", "'train.durations'", "did you mean train.duration"),
    ),
    "unknown key of an axis": (
        ('"data.batch_size"', '"data.batchsize"'),
        ("axis 'size'", "did you mean data.batch_size"),
    ),
    "group of keys": (
        ('"norm.kind": "none"', '"norm": "none"'),
        ("arm 'none'", "'norm' is a group of keys", "one of its keys"),
    ),
    "wrong type": (
        ("(64,)", '"64"'),
        ("arm 'batch', rate=0.1, size=16, net='wide'", "widths='64' is of type str, not tuple"),
    ),
    "no whole number": (("[16, 64]", "[16, 64.5]"), ("size=64.5", "of type float, not int")),
    "out of range": (("[0.1, 0.3]", "[0.1, -0.3]"), ("rate=-0.3", "is negative")),
    "unknown kind": (('"norm.kind": "none"', '"norm.kind": "non"'), ("arm 'none'", "'non'")),
    "none": (('"norm.kind": "none"', '"norm.kind": None'), ("norm.kind=None", "such as 'batch'")),
    "seed": (('"norm.kind": "none"', '"seed": 3'), ("'seed'", "first_seed")),
    "schema": (('"norm.kind": "none"', '"schema": 3'), ("unknown config key 'schema'",)),
    "no name of a key": (
        ('"data.batch_size", [16, 64]', "3, [16, 64]"),
        ("axis key 3", "in quotes", "line"),
    ),
    "a model without norms": (
        (NONE, '"none": {"model.name": "fixup"}'),
        ("arm 'none'", "norm.kind=batch", "fixup has no norms"),
    ),
    "devices of a scope": (
        (NONE, '"none": {"norm.scope": "device", "parallel.devices": 0}'),
        ("norm.scope=device", "'parallel.devices'"),
    ),
    # Axes.
    "an axis without effect": (
        ('"data.batch_size", [16, 64]', '"norm.group.groups", [16, 64]'),
        ("axis 'size' changes nothing", "norm.group.groups"),
    ),
    "an axis and an arm": (
        ('"deep": {}', '"deep": {"norm.kind": "layer"}'),
        ("axis 'net' and arm 'batch'", "norm.kind"),
    ),
    "two axes": (
        ('"deep": {}', '"deep": {"data.batch_size": 8}'),
        ("axis 'size' and axis 'net'", "data.batch_size"),
    ),
    "twice a value": (("[16, 64]", "[16, 64, 16]"), ("line", "16 is there more than once")),
    "no values": (("[16, 64]", "[]"), ("no values",)),
    "a value that is no name": (("[16, 64]", "[(16,), (64,)]"), ("(16,)", "settings(")),
    "not a number": (("[0.1, 0.3]", "[0.1, float('nan')]"), ("nan is not a finite number",)),
    "log of names": (("[16, 64]", '["a", "b"], log=True'), ("log=True",)),
    "range upside down": (
        ('grid("data.batch_size", [16, 64])', 'log_range("data.batch_size", 64, 16, 3)'),
        ("log_range(", "0 < low < high"),
    ),
    "random values that meet": (
        (
            'grid("data.batch_size", [16, 64])',
            'random({"data.batch_size": choice([16, 64])}, 3)',
        ),
        ("random() draws", "'data.batch_size' more than once", "grid()"),
    ),
    "random values that are no names": (
        (
            'grid("data.batch_size", [16, 64])',
            'random({"model.mlp.widths": choice([(16,), (64,)])}, 2)',
        ),
        ("random()", "(64,) cannot be", "settings("),
    ),
    "zipped unequally": (
        (
            'grid("data.batch_size", [16, 64])',
            'zipped({"data.batch_size": [16, 64], "optim.weight_decay": [0.1]})',
        ),
        ("equally many", "'optim.weight_decay': 1"),
    ),
    "a list for an axis": (
        ('grid("data.batch_size", [16, 64])', "[16, 64]"),
        ("'size' in axes is a list, not Axis",),
    ),
    "reserved": (('"size": grid', '"seed": grid'), ("cannot be called 'seed'",)),
    "reserved, too": (('"size": grid', '"mean": grid'), ("cannot be called 'mean'", "another")),
    "two arms of one label": (
        (NONE, f'{NONE}, "twin": Arm(overrides={{"norm.kind": "group"}}, label="none")'),
        ("two arms are called 'none'", "a label of its own"),
    ),
    # Tuning.
    "tunes an unknown axis": (('Tune("rate")', 'Tune("rat")'), ("axis in tune", "mean rate?")),
    "tunes on test": (
        ('Tune("rate")', 'Tune("rate", final("accuracy"))'),
        ("'test'", "on validation"),
    ),
    "tunes by an axis": (
        ('Tune("rate")', 'Tune("rate", largest_usable("rate", 0.5))'),
        ("a measure of one run",),
    ),
    "tune of another type": (('Tune("rate")', '"rate"'), ("tune is a str", "Tune('axis')")),
    # Measures.
    "no measures": (("measures={", "measures={} and {"), ("the study has no measures",)),
    "measure of another type": (
        ('final("accuracy")', '"accuracy"'),
        ("'accuracy' in measures is a str, not Measure",),
    ),
    "collapses an unknown axis": (
        ('largest_usable("rate", 0.5)', 'largest_usable("rates", 0.5)'),
        ("axis in measure 'limit' 'rates'", "mean rate?"),
    ),
    "collapses names": (
        ('largest_usable("rate", 0.5)', 'largest_usable("net", 0.5)'),
        ("measure 'limit' needs numbers along axis 'net'",),
    ),
    "an unknown metric": (
        ('final("accuracy")', 'final("acuracy")'),
        ("metric of split 'test' in measure 'accuracy' 'acuracy'", "mean accuracy?"),
    ),
    "an unknown metric of the training": (
        ('steps_to(0.9, "accuracy")', 'steps_to(0.9, "accuracy", "train")'),
        ("split 'train' in measure 'speed'", "gradient_norm, ", "learning_rate, loss, "),
    ),
    "tunes by an unknown metric": (
        ('Tune("rate")', 'Tune("rate", final("acuracy", "validation"))'),
        ("split 'validation' in tune", "mean accuracy?"),
    ),
    "along what is looked at once": (
        ('steps_to(0.9, "accuracy")', 'steps_to(0.9, "accuracy", "test")'),
        ("measure 'speed'", "when a run ends", "steps_to(..., split='validation')"),
    ),
    "an unknown split": (
        ('final("accuracy")', 'final("accuracy", "tset")'),
        ("'accuracy' looks at split 'tset'", "'train', 'validation', 'test'"),
    ),
    # Scales.
    "one seed": (("Scale(seeds=8)", "Scale(seeds=1)"), ("scale quick", "2 seeds or more")),
    "no seeds": (("Scale(seeds=8)", "Scale(seeds=0)"), ("seeds=0", "1 or more")),
    "a scale is missing": ((f", {FULL}", ""), ("no scale 'full'", "smoke, quick, full")),
    "scale of another type": (("Scale(seeds=8)", "8"), ("'quick' in scales is a int, not Scale",)),
    "arm of a scale": (
        ("Scale(seeds=8)", 'Scale(seeds=8, arms=("batch", "nune"))'),
        ("arm in scale quick", "mean none?"),
    ),
    "an arm that a scale leaves out": (
        ("Scale(seeds=8)", 'Scale(seeds=8, arms=("batch",))'),
        ("at scale quick, ", "'none'", "choose one of: batch"),
    ),
    "arms of a scale that are no list": (
        ("Scale(seeds=8)", 'Scale(seeds=8, arms="batch")'),
        ("scale 'quick' has arms='batch'", "a list"),
    ),
    "overrides of a scale": (
        ("Scale(seeds=8)", 'Scale(seeds=8, overrides=("train.duration", "1st"))'),
        ("the overrides of scale 'quick' must be a dict",),
    ),
    "axis of a scale": (
        ("Scale(seeds=8)", 'Scale(seeds=8, axes={"rat": grid("seed", [1])})'),
        ("axis in scale quick", "mean rate?"),
    ),
    "too much": (
        ("Scale(seeds=8)", "Scale(seeds=2000)"),
        ("32,000 runs", "10,000", "--yes"),
    ),
    # The whole.
    "no question": (('question="Is it so?"', 'question=""'), ("no question",)),
    "a base that is not there": (
        ("digits_mlp.py", "digits_mpl.py"),
        ("digits_mpl.py", "not exist"),
    ),
    "neither": ((f"base={str(ROOT / 'configs' / 'digits_mlp.py')!r},", ""), ("neither",)),
    "both": (("overrides=", "function=print, overrides="), ("a function", "this one has both")),
}

FUNCTIONS = {
    "unknown argument": (('"two": {"n": 2}', '"two": {"m": 2}'), ("arm 'two'", "measure()", "'m'")),
    "missing argument": (
        ('"two": {"n": 2}', '"two": {"width": 2}'),
        ("axis 'width' and arm 'two'", "width"),
    ),
    "no seed": (("seed, n,", "n,"), ("measure(n, width=3)", "must name `seed`")),
    "stars": (("width=3", "**rest"), ("without * and **",)),
    "not JSON": (('"two": {"n": 2}', '"two": {"n": {2}}'), ("measure()", "JSON")),
    "no function": (("function=measure", "function=3"), ("function=3", "with def")),
    "looks along": (('final("size")', 'best("size")'), ("'size'", "along a training")),
    "tunes": (("claims=[]", 'claims=[], tune=Tune("width")'), ("no validation split",)),
    "the same arguments": (
        ('"two": {"n": 2}', '"two": {"n": 1}'),
        ("'one' and 'two'", "overrides are equal"),
    ),
}

# The text of a study file -> what the message has to name besides the file.
FILES = {
    "question = 1": ("no get_study()", "docs/own_study.md"),
    "x = 1\ndef get_study(:": ("SyntaxError", "line 2", "correct the file"),
    "\nraise RuntimeError('boom')": ("RuntimeError: boom", "in line 2"),
    "def get_study():\n    return 1 / 0": ("ZeroDivisionError", "in line 2", "correct the file"),
    "import sys; sys.exit(3)": ("SystemExit: 3",),
    "def get_study(): pass": ("returns a NoneType", "Study"),
    "from bnresearch.study import Study\ndef get_study(): return Study(arm={})": (
        "'arm'",
        "line 2",
    ),
    "import numppy": ("No module named 'numppy'",),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_bad_study_is_refused(name, tmp_path, refused, compiled):
    change, parts = CHANGES[name]
    refused_study(tmp_path, refused, replaced(GOOD, change), parts)
    assert compiled == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_bad_study_of_a_function_is_refused(name, tmp_path, refused):
    change, parts = FUNCTIONS[name]
    refused_study(tmp_path, refused, replaced(FUNCTION, change), parts)


@pytest.mark.parametrize("text", FILES, ids=[parts[0] for parts in FILES.values()])
def test_a_file_that_holds_no_study_is_refused(text, tmp_path, refused):
    refused_study(tmp_path, refused, text, ("'mine.py'", *FILES[text]))


def test_files_that_are_not_there_and_scales_that_are_not_known(tmp_path, refused):
    refused(["study", "no.py", "--scale=quick", "--out=out"], "'no.py'", "list studies")
    refused_study(tmp_path, refused, GOOD, ("scale 'quik'", "mean quick?"), "--scale=quik")


@pytest.mark.parametrize("text", [GOOD, FUNCTION])
@pytest.mark.parametrize("scale", ["smoke", "quick", "full"])
def test_what_the_changes_begin_with_is_good(text, scale, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    study.plan(study.load(path), path, scale)


def test_a_study_that_is_too_large_can_be_meant(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(replaced(FUNCTION, ("Scale(seeds=8)", "Scale(seeds=2501)")))
    mine = study.load(path)
    assert study.count(mine, "quick") == 4 * 2501
    with pytest.raises(UserError, match="10,004 runs"):
        study.plan(mine, path, "quick")
    assert len(study.plan(mine, path, "quick", confirmed=True).runs) == 10004
    assert len(study.plan(mine, path, "quick", seeds=2500).runs) == 10000
