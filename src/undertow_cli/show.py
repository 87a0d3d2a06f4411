"""`undertow show`: what a recipe or a run computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undertow_cli.console import Device, Overrides, Target, out, quiet


def show(
    target: Target,
    overrides: Overrides = [],  # noqa: B006 (typer reads the default, nobody changes it)
    svg: Annotated[Path | None, typer.Option("--svg", help="Also draw the plan into this file.")] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also what a training row keeps for its backward, under each schedule.")
    ] = False,
    lens: Annotated[
        str | None, typer.Option("--lens", metavar="TEXT", help="Instead: what each visit and sweep says on a text.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Show the plan as a picture, parameters, layer evaluations, and FLOPs (of text, per schedule)."""
    from undertow import recipe

    quiet()
    if lens is not None:
        from undertow.analysis.reading import of_text

        out.print(of_text(target, lens, overrides, device))
        return
    chosen = recipe.load_any(target, overrides)
    if not isinstance(chosen, recipe.Recipe):
        from undertow.trm.show import render as render_puzzles

        if svg is not None:
            raise ValueError("--svg: draws models of text; this recipe is of puzzles")
        out.print(render_puzzles(chosen))
        return
    from undertow.analysis.show import render

    out.print(render(chosen, memory=memory))
    if svg is not None:
        from undertow.analysis.drawing import svg as drawn

        svg.write_text(drawn(chosen), encoding="utf-8")
        out.print(f"The plan is drawn in {svg}", soft_wrap=True)
