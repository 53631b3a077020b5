"""Tools of every job: files, processes, optional packages, the way to the GPU. Nothing here knows a model."""
