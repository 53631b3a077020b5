"""nn.Modules over the ops, with the parameter names of the published checkpoints."""
