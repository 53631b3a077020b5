"""How long a kernel takes at least, without a GPU: what it executes, what it takes of a multiprocessor, and a roofline.

`trace` follows the control flow of a parsed kernel, `resources` reads its machine code, `devices` has the GPUs'
constants, and `model` makes a lower bound of them. Predicted, never measured.
"""
