"""What every job stands on: files, processes, optional packages, the way to the GPU. Nothing here knows a model."""
