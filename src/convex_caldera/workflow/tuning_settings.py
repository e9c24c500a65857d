"""What a user asks of one fine-tuning run, validated once; part of recipe.toml afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from convex_caldera.errors import RecipeError
from convex_caldera.finetune.parts import DEFAULT_RANK, Wish
from convex_caldera.finetune.schedule import Schedule
from convex_caldera.finetune.tasks import TaskFields

Scope = Literal["block", "model", "both"]
DEFAULT_PARTS = ("scales", "codebooks", "norms")  # no byte more in the file


class TuneSettings(BaseModel):
    """One run; every field is an option of `convex-caldera finetune`.

    `loss` of None is what the scope allows: mse for blocks, kl for the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: str
    model: str | None = None
    scope: Scope = "both"
    train: tuple[str, ...] = DEFAULT_PARTS
    loss: Literal["mse", "kl", "task"] | None = None
    rank_trainable: Annotated[int, Field(ge=1)] = DEFAULT_RANK
    dataset: str = "bundled:train"
    nsamples: Annotated[int, Field(ge=2)] = 256
    seqlen: Annotated[int, Field(ge=8)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 8
    lr: float = 5e-3
    epochs: float = 2.0
    block_epochs: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    evaluations: int = 4
    patience: int = 4
    time_budget: float | None = None
    seed: int = 42
    device: str = "cpu"
    checkpointing: bool = False
    allow_short: bool = False
    text_field: tuple[str, ...] = ()
    choice_field: tuple[str, ...] = ()
    label_field: str = "label"
    label_name: tuple[str, ...] = ()
    prompt: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> TuneSettings:
        if self.loss == "mse" and self.scope != "block":
            raise ValueError("mse is the loss of --scope block; the model's are kl and task")
        if self.loss in ("kl", "task") and self.scope == "block":
            raise ValueError(f"blocks are trained on mse; --loss {self.loss} needs --scope model")
        if self.fields() is not None and self.loss != "task":
            raise ValueError("text, choice and label fields and a prompt belong to --loss task")
        _ = self.wish, self.schedule()
        return self

    @property
    def wish(self) -> Wish:
        """What is trained."""
        return Wish(self.train, self.rank_trainable)

    @property
    def phases(self) -> tuple[str, ...]:
        """ "block", "model" or both, in order."""
        return ("block", "model") if self.scope == "both" else (self.scope,)

    @property
    def needs_original(self) -> bool:
        """Whether there is a teacher: in every phase but a task."""
        return "block" in self.phases or self.loss != "task"

    def schedule(self, phase: str = "model") -> Schedule:
        """Of one phase; a time budget is shared by the phases evenly."""
        epochs = self.epochs
        if phase == "block" and self.block_epochs is not None:
            epochs = self.block_epochs
        seconds = None if self.time_budget is None else self.time_budget / len(self.phases)
        return Schedule(
            lr=self.lr,
            epochs=epochs,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            evaluations=self.evaluations,
            patience=self.patience,
            seconds=seconds,
            seed=self.seed,
        )

    def fields(self) -> TaskFields | None:
        """Where the parts of a task's examples are; None for language modelling."""
        if not (self.text_field or self.choice_field or self.label_name or self.prompt):
            return None
        return TaskFields(
            self.text_field, self.label_field, self.choice_field, self.label_name, self.prompt
        )

    def published(self) -> dict[str, Any]:
        """As written into an output: no absolute paths."""
        record = self.model_dump(exclude_none=True, exclude={"device"})
        for key in ("directory", "model", "dataset"):
            if key in record and Path(record[key]).is_absolute():
                record[key] = Path(record[key]).name
        return record


def make_tune_settings(**values: Any) -> TuneSettings:
    """Settings from keyword arguments; RecipeError says which field is wrong and why."""
    from convex_caldera.workflow.settings import readable_errors

    try:
        return TuneSettings(**values)
    except ValidationError as error:
        raise RecipeError(readable_errors(error, TuneSettings.model_fields)) from error
