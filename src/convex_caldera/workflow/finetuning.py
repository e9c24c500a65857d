"""Fine-tune a compressed directory into a new one: blocks, the whole model, or both in turn.

Nothing of the input changes. What training finds becomes layers again: trained factors in 16 bits,
diagonals beside the sign bits, scales where they were; the new directory is written like any
other and says in its report what was trained and how much it grew. A run that is cut short goes on
with the same command.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from convex_caldera.calibrate.text import fingerprint, token_windows
from convex_caldera.errors import InterruptedRunError, ModelError, RecipeError
from convex_caldera.finetune.blockwise import BlockResult, tune_blocks
from convex_caldera.finetune.distill import (
    Distillation,
    LanguageModelling,
    Teacher,
    checkpoint_blocks,
)
from convex_caldera.finetune.journal import Journal
from convex_caldera.finetune.memory import fits_in_memory, keep_freed_memory
from convex_caldera.finetune.place import Trained, Values, norm_weights, replace_layers
from convex_caldera.finetune.stored import StoredModel
from convex_caldera.finetune.tasks import TaskTuning, read_examples
from convex_caldera.finetune.team import Team
from convex_caldera.finetune.training import Objective, Outcome, train
from convex_caldera.finetune.windows import TrainingText, split_windows
from convex_caldera.models.resolve import resolve_model
from convex_caldera.models.skeleton import Skeleton
from convex_caldera.models.tokenizer import load_tokenizer
from convex_caldera.recipes.records import canonical_json
from convex_caldera.runtime.load import load
from convex_caldera.storage.files import sha256_of
from convex_caldera.storage.manifest import MANIFEST
from convex_caldera.storage.partial import PartialRun
from convex_caldera.storage.read import Sizes, open_container
from convex_caldera.storage.source import SourceModel
from convex_caldera.storage.tuned import provenance_of
from convex_caldera.workflow.models import usable_device
from convex_caldera.workflow.progress import Progress, Silent
from convex_caldera.workflow.summary import peak_memory_bytes
from convex_caldera.workflow.tuned_output import write_tuned
from convex_caldera.workflow.tuning_check import check_trainable
from convex_caldera.workflow.tuning_settings import TuneSettings


@dataclass(frozen=True)
class Phase:
    """One phase: its validation loss before and after, its steps, seconds and peak memory."""

    name: str
    loss: str
    before: float
    after: float
    steps: int
    seconds: float
    peak_memory_bytes: int
    note: str = ""


@dataclass(frozen=True)
class TuneSummary:
    """What a run has reached, measured from the files written and on the validation split."""

    output: str
    phases: tuple[Phase, ...]
    trained: tuple[str, ...]
    trained_numbers: int
    tuned_layers: int
    before: Sizes
    after: Sizes
    seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)
        for key, sizes in (("before", self.before), ("after", self.after)):
            record[key] |= {
                "file_bytes": sizes.file_bytes,
                "bits_per_compressed_weight": sizes.bits_per_compressed_weight,
                "bits_per_weight": sizes.bits_per_weight,
            }
        return record

    def text(self) -> str:
        lines = [
            f"{phase.name}: {phase.loss} {phase.before:.5g} -> {phase.after:.5g} on validation, "
            f"{phase.steps} steps, {phase.seconds:.0f} s"
            + (f" ({phase.note})" if phase.note else "")
            for phase in self.phases
        ]
        more = self.after.compressed_bytes - self.before.compressed_bytes
        trained = (
            f"trained {', '.join(self.trained)}: {self.trained_numbers:,} numbers in "
            f"{self.tuned_layers} layers"
        )
        nothing = "nothing was better on validation than before; the model is copied as it is"
        return "\n".join(
            [
                *lines,
                trained if self.trained_numbers else nothing,
                f"{self.after.file_bytes:,} bytes ({more:+,}), "
                f"{self.after.bits_per_compressed_weight:.4f} bits per compressed weight "
                f"(was {self.before.bits_per_compressed_weight:.4f}), {self.seconds:.0f} s, "
                f"peak memory {self.peak_memory_bytes / 1e6:.0f} MB -> {self.output}",
            ]
        )


def finetune_to(
    settings: TuneSettings,
    out: Path,
    *,
    progress: Progress | None = None,
    log: Path | None = None,
    tensorboard: Path | None = None,
) -> TuneSummary | None:
    """Fine-tune the directory of the settings into `out`; resumes a run that was cut short there.

    Args:
        settings: the compressed model, what is trained, on what, for how long.
        out: written to exactly this folder, which must be empty or hold the same partial run.
        progress: told of steps.
        log: JSON lines, appended to; TensorBoard events go to the folder `tensorboard`.

    Returns:
        Sizes and validation losses; None in all processes of a launcher but the first.

    Raises:
        RecipeError: contradictory settings, no trainable part, or the original is not the one
            that was compressed.
        DataError, ModelError, FormatError, NumericalError, ResumeError: as their names say.
        InterruptedRunError: Ctrl-C; what was trained up to the last evaluation is kept.
    """
    keep_freed_memory()
    team = Team()
    run = _Run(settings, Path(out), progress or Silent(), team)
    journal = Journal(log if team.leads else None, tensorboard if team.leads else None)
    try:
        return run.go(journal)
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            "interrupted; run the same command again to go on from the last evaluation"
        ) from error
    finally:
        journal.close()


class _Run:
    def __init__(self, settings: TuneSettings, out: Path, progress: Progress, team: Team):
        self.settings, self.out, self.progress, self.team = settings, out, progress, team
        self.started = time.monotonic()
        self.wish = settings.wish
        self.container = open_container(settings.directory)
        self.stored = StoredModel(self.container)
        check_trainable(self.stored, self.wish)
        self.device = team.device or torch.device(usable_device(settings.device))
        self.tokenizer = load_tokenizer(self.container.directory)
        self.text = None if self._has_examples else self._read_text()
        self.skeleton = self._original() if settings.needs_original else None
        self.phases: list[Phase] = []
        self.values: Values = {}

    # --- input -------------------------------------------------------------------------------

    @property
    def _has_examples(self) -> bool:
        return self.settings.fields() is not None

    def _read_text(self) -> TrainingText:
        settings = self.settings
        longest = self.container.config.get("max_position_embeddings")
        if longest is not None and settings.seqlen > longest:
            raise RecipeError(
                f"the model reads at most {longest} tokens but seqlen is {settings.seqlen}; "
                f"choose --seqlen {longest} or less"
            )
        tokens = token_windows(
            settings.dataset,
            self.tokenizer,
            settings.nsamples,
            settings.seqlen,
            settings.seed,
            allow_short=settings.allow_short,
        )
        return split_windows(tokens, settings.batch_size)

    def _original(self) -> Skeleton:
        """The model that was compressed, checked by the hashes that the directory keeps."""
        name = self.settings.model or self.container.recipe().get("run", {}).get("model", "")
        try:
            path = resolve_model(name)
        except ModelError as error:
            raise RecipeError(
                f"the original is needed as the teacher, and {name!r} is not found here; "
                f"give it with --model ({error})"
            ) from error
        ours = provenance_of(self.container).get("source_files", {})
        theirs = SourceModel(path).checkpoint.file_hashes
        odd = sorted(file for file, digest in theirs.items() if ours.get(file) != digest)
        if odd:
            raise RecipeError(
                f"{self.container.directory.name} was not compressed from {name}: {odd[0]} differs"
            )
        return Skeleton(path, torch.float32, self.device)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        """What the result depends on; a partial run with another one is refused."""
        dataset = Path(self.settings.dataset)
        text = fingerprint(self.text.tokens) if self.text is not None else sha256_of(dataset)
        exclude = {"directory", "model", "dataset", "device", "checkpointing"}
        return {
            "model": sha256_of(self.container.directory / MANIFEST),
            "text": text,
            "recipe": canonical_json(self.settings.model_dump(exclude=exclude)),
        }

    # --- phases ------------------------------------------------------------------------------

    def go(self, journal: Journal) -> TuneSummary | None:
        if not self.team.leads:
            self.team.wait()  # for the partial run, so that states are found where they are
            self._train(self.out / ".partial", journal)
            self.team.wait()
            return None
        with PartialRun(self.out, self._fingerprint) as run:
            self.team.wait()
            self._train(run.folder, journal)
            container = write_tuned(
                run, self.stored, self.wish, self.values, self._record(), self.settings
            )
        self.team.wait()
        layers = {name.rpartition(".")[0] for name in self.values} & set(self.stored.layer_names)
        return TuneSummary(
            output=str(self.out),
            phases=tuple(self.phases),
            trained=self.wish.parts,
            trained_numbers=sum(value.numel() for value in self.values.values()),
            tuned_layers=len(layers),
            before=self.container.sizes(),
            after=container.sizes(),
            seconds=time.monotonic() - self.started,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def _train(self, folder: Path, journal: Journal) -> None:
        if "block" in self.settings.phases:
            self._tune_blocks(folder, journal)
        if "model" in self.settings.phases:
            self._tune_model(folder, journal)

    @property
    def _cached(self) -> bool:
        """Whether decoded weights of the whole model fit beside everything else."""
        return fits_in_memory(4 * self.stored.num_weights)

    def _tune_blocks(self, folder: Path, journal: Journal) -> None:
        assert self.skeleton is not None and self.text is not None
        started = time.monotonic()
        result = tune_blocks(
            self.skeleton,
            self.stored,
            self.wish,
            self.settings.schedule("block"),
            self.text,
            folder=folder,
            journal=journal,
            meter=self.progress,
            team=self.team,
            seed=self.settings.seed,
        )
        worse = result.divergence_after > result.divergence_before
        if not worse:
            self.values = result.values
        self.phases.append(_block_phase(result, worse, time.monotonic() - started))
        gc.collect()

    def _tune_model(self, folder: Path, journal: Journal) -> None:
        started = time.monotonic()
        model, trained = self._student()
        trained.assign(self.values)
        objective = self._objective(model, trained)
        notes = []
        if isinstance(objective, TaskTuning):
            notes.append(f"accuracy {objective.accuracy():.3f}")
        outcome = train(
            objective,
            self.settings.schedule("model"),
            state=folder / "model.safetensors",
            journal=journal,
            meter=self.progress,
            team=self.team,
        )
        if isinstance(objective, TaskTuning):
            with trained.as_stored():
                notes[0] += f" -> {objective.accuracy():.3f}"
        if outcome.values:
            self.values = outcome.values
        self.phases.append(_model_phase(outcome, objective, notes, time.monotonic() - started))
        if isinstance(objective, Distillation):
            objective.teacher.close()

    def _student(self) -> tuple[Any, Trained]:
        model = load(self.container.directory, torch.float32, verify=False)
        layers = self.stored.layers()
        placed = replace_layers(model, layers, self.wish, self.settings.seed, self._cached)
        norms = norm_weights(model) if "norms" in self.wish else {}
        wanted = {name: norms[name] for name in self.stored.norm_names if name in norms}
        trained = Trained(placed, wanted, self.stored.norm_dtypes)
        if self.settings.checkpointing:
            checkpoint_blocks(model, list(model.get_submodule(self.stored.blocks_name)))
        return model.to(self.device), trained

    def _objective(self, model: Any, trained: Trained) -> Objective:
        fields = self.settings.fields()
        if fields is not None:
            examples = read_examples(
                Path(self.settings.dataset), fields, self.tokenizer, self.settings.seqlen
            )
            return TaskTuning(
                model, trained, examples, self.settings.batch_size, self.settings.seed
            )
        assert self.text is not None
        if self.settings.loss == "task":
            return LanguageModelling(model, trained, self.text)
        assert self.skeleton is not None
        return Distillation(model, trained, Teacher(self.skeleton, self.text), self.text)

    def _record(self) -> dict[str, Any]:
        """What the report keeps of this run; nothing that depends on the machine."""
        text = self.text
        return {
            "scope": self.settings.scope,
            "trained": list(self.wish.parts),
            "phases": [
                {"name": p.name, "loss": p.loss, "before": p.before, "after": p.after,
                 "steps": p.steps, "note": p.note}
                for p in self.phases
            ],
            "validation_tokens": 0 if text is None else text.validation_tokens.numel(),
        }  # fmt: skip


def _block_phase(result: BlockResult, worse: bool, seconds: float) -> Phase:
    stopped = [o.stopped for o in result.outcomes if "loss" in o.stopped]
    dropped = worse or not result.values
    notes = ["dropped: the model became worse"] if worse else []
    return Phase(
        "blocks",
        "KL",
        result.divergence_before,
        result.divergence_before if dropped else result.divergence_after,
        sum(outcome.steps for outcome in result.outcomes),
        seconds,
        peak_memory_bytes(),
        "; ".join(notes + stopped),
    )


def _model_phase(outcome: Outcome, objective: Objective, notes: list[str], seconds: float) -> Phase:
    loss = "KL" if isinstance(objective, Distillation) else "task loss"
    stopped = [outcome.stopped] if outcome.stopped else []
    return Phase(
        "model",
        loss,
        outcome.first,
        outcome.best,
        outcome.steps,
        seconds,
        peak_memory_bytes(),
        "; ".join(stopped + notes),
    )
