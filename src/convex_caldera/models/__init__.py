"""What a transformer looks like from here: its linear sites, loaded one block at a time."""

from convex_caldera.models.blocks import HiddenStates as HiddenStates
from convex_caldera.models.blocks import iterate_blocks as iterate_blocks
from convex_caldera.models.checkpoint import Checkpoint as Checkpoint
from convex_caldera.models.meta import load_config as load_config
from convex_caldera.models.meta import meta_model as meta_model
from convex_caldera.models.patterns import match as match
from convex_caldera.models.patterns import select as select
from convex_caldera.models.resolve import resolve_model as resolve_model
from convex_caldera.models.sites import Site as Site
from convex_caldera.models.sites import Structure as Structure
from convex_caldera.models.sites import find_structure as find_structure
from convex_caldera.models.skeleton import Skeleton as Skeleton
from convex_caldera.models.tokenizer import load_tokenizer as load_tokenizer
