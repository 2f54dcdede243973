"""Checkpoints: the same bits back, damage noticed, nothing lost to a kill."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from bnresearch import checkpoint
from bnresearch.errors import UserError


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: tuple
    nothing: tuple = ()


def make_state(seed=0, width=8, statistics=jnp.float32):
    """A state with every kind of leaf and of empty node a run may have."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "conv.1": {"kernel": jax.random.normal(keys[0], (3, 3, width))},
        "head": {
            "kernel": jax.random.normal(keys[1], (width, 4)).astype(jnp.bfloat16),
            "bias": jnp.array([0.0, -0.0, jnp.nan, jnp.inf]) * (seed + 1),
        },
        "count": jnp.arange(3, dtype=jnp.uint8) + seed,
        "on": jnp.array(seed % 2 == 0),
        "none": jnp.zeros((0, 3)),
    }
    transform = optax.chain(
        optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale_by_schedule(lambda step: 0.1)
    )
    statistics = {"conv.1": {"mean": jnp.full(width, seed + 0.1, statistics), "n": jnp.int32(seed)}}
    return State(jnp.int32(seed), params, statistics, transform.init(params))


def numbers(seed=0, size=2000):
    return {"params": {"kernel": np.random.default_rng(seed).standard_normal(size)}}


def saved(directory, *steps, make=numbers):
    with checkpoint.Checkpoints(directory, keep=5) as checkpoints:
        for step in steps:
            checkpoints.save(step, make(step))
    return directory


def same_bits(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()


# ---- The digest


def test_digest_is_the_sha256_of_name_dtype_shape_and_bytes():
    import hashlib

    tree = {"b": np.array([1.5, -0.0], np.float32), "a": {"c": np.int32(7)}}
    expected = hashlib.sha256(
        b"a/c\0int32\0()\0" + bytes([7, 0, 0, 0]) + b"b\0float32\0(2,)\0"
        b"\x00\x00\xc0\x3f\x00\x00\x00\x80"
    ).hexdigest()
    assert checkpoint.digest(tree) == expected


def test_digest_knows_nothing_of_containers_devices_or_memory_order():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    reference = checkpoint.digest({"x": array, "y": [np.ones(16)]})
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.device_put(np.ones(16, np.float32), NamedSharding(mesh, PartitionSpec("data")))
    assert checkpoint.digest({"y": (np.ones(16),), "x": jnp.array(array)}) == reference
    assert checkpoint.digest({"x": np.asfortranarray(array), "y": [np.ones(16)]}) == reference
    assert checkpoint.digest({"x": split}) == checkpoint.digest({"x": np.ones(16, np.float32)})


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.array([0.0, 1.0], np.float32)},  # the sign of zero
        {"y": np.array([-0.0, 1.0], np.float32)},
        {"x": np.array([[-0.0, 1.0]], np.float32)},
        {"x": np.array([-0.0, 1.0], np.float32).view(np.int32)},
        {"x": np.array([-0.0, 1.0], np.float64)},
        {"x": np.array([-0.0, 1.0], np.float32), "y": np.zeros(0)},
    ],
)
def test_digest_differs(other):
    reference = {"x": np.array([-0.0, 1.0], np.float32)}
    assert checkpoint.digest(other) != checkpoint.digest(reference)


# ---- Saving and restoring


def test_restore_gives_types_bits_and_dtypes(tmp_path):
    state = make_state(5)
    saved(tmp_path, 3, 5, make=make_state)
    step, restored = checkpoint.Checkpoints(tmp_path).restore(make_state(0))
    assert step == 5
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert type(restored.opt_state[0]) is optax.EmptyState
    same_bits(restored, state)
    assert restored.params["head"]["kernel"].dtype == jnp.bfloat16
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert checkpoint.digest(restored) == checkpoint.digest(state)


