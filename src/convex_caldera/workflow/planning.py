"""From settings and shapes to a plan: a recipe for every layer, within the budget, to the byte.

A plan is made before any weight is read. Its size is that of the very files that will be
written: the compressed shards with their headers (for a budget in bits per weight), and those
plus everything kept as it was (for a budget in bytes).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol, TypeVar

from convex_caldera.core.recipe import Recipe
from convex_caldera.errors import InfeasibleBudgetError, ModelError, RecipeError
from convex_caldera.models.embeddings import EmbeddingSite
from convex_caldera.models.patterns import match, select
from convex_caldera.recipes.embedding import embedding_recipe
from convex_caldera.recipes.guided import guided_recipe
from convex_caldera.recipes.ladder import Method, Wishes
from convex_caldera.recipes.scl import entropy_coded
from convex_caldera.recipes.table import method as method_of
from convex_caldera.storage.codec import recipe_layout
from convex_caldera.storage.layers import LayerEntry, planned_shard_bytes
from convex_caldera.workflow.fill import Rungs, fill_uniformly
from convex_caldera.workflow.settings import Settings, parse_menu, parse_ratio, parse_size


class NamedMatrix(Protocol):
    """What planning needs of a linear layer."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...


class TiedMatrix(NamedMatrix, Protocol):
    """A layer with its place: block and kind."""

    @property
    def block(self) -> int: ...

    @property
    def kind(self) -> str: ...


S = TypeVar("S", bound=NamedMatrix)

CODEBOOK_WISHES = ("code_bits", "block_size", "num_iters", "sample_size", "clip_ratio")
# Two wishes that differ in one key: a method that answers both alike does not know the key.
_TELLING = {
    "rank": (Wishes(rank=0), Wishes(rank=1)),
    "group_size": (Wishes(group_size=8), Wishes(group_size=16)),
    "format": (Wishes(format="mxint4"), Wishes(format="int4")),
    "factor_format": (
        Wishes(rank=1, factor_format="mxint8"),
        Wishes(rank=1, factor_format="int8"),
    ),
    "factor_bits": (Wishes(rank=1, factor_bits=2), Wishes(rank=1, factor_bits=4)),
    "bucket": (Wishes(bucket=1), Wishes(bucket=2)),
    "latent": (Wishes(latent="vq"), Wishes(latent="nf")),
    "order": (Wishes(order="none"), Wishes(order="strip")),
    "code_bits": (Wishes(code_bits=1), Wishes(code_bits=2)),
    "block_size": (Wishes(block_size=1), Wishes(block_size=2)),
    "num_iters": (Wishes(num_iters=1), Wishes(num_iters=2)),
    "sample_size": (Wishes(sample_size=1), Wishes(sample_size=2)),
    "clip_ratio": (Wishes(clip_ratio=0.5), Wishes(clip_ratio=0.75)),
    "neural": (Wishes(neural=("epochs=1",)), Wishes(neural=("epochs=2",))),
}


@dataclass(frozen=True)
class Budget:
    """Bytes that the compressed shards may take, and how the user put it.

    `kept_bytes` are those of the other weight files, for a budget that counts them too.
    """

    compressed_bytes: int
    wording: str
    kept_bytes: int | None = None

    def wish_for(self, compressed_bytes: int, weights: int) -> str:
        """The option that allows so many bytes of compressed shards."""
        if self.kept_bytes is not None:
            return f"--size {compressed_bytes + self.kept_bytes}"
        return f"--bits {math.ceil(80_000 * compressed_bytes / weights) / 10_000:g}"


@dataclass(frozen=True)
class Plan:
    """A recipe for every layer.

    `compressed_bytes` is the exact size of the shards that will hold them, headers included.
    """

    recipes: dict[str, Recipe]
    shapes: dict[str, tuple[int, int]]
    compressed_bytes: int
    budget: Budget | None

    @property
    def weights(self) -> int:
        return sum(m * n for m, n in self.shapes.values())

    @property
    def bits_per_compressed_weight(self) -> float:
        return 8 * self.compressed_bytes / self.weights

    def layer_bits(self, name: str) -> float:
        """Stored bits per weight of one layer, without its share of the file header."""
        return 8 * layer_bytes(self.recipes[name], self.shapes[name]) / math.prod(self.shapes[name])


