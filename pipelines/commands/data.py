"""`shine data`."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.common import AsJson, OutFolder, show
from shine.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Annotation files.")


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
