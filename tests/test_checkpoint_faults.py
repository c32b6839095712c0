"""What goes wrong with disks, arguments and ranks: an error on all of them, and nothing lost."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import re
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launchers import mpirun
from run_ranks import RankError, run_ranks
from torch import nn

from pycomm import CommTimeoutError, InvalidArgumentError, MismatchError, _core, checkpoint
from pycomm.checkpoint import claim, folder, saving
from pycomm.checkpoint.checksums import Checksums
from pycomm.checkpoint.claim import Claim
from pycomm.checkpoint.values import encoded

RANKS = 3


def state_of(step: int, width: int = 4, **more: Any) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(step)
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters()), "step": step, **more}


def write(path: Path, step: int, ranks: int = 1) -> None:
    run_ranks(ranks, lambda group: checkpoint.save(path, state_of(step), group=group))


def step_in(path: Path) -> int:
    """The step of a checkpoint, all of which is of that step."""

    def load(group: _core.Group) -> int:
        state = state_of(0)
        step = checkpoint.load(path, state, group=group)["step"]
        assert all(bool((param == step).all()) for param in state["model"].parameters())
        return int(step)

    return run_ranks(1, load)[0]


def refused(
    body: Callable[[_core.Group], Any],
    pattern: str,
    kind: type[Exception] = InvalidArgumentError,
    ranks: int = RANKS,
) -> None:
    """Every rank raises ``kind`` with a text like ``pattern``, and the group stays usable."""

    def attempt(group: _core.Group) -> None:
        with pytest.raises(kind, match=pattern):
            body(group)
        group.barrier()

    run_ranks(ranks, attempt)


def saves(path: Any, *states: Any) -> Callable[[_core.Group], None]:
    """The same on all ranks, or one for each."""
    return lambda group: checkpoint.save(path, states[group.rank % len(states)], group=group)


def loads(path: Any, state: Callable[[], dict[str, Any]], **options: Any) -> Callable[..., Any]:

    def load(group: _core.Group) -> dict[str, Any]:
        mine = state()
        try:
            return checkpoint.load(path, mine, group=group, **options)
        except Exception:
            assert all(not param.any() for param in mine["model"].parameters())
            raise

    return load


# --- what may not be saved ------------------------------------------------------------------------


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    good = state_of(1)
    path = tmp_path / "c"
    refused(saves(path, {}), "state is empty")
    refused(saves(path, [good["model"]]), r"state is of type list\.\n")
    refused(saves(path, path), "state is PosixPath")
    for swapped, kind in ((good, "dict"), (good["model"], "Sequential")):
        refused(saves(swapped, good), rf"path is of type {kind}\.\n  Pass the path of a folder")
    refused(saves(path, {good["model"]: 1}), r"state has the name of type Sequential\.\n")
    refused(saves("a\0b", good), r"path is 'a\\x00b'\.\n  Paths have no NUL")
    refused(saves(path, {"a.b": 1}), r"has the name 'a\.b'(.|\n)*without dots")
    refused(saves(path, {"pycomm": 1}), "other than 'pycomm'")
    refused(saves("s3://bucket/c", good), "path is 's3://bucket/c'")
    refused(saves(3, good), "path is 3")
    refused(saves("/", good), "of a folder of its own")
    lambdas = {"model": good["model"], "f": {"key": lambda: None}}
    refused(saves(path, lambdas), r"'f' is a dict that cannot be saved(.|\n)*safe_globals")
    refused(saves(path, {"lazy": nn.LazyLinear(3)}), "'lazy.weight' has no shape yet")
    refused(saves(path, {"meta": nn.Linear(1, 1, device="meta")}), r"'meta\.weight' .* on meta")
    lbfgs = torch.optim.LBFGS(good["model"].parameters())
    refused(saves(path, {"model": good["model"], "o": lbfgs}), "'o' is an LBFGS")
    assert not list(tmp_path.iterdir())


def test_ranks_that_differ_hear_of_it(tmp_path: Path) -> None:
    path = tmp_path / "c"
    one = state_of(1)
    refused(saves(path, one, {**one, "more": 1}), "ranks 0 and 1 pass .*'more'", MismatchError)
    refused(
        lambda group: checkpoint.save(tmp_path / str(group.rank), one, group=group),
        r"path is .*/0 on rank 0 .* and .*/1 on rank 1",
        MismatchError,
    )
    refused(saves(path, one, {**one, "step": 2}), r"'step' \(ranks 0 and 1\)(.|\n)*all_gather_obj")
    other_lr = torch.optim.Adam(one["model"].parameters(), lr=0.5)
    refused(
        saves(path, one, one, {**one, "optimizer": other_lr}),
        r"'optimizer\.param_groups\.0\.weight\.lr' \(ranks 0 and 2\)",
    )
    sgd = torch.optim.SGD(one["model"].parameters())
    refused(saves(path, one, {**one, "optimizer": sgd}), "'optimizer' is Adam on rank 0 and SGD")
    wide = state_of(1, width=5)
    refused(saves(path, one, wide), r"'model\.0\.weight' is torch\.float32 \(4, 3\) on rank 0 and")
    assert not list(tmp_path.iterdir())


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    state = state_of(1)
    file = tmp_path / "file"
    file.write_text("mine")
    refused(saves(file, state), "file is no folder")
    mixed = tmp_path / "mixed"
    write(mixed, 1)
    (mixed / "notes.txt").write_text("mine")
    refused(saves(mixed, state), r"would be replaced, and holds notes\.txt")
    (tmp_path / "c.unfinished").mkdir()
    (tmp_path / "c.unfinished" / "notes.txt").write_text("mine")
    refused(saves(tmp_path / "c", state), r"c\.unfinished would be replaced")
    refused(saves(file / "c", state), "file is no folder")
    refused(saves(file / "d" / "c", state), r"cannot write .*file.* on .*: Not a directory")
    refused(saves("/proc/1/c", state), "cannot write /proc/1.* on ")
    refused(saves(os.fsdecode(b"/proc/\xff"), state), r"cannot write /proc/\\udcff\.unfinished on ")
    assert file.read_text() == (mixed / "notes.txt").read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    write(empty, 2)
    link = tmp_path / "link"
    link.symlink_to(empty)
    write(link, 3)
    assert link.is_symlink() and step_in(empty) == step_in(link) == 3
    empty.rename(folder.replaced(empty))  # as a crash between two renames leaves it
    assert step_in(link) == 3 and folder.exists(link)
    write(tmp_path / "new" / "folders" / "c", 4)


# --- disks ----------------------------------------------------------------------------------------


def test_a_full_disk_on_one_rank_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    write(path, 1)
    prepare = folder.prepare

    def with_full_disk(path: Path) -> Claim:
        own = prepare(path)
        (folder.unfinished(path) / "__1_0.distcp").symlink_to("/dev/full")
        return own

    with monkeypatch.context() as patched:
        patched.setattr(folder, "prepare", with_full_disk)
        refused(
            saves(path, state_of(2)),
            rf"failed on rank 1: .*cannot write {path}.unfinished.*No space left(.|\n)*Make room",
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert step_in(path) == 1
    write(path, 2, RANKS)
    assert step_in(path) == 2


def raised_by_torch(error: OSError) -> RuntimeError:
    """As for a tensor that does not fit on the disk."""
    try:
        raise error
    except OSError:
        try:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704")
        except RuntimeError as of_torch:
            return of_torch


@pytest.mark.parametrize(
    ("error", "pattern"),
    [
        (OSError(errno.ENOSPC, "full"), r": full\.\n  Make room there, or save to .* W"),
        (OSError(errno.EDQUOT, "much"), r": much\.\n  Make room there, or save to .* W"),
        (OSError(errno.EACCES, "not you"), r": not you\.\n  See to permissions there, or s.* W"),
        (OSError(errno.EROFS, "fixed"), r": fixed\.\n  See to permissions there, or save to.* W"),
        (raised_by_torch(OSError(errno.ENOSPC, "full")), r": full\.\n  Make room there, or .* W"),
        (OSError(errno.ENOENT, "gone"), r": gone\.\n  W"),
        (ValueError("a bug"), r": ValueError: a bug\.\n  W"),
    ],
    ids=["full", "quota", "permission", "read-only", "torch", "missing", "bug"],
)
def test_the_remedy_is_for_what_went_wrong(
    error: Exception, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    write(path, 1)

    class Writer(saving.FileSystemWriter):
        def write_data(self, *_: Any) -> Any:
            raise error

    with monkeypatch.context() as patched:
        patched.setattr(saving, "FileSystemWriter", Writer)
        refused(saves(path, state_of(2)), pattern + r"hat was saved before is as it was\.$")
    assert step_in(path) == 1


def test_a_previous_checkpoint_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    write(path, 1)

    def rmtree(place: Path) -> None:
        raise OSError(errno.EACCES, "not you", str(place / "x"))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", rmtree)
        refused(
            saves(path, state_of(2)),
            r"cannot remove .*/c\.replaced/x on \S+: not you\.\n  See to permissions there\. "
            r"The new checkpoint is in place\. Remove that by hand\.$",
        )
    assert step_in(path) == 2
    write(path, 3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_a_new_checkpoint_that_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    write(path, 1)
    rename = Path.rename

    def not_this(self: Path, target: Path) -> Path:
        if self.name == "c.unfinished":
            raise OSError(errno.EIO, "broken", str(self))
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", not_this)
        refused(
            saves(path, state_of(2)),
            r"cannot write .*/c\.unfinished on \S+: broken\.\n  What was saved before is as it was",
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert step_in(path) == 1


class Crash(BaseException):
    """The process ends here."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Lets the n-th change to the file system, and none after it, not happen."""
    count = 0
    limit = 0
    done: list[str] = []

    def watched(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if threading.current_thread().name.startswith("rank"):
                count += 1
                if count > limit:
                    raise Crash(name)
                done.append(name)
            return action(*arguments, **options)

        return act

    for module, name in [
        (Path, "mkdir"),
        (Path, "touch"),
        (Path, "unlink"),
        (Path, "rename"),
        (Path, "open"),
        (os, "fsync"),
        (os, "unlink"),
        (os, "rmdir"),
        (pickle, "dump"),
    ]:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))

    def at(number: int) -> list[str]:
        nonlocal count, limit
        count, limit = 0, number
        done.clear()
        return done

    return at