def chosen_sites(sites: Sequence[S], ignore: Iterable[str]) -> tuple[S, ...]:
    """The layers to compress.

    Raises:
        ModelError: there are none, or all are ignored.
        RecipeError: a pattern that fits no layer.
    """
    if not sites:
        raise ModelError("the decoder blocks have no linear layers to compress")
    ignored = set(select(ignore, [site.name for site in sites]))
    kept = tuple(site for site in sites if site.name not in ignored)
    if not kept:
        raise ModelError("every linear layer is ignored; nothing to compress")
    return kept


def fixed_budget(settings: Settings, sites: Sequence[NamedMatrix], method: Method) -> Budget | None:
    """What all layers take where no budget is given and formats and ranks leave no choice."""
    if (settings.bits, settings.size, settings.ratio) != (None, None, None) or method.allocates:
        return None
    check_wishes(sites, method, settings)
    ladders = {site.name: ladder_of(site, method, settings) for site in sites}
    if any(len(ladder) != 1 for ladder in ladders.values()):
        return None
    alone = {name: ladder[0] for name, ladder in ladders.items()}
    recipes = shared(alone, sites, method, settings)
    size = planned_bytes(recipes, {site.name: site.shape for site in sites})
    return Budget(size, "the formats given")


def make_budget(settings: Settings, weights: int, rest_bytes: int, original_bytes: int) -> Budget:
    """The user's budget as bytes of the compressed shards.

    Args:
        weights: number of weights to compress.
        rest_bytes: file bytes of everything that is kept as it is.
        original_bytes: weight-file bytes of the original model.

    It is below zero where a byte budget is less than what is kept takes.
    """
    if settings.size is None and settings.ratio is None:
        bits = settings.bits_or_default  # as it was typed: 2.2 is 22/10, not the double nearby
        exact = Fraction(repr(bits)) * weights / 8
        return Budget(math.floor(exact), f"{bits:g} bits per compressed weight")
    if settings.size is not None:
        total, wording = parse_size(settings.size), f"{settings.size} of weight files"
    else:
        ratio = settings.ratio or ""
        total, wording = int(original_bytes / parse_ratio(ratio)), f"{ratio} smaller weight files"
    return Budget(total - rest_bytes, wording, rest_bytes)


def wishes_of(settings: Settings, name: str) -> Wishes:
    """What the user fixed for one layer: the options, overridden by the first pin that fits."""
    wishes = Wishes(
        settings.rank,
        settings.factor_bits or method_of(settings.method).factor_bits,
        settings.group_size,
        format=settings.format,
        factor_format=settings.factor_format,
        bucket=settings.bucket,
        latent=settings.latent,
        order=settings.order,
        neural=settings.neural,
        **{key: getattr(settings, key) for key in CODEBOOK_WISHES},
    )
    for pin in settings.pin:
        pattern, pinned = parse_pin(pin)
        if match((pattern,), name):
            return dataclasses.replace(wishes, **pinned)
    return wishes


