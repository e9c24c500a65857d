"""Groups of options: a command's signature has their fields, the command gets the groups."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer

from convex_caldera.cli import groups
from convex_caldera.cli.groups import spelled_out
from convex_caldera.workflow.settings import Settings


@dataclass(frozen=True)
class Window:
    width: Annotated[int, typer.Option()] = 3
    names: Annotated[list[str] | None, typer.Option("--name")] = None


def test_fields_take_the_place_of_their_group_and_come_back_in_it() -> None:
    seen: list[Any] = []

    def command(first: str, window: Window, last: bool = False) -> None:
        """What it does."""
        seen.append((first, window, last))

    found = spelled_out(command)
    signature = inspect.signature(found)
    assert list(signature.parameters) == ["first", "width", "names", "last"]
    assert signature.parameters["width"].default == 3
    assert found.__doc__ == "What it does." and found.__name__ == "command"

    app = typer.Typer()
    app.command()(found)
    typer.main.get_command(app)(
        ["x", "--width", "5", "--name", "a", "--last"], standalone_mode=False
    )
    assert seen == [("x", Window(5, ["a"]), True)]


@pytest.mark.parametrize(
    "group",
    [
        groups.RecipeOptions,
        groups.CalibrationOptions,
        groups.LayerOptions,
        groups.CurvatureOptions,
    ],
)
def test_every_field_is_a_setting(group: type) -> None:
    assert {field.name for field in fields(group)} <= set(Settings.model_fields)
