"""Samples: from a path to arrays that fit a model's inputs."""