def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, crash_at: Callable[[int], list[str]]
) -> None:
    path = tmp_path / "c"
    seen = []
    for number in range(100):
        crash_at(10**9)
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        write(path, 1)
        done = crash_at(number)
        try:
            write(path, 2)
        except RankError as error:
            if not isinstance(error.__cause__, Crash):
                raise
            crash_at(10**9)
            seen.append(step_in(path))
            write(path, 3)  # whatever was left
            assert step_in(path) == 3
            assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
        else:
            assert done.count("rename") >= 3  # the metadata, the old folder, the new one
            break
    assert seen == sorted(seen) and set(seen) == {1, 2}
    assert len(seen) > 12


def test_a_first_save_that_crashes_leaves_no_checkpoint(
    tmp_path: Path, crash_at: Callable[[int], list[str]]
) -> None:
    crash_at(6)
    with pytest.raises(RankError, match="Crash"):
        write(tmp_path / "c", 1)
    crash_at(10**9)
    refused(
        loads(tmp_path / "c", lambda: state_of(0)),
        r"there is no .*/c\.\n.*/c\.unfinished is what a save left that did not complete",
    )


def test_ranks_without_a_common_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same path is another folder on rank 2: here by a path that is resolved differently."""
    path = tmp_path / "c"
    realpath = os.path.realpath

    def of_host(place: Any, **options: Any) -> str:
        found = realpath(place, **options)
        elsewhere = threading.current_thread().name == "rank 2" and str(place) == str(path)
        return f"{found}-elsewhere" if elsewhere else found

    with monkeypatch.context() as patched:
        patched.setattr(os.path, "realpath", of_host)
        patched.setattr(folder, "SECONDS_TO_SEE", 0.1)
        refused(
            saves(path, state_of(1)),
            r"rank 2 on .* does not see .*\.unfinished, which rank 0 has made(.|\n)*share",
        )
        assert not list(tmp_path.iterdir())
        write(path, 1)
        refused(
            loads(path, lambda: state_of(0)),
            r"there is no .*c-elsewhere(.|\n)*rank 2 on .*; rank 0 on .* finds a checkpoint",
        )
        write(tmp_path / "c-elsewhere", 2)
        refused(loads(path, lambda: state_of(0)), "rank 0 on .* and rank 2 on .* find different")
        shutil.rmtree(tmp_path / "c-elsewhere")
        shutil.copytree(path, tmp_path / "c-elsewhere")  # a copy on every host will do
        run_ranks(RANKS, loads(path, lambda: state_of(0)))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    path = tmp_path / "c"
    write(path, 1, RANKS)
    return path


def test_a_damaged_checkpoint_is_refused_before_anything_changes(damaged: Path) -> None:
    states = {rank: state_of(0) for rank in range(RANKS)}

    def load(group: _core.Group) -> None:
        checkpoint.load(damaged, states[group.rank], group=group)

    file = damaged / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-200])
    refused(load, rf"{file} on .* has {len(content) - 200} bytes, and {len(content)} are needed")
    file.unlink()
    refused(load, rf"cannot read {file} on .*: No such file")
    for state in states.values():
        assert all(not param.any() for param in state["model"].parameters())
    file.write_bytes(bytes(len(content)))
    refused(load, r"cannot read .*\.distcp on .*Take another checkpoint|(.|\n)*Take another")
    metadata = damaged / ".metadata"
    pickled = metadata.read_bytes()
    (damaged / ".checksums").unlink()
    metadata.write_bytes(pickled[:100])
    refused(load, r"cannot read .*\.metadata on ")
    metadata.write_bytes(pickle.dumps({"not": "ours"}))
    refused(load, "is not that of a checkpoint")
    metadata.unlink()
    refused(load, r"is a folder without \.metadata, no checkpoint")
    with pytest.raises(InvalidArgumentError, match=r"checkpoint\.read\(.*is a folder without"):
        checkpoint.read(damaged)
    refused(
        loads(damaged / "__0_0.distcp", lambda: state_of(0)),
        "is a file, and a checkpoint is a folder",
    )


def test_values_are_loaded_without_running_their_code(damaged: Path) -> None:
    """A file in which a value was replaced by a pickle that would run something."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(damaged / "evil"),)

    import io

    saved = checkpoint.saved.Saved.open(damaged)
    (index,) = (index for index in saved.metadata.storage_data if index.fqn == "step")
    place = saved.metadata.storage_data[index]
    payload = io.BytesIO()
    torch.save({"step": Evil()}, payload)
    place.relative_path, place.offset, place.length = "evil.distcp", 0, len(payload.getvalue())
    (damaged / "evil.distcp").write_bytes(payload.getvalue())
    (damaged / ".checksums").unlink()
    (damaged / ".metadata").write_bytes(pickle.dumps(saved.metadata))
    refused(
        loads(damaged, lambda: state_of(0)),
        r"cannot read .*evil\.distcp on .*: there is a posix\.mkdir in it, which weights_only=True "
        r"refuses\.\n  If you trust it, allow that type",
    )
    assert not (damaged / "evil").exists()


