"""The whole story in one command: world, negatives, two trainings, evaluation, report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.connection import connect
from pipelines.console import console, evaluation_table, results, tracked, training_note
from pipelines.features import pack
from pipelines.negatives import generate
from pipelines.settings import config_folder
from pipelines.train import train_run
from shine.config import load_config
from shine.data.planted import WorldConfig, make_world
from shine.evaluation import evaluate_run
from shine.report import write_report

RUNS = {"baseline": "quickstart.yaml", "shine": "quickstart_shine.yaml"}


def run_quickstart(
    out: Path, *, planted: WorldConfig | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """`out` holds a planted world, a baseline and a SHINE run on it, and `report.html`.

    Calls what the commands of the same names call. Started again, it continues where it was
    stopped.

    Args:
        out: folder to write.
        planted: another world than the frozen one.
        overrides: of both configurations, as `section.key=value`.

    Returns:
        The paths of the report and of the runs.

    Raises:
        InputError: an override is wrong, or `out` holds a run of another configuration.
    """
    world = out / "world"
    configs = {
        name: load_config(config_folder() / file, overrides).rooted(world)
        for name, file in RUNS.items()
    }
    baseline = configs["baseline"]
    console.print(f"A short run on a simulated world; everything goes to {out}", highlight=False)
    with tracked("planted world") as tracker:
        make_world(planted or WorldConfig(), world)
        tracker.update(1, 1)
    with connect():
        with tracked("packing features") as tracker:
            pack(baseline, tracker.update)
        with tracked("hard negatives") as tracker:
            assert baseline.data.negatives is not None
            generate(
                baseline,
                source=baseline.path(baseline.data.train),
                out=baseline.path(baseline.data.negatives),
                on_progress=tracker.update,
            )
        for name, config in configs.items():
            with tracked(f"training {name}") as tracker:
                train_run(
                    config,
                    out / name,
                    lambda record, t=tracker, c=config: t.update(
                        record["epoch"], c.train.epochs, training_note(record)
                    ),
                )
    evaluations = {}
    with tracked("evaluation") as tracker:
        for done, name in enumerate(configs, start=1):
            evaluations[name] = evaluate_run(out / name)
            tracker.update(done, len(configs))
    results.print(evaluation_table(evaluations))
    report = write_report(
        [out / name for name in configs],
        out / "report.html",
        title="SHINE quickstart",
        notes=[
            f"A short run: {baseline.train.epochs} epochs and one seed, a few minutes on a laptop."
        ],
        commands=["shine quickstart"],
    )
    return {"report": str(report), "runs": [str(out / name) for name in configs]}
