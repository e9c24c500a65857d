"""A model whose parameters are loaded and freed by part: real buffers, meta parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from convex_caldera.errors import ModelError, NumericalError
from convex_caldera.linalg.finite import all_finite
from convex_caldera.models.architectures import auto_class, reads_images
from convex_caldera.models.checkpoint import Checkpoint
from convex_caldera.models.embeddings import EmbeddingSite, find_embeddings
from convex_caldera.models.image_parts import ImageParts, Module, find_image_parts, of_modules
from convex_caldera.models.meta import load_config, meta_model
from convex_caldera.models.names import map_names, needs_conversion
from convex_caldera.models.parameters import Slot, answer_to, slots
from convex_caldera.models.sites import Site, Structure, find_structure


class Skeleton:
    """A causal language model on disk, loaded and freed module by module.

    Args:
        path: directory with config.json and safetensors weights.
        dtype: of all computation; parameters are converted when loaded.
        device: where loaded parameters and all buffers live.

    Attributes:
        model: the transformers model, in evaluation mode, parameters on the meta device.
        checkpoint: its weights on disk.
        names: parameter -> name in the checkpoint; tied parameters have the same one, and
            parameters that exist after conversion only (see `whole_model`) have none.
        unused: tensors of the checkpoint that no parameter asks for.
        whole_model: True if transformers converts this checkpoint on loading, so that the whole
            model is held in memory instead of one block; reports must say so.

    Raises:
        ModelError: no architecture known here, already quantized, or weights missing or of
            other shapes than the configuration says.
        FormatError: damaged weight files.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        config = load_config(path)
        quantized = getattr(config, "quantization_config", None)
        if quantized:
            method = dict(quantized).get("quant_method", "an unknown method")
            raise ModelError(f"{path} is quantized already ({method}); give the original model")
        self.path = path
        self.dtype = dtype
        self.device = torch.device(device)
        self.model = meta_model(config, dtype)
        self.checkpoint = Checkpoint(path)
        self._read_names()
        self._live: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()
        self._place_buffers()

    @cached_property
    def structure(self) -> Structure:
        """Decoder blocks, linear layers and shared inputs, under their names in the checkpoint."""
        found = find_structure(self.model)
        if reads_images(self.model.config):  # asked before the model answers to other names
            self._decoder = self.model.get_decoder()  # type: ignore[operator]
        return self._named_as_stored(found)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.structure.sites

    @cached_property
    def embeddings(self) -> tuple[EmbeddingSite, ...]:
        """Input embedding and output head, under their names in the checkpoint; one if tied.

        Raises:
            ModelError: one of them is no tensor of the checkpoint.
        """
        found = find_embeddings(self.model, self.names, self.checkpoint)
        for site in found:
            self._sources.setdefault(
                f"{site.name}.weight", self._sources[f"{site.parameter}.weight"]
            )
        return found

    @cached_property
    def image_parts(self) -> ImageParts:
        """Tower and projector under their names in the checkpoint; ModelError if there are none."""
        if not reads_images(self.model.config):
            raise ModelError(
                f"{type(self.model).__name__} reads no images: it has no tower and no projector; "
                "leave out --modules"
            )
        blocks = len(self.structure.blocks)
        found = find_image_parts(self.model, self._decoder, blocks)
        stored = {site.name: self._stored_layer(site.name) for site in found}
        self._own_names = {name: own for own, name in stored.items()}
        self._sources |= {
            f"{name}.weight": self._sources[f"{own}.weight"] for own, name in stored.items()
        }

        def renamed(site: Site) -> Site:
            return replace(site, name=stored[site.name], input_site=stored[site.input_site])

        return ImageParts(tuple(map(renamed, found.tower)), tuple(map(renamed, found.projector)))

    def sites_of(self, modules: Collection[Module]) -> tuple[Site, ...]:
        """The layers of some parts of the model: language model, vision tower, projector.

        Raises:
            ModelError: tower or projector of a model that has none.
        """
        only_text = set(modules) <= {"language"}
        return of_modules(self.sites, None if only_text else self.image_parts, modules)

    def image_linear(self, site: Site) -> nn.Module:
        """The torch layer of a site of tower or projector."""
        return self.model.get_submodule(self._own_names[site.name])

    @property
    def tied_head(self) -> bool:
        """Whether the output head is the embedding: one matrix with two uses."""
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        by_owner = {slot.owner: slot.name for slot in slots(self.model) if slot.key == "weight"}
        if head is None or head not in by_owner:
            return False
        return self._sources[by_owner[head]] == self._sources[by_owner[embedding]]

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        """The module `name` with its real weights, freed at the end of the context.

        Raises:
            NumericalError: a weight has NaN or infinite entries; the message names it.
        """
        module = self.model.get_submodule(name)
        with self._filled(slots(module, name)):
            yield module

    @contextmanager
    def loaded_outside(self, head: bool = True) -> Iterator[nn.Module]:
        """The model with all weights that are not in a decoder block, with or without head."""
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        inside = {id(module) for block in self.structure.blocks for module in block.modules()}
        outside = (slot for slot in slots(self.model) if id(slot.owner) not in inside)
        with self._filled(slot for slot in outside if head or slot.owner is not output):
            yield self.model

    @contextmanager
    def substituted(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Some parameters at other values while the context lasts, in all places that share them.

        All else is loaded and freed as ever.

        Args:
            values: parameter of the model -> what it is meanwhile.
        """
        by_source = {self._sources[name]: value for name, value in values.items()}
        found = [(slot, self._sources.get(slot.name)) for slot in slots(self.model)]
        places = [(slot, slot.parameter, source) for slot, source in found if source in by_source]
        for slot, _, source in places:
            value = by_source[source].to(self.device, self.dtype)
            slot.put(nn.Parameter(value, requires_grad=False))
        try:
            yield
        finally:
            for slot, before, _ in places:
                slot.put(before)

    def tensor(self, name: str) -> Tensor:
        """One parameter as stored, by its name in the model."""
        return self._value(self._sources[name])

    @contextmanager
    def _filled(self, wanted: Iterable[Slot]) -> Iterator[None]:
        filled: list[tuple[Slot, nn.Parameter]] = []
        try:
            for slot in wanted:
                if slot.parameter.is_meta:
                    filled.append((slot, slot.parameter))
                    slot.put(self._parameter(slot.name))
            yield
        finally:
            for slot, meta in filled:
                slot.put(meta)

    def _parameter(self, name: str) -> nn.Parameter:
        """The parameter with data; tied names get one object as long as it lives."""
        source = self._sources[name]
        live = self._live.get(source)
        if live is not None:
            return live
        values = self._value(source).to(self.device, self.dtype)
        if not all_finite(values):
            bad = int((~torch.isfinite(values)).sum())
            raise NumericalError(
                f"{source}: {bad} of {values.numel()} weights are NaN or infinite; "
                "repair the checkpoint"
            )
        parameter = nn.Parameter(values, requires_grad=False)
        self._live[source] = parameter
        return parameter

    def _read_names(self) -> None:
        mapped = map_names(self.model, self.checkpoint)
        self.names, self.unused = mapped.parameters, mapped.unused
        self.whole_model = bool(mapped.missing) or needs_conversion(self.model, self.checkpoint)
        # Where values come from: by default the checkpoint, by its names.
        self._sources, self._buffer_sources = mapped.parameters, mapped.buffers
        self._converted: dict[str, Tensor] | None = None
        if self.whole_model:
            self._converted = _converted_state(self.path)
            first = {t.data_ptr(): name for name, t in reversed(self._converted.items())}
            sources = {name: first[t.data_ptr()] for name, t in self._converted.items()}
            self._sources = {slot.name: sources[slot.name] for slot in slots(self.model)}
            buffers = dict(self.model.named_buffers())
            self._buffer_sources = {name: name for name in self._converted if name in buffers}

    def _stored_layer(self, own: str) -> str:
        """The layer's name in the checkpoint."""
        stored = self.names.get(f"{own}.weight", "")
        if self.whole_model or not stored.endswith(".weight"):
            return own
        return stored.removesuffix(".weight")

    def _named_as_stored(self, structure: Structure) -> Structure:
        """Names as in the checkpoint, where the module list has another place there.

        `model.language_model.layers` of a vision-language model is `language_model.model.layers`
        in its files. Layers are named, chosen and stored as in the files; the model answers to
        both names.
        """
        site = structure.sites[0]
        local = f"{site.name}.weight".removeprefix(structure.blocks_name)
        stored = self._sources[f"{site.name}.weight"]
        if self.whole_model or not stored.endswith(local):
            return structure
        name = stored.removesuffix(local)
        if name == structure.blocks_name:
            return structure
        answer_to(self.model, name, structure.blocks_name)
        self._sources |= {source: source for source in self._sources.values()}
        return structure.renamed(name)

    def _place_buffers(self) -> None:
        for module_name, module in self.model.named_modules():
            for key, buffer in module._buffers.items():
                name = f"{module_name}.{key}" if module_name else key
                if buffer is not None and name in self._buffer_sources:
                    value = self._value(self._buffer_sources[name])
                    module._buffers[key] = value.to(self.device, buffer.dtype)
                elif buffer is not None:
                    module._buffers[key] = buffer.to(self.device)

    def _value(self, source: str) -> Tensor:
        if self._converted is not None:
            return self._converted[source].clone()
        return self.checkpoint.tensor(source)


def _converted_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a model that transformers must convert, loaded at once, as stored types."""
    whole, report = auto_class(load_config(path)).from_pretrained(
        path,
        dtype="auto",
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{path}: the weights have no tensor for {missing[0]} ({len(missing)} missing); "
            "the checkpoint is incomplete or of another architecture"
        )
    return whole.state_dict()
