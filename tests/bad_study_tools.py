"""Two good study files, and what makes bad ones of them."""

from run_tools import ROOT

GOOD = f'''"""A good study."""

from bnresearch.study import *


def get_study():
    return Study(
        question="Is it so?",
        source="nobody",
        prediction="It is.",
        base={str(ROOT / "configs" / "digits_mlp.py")!r},
        overrides={{"train.duration": "5ep"}},
        arms={{"batch": {{"norm.kind": "batch"}}, "none": {{"norm.kind": "none"}}}},
        axes={{
            "rate": grid("optim.learning_rate", [0.1, 0.3]),
            "size": grid("data.batch_size", [16, 64]),
            "net": settings({{"wide": {{"model.mlp.widths": (64,)}}, "deep": {{}}}}),
        }},
        tune=Tune("rate"),
        measures={{
            "accuracy": final("accuracy"),
            "speed": steps_to(0.9, "accuracy"),
            "limit": largest_usable("rate", 0.5),
            "sizes": largest_usable("size", 0.5),
        }},
        claims=[
            Difference(treatment="batch", control="none", measure="accuracy",
                       where={{"size": 16, "net": "deep"}}),
        ],
        scales={{"smoke": Scale(seeds=1), "quick": Scale(seeds=8), "full": Scale(seeds=20)}},
    )
'''
FUNCTION = '''"""Without training."""

from bnresearch.study import *


def measure(seed, n, width=3):
    return {"size": float(seed + n * width)}


def get_study():
    return Study(
        question="Is it so?",
        source="nobody",
        prediction="It is.",
        function=measure,
        arms={"one": {"n": 1}, "two": {"n": 2}},
        axes={"width": grid("width", [3, 4])},
        measures={"size": final("size")},
        claims=[],
        scales={"smoke": Scale(seeds=1), "quick": Scale(seeds=8), "full": Scale(seeds=20)},
    )
'''

CLAIM = """Difference(treatment="batch", control="none", measure="accuracy",
                       where={"size": 16, "net": "deep"}),"""
PLACE = 'where={"size": 16, "net": "deep"}'
NONE = '"none": {"norm.kind": "none"}'
FULL = '"full": Scale(seeds=20)'


def claim(text):
    return CLAIM, f"{text},"


def replaced(text, change):
    old, new = change
    assert text.count(old) == 1, old
    return text.replace(old, new)


def refused_study(tmp_path, refused, text, parts, *flags):
    (tmp_path / "mine.py").write_text(text)
    refused(["study", "mine.py", "--scale=quick", "--out=out", *flags], *parts)
