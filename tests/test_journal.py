"""The journal: whatever a process leaves behind at any moment, one of the last two states comes back whole, or none."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import tree
from jaxpeft.training import journal, sharding
from jaxpeft.training.journal import Journal

MANIFEST = {"config": "a", "data": {"train": "b"}}


def state(step):
    rng = np.random.default_rng(step)
    return {
        "step": jnp.int32(step), "w": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), "empty": jnp.zeros((0, 3)),
        "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16), "ok": jnp.bool_(step % 2), "seed": jnp.uint32(2**32 - 1 - step),
    }  # fmt: skip


def words(step):
    return sharding.packed(list(tree.flatten(state(step)).values()))


def opened(path, manifest=MANIFEST, like=None, said=None):
    return Journal(path, like or state(0), manifest, log=(said if said is not None else []).append)


def written(path, *steps):
    one = opened(path)
    for step in steps:
        one.write(step, words(step))
    return one


def same(a, b):
    for name, x in tree.flatten(a).items():
        y = tree.flatten(b)[name]
        assert x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def test_words_hold_every_bit():
    odd = {"nan": np.array([np.nan, -np.nan, -0.0, np.inf], np.float32), "i": np.array([-1, 2**31 - 1], np.int32)}
    odd["nan"].view(np.uint32)[0] |= 12345  # a payload
    layout = tree.layout(odd)
    back = tree.unpack(np.asarray(sharding.packed([jnp.asarray(x) for x in odd.values()])), layout)
    same(odd, back)
    with pytest.raises(ValueError, match="5 words of uint32, expected 6"):
        tree.unpack(np.zeros(5, np.uint32), layout)
    for dtype in ("O", "float64"):
        with pytest.raises(ValueError, match="32 bits at most"):
            tree.unpack(np.zeros(3, np.uint32), [["x", dtype, [3]]])
    with pytest.raises(ValueError, match="float64 does not fit|int64 does not fit"), jax.enable_x64(True):
        sharding.packed([jnp.zeros(3, jnp.int64)])


def test_the_newest_state_comes_back(tmp_path):
    path = tmp_path / "a" / "journal"
    assert opened(path).restore(0) is None
    one = written(path, 1)
    for step in range(2, 7):
        one.write(step, words(step))
        found, got = opened(path).restore(0)
        assert found == step
        same(state(step), got)
    assert opened(path).restore(6) is None  # a checkpoint is as new
    size = path.stat().st_size
    again = opened(path)  # the next process goes on in the same file
    again.write(7, words(7))
    assert path.stat().st_size == size and opened(path).restore(6)[0] == 7
    assert opened(path).restore(5)[0] == 7


@pytest.mark.parametrize("n", [2, 3])  # the newest is in the second slot, or in the first
@pytest.mark.parametrize("resumed", [False, True])
def test_a_write_that_is_cut_off_leaves_the_state_before(tmp_path, monkeypatch, resumed, n):
    """After each possible number of bytes, by the process that wrote before or by its successor."""

    class CutOffError(BaseException):  # as sudden as a signal
        pass

    path, real = tmp_path / "journal", journal._write
    one = written(path, *range(1, n + 1))
    before, slot = path.read_bytes(), one._next
    total = 4 * words(9).size + journal._SLOT.size
    for cut in [*range(0, total, 97), *range(total - 60, total)]:
        path.write_bytes(before)
        room = [cut]

        def some(file, data, at, room=room):
            real(file, data[: room[0]], at)
            room[0] -= len(data)
            if room[0] < 0:
                raise CutOffError

        one = opened(path) if resumed else one
        one._next = None if resumed else slot
        with monkeypatch.context() as patch, pytest.raises(CutOffError):
            patch.setattr(journal, "_write", some)
            one.write(9, words(9))
        found, got = opened(path).restore(0)
        assert found == n
        same(state(n), got)


def test_no_flipped_bit_is_taken_for_a_state(tmp_path):
    path, rng = tmp_path / "journal", np.random.default_rng(0)
    written(path, 1, 2)
    raw, seen = path.read_bytes(), set()
    for _ in range(300):
        at, bit = int(rng.integers(len(raw))), int(rng.integers(8))
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :])
        found = opened(path).restore(0)
        seen.add(found and found[0])
        if found:
            same(state(found[0]), found[1])
    assert seen == {None, 1, 2}


@pytest.mark.parametrize(
    "raw", [b"", b"\0" * 5, b"\xff" * 4096, b"\x02" + bytes(7) + b"{}" + bytes(9000), b"x" * 10_000]
)
def test_what_is_no_journal_is_left_alone_until_there_is_one(tmp_path, raw):
    path = tmp_path / "journal"
    path.write_bytes(raw)
    assert opened(path).restore(0) is None
    written(path, 1)
    assert opened(path).restore(0)[0] == 1


def test_another_run_is_refused_with_the_difference(tmp_path):
    path, said = tmp_path / "journal", []
    written(path, 4)
    other = MANIFEST | {"data": {"train": "c"}}
    with pytest.raises(ValueError, match="step 4 of journal belongs to another run.*data/train: stored b, now c"):
        opened(path, other).restore(0)
    accepting = opened(path, other, said=said)
    assert accepting.restore(0, accept=True)[0] == 4 and "accepted as asked" in said[0]
    accepting.write(5, words(5))  # replaces the file
    assert opened(path, other).restore(0)[0] == 5
    with pytest.raises(ValueError, match="another run"):
        opened(path).restore(0)
    with pytest.raises(ValueError, match=r"does not fit:\n  missing \(1\): more"):
        opened(path, other, like=state(0) | {"more": jnp.zeros(3)}).restore(0)


def test_a_head_that_somebody_made_up_is_refused(tmp_path):
    """With a digest that is right: anybody can compute one."""
    path = tmp_path / "journal"
    for head in (
        [],
        {"manifest": []},
        {"manifest": MANIFEST, "layout": [["w", "O", [9]]]},
        {"manifest": MANIFEST, "layout": 3},
    ):
        raw = json.dumps(head).encode()
        raw, data = struct.pack("<Q", len(raw)) + raw, np.zeros(9, np.uint32)
        slot = journal._SLOT.pack(3, 9, journal._digest(raw, 3, data)) + data.tobytes()
        path.write_bytes(raw.ljust(journal.PAGE, b"\0") + 2 * slot.ljust(journal.PAGE, b"\0"))
        with pytest.raises(ValueError, match="journal"):
            opened(path).restore(0)


def test_a_slow_store_takes_little_of_the_time(tmp_path, monkeypatch):
    """One that needs a second for what takes a step of a tenth; a clock that is moved by hand."""
    clock, real, said, per_write = [1000.0], journal._write, [], [1.0]

    def slow(file, data, at):
        clock[0] += per_write[0] / 2
        real(file, data, at)

    monkeypatch.setattr(journal, "_write", slow)
    monkeypatch.setattr(journal.time, "perf_counter", lambda: clock[0])
    one, written_at = opened(tmp_path / "journal", said=said), []
    for step in range(1, 1001):
        clock[0] += 0.1
        before = clock[0]
        one.write(step, words(3))
        if clock[0] > before:
            written_at.append(step)
    assert written_at[:3] == [1, 2, 3] and 203 <= written_at[3] <= 204
    assert len(written_at) <= 9, written_at  # of 100 s of steps
    assert len(said) == 1 and "every 20 s" in said[0]
    per_write[0] = 0.01  # as fast as a disk again
    for step in range(1001, 1700):
        clock[0] += 0.1
        one.write(step, words(3))
    assert opened(tmp_path / "journal").restore(0)[0] == 1699


def test_a_slow_write_now_and_then_leaves_no_step_out(tmp_path, monkeypatch):
    clock, real = [1000.0], journal._write

    def sometimes(file, data, at):
        clock[0] += 5.0 if int(clock[0]) % 3 == 0 else 0.01
        real(file, data, at)

    monkeypatch.setattr(journal, "_write", sometimes)
    monkeypatch.setattr(journal.time, "perf_counter", lambda: clock[0])
    one = opened(tmp_path / "journal")
    for step in range(1, 60):
        clock[0] += 0.1
        one.write(step, words(3))
        assert opened(tmp_path / "journal").restore(0)[0] == step


def test_a_file_that_is_deleted_while_it_is_written_is_made_again(tmp_path):
    said = []
    one = opened(tmp_path / "checkpoints" / "journal", said=said)
    one.write(1, words(1))
    (tmp_path / "checkpoints" / "journal").unlink()
    (tmp_path / "checkpoints").rmdir()
    for step in (2, 3):
        one.write(step, words(step))
    assert opened(tmp_path / "checkpoints" / "journal").restore(0)[0] == 3 and len(said) == 1


def test_a_full_disk_is_said_once(tmp_path, monkeypatch):
    path, said = tmp_path / "journal", []
    one, full = opened(path, said=said), [True]

    def no_room(*_):
        if full[0]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal.os, "posix_fallocate", no_room)
    for step in (1, 2):
        one.write(step, words(step))
    assert len(said) == 1 and "No space left" in said[0] and not list(tmp_path.iterdir())
    full[0] = False
    (tmp_path / ".journal.123").write_bytes(b"left by a process that was killed while it made one")
    one.write(3, words(3))
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]
    assert opened(path).restore(0)[0] == 3
