"""`undertow show`: what a recipe or a run computes."""

from __future__ import annotations

from undertow.cli.console import Overrides, Target, out, quiet


def show(target: Target, overrides: Overrides = []) -> None:  # noqa: B006 (typer reads the default, nobody changes it)
    """Show the plan as a picture, parameters, layer evaluations, and FLOPs (of text, per schedule)."""
    from undertow import recipe

    chosen = recipe.load_any(target, overrides)
    quiet()
    if isinstance(chosen, recipe.Recipe):
        from undertow.analysis.show import render

        out.print(render(chosen))
    else:
        from undertow.trm.show import render as render_puzzles

        out.print(render_puzzles(chosen))
