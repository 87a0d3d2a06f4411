"""How each model family is seen as `embed -> layers -> norm -> head`."""

from undertow.backbone.adapter import Backbone, Shape, tapped
from undertow.backbone.families import FAMILIES, Family, Tap, family_of

__all__ = ["FAMILIES", "Backbone", "Family", "Shape", "Tap", "family_of", "tapped"]
