"""Write a run folder with another base, which all commands take as they take any run."""

from dataclasses import dataclass
from pathlib import Path

from rayml.algorithms.inner_loop import Params
from rayml.config import Config, dump_config
from rayml.runs.checkpoint import folder_name, seal, write_state
from rayml.runs.files import write_whole
from rayml.runs.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Compressed:
    """What a compressed base's run has learned."""

    config: Config
    start: Params
    inner_lrs: Params
    untrained: Params


def base_folder(folder: Path) -> Path:
    """Return where a compressed run keeps its base."""
    return folder / "base"


def write_run(source: RunFolder, folder: Path, compressed: Compressed, step: int) -> RunFolder:
    """Write config, tasks, untrained start and one checkpoint beside a base that lies in `folder / "base"`.

    There is no other checkpoint to choose, so a patience, by which readers would look for the best, is dropped.
    """
    config = compressed.config
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"name": str(base_folder(folder))}),
            "run": config.run.model_copy(update={"dir": str(folder)}),
            "validation": config.validation.model_copy(update={"patience": 0}),
        }
    )
    run = RunFolder(folder)
    checkpoint = run.checkpoints / folder_name(step)
    assert isinstance(checkpoint, Path)
    checkpoint.mkdir(parents=True)
    start = {f"start/{name}": weight for name, weight in compressed.start.items()}
    write_state(checkpoint, start | {f"log_rate/{name}": rate.log() for name, rate in compressed.inner_lrs.items()})
    seal(checkpoint, step, part=0, parts=1)
    run.write_untrained(compressed.untrained)
    write_whole(run.tasks, source.tasks.read_text(encoding="utf-8"))
    write_whole(run.config, dump_config(config))
    return run
