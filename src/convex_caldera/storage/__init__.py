"""Layers <-> files: the container of docs/format.md, resumable runs, plain exports."""

from convex_caldera.storage.card import CardFacts as CardFacts
from convex_caldera.storage.card import inherited_license as inherited_license
from convex_caldera.storage.codec import layer_from_tensors as layer_from_tensors
from convex_caldera.storage.codec import layer_to_tensors as layer_to_tensors
from convex_caldera.storage.codec import recipe_layout as recipe_layout
from convex_caldera.storage.export import export_dense as export_dense
from convex_caldera.storage.files import require_free_space as require_free_space
from convex_caldera.storage.layers import FORMAT_VERSION as FORMAT_VERSION
from convex_caldera.storage.layers import LayerEntry as LayerEntry
from convex_caldera.storage.layers import planned_shard_bytes as planned_shard_bytes
from convex_caldera.storage.manifest import add_file as add_file
from convex_caldera.storage.partial import PartialRun as PartialRun
from convex_caldera.storage.read import Container as Container
from convex_caldera.storage.read import Sizes as Sizes
from convex_caldera.storage.read import open_container as open_container
from convex_caldera.storage.read import read_layers as read_layers
from convex_caldera.storage.source import SourceModel as SourceModel
from convex_caldera.storage.write import assemble as assemble
from convex_caldera.storage.write import provenance_record as provenance_record
