"""What the tests share: models, graphs, artifacts, oracles."""
