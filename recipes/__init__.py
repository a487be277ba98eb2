"""Complete training recipes. Each file defines `recipe`, an `engine.recipe.Recipe`."""