def test_restore_places_leaves_as_the_template_has_them(tmp_path):
    saved(tmp_path, 1, make=lambda _: {"a": np.arange(16.0), "b": np.arange(8.0), "c": np.ones(2)})
    mesh = jax.make_mesh((8,), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    with jax.enable_x64(True):
        template = {
            "a": jax.device_put(np.zeros(16), split),
            "b": jnp.zeros(8, jnp.float64),
            "c": np.zeros(2),
        }
        _, state = checkpoint.Checkpoints(tmp_path).restore(template)
    assert state["a"].sharding == split
    assert len(state["a"].addressable_shards) == 8
    assert not state["b"].committed
    assert isinstance(state["c"], np.ndarray)
    np.testing.assert_array_equal(state["a"], np.arange(16.0))


def test_a_state_that_is_donated_after_the_save_is_saved_as_it_was(tmp_path):
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = {"x": advance(jnp.zeros(3_000_000))}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(10):
            state = {"x": advance(state["x"])}
    _, restored = checkpoint.Checkpoints(tmp_path).restore(state)
    np.testing.assert_array_equal(restored["x"], np.ones(3_000_000))
    np.testing.assert_array_equal(advance(advance(restored["x"])), np.full(3_000_000, 3.0))


def test_the_newest_are_kept(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "deep" / "er", keep=2) as checkpoints:
        for step in (1, 5, 10, 20):
            checkpoints.save(step, numbers(step))
        checkpoints.wait()
        assert checkpoints.steps() == [10, 20]


def test_nothing_saved_is_none_and_writes_nothing(tmp_path, capsys):
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.restore(numbers()) is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_saving_a_step_again(tmp_path):
    saved(tmp_path, 1, 2)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        before = (tmp_path / "2" / "_CHECKPOINT_METADATA").stat().st_mtime_ns
        checkpoints.save(2, numbers(2))
        assert (tmp_path / "2" / "_CHECKPOINT_METADATA").stat().st_mtime_ns == before
        with pytest.raises(RuntimeError, match="already has step 2, with another state"):
            checkpoints.save(2, numbers(3))


def test_a_state_is_readable_by_plain_orbax(tmp_path):
    import orbax.checkpoint as ocp

    state = make_state(4)
    saved(tmp_path, 4, make=make_state)
    plain = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
        tmp_path / "4" / "state", args=ocp.args.StandardRestore(None)
    )
    kernel = plain["params"]["conv.1"]["kernel"]
    np.testing.assert_array_equal(kernel, state.params["conv.1"]["kernel"])


def test_a_save_that_fails_is_reported_and_does_not_stick(tmp_path, monkeypatch):
    from orbax.checkpoint._src.path import atomicity

    async def full(self):
        raise OSError(28, "No space left on device")

    checkpoints = checkpoint.Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", full)
        checkpoints.save(1, numbers(1))
        with pytest.raises(OSError, match="No space left") as raised:
            checkpoints.wait()
    assert raised.value.__notes__ == [f"while writing checkpoint {tmp_path / '1'}"]
    checkpoints.save(2, numbers(2))
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]


# ---- Refusals


def test_keep_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        checkpoint.Checkpoints(tmp_path, keep=0)


def test_another_model_is_refused_and_is_not_damage(tmp_path):
    saved(tmp_path, 1, make=make_state)
    other = make_state(width=16)
    other = other.replace(params=other.params | {"new": jnp.zeros(2)})
    with pytest.raises(UserError, match="another model") as raised:
        checkpoint.Checkpoints(tmp_path).restore(other)
    message = str(raised.value)
    assert "params/conv.1/kernel: saved float32[3, 3, 8], wanted float32[3, 3, 16]" in message
    assert "params/new: saved nothing, wanted float32[2]" in message
    assert checkpoint.Checkpoints(tmp_path).steps() == [1]


def test_a_long_list_of_differences_ends_with_a_count(tmp_path):
    saved(tmp_path, 1, make=lambda _: {f"p{n:02d}": np.ones(2) for n in range(15)})
    with pytest.raises(UserError, match=r"p09: saved(.|\n)*\.\.\. and 5 more$"):
        checkpoint.Checkpoints(tmp_path).restore({f"p{n:02d}": np.ones(3) for n in range(15)})


def test_running_statistics_must_be_float32(tmp_path):
    state = {"batch_stats": {"mean": np.ones(2, ml_dtypes.bfloat16)}}
    good = {"batch_stats": {"mean": np.ones(2, np.float32)}}
    saved(tmp_path, 1, make=lambda _: state)
    for template in (good, state):
        with pytest.raises(UserError, match="must be float32, batch_stats/mean is bfloat16"):
            checkpoint.Checkpoints(tmp_path).restore(template)
    assert checkpoint.Checkpoints(tmp_path).steps() == [1]


