"""``save``: what all ranks have, each part once, into one folder."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.storage import WriteResult

from pycomm._core import Group
from pycomm.checkpoint import checksums, folder
from pycomm.checkpoint.checksums import Checksums
from pycomm.checkpoint.contents import Contents
from pycomm.checkpoint.host import host
from pycomm.checkpoint.optimizer import OptimizerThing
from pycomm.checkpoint.save_plan import Planner
from pycomm.checkpoint.thing import Thing
from pycomm.checkpoint.things import agreed
from pycomm.checkpoint.together import naming, together
from pycomm.errors import InvalidArgumentError
from pycomm.objects import all_gather_object, broadcast_object, gather_object, scatter_object
from pycomm.runtime import group_of


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    group: Group | None = None,
    verify: bool = True,
) -> None:
    """Write a checkpoint that loads into any layout: other ``dp``, ``pp``, ``tp``, or one process.

    ::

        pycomm.checkpoint.save("run/latest", {"model": pipeline, "optimizer": optimizer,
                                              "scheduler": scheduler, "step": step})

    The folder has the format of ``torch.distributed.checkpoint``, each tensor's parts written once,
    by the ranks in turns. A checkpoint that is at ``path`` is replaced when the new one is whole
    and on the disk; until then, and after a crash at any moment, ``load`` finds the previous one.

    Args:
        path: of the folder, the same on every rank, on a file system that all ranks see. Only one
            group saves there at a time.
        state: by name, the same names on every rank: an ``nn.Module`` (its layers split over ranks
            or not) or a ``Pipeline``, of which each rank has its part; an optimizer, bare, in a
            ``DistributedOptimizer`` or a ``ShardedOptimizer``, whose parameters get their names
            from the modules beside it; anything with ``state_dict`` and ``load_state_dict``; or
            values that ``torch.load(weights_only=True)`` takes: tensors, numbers, strings, lists,
            dicts. Objects and values are the same on every rank.
        group: the ranks that share the state, the world if None; every one of them makes this call.
            All that have a part of a pipeline, of split layers or of a divided optimizer are in it.
        verify: refuse replicas of parameters and of optimizer state that are not the same, bit by
            bit. If False, one of each is written.

    Raises:
        InvalidArgumentError: on every rank, if one cannot write, does not see what the others
            write, or has something that cannot be saved or differs, or if another group is saving
            to ``path``; the group stays usable and the previous checkpoint as it is, unless the
            text says that a new one is in place.
        MismatchError: ranks passed different paths or names; the group stays usable.
        PeerLostError, CommTimeoutError: a rank ended, or took longer than the deadline. The next
            ``save`` removes what is left of this one.

    Of buffers, such as the averages of a BatchNorm, which data-parallel replicas have each of their
    own, the lowest rank's are written.

    Cost: each rank writes about its share of all bytes, waits until they are on the disk, and reads
    them from the system's cache for their checksums. With ``verify`` it reads all that it has
    before, at the speed of memory.
    Memory: no second copy of what lies on the CPU in one piece; else of one tensor at a time.
    """
    call = "checkpoint.save"
    group = group_of(group, call)
    place, things = agreed(call, path, state, group)
    call = f"checkpoint.save({str(place)!r})"
    place = Path(os.path.realpath(place))
    with naming(call, "What was there before is as it was, unless the new one is whole and there."):
        planner = together(call, group, lambda: _planner(things, verify))
        claim = together(call, group, lambda: folder.prepare(place), root=0)  # None on the others
        try:
            token = broadcast_object(claim and claim.token, group=group)
            _check_all_see(call, place, token, group)
            _write(call, place, planner, group, token)
            together(call, group, lambda: folder.put_in_place(place, claim), root=0)
        except InvalidArgumentError:
            if claim:  # every rank has ended its part
                with contextlib.suppress(OSError):  # the error is on its way; the next save tries
                    folder.discard(place, claim)
            raise
        finally:
            if claim:
                claim.release()


def _planner(things: list[Thing], verify: bool) -> Planner:
    contents = Contents()
    for thing in things:
        contents.add(thing.contents())
    return Planner(
        contents,
        {thing.name: thing.kind for thing in things},
        {thing.name: thing.record() for thing in things if isinstance(thing, OptimizerThing)},
        verify=verify,
    )


def _check_all_see(call: str, place: Path, token: str, group: Group) -> None:
    seen = together(call, group, lambda: folder.writing(place, lambda: folder.sees(place, token)))
    everyones = all_gather_object((seen, host()), group=group)
    for rank, (its_seen, its_host) in enumerate(everyones):
        if not its_seen:
            raise InvalidArgumentError(
                f"{call} on rank {group.rank}: rank {rank} on {its_host} does not see "
                f"{folder.unfinished(place)}, which rank 0 has made on {everyones[0][1]}: they "
                "have no file system in common there.\n  Pass a path on one that all ranks share."
            )


def _write(call: str, place: Path, planner: Planner, group: Group, token: str) -> None:
    """The sequence that torch lays down for its planners and writers, over pycomm's group."""
    target = folder.unfinished(place)
    writer = FileSystemWriter(target)
    writer.set_up_storage_writer(group.rank == 0)
    plan = together(
        call,
        group,
        lambda: folder.writing(
            target, lambda: writer.prepare_local_plan(planner.create_local_plan())
        ),
    )
    plans = gather_object(plan, group=group)

    def global_plan() -> tuple[list[Any], Any]:
        assert plans is not None
        shared_out, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(shared_out), metadata

    planned = together(call, group, global_plan, root=0)
    mine = planner.finish_plan(scatter_object(planned[0] if group.rank == 0 else None, group=group))

    def write_data() -> tuple[list[WriteResult], dict[str, list[int]]]:
        try:
            results = writer.write_data(mine, planner).wait() if mine.items else []
        finally:  # not to blame the disk
            folder.check_own(place, token)
        names = {result.storage_data.relative_path for result in results}
        return results, {name: checksums.of_file(target / name) for name in sorted(names)}

    written = together(call, group, functools.partial(folder.writing, target, write_data))
    everyones = gather_object(written, group=group)

    def finish() -> None:
        assert everyones is not None
        writer.finish(planned[1], [results for results, _ in everyones])
        of_files = {name: crcs for _, of_rank in everyones for name, crcs in of_rank.items()}
        of_files[folder.METADATA] = checksums.of_file(target / folder.METADATA)
        Checksums(target, of_files).write()

    together(call, group, functools.partial(folder.writing, target, finish), root=0)
