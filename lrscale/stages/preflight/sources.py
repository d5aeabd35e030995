"""Where a recipe's model comes from and how large it is, or the finding that says why that cannot be told."""

from __future__ import annotations

from lrscale.config.diagnosis import Check
from lrscale.config.recipe import Recipe
from lrscale.parallel.loading import checked_source
from lrscale.stages.preflight.model_size import ModelSize, measure


def source_of(recipe: Recipe) -> str | Check:
    """What transformers is given for the model, its configuration and tokenizer loaded once."""
    try:
        # On whatever device there is: a login node has no GPU.
        return checked_source(recipe.model.model_copy(update={"device": "auto"}), recipe.projector)[0]
    except ValueError as error:
        needed = "a model that transformers can load, with its tokenizer"
        return Check("model", "failed", str(error), needed=needed, help="mend model.path or its folder")


def size_of(recipe: Recipe, source: str) -> ModelSize | Check:
    """The size of the model, from its configuration alone."""
    try:
        return measure(recipe, source)
    except (ValueError, OSError, AttributeError) as error:
        return Check("disk", "not checked", f"the size of the model cannot be told: {str(error).splitlines()[0]}")
