"""Everything between the YAML file and the model: configuration, data, engine, metrics and tracking."""