def test_torchs_advice_to_run_what_is_in_values_is_not_passed_on(damaged: Path) -> None:
    numpy = pytest.importorskip("numpy")
    seen = []

    def caught(action: Callable[[], Any]) -> None:
        with pytest.raises(InvalidArgumentError) as info:
            action()
        seen.append(str(info.value))

    values = {"loss": numpy.float64(2), "losses": [numpy.ones(2)], "where": Path("a")}
    for name, value in values.items():
        caught(lambda name=name, value=value: encoded(name, value))
    saved = checkpoint.saved.Saved.open(damaged)
    (index,) = (index for index in saved.metadata.storage_data if index.fqn == "step")
    file = damaged / saved.metadata.storage_data[index].relative_path
    (damaged / ".checksums").unlink()
    content, at = file.read_bytes(), saved.metadata.storage_data[index].offset
    for offset in range(at, at + 200):
        file.write_bytes(content[:offset] + bytes([content[offset] ^ 0x41]) + content[offset + 1 :])
        try:
            checkpoint.read(damaged)
        except InvalidArgumentError as error:
            seen.append(str(error))
    assert len(seen) > 10
    for text in seen:
        assert not re.search(r"[Rr]e-run|`|two options|\x1b|trusted source", text), text
    assert "'loss' is a float64 that cannot be saved: there is a numpy." in seen[0]
    assert "which weights_only=True refuses.\n  Convert it" in seen[0] and "float(x)" in seen[0]
    assert "there is a pathlib.PosixPath in it" in seen[2]