def check_wishes(sites: Sequence[NamedMatrix], method: Method, settings: Settings) -> None:
    """Refuse what would be ignored in silence.

    Raises:
        RecipeError: a pin that fits no layer, or a wish that the method's recipes know nothing of.
    """
    pins = [parse_pin(pin) for pin in settings.pin]
    names = [site.name for site in sites]
    for pattern, _ in pins:
        select((pattern,), names)
    if settings.coder is not None and method.allocates:
        raise RecipeError(f"{method.name} counts its codes before they are coded; leave out coder")
    for key in ("tie", "bits_menu", "rank_menu"):
        if getattr(settings, key) and not method.allocates:
            raise RecipeError(f"{method.name} allocates nothing; leave out {key.replace('_', ' ')}")
        if key != "tie" and getattr(settings, key) and method.menu is not None:
            raise RecipeError(
                f"{method.name} has a menu of its own; leave out {key.replace('_', ' ')}"
            )
    given = {key for _, pinned in pins for key in pinned}
    optional = (
        "rank",
        "factor_bits",
        "group_size",
        "format",
        "factor_format",
        "bucket",
        "latent",
        "order",
    )
    optional += CODEBOOK_WISHES
    given |= {key for key in optional if getattr(settings, key) is not None}
    given |= {"neural"} if settings.neural else set()
    for key in sorted(given & set(_TELLING)):
        one, other = _TELLING[key]
        if method.ladder(sites[0].shape, one) == method.ladder(sites[0].shape, other):
            raise RecipeError(f"{method.name} has no {key.replace('_', ' ')}; leave the option out")


def parse_pin(pin: str) -> tuple[str, dict[str, int]]:
    """("q_proj", {"bits": 4, "rank": 0}) of "q_proj=bits:4,rank:0".

    Raises:
        RecipeError: another form, or an unknown key.
    """
    pattern, equals, body = pin.rpartition("=")
    pairs = [part.partition(":") for part in body.split(",")]
    keys = {"bits": "bits", "rank": "rank", "factor_bits": "factor_bits", "group": "group_size"}
    wrong = [key for key, _, value in pairs if key not in keys or not value.strip().isdigit()]
    twice = len({key for key, _, _ in pairs}) < len(pairs)
    if not equals or not pattern or wrong or twice:
        raise RecipeError(
            f"pin {pin!r} must read pattern=key:number,... with keys {', '.join(keys)}, each once"
        )
    return pattern, {keys[key]: int(value) for key, _, value in pairs}


def ties_of(ties: Sequence[str], sites: Sequence[TiedMatrix]) -> tuple[tuple[str, ...], ...]:
    """Layers that must share a format: "q_proj,k_proj,v_proj" ties those kinds in each block.

    Raises:
        RecipeError: a kind that no block has or that is in two ties, or a tie of one.
    """
    groups = []
    tied = [kind.strip() for tie in ties for kind in tie.split(",") if kind.strip()]
    twice = sorted({kind for kind in tied if tied.count(kind) > 1})
    if twice:
        raise RecipeError(f"{twice[0]} is tied twice; join the ties")
    for tie in ties:
        kinds = [kind.strip() for kind in tie.split(",") if kind.strip()]
        unknown = sorted(set(kinds) - {site.kind for site in sites})
        if unknown or len(kinds) < 2:
            raise RecipeError(f"tie {tie!r}: {unknown[0] if unknown else 'one kind'} ties nothing")
        for block in sorted({site.block for site in sites}):
            members = tuple(s.name for s in sites if s.block == block and s.kind in kinds)
            if len(members) > 1:
                groups.append(members)
    return tuple(groups)


def check_ties(settings: Settings, sites: Sequence[TiedMatrix]) -> None:
    """Raises RecipeError for ties that cannot be kept: see `ties_of`, or pinned apart."""
    for members in ties_of(settings.tie, sites):
        first, *others = (wishes_of(settings, name) for name in members)
        if any(wishes != first for wishes in others):
            raise RecipeError(f"{', '.join(members)} are tied but pinned differently")


def uniform_plan(
    sites: Sequence[NamedMatrix], method: Method, settings: Settings, budget: Budget
) -> Plan:
    """The method's ladder for each layer, filled uniformly (`workflow.fill`).

    Raises:
        InfeasibleBudgetError: with the least feasible budget and the pins.
        RecipeError: a wish that fits no layer, or that the method cannot obey.
    """
    check_wishes(sites, method, settings)
    ladders = {site.name: ladder_of(site, method, settings) for site in sites}
    shapes = {site.name: site.shape for site in sites}
    rungs = [
        Rungs(name, math.prod(shapes[name]), tuple(layer_bytes(r, shapes[name]) for r in ladder))
        for name, ladder in ladders.items()
    ]

    def recipes(choice: Mapping[str, int]) -> dict[str, Recipe]:
        alone = {name: ladders[name][choice[name]] for name in ladders}
        return shared(alone, sites, method, settings)

    def measure(choice: Mapping[str, int]) -> int:
        return planned_bytes(recipes(choice), shapes)

    weights = sum(math.prod(shape) for shape in shapes.values())
    with _saying_what_is_feasible(settings, budget, weights):
        choice = fill_uniformly(rungs, budget.compressed_bytes, measure)
    return Plan(recipes(choice), shapes, measure(choice), budget)


