"""A name to a model: the folder, here or from the hub, its config, its headers, its weights."""
