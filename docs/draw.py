"""Draw the plans on the method pages anew: `python docs/draw.py` (a test holds them to what `undertow show` says).

A page says `<!-- plan: recipes/NAME.yaml -->`; what follows it, up to the end of the code block, is replaced.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- plan: (\S+) -->\n(?:.*?```text\n.*?```\n)?", re.S)


def drawn(page: str) -> str:
    """The page with every plan as `undertow show` draws it now."""
    return BLOCK.sub(lambda found: _block(found[1]), page)


def _block(recipe: str) -> str:
    from undertow.analysis.show import plain
    from undertow.recipe import load

    said = plain(load(ROOT / recipe), width=110)
    picture = "\n".join(line.rstrip() for line in said.split("\n\n")[1].splitlines())  # after the summary
    return f"<!-- plan: {recipe} -->\n`undertow show {recipe}` draws it:\n\n```text\n{picture}\n```\n"


if __name__ == "__main__":
    for path in sorted((ROOT / "docs" / "methods").glob("*.md")):
        path.write_text(drawn(path.read_text(encoding="utf-8")), encoding="utf-8")
