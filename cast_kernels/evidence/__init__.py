"""What can be shown of the GPU kernels without a GPU: compiled for each architecture, executed in emulation.

Nothing here is needed to run the library; `cast-kernels compile` and `cast-kernels emulate` are its commands.
"""
