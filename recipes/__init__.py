"""One file, one complete recipe: each defines `recipe`, a `engine.recipe.Recipe`."""