# ---- Damage


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reshape(description):
    content = description.read_bytes()
    assert content.count(b"[20000]") == 1
    description.write_bytes(content.replace(b"[20000]", b"[20001]"))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = {
    "flipped bit in the arrays": lambda folder: flip(largest(folder / "state")),
    "truncated arrays": lambda folder: truncate(largest(folder / "state")),
    "missing arrays": lambda folder: largest(folder / "state").unlink(),
    "flipped bit in the manifest": lambda folder: flip(folder / "state" / "manifest.ocdbt"),
    "truncated metadata": lambda folder: truncate(folder / "state" / "_METADATA"),
    "flipped bit in the description": lambda folder: flip(folder / "about" / "metadata"),
    "another shape in the description": lambda folder: reshape(folder / "about" / "metadata"),
    "missing description": lambda folder: (folder / "about" / "metadata").unlink(),
    "missing state": lambda folder: shutil.rmtree(folder / "state"),
    "empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed_and_the_one_before_used(tmp_path, capfd, damage):
    make = lambda seed: numbers(seed, 20_000)  # noqa: E731
    saved(tmp_path, 1, 2, 3, make=make)
    damage(tmp_path / "3")
    with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
        step, state = checkpoints.restore(make(0))
        assert step == 2
        same_bits(state, make(2))
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(f"warning: checkpoint {tmp_path / '3'} is damaged (")
        assert lines[0].endswith("moved to damaged-3, trying the one before")
        checkpoints.save(3, make(3))  # the run arrives there again
    with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        same_bits(checkpoints.restore(make(0))[1], make(3))
    assert (tmp_path / "damaged-3").is_dir()


def test_orbax_alone_restores_a_flipped_bit_as_a_wrong_number(tmp_path):
    """Why there is a digest; if this fails, orbax has learnt to check, and ours may go."""
    import orbax.checkpoint as ocp

    saved(tmp_path, 1, make=lambda seed: numbers(seed, 20_000))
    flip(largest(tmp_path / "1" / "state"))
    plain = ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
        tmp_path / "1" / "state", args=ocp.args.StandardRestore(numbers(0, 20_000))
    )
    different = plain["params"]["kernel"] != numbers(1, 20_000)["params"]["kernel"]
    assert different.sum() >= 1


def test_any_flipped_bit_gives_the_same_state_or_is_noticed(tmp_path):
    state = make_state(1)
    source = saved(tmp_path / "source", 1, make=make_state)
    files = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    noticed = 0
    for number, file in enumerate(files * 2):
        copy = tmp_path / str(number)
        shutil.copytree(source, copy)
        flip(copy / file, random.Random(number).random())
        try:
            _, restored = checkpoint.Checkpoints(copy).restore(make_state(0))
        except UserError as error:
            assert "are damaged (steps 1)" in str(error)
            noticed += 1
        else:
            same_bits(restored, state)
    assert noticed >= 4  # the description and the manifest, twice


def test_a_renamed_checkpoint_is_not_believed(tmp_path, capfd):
    saved(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "9")
    assert checkpoint.Checkpoints(tmp_path).restore(numbers())[0] == 1
    assert "it holds step 2" in capfd.readouterr().err


def test_all_damaged_is_an_error_once_and_then_a_new_start(tmp_path, capfd):
    saved(tmp_path, 1, 2)
    for step in "12":
        flip(largest(tmp_path / step / "state"))
    with pytest.raises(UserError, match=r"are damaged \(steps 1, 2\)(.|\n)*same command again"):
        checkpoint.Checkpoints(tmp_path).restore(numbers())
    capfd.readouterr()
    assert checkpoint.Checkpoints(tmp_path).restore(numbers()) is None
    assert "starting from the beginning" in capfd.readouterr().err


def test_the_same_step_may_be_damaged_twice(tmp_path):
    for _ in range(2):
        saved(tmp_path, 1, 2)
        flip(largest(tmp_path / "2" / "state"))
        assert checkpoint.Checkpoints(tmp_path).restore(numbers())[0] == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1", "damaged-2", "damaged-2.1"]


def test_read_only_moves_nothing(tmp_path, capfd):
    saved(tmp_path, 1, 2)
    flip(largest(tmp_path / "2" / "state"))
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert checkpoints.restore(numbers())[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3.orbax-checkpoint-tmp"]
    with pytest.raises(RuntimeError, match="read only"):
        checkpoints.save(4, numbers())
    flip(largest(tmp_path / "1" / "state"))
    with pytest.raises(UserError, match="put a sound copy back under its step number$"):
        checkpoints.restore(numbers())
    assert "damaged" in capfd.readouterr().err


def test_the_description_is_json_to_look_at(tmp_path):
    saved(tmp_path, 7)
    about = json.loads((tmp_path / "7" / "about" / "metadata").read_text())
    assert about["step"] == 7
    assert about["leaves"] == {"params/kernel": ["float64", [2000]]}
    assert about["digest"] == checkpoint.digest(numbers(7))