def test_a_byte_that_was_flipped_is_found_before_anything_changes(damaged: Path) -> None:
    """One in a tensor loaded, and nothing was said."""
    files = sorted(damaged.iterdir())
    assert [file.name for file in files] == [
        ".checksums",
        ".metadata",
        *(f"__{rank}_0.distcp" for rank in range(RANKS)),
    ]
    for file in files:
        content = file.read_bytes()
        for at in range(0, len(content), 53):
            flipped = bytes([content[at] ^ 0x10])
            file.write_bytes(content[:at] + flipped + content[at + 1 :])
            with pytest.raises(InvalidArgumentError, match=r"damaged|cannot read .*checksums"):
                checkpoint.read(damaged)
        file.write_bytes(content + b"more")
        if file.name != ".checksums":
            text = rf"{file} on \S+ is damaged: something in its bytes 0 to 1048576 is not"
            refused(loads(damaged, lambda: state_of(0)), text)
        file.write_bytes(content)
    assert step_in(damaged) == 1


def test_a_checkpoint_without_checksums_is_read_as_it_is(damaged: Path) -> None:
    (damaged / ".checksums").unlink()
    assert step_in(damaged) == 1
    (damaged / ".checksums").touch()
    refused(loads(damaged, lambda: state_of(0)), r"cannot read .*/\.checksums on ")


