"""How much memory a training needs, calculated before any weight is read."""