def shared(
    recipes: Mapping[str, Recipe],
    sites: Sequence[NamedMatrix],
    method: Method,
    settings: Settings,
) -> dict[str, Recipe]:
    """The recipes with what the method trains for several layers shared among them.

    Embeddings keep what is their own: they are decoded when a model is loaded, and gone then.
    """
    if method.share is None:
        return dict(recipes)
    alone = {site.name for site in sites if isinstance(site, EmbeddingSite)}
    layers = {name: recipe for name, recipe in recipes.items() if name not in alone}
    found = method.share(layers, settings.neural) if layers else {}
    return {name: found.get(name, recipe) for name, recipe in recipes.items()}


def planned_bytes(recipes: Mapping[str, Recipe], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Exact bytes of the compressed shards of these layers."""
    return planned_shard_bytes(
        LayerEntry(name, *layout_of(recipe, shapes[name])) for name, recipe in recipes.items()
    )


def layer_bytes(recipe: Recipe, shape: tuple[int, int]) -> int:
    """Bytes of one layer's tensors, before file headers."""
    _, layout = layout_of(recipe, shape)
    return sum(math.prod(size) * dtype.itemsize for dtype, size in layout.values())


@lru_cache(maxsize=65536)
def layout_of(recipe: Recipe, shape: tuple[int, int]):  # type: ignore[no-untyped-def]
    return recipe_layout(recipe, shape)


def ladder_of(site: NamedMatrix, method: Method, settings: Settings) -> list[Recipe]:
    """A layer's recipes by rising size; of two with one size the later is kept."""
    wishes = wishes_of(settings, site.name)
    if settings.rank_menu is not None and wishes.rank is None:
        wishes = dataclasses.replace(wishes, rank=int(parse_menu(settings.rank_menu)[0]))
    if settings.bits_menu is not None and wishes.bits is None:
        menu = [dataclasses.replace(wishes, bits=bits) for bits in parse_menu(settings.bits_menu)]
    else:
        menu = [wishes]
    recipes = [recipe for wish in menu for recipe in method.ladder(site.shape, wish)]
    if isinstance(site, EmbeddingSite):
        recipes = [embedding_recipe(recipe) for recipe in recipes]
    elif settings.curvature == "guided":
        recipes = [guided_recipe(recipe, site.shape) for recipe in recipes]
    if settings.coder is not None:
        recipes = [entropy_coded(recipe, settings.coder) for recipe in recipes]
    by_size: dict[int, Recipe] = {layer_bytes(r, site.shape): r for r in recipes}
    return [by_size[size] for size in sorted(by_size)]


@contextmanager
def _saying_what_is_feasible(settings: Settings, budget: Budget, weights: int) -> Iterator[None]:
    """Puts an infeasible budget in the user's terms: what to ask for, which pins weigh on it."""
    try:
        yield
    except InfeasibleBudgetError as error:
        least = (error.least_bits or 0) // 8
        kept = f", beside {budget.kept_bytes} of what is kept" if budget.kept_bytes else ""
        pins = f"; pins: {', '.join(settings.pin)}" if settings.pin else ""
        message = (
            f"{budget.wording} leave {max(budget.compressed_bytes, 0)} bytes to the compressed "
            f"layers, which is below the least feasible {least}{kept}; "
            f"ask for {budget.wish_for(least, weights)}{pins}"
        )
        raise InfeasibleBudgetError(message, error.least_bits) from error
