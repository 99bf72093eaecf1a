"""`shine data`."""

import re
from pathlib import Path
from typing import Annotated, Final

import typer

from pipelines.commands.common import AsJson, ConfigFile, OutFolder, show
from pipelines.settings import load_settings
from shine.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Annotation files.")
_OVERRIDE: Final = re.compile(r"\w+(\.[\w-]+)+=.*", re.DOTALL)


@app.command("check")
def data_check(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="FILE|SECTION.KEY=VALUE", show_default=False)
    ] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Report everything that is wrong with annotation files, and what will be done about it.

    Files of any layout. With a configuration (--config or overrides), they have the roles that it
    gives them (without any, all of its files are checked) and are compared with its features; else
    the first is the training file and the others are tests. Exits with 2 where training would
    refuse something.

    Example: shine data check charades_cg_gpt_train.jsonl charades_cg_test.jsonl

    Example: shine data check --config configs/charades_cg.yaml data.root=/data/charades_cg --json
    """
    from pipelines.data_tables import check_lines
    from shine.data.check import check, with_roles

    overrides = [one for one in arguments or () if _OVERRIDE.fullmatch(one)]
    files = [Path(one) for one in arguments or () if not _OVERRIDE.fullmatch(one)]
    settings = load_settings(config, overrides) if config is not None or overrides else None
    if not files and settings is None:
        raise InputError("name annotation files, or a configuration with --config")
    report = check(with_roles(files, settings), settings)
    show(report, as_json, *check_lines(report))
    if report["refused"]:
        raise typer.Exit(2)


@app.command("convert")
def data_convert(
    file: Annotated[Path, typer.Argument(help="Annotation file of any layout.")],
    out: Annotated[Path, typer.Option("--out", help="JSON Lines to write.")],
    durations: Annotated[
        Path | None,
        typer.Option(
            help="Seconds of each video, JSON, JSON Lines or CSV, for a layout without them."
        ),
    ] = None,
    clip_seconds: Annotated[
        float,
        typer.Option(min=0, help="Of the features: durations of a video may differ by so much."),
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Write the rows of an annotation file as JSON Lines, but for those that training refuses.

    Values stay as they are. Each row that is left out is named with its reason.

    Example: shine data convert charades_sta_train.txt --durations seconds.csv --out train.jsonl

    Example: shine data convert mine.txt --durations features/extract.jsonl --out train.jsonl
    """
    from pipelines.data_tables import convert_lines
    from shine.data.check import convert
    from shine.data.formats import read_durations

    seconds = None if durations is None else read_durations(durations)
    result = convert(file, out, seconds, clip_seconds)
    show(result, as_json, *convert_lines(result, out))


@app.command("split")
def data_split(
    train: Annotated[Path, typer.Argument(help="Annotation file of training queries.")],
    out: OutFolder = Path("runs/split"),
    rows: Annotated[int, typer.Option(help="Queries of each validation split, about.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of pairs and videos.")] = 0,
    tagger: Annotated[str, typer.Option(help="Pipeline that reads verbs and nouns.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Carve validation splits of seen and of held-out verb-noun pairs from training videos.

    Example: shine data split charades_cg_train.jsonl --out runs/charades
    """
    from shine.data.annotations import read_annotations, to_record, write_jsonl
    from shine.data.split import Carved, carve_validation
    from shine.language.tagging import load_tagger

    targets = {name: out / f"{name}.jsonl" for name in Carved._fields}
    if train.resolve() in [target.resolve() for target in targets.values()]:
        raise InputError(f"{train} would be overwritten by its own split; name another --out")
    carved = carve_validation(read_annotations(train), load_tagger(tagger), rows=rows, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, part in carved._asdict().items():
        write_jsonl(targets[name], map(to_record, part))
        counts[name] = len(part)
    show(counts, as_json, f"{out}: {counts}")
