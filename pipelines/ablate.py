"""SHINE's own ablations: every variant with every seed, evaluated, in one table."""

import json
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from rich.table import Table

from cluster.connection import connect
from pipelines.console import training_note
from pipelines.negatives import generate
from pipelines.train import train_run
from shine.config import Config, PartOfSpeech
from shine.data.annotations import read_annotations
from shine.data.loading import Source
from shine.errors import InputError
from shine.evaluation import evaluate_run
from shine.files import write_whole
from shine.language.negatives import read_negatives
from shine.metrics.summary import Evaluation
from shine.report import SPLITS

logger = logging.getLogger(__name__)

METRICS: Final = ("R1@0.5", "R1@0.7", "mIoU")
GAP: Final = "composition_gap"
PUBLISHED: Final = "published"
CONFIG_FILE: Final = "config.yaml"
RESULT_FILE: Final = "ablation.json"
PAGE_FILE: Final = "ablation.md"
Figures = dict[str, dict[str, float]]  # of one run, by split
OnProgress = Callable[[int, int, str], None]  # runs done, runs in all, a note

# Who makes the negatives that a variant trains on, by the name of the file.
NEGATIVES: Final[dict[str, dict[str, Any]]] = {
    "corpus": {"generator": "corpus", "parts": get_args(PartOfSpeech)},
    "random": {"generator": "random", "parts": get_args(PartOfSpeech)},
    "verbs-nouns": {"generator": "corpus", "parts": ("verb", "noun")},
    "no-prepositions-adverbs": {"generator": "corpus", "parts": ("verb", "noun", "adjective")},
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One line of the table: what is left of SHINE's losses, and the negatives they see."""

    name: str
    label: str
    intra: bool = True
    inter: bool = True
    levels: int | None = None  # hard-negative levels of the fine ranking, from the first; None: all
    negatives: str = "corpus"  # a key of `NEGATIVES`, or those in the annotation file

    def configured(self, config: Config, seed: int, folder: Path) -> Config:
        """The configuration of one run.

        Args:
            config: full SHINE.
            seed: of the training.
            folder: where the files of `NEGATIVES` are.
        """
        loss = config.loss
        levels = loss.num_hard_negatives if self.levels is None else self.levels
        kept = [*range(levels), -1] if levels else []  # the last term is the unrelated query's
        values = config.model_dump()
        values["train"] |= {"seed": seed}
        values["loss"] |= {
            "intra_weight": loss.intra_weight if self.intra else 0.0,
            "inter_weight": loss.inter_weight if self.inter else 0.0,
            "fine_weights": tuple(loss.fine_weights[term] for term in kept),
            "fine_margins": tuple(loss.fine_margins[term] for term in kept),
        }
        if levels and self.negatives == PUBLISHED:
            values["data"] |= {"negatives": None}
        elif levels:
            values["data"] |= {"negatives": str(folder / f"{self.negatives}.parquet")}
            values["negatives"] |= NEGATIVES[self.negatives]
        return Config.model_validate(values)


def variants(config: Config, *, published: bool) -> tuple[Variant, ...]:
    """The ablations of a configuration of full SHINE, in the order of the table.

    Args:
        config: its loss tells how many levels there are.
        published: whether the training annotations bring hard negatives of their own.
    """
    levels = range(1, config.loss.num_hard_negatives)
    found = (
        Variant("base", "baseline", intra=False, inter=False, levels=0),
        Variant("intra", "+ intra", inter=False, levels=0),
        Variant("inter", "+ inter", intra=False, levels=0),
        Variant("both", "+ both", levels=0),
        *(Variant(f"fine-{k}", f"+ both, fine to level {k}", levels=k) for k in levels),
        Variant("full", "full: + both, fine, corpus negatives"),
        Variant("random", "full, random negatives", negatives="random"),
        Variant("verbs-nouns", "full, verbs and nouns only", negatives="verbs-nouns"),
        Variant(
            "no-prepositions-adverbs",
            "full, without prepositions and adverbs",
            negatives="no-prepositions-adverbs",
        ),
    )
    theirs = Variant(PUBLISHED, "full, published negatives", negatives=PUBLISHED)
    return (*found, theirs) if published else found


def run_ablation(
    config: Config,
    out: Path,
    *,
    num_seeds: int = 3,
    only: Sequence[str] | None = None,
    on_progress: OnProgress = lambda done, total, note: None,
) -> dict[str, Any]:
    """`out` holds every variant trained with every seed and evaluated, and their table.

    Seed by seed over all variants, so that a stopped command leaves whole tables of fewer seeds;
    started again, it continues. All runs have the same rows in the same order, steps and seeds.
    `ablation.json` and `ablation.md` are written after every run. One run that fails is recorded
    and the others go on.

    Args:
        config: full SHINE on data with test splits; `train.seed` is the first seed. Training is
            done in this process unless it sets `train.num_workers`.
        out: the runs go to `{variant}/seed{n}`, hard negatives to `negatives`.
        num_seeds: trainings of each variant.
        only: names of variants; None: all that the data allow.
        on_progress: told about the runs.

    Returns:
        The content of `ablation.json`: `seeds`, `variants` (their labels, finished seeds, per split
        the figures, and their `changes` from the first variant, seed by seed), `valid` (share of
        usable negatives per level and source), `failures`.

    Raises:
        InputError: data or configuration are wrong, or `out` holds another ablation.
    """
    if "num_workers" not in config.train.model_fields_set:
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"num_workers": 0})}
        )
    config, out = config.rooted(Path(config.data.root)), out.resolve()
    _check(config)
    annotations = read_annotations(config.path(config.data.train))
    chosen = variants(config, published=any(row.negatives for row in annotations))
    chosen = [variant for variant in chosen if only is None or variant.name in only]
    _begin(config, out)
    seeds = [config.train.seed + number for number in range(num_seeds)]
    total, done = len(seeds) * len(chosen), 0
    found: dict[str, dict[int, Evaluation]] = {variant.name: {} for variant in chosen}
    valid: dict[str, list[float]] = {}
    failures: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    with connect(min_cpus=config.train.num_workers) if config.train.num_workers else nullcontext():
        for seed in seeds:
            for variant in chosen:
                title = f"{variant.name}, seed {seed}"
                on_progress(done, total, title)

                def note(record: Mapping[str, Any], title: str = title, done: int = done) -> None:
                    on_progress(done, total, f"{title} | {training_note(record)}")

                settings = variant.configured(config, seed, out / "negatives")
                try:
                    found[variant.name][seed] = _run(settings, out / variant.name, note)
                    if settings.loss.num_hard_negatives > len(valid.get(variant.negatives, ())):
                        valid[variant.negatives] = _valid(settings)
                except Exception as error:
                    reason = _sentence(error)
                    logger.error("%s failed: %s", title, reason)
                    failures.append({"variant": variant.name, "seed": seed, "error": reason})
                done += 1
                result = _result(config, seeds, chosen, found, valid, failures)
                write_whole(out / RESULT_FILE, json.dumps(result, indent=1) + "\n")
                write_whole(out / PAGE_FILE, page(result))
    on_progress(total, total, "")
    return result


