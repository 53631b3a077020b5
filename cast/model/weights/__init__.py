"""Foreign checkpoints: reading them without running their code, and naming their tensors as ours.

Nothing here knows the model. `source` reads files, `clip` and `videomae` translate the experts' layouts,
`official` infers a configuration from the shapes of a CAST checkpoint, `assign` checks and copies.
"""
