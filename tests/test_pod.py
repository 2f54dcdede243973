"""The model of a pod against sums done by hand, and what is read from a compiled module."""

import json

import pytest

from benchmarks import pod, pod_step
from benchmarks.measure import RESULTS
from benchmarks.pod import Level, Step, Switched, Torus

SWITCHED = Switched("s", 100.0, 5.0, (Level(8, 1.0, 100.0), Level(1024, 10.0, 10.0)), "")
TORUS = Torus("t", 100.0, 5.0, 1.0, 10.0, "")


@pytest.mark.parametrize(
    ("fabric", "devices", "stride", "size", "seconds"),
    [
        (SWITCHED, 1, 1, 800, 0),
        (SWITCHED, 8, 1, 800, 3 * 1 + 7 / 8 * 800 / 100),
        # Within hosts, then an eighth of it between 8 of them.
        (SWITCHED, 64, 1, 6400, (3 * 1 + 7 / 8 * 6400 / 100) + (3 * 10 + 7 / 8 * 800 / 10)),
        (SWITCHED, 8, 8, 800, 3 * 10 + 7 / 8 * 800 / 10),  # one of each host
        (TORUS, 8, 1, 240, 3 * 1 + 7 / 8 * 240 / (3 * 10)),  # 2 x 2 x 2, open
        (TORUS, 64, 1, 1920, 3 * 2 + 63 / 64 * 1920 / (3 * 20)),  # 4 x 4 x 4, closed
        (TORUS, 8, 8, 240, 3 * 2 + 7 / 8 * 240 / (3 * 20 / 2)),  # every other of those
    ],
)
def test_a_phase(fabric, devices, stride, size, seconds):
    assert fabric.phase(devices, stride, size) == pytest.approx(seconds)


def test_collectives_one_after_the_other():
    kinds = {
        "all-reduce": {"operations": 2, "bytes": 800},
        "all-gather": {"operations": 3, "bytes": 1600},
    }
    wanted = 2 * (5 + 2 * 3) + 2 * 7 + 3 * (5 + 3) + 14
    assert pod.seconds(SWITCHED, kinds, (8, 1)) == pytest.approx(wanted)
    assert pod.seconds(SWITCHED, kinds, (1, 8)) == 0


def test_efficiency_with_overlap_and_apart():
    assert Step(9, 1, 3).efficiency(False) == pytest.approx(9 / 13)
    assert Step(9, 1, 3).efficiency(True) == pytest.approx(9 / 10)  # 6 s could be hidden
    assert Step(3, 1, 4).efficiency(True) == pytest.approx(3 / 6)  # 2 s are


def gathered(operations, size):
    return {"all-gather": {"operations": operations, "bytes": size}}


ROW = {  # 10 features at 2 sites, on 16 devices
    "devices": 16,
    "flops": 300.0,
    "per_device": 4,
    "sent": {
        "forward": gathered(2, 8 * 2 * 10 * 4),
        "statistics": gathered(2, 2 * 2 * 10 * 4),
        "backward": {"all-reduce": {"operations": 2, "bytes": 80}},
        "gradients": {"all-reduce": {"operations": 1, "bytes": 400}},
    },
}


def test_what_is_sent_on_more_devices():
    """Gathers within groups of 8 stay, those of 16 groups have 8 times as much as those of 2."""
    sent = pod.sent_on(ROW | {"scope": "group:8"}, 128)
    assert sent["forward"] == gathered(2, 640)
    assert sent["statistics"] == gathered(2, 8 * 160)
    assert sent["gradients"] == ROW["sent"]["gradients"]
    assert pod.sent_on(ROW | {"scope": "global"}, 128)["forward"] == gathered(2, 8 * 640)
    summed = pod.by_sums(sent, "group:8", 128)
    assert summed["forward"] == {"all-reduce": {"operations": 4, "bytes": 80}}
    assert summed["statistics"] == summed["forward"]
    assert summed["backward"] == sent["backward"]