def _check(config: Config) -> None:
    """What all variants need is there.

    Raises:
        InputError: it is not.
    """
    loss = config.loss
    weights = (loss.intra_weight, loss.inter_weight, *loss.fine_weights)
    if not (loss.fine_weights and all(weights)):
        raise InputError(
            f"an ablation starts from full SHINE: expected loss.intra_weight, loss.inter_weight "
            f"and all of loss.fine_weights above 0, got {loss.intra_weight}, {loss.inter_weight} "
            f"and {list(loss.fine_weights)}; add `base: [..., shine.yaml]` to the configuration"
        )
    if config.text.encoder != "lexical":
        raise InputError(
            f"an ablation trains on negatives that it makes, whose token vectors no folder has; "
            f"expected text.encoder=lexical, got {config.text.encoder}"
        )
    if not config.data.tests:
        raise InputError("an ablation is measured on test splits; set data.tests")
    Source.open(config)
    for file in (*config.data.validation.values(), *config.data.tests.values()):
        read_annotations(config.path(file))


def _begin(config: Config, out: Path) -> None:
    """The folder belongs to this configuration.

    Raises:
        InputError: it holds an ablation of another one, or cannot be written.
    """
    path = out / CONFIG_FILE
    try:
        (out / "negatives").mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_whole(path, config.to_yaml())
        before = path.read_text()
    except OSError as error:
        raise InputError(f"cannot use the folder {out}: {error.strerror}") from None
    if before != config.to_yaml():
        raise InputError(
            f"{out} holds an ablation of another configuration (see its {CONFIG_FILE}); choose "
            f"another --out"
        )


def _run(
    config: Config, folder: Path, on_record: Callable[[Mapping[str, Any]], None]
) -> Evaluation:
    """One variant with one seed, trained and evaluated where it is not yet."""
    made = config.data.negatives
    if config.loss.num_hard_negatives and made is not None and not Path(made).exists():
        generate(config, source=config.path(config.data.train), out=Path(made))
    run = folder / f"seed{config.train.seed}"
    train_run(config, run, on_record)
    finished = run / "evaluation.json"
    return json.loads(finished.read_text()) if finished.exists() else evaluate_run(run)


def _valid(config: Config) -> list[float]:
    """The share of rows whose hard negative of a level takes part in the loss, by level."""
    rows = read_negatives(config.path(config.data.negatives or config.data.train)).values()
    levels = range(config.loss.num_hard_negatives)
    return [sum(any(row.valid[k : k + 1]) for row in rows) / len(rows) for k in levels]


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


# The table


