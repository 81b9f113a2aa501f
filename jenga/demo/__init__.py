"""Small models, made on the spot, whose layers differ the way large ones do."""
