"""Names that one module has had in different releases of transformers.

Vision-language models were stored as `language_model.model.layers.0...`, `vision_tower...` and
`multi_modal_projector...`; since release 4.52 their modules are `model.language_model.layers.0...`
and so on, while files keep the old names. Files of statistics were keyed by either, with and
without `.weight`, some with a further `language_model.` in front.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

# (prefix of the module now, prefix in files and in older releases)
RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def aliases(name: str) -> Iterator[str]:
    """The name itself, then its other names, old and new, nearest first.

    Two renamings may have come one after the other, so aliases of aliases follow.
    """
    seen = [name]
    yield name
    for known in (name, *_renamed(name)):
        for other in _renamed(known):
            if other not in seen:
                seen.append(other)
                yield other


def _renamed(name: str) -> list[str]:
    found = []
    for new, old in RENAMED:
        if name.startswith(new):
            found.append(old + name.removeprefix(new))
        if name.startswith(old):
            found.append(new + name.removeprefix(old))
    # Keys that a script made by putting "language_model." before every name.
    if name.startswith("language_model."):
        found.append(name.removeprefix("language_model."))
    return found


def known_alias(name: str, known: Container[str]) -> str | None:
    """The first alias of `name`, with or without `.weight`, that is in `known`."""
    bare = name.removesuffix(".weight")
    for alias in aliases(bare):
        for candidate in (alias, f"{alias}.weight"):
            if candidate in known:
                return candidate
    return None
