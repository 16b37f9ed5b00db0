"""Installed as petra_zoo.recipes: YAML files, one folder per data set; see `petra_zoo.training.recipe`."""