def test_only_blocks_that_are_read_are_verified(tmp_path: Path) -> None:
    file = tmp_path / "file"
    content = bytearray(range(35))
    file.write_bytes(content)
    crcs = [zlib.crc32(content[begin : begin + 10]) for begin in range(0, 35, 10)]
    file.write_bytes(content[:22] + b"x" + content[23:])  # in the third of four blocks

    def verify(*ranges: tuple[int, int]) -> None:
        Checksums(tmp_path, {"file": crcs}, 10).verify("file", ranges)

    verify((0, 20), (30, 35))
    verify((3, 4), (34, 35))
    verify()
    for ranges in [(0, 21)], [(29, 31)], [(5, 6), (25, 25 + 1)]:
        with pytest.raises(InvalidArgumentError, match=r"damaged: something in its bytes 20 to 30"):
            verify(*ranges)
    with pytest.raises(InvalidArgumentError, match="damaged"):
        Checksums(tmp_path, {"file": crcs}, 10).verify("file")
    with pytest.raises(InvalidArgumentError, match="damaged"):
        Checksums(tmp_path, {}, 10).verify("file", [(0, 1)])


@pytest.mark.parametrize("kind", [EOFError, MemoryError, RuntimeError, ValueError])
def test_exceptions_without_a_text(
    kind: type[Exception], damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as torch's for a file that ends too early: looking for their text raised another."""

    class Value:
        def __reduce__(self) -> tuple[Any, ...]:
            raise kind

    name = kind.__name__
    refused(saves(damaged, {"v": Value()}), rf"'v' is a Value that cannot be saved: {name}\.\n")

    def read_data(self: Any, *_: Any) -> Any:
        raise kind

    monkeypatch.setattr(checkpoint.saved.FileSystemReader, "read_data", read_data)
    refused(loads(damaged, lambda: state_of(0)), rf"cannot read .*\.distcp on \S+: {name}\.\n")


@pytest.mark.parametrize("error", [KeyError("kinds"), MemoryError(), InvalidArgumentError("no")])
def test_what_one_rank_alone_meets_on_opening_the_others_hear(
    error: Exception, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left the others waiting."""
    opened = checkpoint.saved.Saved.open

    def open_here(path: Path) -> Any:
        if threading.current_thread().name == "rank 1":
            raise error
        return opened(path)

    monkeypatch.setattr(checkpoint.saved.Saved, "open", staticmethod(open_here))
    text = "no" if isinstance(error, InvalidArgumentError) else re.escape(repr(error))
    refused(
        loads(damaged, lambda: state_of(0)), rf"{text}\n  That is rank 1 .*rank 0 .* finds a check"
    )


def test_a_record_that_is_not_ours(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for record in ({}, {"format": "one"}, 3):
        monkeypatch.setattr(
            checkpoint.saved.Saved, "read", lambda *_, record=record: {"pycomm": record}
        )
        refused(loads(damaged, lambda: state_of(0)), "cannot read .* on .*: (Key|Type|Value)Error")


def test_a_checkpoint_of_another_program(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp

    dcp.save({"model": nn.Linear(2, 2).state_dict()}, checkpoint_id=tmp_path / "c")
    refused(
        loads(tmp_path / "c", lambda: state_of(0)), r"was not written by pycomm(.|\n)*torch\.di"
    )


# --- what does not fit ----------------------------------------------------------------------------


def test_what_does_not_fit_is_named_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write(path, 1)

    refused(loads(path, lambda: {**state_of(0), "optimizer": None}), r"'optimizer' \(value\) is of")
    wide = state_of(0, width=5)
    refused(
        loads(path, lambda: wide),
        r"'model\.0\.weight' has shape \(4, 3\) in it, and \(5, 3\) here, 'model\.0\.bias' has",
    )

    def more() -> dict[str, Any]:
        model = nn.Sequential(*state_of(0)["model"], nn.Linear(2, 2))
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    refused(loads(path, more), r"'model\.2\.weight' is missing, 'model\.2\.bias' is missing")

    def fewer() -> dict[str, Any]:
        model = state_of(0)["model"][:1]
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    refused(loads(path, fewer), r"has 'model\.1\.weight', 'model\.1\.bias', 'optimizer\..*no rank")

    def double() -> dict[str, Any]:
        model = state_of(0)["model"].double()
        return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}

    refused(loads(path, double), r"'model\.0\.weight' is torch\.float32 in it, and torch\.float64")

    def part() -> dict[str, Any]:
        state = state_of(0)
        params = list(state["model"].parameters())[:-1]
        return {**state, "optimizer": torch.optim.Adam(params)}

    refused(loads(path, part), r"has 'optimizer\.param_groups\.1\.bias\.lr'")

    def sgd() -> dict[str, Any]:
        state = state_of(0)
        return {**state, "optimizer": torch.optim.SGD(state["model"].parameters())}

    refused(loads(path, sgd), "'optimizer' is SGD, and the checkpoint has the state of Adam")
    refused(loads(path, lambda: {"model": state_of(0)["model"]}), r"has 'optimizer', which state")
    refused(loads(path, lambda: {**state_of(0), "epoch": 0}), r"'epoch' \(value\) is not in it")
    refused(loads(tmp_path / "none", lambda: state_of(0)), "there is no ")
    refused(
        loads(path, lambda: {**state_of(0), "optimizer": {"state": {}}}),
        r"'optimizer' \(value\) is of kind optimizer in it(.|\n)*Pass the optimizer itself",
    )

    def unknown() -> dict[str, Any]:
        return {**state_of(0), "optimizer": torch.optim.Adam(nn.Linear(1, 1).parameters())}

    refused(loads(path, unknown), r"whose name is not known\.\n  Pass the module that has it")
    alone = loads(path, lambda: {"model": state_of(0)["model"]}, partial=True)
    assert run_ranks(RANKS, alone) == [{"step": 1}] * RANKS


# --- ranks ----------------------------------------------------------------------------------------


def test_a_rank_that_raises_in_its_own_state_is_named(tmp_path: Path) -> None:
    class Broken:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        def state_dict(self) -> dict[str, int]:
            if self.rank == 1:
                raise KeyError("lost")
            return {"n": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            if self.rank == 2:
                raise KeyError("unknown")

    def save(rank: int) -> Callable[[_core.Group], None]:
        return lambda group: checkpoint.save(
            tmp_path / "c", {"broken": Broken(rank * group.rank)}, group=group
        )

    refused(save(1), "failed on rank 1: KeyError: 'lost'")
    run_ranks(RANKS, save(0))
    refused(
        lambda group: checkpoint.load(tmp_path / "c", {"broken": Broken(group.rank)}, group=group),
        "failed on rank 2: KeyError: 'unknown'",
    )


def test_a_rank_that_is_too_slow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gave_up = threading.Event()

    class SlowDisk(saving.FileSystemWriter):
        def write_data(self, *arguments: Any) -> Any:
            if threading.current_thread().name == "rank 1":
                gave_up.wait(30)
            return super().write_data(*arguments)

    monkeypatch.setattr(saving, "FileSystemWriter", SlowDisk)
    path = tmp_path / "c"
    worlds = _core.loopback_worlds([0, 0], timeout_s=1.0)
    errors: dict[int, Exception] = {}

    def save(rank: int) -> None:
        try:
            checkpoint.save(path, state_of(2), group=worlds[rank].group)
        except Exception as error:
            errors[rank] = error
        gave_up.set()

    threads = [threading.Thread(target=save, args=(r,), name=f"rank {r}") for r in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(errors[0], CommTimeoutError)
    for error in errors.values():
        assert str(error).startswith(f"checkpoint.save({str(path)!r}): "), error
        assert "rank 1" in str(error) and "What was there before is as it was" in str(error)
    assert not path.exists()


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What happens while the first of the saves to come is writing."""
    actions: list[Callable[[], None]] = []

    class Writer(saving.FileSystemWriter):
        def write_data(self, *arguments: Any) -> Any:
            written = super().write_data(*arguments)
            while actions:
                actions.pop()()
            return written

    monkeypatch.setattr(saving, "FileSystemWriter", Writer)
    return actions


def test_a_claim_that_cannot_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> str:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patched:
        patched.setattr(claim, "host", full)
        with pytest.raises(OSError, match="full") as kept:  # its traceback keeps the file
            Claim(tmp_path)
    assert claim.holder(tmp_path) is None and kept
    own = Claim(tmp_path)
    assert claim.holder(tmp_path) == f"process {os.getpid()} on {claim.host()}"
    own.release()
    assert claim.holder(tmp_path) is None


def test_two_groups_do_not_write_to_one_path(
    tmp_path: Path, meanwhile: list[Callable[[], None]]
) -> None:
    """As with group=mesh["pp"] and data parallelism: each wrote into the other's files."""
    path = tmp_path / "c"

    def other() -> None:
        process = rf"process {os.getpid()} on \S+\.\n  Let one group"
        refused(saves(path, state_of(2)), rf"c\.unfinished is being written by .*{process}")
        write(tmp_path / "d", 2)  # it does not hinder others

    meanwhile.append(other)
    write(path, 1)
    assert step_in(path) == 1 and not meanwhile
    write(path, 3)
    assert step_in(path) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c", "d"]
    assert not list(path.glob(".seen*"))


@pytest.mark.parametrize("ends", [True, False], ids=["second-ends-first", "second-ends-last"])
def test_two_groups_on_a_file_system_without_locks(
    ends: bool,
    tmp_path: Path,
    meanwhile: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "c"
    claims: list[Claim] = []
    write(path, 1)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    meanwhile.append((lambda: write(path, 3)) if ends else lambda: claims.append(prepared(path)))
    refused(saves(path, state_of(2)), "another save has written to .*/c at the same time", ranks=1)
    assert step_in(path) == (3 if ends else 1)
    assert all((folder.unfinished(path) / own.token).exists() for own in claims)


def prepared(path: Path) -> Claim:
    own = folder.prepare(path)
    own.release()
    return own


def test_a_rank_that_dies_while_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "c"
    write(path, 1)
    result = mpirun(
        2,
        """
        import os, signal, sys, torch, pycomm
        from pycomm.checkpoint import saving
        from torch import nn

        pycomm.init()
        torch.manual_seed(0)
        class Writer(saving.FileSystemWriter):
            def write_data(self, plan, planner):
                if pycomm.rank() == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().write_data(plan, planner)
        saving.FileSystemWriter = Writer
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        try:
            pycomm.checkpoint.save(sys.argv[1], {"model": model, "step": 2})
        except pycomm.PeerLostError as error:
            print(error, flush=True)
        """,
        str(path),
    )
    call = re.escape(f"checkpoint.save('{path}')")
    assert result.returncode != 0
    assert re.search(rf"{call}: .*rank 1(.|\n)*is as it was", result.out), result
    assert step_in(path) == 1
    write(path, 3, 2)
    assert step_in(path) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
