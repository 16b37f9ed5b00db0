"""What a run is told: recipes and the files they stand in. Imports no torch."""
