"""Training by recipes: settings, data, the loop, the run directory, evaluation."""
