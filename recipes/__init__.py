"""Installed as petra_zoo.recipes: YAML files, one folder per data set; see `petra_zoo.settings.recipe_files`."""
