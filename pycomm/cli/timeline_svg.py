"""A pipeline's timeline as a drawing."""

from __future__ import annotations

from pathlib import Path

from pycomm.pipeline.schedule import Kind, Schedule, Timeline

_COLORS = {
    Kind.FORWARD: "#4c78a8",
    Kind.BACKWARD: "#54a24b",
    Kind.INPUT_GRADIENT: "#88bb7c",
    Kind.WEIGHT_GRADIENT: "#eeca3b",
}


def draw(schedule: Schedule, timeline: Timeline, path: Path) -> None:
    """Write an SVG: a row for each rank, a box for each action, empty where the rank is idle.

    Raises:
        ImportError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    import matplotlib  # here, because it is slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same file on every run, with text that can be selected and found.
    with matplotlib.rc_context({"svg.hashsalt": "pycomm", "svg.fonttype": "none"}):
        width = min(4.0 + 0.28 * timeline.end, 60.0)
        figure, axes = pyplot.subplots(
            figsize=(width, 1.2 + 0.45 * schedule.ranks), layout="constrained"
        )
        seen = set()
        for rank, timed in enumerate(timeline.ranks):
            for entry in timed:
                action, length = entry.action, entry.end - entry.begin
                kind = action.kind
                chunk = action.stage // schedule.ranks
                axes.barh(
                    rank,
                    length,
                    left=entry.begin,
                    height=0.86,
                    color=_COLORS[kind],
                    alpha=1.0 if chunk % 2 == 0 else 0.6,
                    edgecolor="white",
                    linewidth=0.6,
                    label=None if kind in seen else kind.name.lower().replace("_", " "),
                )
                seen.add(kind)
                axes.text(
                    entry.begin + length / 2,
                    rank,
                    str(action.micro_batch),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if kind is not Kind.WEIGHT_GRADIENT else "black",
                )
        several = ", paler: a rank's second stage" if schedule.stages > schedule.ranks else ""
        axes.set(
            title=f"{schedule.name}: {schedule.micro_batches} micro-batches, bubble "
            f"{timeline.bubble:.1%}{several}",
            yticks=range(schedule.ranks),
            yticklabels=[f"rank {rank}" for rank in range(schedule.ranks)],
            xlabel="time, in forwards of a stage",
            xlim=(0, timeline.end),
        )
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
        try:
            figure.savefig(path, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(figure)
