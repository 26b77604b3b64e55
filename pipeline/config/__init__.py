"""One YAML file, typed and checked: what a run is told."""
