"""`cast-kernels predict --cuda`: what CUDA C++ kernels of B-CAST would take, by a model that is older than they are.

`arithmetic` is the model, `design` what a kernel takes of a multiprocessor, `rows`, `attention` and `launches` what a
launch moves and computes, `built` the same of csrc/cuda, `triton` Triton's launches by the same terms, `report` and
`tables` what is said.
"""
