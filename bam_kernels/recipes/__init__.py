"""Training and evaluation: the paper's recipes, and small ones that run anywhere.

``python -m bam_kernels train``, ``evaluate`` and ``study`` call what is here.
"""

from bam_kernels.recipes.errors import DivergedError, RecipeError
from bam_kernels.recipes.recipe import RECIPES, Recipe

__all__ = ["RECIPES", "DivergedError", "Recipe", "RecipeError"]
