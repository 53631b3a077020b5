"""Foreign checkpoints: read them without running their code, and rename their tensors.

Nothing here knows the model. `source` reads files, `clip` and `videomae` translate the experts' layouts,
`official` infers a configuration from the shapes of a CAST checkpoint, `assign` checks and copies.
"""