def _result(
    config: Config,
    seeds: Sequence[int],
    chosen: Sequence[Variant],
    found: Mapping[str, Mapping[int, Evaluation]],
    valid: Mapping[str, Sequence[float]],
    failures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    evaluations = [one for runs in found.values() for one in runs.values()]
    figures = {
        name: {seed: _figures(evaluation) for seed, evaluation in runs.items()}
        for name, runs in found.items()
    }
    first = figures[chosen[0].name]
    return {
        "simulated": evaluations[0]["simulated"] if evaluations else None,
        "sanity_negatives": evaluations[0]["negatives"] if evaluations else None,
        "epochs": config.train.epochs,
        "seeds": list(seeds),
        "variants": {
            variant.name: {
                "label": variant.label,
                "seeds": list(figures[variant.name]),
                "splits": _over_seeds(list(figures[variant.name].values())),
                "changes": _over_seeds(
                    [
                        _minus(values, first[seed])
                        for seed, values in figures[variant.name].items()
                        if seed in first and variant is not chosen[0]
                    ]
                ),
            }
            for variant in chosen
        },
        "valid": dict(valid),
        "failures": list(failures),
    }


def _over_seeds(per_seed: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    """Per split and figure the values of the seeds, their mean and their spread."""
    return {
        split: {name: summary([figures[split][name] for figures in per_seed]) for name in names}
        for split, names in (per_seed[0] if per_seed else {}).items()
    }


def _minus(figures: Figures, others: Figures) -> Figures:
    return {
        split: {name: value - others[split][name] for name, value in values.items()}
        for split, values in figures.items()
    }


def _figures(evaluation: Evaluation) -> Figures:
    """What the table shows of one run; the composition gap stands beside the splits."""
    figures: Figures = {}
    for split, summed in evaluation["splits"].items():
        figures[split] = {name: summed["metrics"][name]["value"] for name in METRICS}
        figures[split] |= {
            level.replace("level_", "sanity "): interval["value"]
            for level, interval in sorted(summed["saliency_sanity"].items())
        }
    if gap := evaluation["composition_gap"]:
        figures[GAP] = {name: gap[name]["value"] for name in METRICS}
    return figures


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and spread: the standard deviation over seeds (n - 1), None for fewer than two."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "values": list(values)}


def table(result: Mapping[str, Any], split: str) -> list[list[str]]:
    """One split in percent, heading first: a line per variant with mean and spread.

    The last column is the change of R1@0.5 from the first variant, seed by seed.
    """
    variants = result["variants"].values()
    names = list(dict.fromkeys(n for variant in variants for n in variant["splits"].get(split, ())))
    return [
        ["variant", "seeds", *names, f"{METRICS[0]} change"],
        *(
            [
                variant["label"],
                str(len(variant["seeds"])),
                *(_cell(variant["splits"].get(split, {}).get(name)) for name in names),
                _cell(variant["changes"].get(split, {}).get(METRICS[0]), sign="+"),
            ]
            for variant in variants
        ),
    ]


def _cell(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    if figure is None:
        return "-"
    mean = f"{100 * figure['mean']:{sign}.1f}"
    return mean if figure["spread"] is None else f"{mean} ± {100 * figure['spread']:.1f}"


def splits(result: Mapping[str, Any]) -> dict[str, str]:
    """The splits of the finished runs and their titles; the composition gap comes last."""
    names = dict.fromkeys(
        split for variant in result["variants"].values() for split in variant["splits"]
    )
    titles = {name: SPLITS.get(name, (name, ""))[0] for name in names if name != GAP}
    return {**titles, GAP: "Composition gap"} if GAP in names else titles


def screen_tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables for a terminal."""
    tables = []
    for split, title in splits(result).items():
        heading, *rows = table(result, split)
        shown = Table(title=f"{title}, percent ± standard deviation over seeds")
        for number, name in enumerate(heading):
            shown.add_column(name, justify="right" if number else "left", no_wrap=bool(number))
        for row in rows:
            shown.add_row(*row)
        tables.append(shown)
    return tables


def page(result: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    seeds = ", ".join(map(str, result["seeds"]))
    lines = ["# Ablations of SHINE", ""]
    if result["simulated"]:
        lines += [f"**Simulated data: {result['simulated']}.**", ""]
    lines += [
        f"Percent: mean over training seeds ({seeds}) ± their standard deviation; "
        f"{result['epochs']} epochs each, the same rows, order and seeds for all. Sanity k: how "
        f"often the query's saliency beats that of its level-k negative inside the moment "
        f"(negatives: {result['sanity_negatives']}). Change: from the first line, seed by seed.",
        "",
    ]
    for split, title in splits(result).items():
        heading, *rows = table(result, split)
        lines += [f"## {title}", "", _markdown(heading), _markdown(["---"] * len(heading))]
        lines += [*map(_markdown, rows), ""]
    lines += ["## Usable negatives per level", ""]
    lines += [
        f"- {name}: {', '.join(f'{100 * share:.1f} %' for share in shares)}"
        for name, shares in result["valid"].items()
    ]
    if failures := result["failures"]:
        lines += ["", "## Runs that failed", ""]
        lines += [f"- {one['variant']}, seed {one['seed']}: {one['error']}" for one in failures]
    return "\n".join(lines) + "\n"


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