def test_a_step_of_each_scope():
    """On 64 devices; 64 FLOPs at 15 of 100 a second."""
    sent = {part: {"all-reduce": {"operations": 1, "bytes": 0}} for part in pod_step.PARTS}
    inside, all_of_them, between = 5 + 2 * 3, 5 + 2 * 33, 5 + 2 * 30
    wanted = {
        "global": (2 * all_of_them, all_of_them),  # its statistics need nothing more
        "group:8": (2 * inside, between + all_of_them),
        "device": (0, 2 * all_of_them),
    }
    for scope, (waited_for, others) in wanted.items():
        found = pod.step(SWITCHED, 64.0, sent, scope, 64)
        assert found == pytest.approx(Step(64 / 15, waited_for, others))


def test_more_rows_on_a_device_compute_more_and_send_the_same():
    few, many = (row for row in pod.predict([ROW | {"scope": "global"}], (64,))[:2])
    assert (few["batch"], many["batch"]) == (32, 256)
    one, other = (row["steps"]["64"] for row in (few, many))
    assert one["computing"] == pytest.approx(300 * 8 / (989e12 * 0.15))
    assert other["computing"] == pytest.approx(8 * one["computing"])
    assert other["others"] == one["others"]


def test_the_table_gives_percent_with_overlap_and_apart():
    row = {"fabric": "f", "batch": 32, "scope": "global", "by_sums": False}
    steps = {"8": {"overlapped": 0.96, "apart": 0.5}}
    assert pod.table([row | {"steps": steps}]) == [("f", "32", "global", "96, 50")]


def test_what_is_published_follows_from_the_counts_and_these_are_of_a_resnet_50():
    """53 norms of 26,560 features together; mean and variance of each device are gathered."""
    result = json.loads((RESULTS / "devices.json").read_text())
    assert pod.predict(result["resnet50"]) == result["predicted"]
    for row in result["resnet50"]:
        gathers, backward = (row["sent"][part] for part in ("forward", "backward"))
        if row["scope"] == "device":
            assert gathers == backward == {}
            gathers = row["sent"]["statistics"]
        members = 8 if row["scope"] == "group:8" else row["devices"]
        assert gathers == gathered(53, members * 2 * 4 * 26_560)
        assert backward == {} or backward["all-reduce"]["operations"] <= 53


MODULE = """
%a = f32[1,8,2,64]{3,2,0,1} all-gather(%x), metadata={op_name="jit(run)/jvp(ResNet)/stem/norm1/norm1._with_running/concatenate"}
%b = f32[1,8,2,64]{3,2,0,1} all-gather(%x), metadata={op_name="jit(run)/jvp(ResNet)/stem/norm1/norm1._with_running/whole_batch/concatenate"}
%c = f32[3,64]{1,0} all-reduce(%x), metadata={op_name="jit(run)/transpose(jvp(ResNet))/stem/norm1/norm1._with_running/checkpoint/reduce_sum"}
%d = (f32[7,7,3,64]{3,2,1,0}, f32[64]{0}) all-reduce(%x, %y), metadata={op_name="jit(run)/(transpose(jvp(ResNet))/stem/conv1/conv:transpose(jvp(ResNet))/stem/norm1/norm1._with_running/mul)"}
%f = (f32[64]{0}, f32[64]{0}, f32[64]{0}, f32[64]{0}, f32[64]{0}) all-reduce(%x), metadata={op_name="jit(run)/transpose(jvp(ResNet))/(stem/norm1/norm1._with_running/reduce_sum:stage1/block1/norm1/norm1._with_running/reduce_sum)"}
%e = f32[] all-reduce(%x), metadata={op_name="jit(run)/jvp()/reduce_sum"}
"""  # noqa: E501


def test_collectives_are_told_apart_by_their_origin():
    assert pod_step.counted(MODULE) == {
        "forward": gathered(1, 4 * 1024),
        "statistics": gathered(1, 4 * 1024),
        "backward": {"all-reduce": {"operations": 1, "bytes": 4 * 192}},
        "gradients": {"all-reduce": {"operations": 3, "bytes": 4 * (9408 + 64 + 5 * 64 + 1)}},
    }
