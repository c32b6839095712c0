"""A model as stages: which layers are in which, and what connects them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from pycomm._core import Group
from pycomm.arguments import integer
from pycomm.errors import InvalidArgumentError
from pycomm.objects import all_gather_object, broadcast_object, raise_together
from pycomm.pipeline import partition, skips
from pycomm.pipeline.executor import Connection
from pycomm.pipeline.schedule import SCHEDULES, Schedule, make, simulate, usual_stages_per_rank
from pycomm.pipeline.stage import MAIN

Balance = Literal["parameter_bytes", "measured_seconds"]
Model = nn.Sequential | Sequence[nn.Module | None]
Pieces = Mapping[int, nn.Module | None]
"""The module of each stage; None if this rank was not given it."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What can be said of a pipeline without its ranks' talking to each other."""

    schedule: Schedule
    layers_by_hand: list[int] | None
    balance: Balance
    model: str  # for comparison between ranks

    @staticmethod
    def of(
        model: Model,
        stages: int | Sequence[int] | None,
        schedule: str,
        micro_batches: int,
        balance: Balance,
        ranks: int,
    ) -> Plan:
        """Check the arguments.

        Raises:
            InvalidArgumentError: they make no pipeline.
        """
        number = integer(micro_batches)
        if number is None or number < 1:
            raise InvalidArgumentError(
                f"micro_batches is {micro_batches!r}. Pass a whole number from 1 up."
            )
        if schedule not in SCHEDULES:
            known = ", ".join(map(repr, SCHEDULES))
            raise InvalidArgumentError(f"schedule is {schedule!r}. Pass one of {known}.")
        if balance not in ("parameter_bytes", "measured_seconds"):
            raise InvalidArgumentError(
                f'balance is {balance!r}. Pass "parameter_bytes" or "measured_seconds".'
            )
        by_hand = None
        if isinstance(model, nn.Sequential):
            count, by_hand = _stages_of_layers(stages, len(model), schedule, ranks)
        else:
            count = _stages_of_modules(model, stages)
        if count % ranks:
            raise InvalidArgumentError(
                f"{count} stages on {ranks} ranks, and each rank needs as many.\n"
                f"  Use {-(-count // ranks) * ranks} stages, or a group of another size."
            )
        planned = make(schedule, ranks, number, count // ranks)
        simulate(planned)
        return Plan(planned, by_hand, balance, _described(model))

    def pieces(self, model: Model, sample: Any, group: Group) -> Pieces:
        """Cut the model. Collective: rank 0 decides where.

        Raises:
            InvalidArgumentError: measuring failed; on every rank.
        """
        if not isinstance(model, nn.Sequential):
            return dict(enumerate(model))
        counts, mistake = self.layers_by_hand, None
        if counts is None and group.rank == 0:
            try:
                counts = partition.balanced(self._costs(model, sample), self.schedule.stages)
            except Exception as error:  # a layer's own
                mistake = error
        raise_together("Pipeline", mistake, group)
        counts = broadcast_object(counts, group=group)
        layers = iter(_layers(model))
        return {
            stage: nn.Sequential(OrderedDict(next(layers) for _ in range(count)))
            for stage, count in enumerate(counts)
        }

    def _costs(self, model: nn.Sequential, sample: Any) -> list[float]:
        if self.balance == "parameter_bytes":
            return partition.parameter_bytes(model)
        if sample is None:
            raise InvalidArgumentError(
                'balance is "measured_seconds" and there is no sample to measure with.\n'
                "  Pass sample=, one micro-batch of the first stage's input."
            )
        return partition.measured_seconds(model, sample)


def together(model: Model, here: Mapping[int, nn.Module]) -> nn.Sequential:
    """A rank's stages as one module, whose names are those in the whole model."""
    if not isinstance(model, nn.Sequential):
        return nn.Sequential(OrderedDict((str(stage), piece) for stage, piece in here.items()))
    layers = (layer for piece in here.values() for layer in _layers(piece))
    return nn.Sequential(OrderedDict(layers))


def connections(here: Mapping[int, nn.Module], stages: int, group: Group) -> list[Connection]:
    """From each stage to the next, and each ``Stash`` to its ``Take``. Collective.

    Raises:
        InvalidArgumentError: a name is stashed or taken twice, or only one of the two, or taken in
            an earlier stage; on every rank.
    """
    mistake, mine = None, []
    try:
        mine = [(stage, *skips.names(piece)) for stage, piece in here.items()]
    except InvalidArgumentError as error:
        mistake = error
    raise_together("Pipeline", mistake, group)
    everyones = sorted(entry for theirs in all_gather_object(mine, group=group) for entry in theirs)
    stashed: dict[str, int] = {}
    taken: dict[str, int] = {}
    for stage, its_stashed, its_taken in everyones:
        for kind, table, names in (("Stash", stashed, its_stashed), ("Take", taken, its_taken)):
            for name in names:
                if name in table:
                    raise InvalidArgumentError(
                        f'Pipeline: {kind}("{name}") is in stage {table[name]} and in stage '
                        f"{stage}.\n  Give each connection its own name."
                    )
                table[name] = stage
    for name in sorted(stashed.keys() | taken.keys()):
        source, target = stashed.get(name), taken.get(name)
        if source is None or target is None or source > target:
            raise InvalidArgumentError(
                f'Pipeline: Stash("{name}") is in '
                f'{"no stage" if source is None else f"stage {source}"} and Take("{name}") in '
                f"{'no stage' if target is None else f'stage {target}'}.\n"
                "  A connection goes from one stage to a later one."
            )
    main = [Connection(MAIN, stage, stage + 1) for stage in range(stages - 1)]
    return main + [Connection(name, stashed[name], taken[name]) for name in sorted(stashed)]


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of an ``nn.Sequential`` by name; one that comes twice, twice."""
    return [(name, layer) for name, layer in model._modules.items() if layer is not None]


def _stages_of_layers(
    stages: int | Sequence[int] | None, layers: int, schedule: str, ranks: int
) -> tuple[int, list[int] | None]:
    if stages is None:
        stages = ranks * usual_stages_per_rank(schedule)
    number = integer(stages)
    if number is None:
        counts = [integer(count) for count in stages] if isinstance(stages, Sequence) else []
        whole = [count for count in counts if count is not None]
        if not counts or len(whole) < len(counts):
            raise InvalidArgumentError(
                f"stages is {stages!r}.\n  Pass their number, or a list with the number of layers "
                "of each."
            )
        return len(whole), partition.by_hand(whole, layers)
    if number < 1:
        raise InvalidArgumentError(f"stages is {stages!r}. Pass at least 1.")
    partition.balanced([0.0] * layers, number)  # refuses more stages than layers
    return number, None


def _stages_of_modules(model: Any, stages: int | Sequence[int] | None) -> int:
    if not isinstance(model, Sequence) or not all(
        module is None or isinstance(module, nn.Module) for module in model
    ):
        raise InvalidArgumentError(
            f"model is a {type(model).__name__}.\n  Pass an nn.Sequential, or a list with an "
            "nn.Module for each stage."
        )
    if not model or (stages is not None and stages != len(model)):
        raise InvalidArgumentError(
            f"stages is {stages!r}, and the model is given as {len(model)} stages.\n"
            "  Leave stages out, or pass that number."
        )
    return len(model)


def _described(model: Model) -> str:
    if not isinstance(model, nn.Sequential):
        return f"{len(model)} modules"
    text = ",".join(f"{name}{tuple(param.shape)}" for name, param in model.named_parameters())
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"nn.Sequential of {len(model)} layers (parameters {digest})"
